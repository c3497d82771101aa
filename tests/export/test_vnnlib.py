"""The text of a property: what it says exactly, and that it is read back; and what the reader refuses."""

import gzip
import json
import math
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evocert.errors import InputError
from evocert.export.generate_properties import FORMATS, exact_interval, outward, property_text
from evocert.export.vnnlib import read_property

MEAN, STD = ([float(np.float32(value)) for value in values] for values in ((0.1307, 0.5, 0.9), (0.3081, 0.25, 1.7)))
FLOAT32 = st.floats(0, 1, width=32)


def sidecar(shape=(1, 1, 1, 2), classes=3, eps=0.1, vnnlib="1.0", where="folded"):
    channels = shape[1]
    return {
        "name": "toy",
        "data": "digits",
        "input_shape": list(shape),
        "input_units": "some units",
        "num_classes": classes,
        "eps": eps,
        "vnnlib": vnnlib,
        "normalisation": {"where": where, "mean": MEAN[:channels], "std": STD[:channels]},
    }


def image(*pixels, shape=(1, 1, 2)):
    return np.array(pixels, np.float32).reshape(shape)


def read(tmp_path, text):
    (tmp_path / "p.vnnlib").write_text(text)
    return read_property(tmp_path / "p.vnnlib")


def numbers(text, relation):
    """Bounds as they are written, by an expression of their own."""
    found = re.findall(rf"\({relation} X[_\[][\d,\]]+ (-?[\d.]+)\)", text)
    return [Fraction(number) for number in found], [float(number) for number in found]


BODY_1_0 = """
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
(declare-const Y_2 Real)

(assert (>= X_0 0.0))
(assert (<= X_0 0.25))
(assert (>= X_1 0.25))
(assert (<= X_1 0.75))

(assert (or
  (and (<= Y_1 Y_0))
  (and (<= Y_1 Y_2))
))
"""
BODY_2_0 = """
(declare-network N
  (declare-input X float32 [1,1,1,2])
  (declare-output Y float32 [1,3])
)

(assert (>= X[0,0,0,0] 0.0))
(assert (<= X[0,0,0,0] 0.25))
(assert (>= X[0,0,0,1] 0.25))
(assert (<= X[0,0,0,1] 0.75))

(assert (or
  (and (<= Y[0,1] Y[0,0]))
  (and (<= Y[0,1] Y[0,2]))
))
"""


class TestText:
    @pytest.mark.parametrize(("version", "body"), [("1.0", BODY_1_0), ("2.0", BODY_2_0)])
    def test_by_hand(self, version, body):
        text = property_text(image(0.0, 0.5), 1, 7, sidecar(eps=0.25, vnnlib=version))
        lines = text.splitlines(keepends=True)
        first = lines.pop(0) if version == "2.0" else None
        assert first in (None, "(vnnlib-version <2.0>)\n")
        comments = [line for line in lines if line.startswith(";")]
        assert lines[: len(comments)] == comments
        assert "image 7" in comments[0]
        assert "class 1" in comments[0]
        assert "".join(lines[len(comments) :]) == body
        assert text.isascii()

    @pytest.mark.parametrize("version", FORMATS)
    @pytest.mark.parametrize("where", ["folded", "outside"])
    @pytest.mark.parametrize("eps", [2 / 255, 0.1, 0.0, 1.0])
    def test_the_box_holds_the_exact_one_and_hardly_more(self, tmp_path, version, where, eps):
        shape = (1, 3, 4, 5)
        generator = np.random.default_rng(1)
        pixels = (generator.integers(0, 256, shape[1:]) / np.float32(255)).astype(np.float32)
        pixels[:, 0] = np.array([0, 1, 1e-30, 1 - 2**-24, np.float32(2 / 255)])
        text = property_text(pixels, 2, 0, sidecar(shape, eps=eps, vnnlib=version, where=where))
        found = read(tmp_path, text)
        # In Python's integers alone, and in C-order: channel, row, column.
        exact = []
        for channel in range(3):
            for pixel in pixels[channel].ravel().tolist():
                low, high = max(Fraction(pixel) - Fraction(eps), 0), min(Fraction(pixel) + Fraction(eps), 1)
                mean, std = (Fraction(MEAN[channel]), Fraction(STD[channel])) if where == "outside" else (0, 1)
                exact.append(((low - mean) / std, (high - mean) / std))
        for side, relation, read_back, sign in ((0, ">=", found.lower, 1), (1, "<=", found.upper, -1)):
            written, as_float = numbers(text, relation)
            assert len(written) == math.prod(shape)
            for number, double, again, ends in zip(written, as_float, read_back.tolist(), exact, strict=True):
                slack = 3 * Fraction(math.ulp(float(ends[side]))) if ends[side] else 0
                for value in (number, Fraction(double), Fraction(again)):
                    assert 0 <= sign * (ends[side] - value) <= slack

    @given(FLOAT32, st.floats(0, 1), st.floats(-1, 2, width=32), st.floats(0.0625, 8, width=32))
    @example(0.1, 0.1, 0.0, 1.0)
    def test_outward(self, pixel, eps, mean, std):
        for exact, towards in zip(exact_interval(pixel, eps, mean, std), (-math.inf, math.inf), strict=True):
            text = outward(exact, towards)
            assert re.fullmatch(r"-?\d+\.\d+", text)  # no exponent
            for value in (Fraction(text), Fraction(float(text))):
                assert (value - exact) * (1 if towards > 0 else -1) >= 0

    def test_order_of_the_inputs(self, tmp_path):
        pixels = np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 16
        for version in FORMATS:
            found = read(tmp_path, property_text(pixels, 0, 0, sidecar((1, 3, 2, 2), eps=0.0, vnnlib=version)))
            assert np.array_equal(found.lower * 16, np.arange(12))
            assert np.array_equal(found.upper, found.lower)


class TestReader:
    @pytest.mark.parametrize("version", FORMATS)
    def test_reads_what_is_written(self, tmp_path, version):
        text = property_text(image(0.0, 0.5), 1, 0, sidecar(eps=0.25, vnnlib=version))
        (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
        for found in (read(tmp_path, text), read_property(tmp_path / "p.vnnlib.gz")):
            assert (found.label, found.targets, found.classes, found.version) == (1, (0, 2), 3, version)
            assert found.shape == ((1, 1, 1, 2) if version == "2.0" else None)
            assert (found.lower.tolist(), found.upper.tolist()) == ([0.0, 0.25], [0.25, 0.75])

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("(and (<= Y_1 Y_0))", "(<= Y_1 Y_0)"),
            ("(and (<= Y_1 Y_0))", "(and (>= Y_0 Y_1))"),
            ("(<= X_0 0.25)", "(>= 0.25 X_0)"),
            ("(<= X_0 0.25)", "(<= X_0 2.5e-1)"),
            ("(<= X_0 0.25)", "(<= X_0 (- -.25) ; a quarter)\n)"),
            ("(assert (>= X_1 0.25))\n(assert (<= X_1 0.75))", "(assert(<= X_1 0.75))(assert\n(>= X_1 +0.25))"),
        ],
    )
    def test_other_ways_to_say_the_same(self, tmp_path, before, after):
        assert before in BODY_1_0
        found = read(tmp_path, BODY_1_0.replace(before, after))
        assert (found.label, found.targets, found.lower.tolist(), found.upper.tolist()) == (
            (1, (0, 2), [0.0, 0.25], [0.25, 0.75])
        )

    def test_one_target(self, tmp_path):
        head, _, _ = BODY_1_0.partition("(assert (or")
        assert read(tmp_path, head + "(assert (>= Y_2 Y_1))").targets == (2,)

    def test_numbers_are_rounded_outward(self, tmp_path):
        text = BODY_1_0.replace("X_0 0.0)", "X_0 0.1)").replace("X_0 0.25)", "X_0 0.1)").replace("X_1 0.75", "X_1 0.7")
        found = read(tmp_path, text)
        assert Fraction(found.lower[0]) <= Fraction("0.1") <= Fraction(found.upper[0])
        assert found.lower[0] < found.upper[0] == 0.1
        assert found.upper[1] == np.nextafter(0.7, 1)

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            ("(assert (<= X_1 0.75))", "", ("input 1", "<=")),
            ("(assert (<= X_1 0.75))", "(assert (<= X_0 0.75))", ("line 11", "second")),
            ("(<= X_1 0.75)", "(<= X_1 0.2)", ("input 1", "0.25")),
            ("(<= X_1 0.75)", "(<= X_2 0.75)", ("line 11", "X_2")),
            ("(<= X_1 0.75)", "(<= X_1 X_0)", ("line 11", "number")),
            ("(<= X_1 0.75)", "(< X_1 0.75)", ("line 11", "<=")),
            ("(<= X_1 0.75)", "(<= X_1 nan)", ("line 11", "nan", "finite numbers")),
            ("(<= X_1 0.75)", "(<= X_1 1e999)", ("line 11", "1e999")),
            ("(<= X_1 0.75)", "(<= X_1 1e-99999999999)", ("line 11", "1e-9999")),
            ("(<= X_1 0.75)", "(<= X_1 (+ 0.5 0.25))", ("line 11", "numbers")),
            ("(<= X_1 0.75)", "(<= Y_1 0.75)", ("line 11", "two outputs")),
            ("(<= X_1 0.75)", "", ("line 11", "(assert)")),
            ("(and (<= Y_1 Y_2))", "(and (<= Y_0 Y_2))", ("[0, 1]", "one with others")),
            ("(and (<= Y_1 Y_2))", "(and (<= Y_1 Y_1))", ("one with others",)),
            ("(and (<= Y_1 Y_2))", "(and (<= Y_1 Y_2) (<= Y_1 Y_0))", ("line 13", "and")),
            ("(and (<= Y_1 Y_2))", "(and (<= Y_1 Y_3))", ("line 13", "Y_3")),
            ("(and (<= Y_1 Y_2))", "(and (<= X_1 X_0))", ("line 13", "outputs")),
            ("  (and (<= Y_1 Y_0))\n  (and (<= Y_1 Y_2))\n", "", ("no condition",)),
            ("))\n", "))\n(assert (<= Y_1 Y_2))", ("second condition",)),
            ("))\n", ")\n", ("line", "never closed")),
            ("(declare-const Y_1 Real)\n", "", ("line 5", "Y_2", "Y_1")),
            ("(declare-const X_1 Real)", "(declare-const X_1 Int)", ("line 3", "Int", "Real")),
            ("(declare-const X_1 Real)", "(declare-fun X_1 () Real)", ("line 3", "declare-fun", "declare-const")),
            ("(declare-const X_1 Real)", "(vnnlib-version <2.0>)", ("line 3", "before everything")),
            ("(declare-const X_1 Real)", "()", ("line 3", "()")),
            ("(declare-const X_1 Real)", "X_1", ("line 3", "X_1", "outside")),
            ("(declare-const X_1 Real)", ")", ("line 3", "outside")),
            ("(declare-const X_1 Real)", "(declare-const X_1 [)", ("line 3", "[")),
            ("(declare-const X_1 Real)", "(" * 100_000, ("line 3", "20")),
        ],
    )
    def test_refuses_the_rest(self, tmp_path, before, after, words):
        assert before in BODY_1_0
        refused(tmp_path, BODY_1_0[::-1].replace(before[::-1], after[::-1], 1)[::-1], words)

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            ("<2.0>", "<3.0>", ("line 1", "<2.0>")),
            ("(declare-output Y float32 [1,3])", "", ("line 3", "declare-output")),
            ("(declare-output Y float32 [1,3])", "((a) Y float32 [1,3])", ("line 3", "declare-output")),
            ("(declare-output Y float32 [1,3])", "(declare-output Y (a) [1,3])", ("line 3", "declare-output")),
            ("(declare-output Y float32 [1,3])", "(declare-output Y int8 [1,3])", ("line 3", "declare-output")),
            ("(declare-output Y float32 [1,3])", "(declare-output Y float32 [1,0])", ("line 3", "[1,0]", "Y")),
            ("(declare-output Y float32 [1,3])", "(declare-output Y float32 (a))", ("line 3", "'a'", "Y")),
            ("X[0,0,0,1] 0.25", "X[0,0,0,2] 0.25", ("line 10", "X[0,0,0,2]")),
            ("X[0,0,0,1] 0.25", "X[0,0,1] 0.25", ("line 10", "X[0,0,1]")),
            ("X[0,0,0,1] 0.25", "X_1 0.25", ("line 10", "X_1")),
            ("(assert (>= X[0,0,0,1] 0.25))", "(declare-const X_0 Real)", ("line 10", "1.0")),
        ],
    )
    def test_refuses_the_rest_in_2_0(self, tmp_path, before, after, words):
        text = "(vnnlib-version <2.0>)\n" + BODY_2_0.lstrip()
        text = text.replace("\n", "\n;\n", 1)
        assert before in text
        refused(tmp_path, text.replace(before, after, 1), words)

    def test_files_that_cannot_be_read(self, tmp_path):
        (tmp_path / "p.vnnlib").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(BODY_1_0.encode())[:-9])
        for name in ("absent.vnnlib", "p.vnnlib", "p.vnnlib.gz"):
            with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
                read_property(tmp_path / name)
        refused(tmp_path, "", ("0 inputs",))


def refused(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert len(message) < 400
    for word in (str(tmp_path / "p.vnnlib"), *words):
        assert word in message


# Version of the package `vnnlib` -> a program that prints [lower, upper, pairs (label, target)] of a file, as that package
# reads it. The two cannot be installed together, so each has an environment of its own.
OTHER_READERS = {
    "0.0.1.post1": """\
import json, sys, warnings
from vnnlib.compat import read_vnnlib_simple
warnings.simplefilter("ignore")
(box, claims), = read_vnnlib_simple(sys.argv[1], 12, 3)
pairs = [[m[0].tolist().index(1), m[0].tolist().index(-1)] for m, rhs in claims if rhs.tolist() == [[0]]]
print(json.dumps([*zip(*box), pairs]))
""",
    "1.0.2": """\
import json, sys, vnnlib, vnnlib.compat
case, = vnnlib.compat.transform(vnnlib.parse_query_file(sys.argv[1]))
pairs = []
for claim in case.output_constraints:
    (row,) = claim.coeff_matrix
    assert list(claim.rhs) == [0.0]
    pairs.append([row.index(1.0), row.index(-1.0)])
lower, upper = zip(*case.input_box)
print(json.dumps([lower, upper, pairs]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(("version", "package"), [("1.0", "0.0.1.post1"), ("2.0", "1.0.2")])
@pytest.mark.parametrize("where", ["folded", "outside"])
def test_another_reader_finds_the_same(tmp_path, other_reader, version, package, where):
    pixels = np.random.default_rng(0).uniform(0, 1, (3, 2, 2)).astype(np.float32)
    path = tmp_path / "p.vnnlib"
    path.write_text(property_text(pixels, 1, 0, sidecar((1, 3, 2, 2), vnnlib=version, where=where)))
    command = [other_reader(package), "-c", OTHER_READERS[package], path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lower, upper, pairs = json.loads(done.stdout.splitlines()[-1])
    mine = read_property(path)
    assert np.allclose(lower, mine.lower, rtol=1e-15, atol=0)
    assert np.allclose(upper, mine.upper, rtol=1e-15, atol=0)
    assert sorted(map(tuple, pairs)) == [(1, 0), (1, 2)]


@pytest.fixture(scope="module")
def other_reader(tmp_path_factory):
    """Version of the package `vnnlib` -> a Python that has it; where it cannot be installed the test is skipped."""
    made = {}

    def python(version):
        if version not in made:
            folder = tmp_path_factory.mktemp("venv")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            made[version] = folder / "bin" / "python"
            command = [made[version], "-m", "pip", "install", "-q", f"vnnlib=={version}"]
            if subprocess.run(command, capture_output=True, timeout=300).returncode:
                made[version] = None
        if made[version] is None:
            pytest.skip(f"vnnlib {version} cannot be installed here")
        return made[version]

    return python
