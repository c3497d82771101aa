"""Second opinions: stand-ins that answer, lie, crash, hang and talk nonsense, and one real verifier."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from evocert.certify import external
from evocert.certify.external import Question, Verifier, ask, find
from evocert.export.vnnlib import read_property

HOW = "ask its author"
EXAMPLES = 12


def stand_in(tmp_path, body):
    """A verifier that is a Python script: its arguments are the ONNX file, the property, the result's file and the time."""
    script = tmp_path / "stand_in.py"
    script.write_text("import sys, time\nonnx, vnnlib, result, timeout = sys.argv[1:]\n" + body)

    def command(path, question):
        values = (question.onnx, question.vnnlib, question.result, f"{question.timeout:g}")
        return [str(path), str(script), *map(str, values)]

    return Verifier(command, lambda path: [str(path), "-c", ""], Path(sys.executable), HOW)


def answered(tmp_path, body, timeout=5.0):
    question = Question(tmp_path / "n.onnx", tmp_path / "p.vnnlib", tmp_path / "result.txt", timeout)
    return ask(stand_in(tmp_path, body), Path(sys.executable), question, tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("unsat", "proved"), ("holds\\n", "proved"), ("UNSAT,0.5", "proved"), ("sat\\n((X_0 0.5)\\n (X_1 -2e-3))", "refuted"),
        ("violated", "refuted"), ("timeout", "undecided"), ("unknown", "undecided"),
    ],
)  # fmt: skip
def test_words_of_the_competition_are_understood(tmp_path, text, claim):
    answer = answered(tmp_path, f"open(result, 'w').write('{text}')")
    assert answer.claim == claim
    assert answer.note is None
    if "X_0" in text:
        assert answer.values.tolist() == [0.5, -2e-3]
    assert (tmp_path / "log.txt").exists() == (claim == "undecided")


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("print('about to fall'); raise SystemExit(7)", "it ended with status 7"),
        ("import os; os.kill(os.getpid(), 11)", "it ended with status -11"),
        ("open(result, 'w').write('perhaps'); print('about to fall')", "it gave no answer"),
        ("print('about to fall')", "it gave no answer"),
        ("open(result, 'wb').write(bytes(range(256)))", "it gave no answer"),
    ],
)
def test_crashes_and_nonsense_are_no_answers_and_leave_a_log(tmp_path, body, note):
    answer = answered(tmp_path, body)
    assert (answer.claim, answer.note) == ("undecided", note)
    assert ("about to fall" in (tmp_path / "log.txt").read_text()) == ("about to fall" in body)


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "GRACE", 0.5)
    body = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(600)"
    )
    answer = answered(tmp_path, body, timeout=1.5)
    assert answer.claim == "undecided"
    assert "did not end within 2 seconds" in answer.note
    assert answer.seconds < 60
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    if Path("/proc").is_dir():
        assert not status.exists() or "Z (zombie)" in status.read_text()


def test_values_must_be_whole_and_in_order(tmp_path):
    assert answered(tmp_path, "open(result, 'w').write('sat (X_0 0.5) (X_2 0.5)')").values is None
    assert answered(tmp_path, "open(result, 'w').write('sat (X_0 half)')").values is None
    assert answered(tmp_path, "open(result, 'w').write('sat (X_1 0.25) (X_0 0.5)')").values.tolist() == [0.5, 0.25]


def test_one_that_is_not_installed_is_refused_with_how_to_get_it(evocert, run_folder, tmp_path):
    for name, place in (
        ("neuralsat", sys.executable),
        ("marabou", tmp_path / "none"),
        ("abcrown", tmp_path / "none.py"),
    ):
        status, _, error = evocert("certify", run_folder, "--verifier", name, "--verifier-path", place)
        assert status == 2
        assert f"verifier {name} is not installed at {place}; " in error
    status, _, error = evocert("certify", run_folder, "--verifier", "abcrown")
    assert (status, "--verifier-path is needed" in error) == (2, True)
    status, _, error = evocert("certify", run_folder, "--verifier", "eran")
    assert (status, "allowed are neuralsat, marabou, abcrown" in error) == (2, True)
    assert not (run_folder / "certify.jsonl").exists()


# What a stand-in may do with a property: read it, and ask ONNX Runtime at its corners and middle.
TRUTHFUL = """
import sys
sys.path.insert(0, {package!r})
from pathlib import Path
import json
known = json.loads(Path({known!r}).read_text())
text = Path(vnnlib).read_text()
index = text.split(": image ")[1].split(" ")[0]
verdict, values = known[index]
{twist}
answer = {{"certified": "unsat", "attacked": "sat"}}.get(verdict, "unknown")
points = "".join(f"(X_{{i}} {{v!r}})" for i, v in enumerate(values or []))
open(result, "w").write(answer + " " + points)
"""


@pytest.fixture
def decided(evocert, run_folder, tmp_path):
    """A run whose first images are on record, and what the stand-ins know of them."""
    status, _, _ = evocert("certify", run_folder, "--examples", EXAMPLES, "--eps", "0.1", "--timeout", 5, "--quiet")
    assert status == 0
    rows = [json.loads(line) for line in (run_folder / "certify.jsonl").read_text().splitlines()]
    known = {}
    for row in rows:
        point = np.load(run_folder / row["point"]).flatten().tolist() if "point" in row else None
        known[str(row["index"])] = (row["verdict"], point)
    path = tmp_path / "known.json"
    path.write_text(json.dumps(known))
    assert {row["verdict"] for row in rows} >= {"certified", "attacked"}
    return run_folder, rows, path


def opinions(evocert, monkeypatch, tmp_path, decided, twist=""):
    folder, _, known = decided
    body = TRUTHFUL.format(package=os.getcwd(), known=str(known), twist=twist)
    monkeypatch.setitem(external.VERIFIERS, "standin", stand_in(tmp_path, body))
    return evocert("certify", folder, "--examples", EXAMPLES, "--eps", "0.1", "--timeout", 5, "--verifier", "standin")


def test_one_that_tells_the_truth_agrees(evocert, monkeypatch, tmp_path, decided):
    folder, rows, _ = decided
    status, output, error = opinions(evocert, monkeypatch, tmp_path, decided)
    assert (status, error) == (0, "")
    summary = json.loads((folder / "certify.json").read_text())["second_opinion"]
    wanted = [row for row in rows if row["verdict"] != "misclassified"]
    assert summary["asked"] == summary["agree"] + summary["undecided"] == len(wanted)
    assert summary["proved"] == sum(row["verdict"] == "certified" for row in rows)
    assert summary["contradictions"] == []
    assert f"standin on {len(wanted)} of them" in output
    # It is not asked again.
    before = (folder / "certify-standin.jsonl").read_bytes()
    assert opinions(evocert, monkeypatch, tmp_path, decided, "raise SystemExit(1)")[0] == 0
    assert (folder / "certify-standin.jsonl").read_bytes() == before


def test_one_that_proves_what_is_broken_is_a_contradiction(evocert, monkeypatch, tmp_path, decided):
    folder, rows, _ = decided
    status, output, _ = opinions(evocert, monkeypatch, tmp_path, decided, "verdict = 'certified'")
    broken = [row["index"] for row in rows if row["verdict"] == "attacked"]
    assert status == 1
    content = json.loads((folder / "certify.json").read_text())
    assert [found["index"] for found in content["contradictions"]] == broken
    assert all(found["certified_by"] == "standin" for found in content["contradictions"])
    assert output.count("CONTRADICTION") == len(broken)


def test_a_refutation_counts_only_with_a_point_that_replays(evocert, monkeypatch, tmp_path, decided):
    folder, rows, _ = decided
    status, _, _ = opinions(
        evocert, monkeypatch, tmp_path, decided, "verdict, values = 'attacked', values or [0.0] * 64"
    )
    assert status == 0
    summary = json.loads((folder / "certify.json").read_text())["second_opinion"]
    assert summary["refuted"] == sum(row["verdict"] == "attacked" for row in rows)
    assert summary["undecided"] == sum(row["verdict"] not in ("attacked", "misclassified") for row in rows)


def test_what_it_is_given_is_the_box_of_the_image(evocert, monkeypatch, tmp_path, decided):
    folder, rows, _ = decided
    kept = tmp_path / "kept"
    kept.mkdir()
    twist = f"import shutil; shutil.copy(vnnlib, {str(kept)!r} + '/' + index + '.vnnlib')"
    opinions(evocert, monkeypatch, tmp_path, decided, twist)
    from evocert.finished import load_finished

    images, labels = load_finished(folder).data.test.batch(slice(0, EXAMPLES))
    for row in rows:
        if row["verdict"] == "misclassified":
            continue
        found = read_property(kept / f"{row['index']}.vnnlib")
        image = images[row["index"]].double().numpy()
        assert found.label == labels[row["index"]]
        lower, upper = (np.asarray(end, dtype=float).reshape(image.shape) for end in (found.lower, found.upper))
        np.testing.assert_allclose(lower, (image - 0.1).clip(min=0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(upper, (image + 0.1).clip(max=1), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_neuralsat_agrees(evocert, run_folder, tmp_path):
    """From the package index, into an environment of its own; torch and what else it needs it finds in this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (place,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (place / "this.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    small = ["beartype", "coloredlogs", "humanfriendly", "gurobipy", "psutil", "sortedcontainers", "termcolor", "joblib",
             "onnxsim", "tqdm", "requests"]  # fmt: skip
    for packages in (["--no-deps", "neuralsat==0.2.17"], small):
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            pytest.skip(f"neuralsat cannot be installed here: {done.stderr.strip().splitlines()[-1][:100]}")
    name, path = find("neuralsat", python)
    assert (name, path) == (external.VERIFIERS["neuralsat"], python)
    status, _, error = evocert(
        "certify", run_folder, "--examples", 5, "--timeout", 60, "--verifier", "neuralsat", "--verifier-path", python
    )
    assert (status, error) == (0, "")
    summary = json.loads((run_folder / "certify.json").read_text())["second_opinion"]
    assert summary["asked"] >= 3
    assert summary["agree"] == summary["asked"]
