"""``evocert bench``: what it counts, what it compares with, and what it writes."""

import importlib.util
import json
import subprocess
import sys
import types
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

from evocert import networks
from evocert.bench import floor, fresh, lirpa, loop, measure, work
from evocert.bench.table import Tables
from evocert.bench.work import Architecture, Images, Work
from evocert.bounds import BOUNDS, Tile, box_around, read_network
from evocert.errors import InputError
from evocert.modules import Residual


def population(name="cnn3", width=2, shape=(1, 8, 8), members=3, images=4, eps=0.05):
    architecture = Architecture(name, width, shape, (0.4,) * shape[0], (0.3,) * shape[0])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(images, *shape, generator=generator)
    labels = torch.arange(images) % work.CLASSES
    return Work(architecture, work.random_members(architecture, members), inputs, labels, eps)


class TestOperations:
    """By hand."""

    # conv1 gives 2x2x2 values of 4 products each, conv2 1x1x1 of 8, the last layer 3 of 1.
    tiny = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1, 3)
    )  # fmt: skip
    # A row of the margins is multiplied by the 8 weights of conv2, then 2x2x2 coefficients by 4 weights each; there are 2.
    margins = 2 * (8 + 32)

    @pytest.mark.parametrize(
        ("bound", "expected"),
        [
            ("ibp", 2 * (32 + 8) + 3 + 2 * 1),
            ("crown-ibp", 2 * (32 + 8) + margins),
            # Twice the first layer; one neuron of the second, lower and upper, through conv1.
            ("deeppoly", 2 * 32 + 2 * 32 + margins),
            ("crown-zero", 2 * 32 + 2 * 32 + margins),
            ("deeppoly-intersect", 2 * (32 + 8) + 3 + 2 * 1 + 2 * 32 + margins),
            ("alpha-crown", 2 * 32 + 2 * 32 + margins * (1 + 3 * 20)),
        ],
    )
    def test_two_convolutions(self, bound, expected):
        assert floor.operations(read_network(self.tiny, (1, 3, 3)), bound) == expected

    def test_only_undecided_neurons(self):
        network = read_network(self.tiny, (1, 3, 3))
        assert floor.operations(network, "deeppoly-sparse", [0.9, 0.25]) == 2 * 40 + 0.25 * 64 + self.margins

    def test_windows_stay_windows(self):
        """CNN3 w=16 on MNIST: 1,568 neurons see 4x4x16 entries, each of which sees 25 pixels; 9 margins see all of both."""
        network = population("cnn3", 16, (1, 28, 28)).network
        expected = 2 * 78_400 + 2 * 1568 * 256 * 25 + 9 * (401_408 + 78_400)
        assert floor.operations(network, "deeppoly") == expected

    def test_a_window_grows_through_strides_and_dilations(self):
        module = nn.Sequential(
            nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3, dilation=2, stride=2), nn.ReLU(), nn.Conv2d(1, 1, 2),
            nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2),
        )  # fmt: skip
        network = read_network(module, (1, 15, 15))  # maps of 13x13, 5x5, 4x4
        second = 25 * 5 * 5 * 9  # each sees 5x5 of 13x13, times the 3x3 of the first layer
        third = 16 * (2 * 2 * 9 + 7 * 7 * 9)  # 2x2 of 5x5, then 7x7 of 13x13
        margin = 5 * 5 * 9 + 13 * 13 * 9  # all of it; the 16 coefficients first pass the third layer
        expected = 2 * 13 * 13 * 9 + 2 * (second + third) + 16 * 4 + margin
        assert floor.operations(network, "deeppoly") == expected

    def test_both_ways_through_a_residual_block(self):
        block = Residual(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1)))
        module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), block, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        network = read_network(module, (1, 4, 4))
        inside = 16 * 9 * 1  # 3x3 coefficients on the first layer's output, of one weight each
        # Through the body the 3x3 coefficients meet 9 weights and become 5x5, cut to 4x4; then the first layer.
        behind = 16 * (9 * 9 + 16 * 1)
        margin = 2 * 16 * 9 + 16 * 1
        assert floor.operations(network, "deeppoly") == 2 * 16 + 2 * (inside + behind) + margin

    def test_every_bound_and_network_has_a_count(self):
        for name in networks.NETWORKS:
            network = population(name, 1, (3, 16, 16)).network
            share = [1.0] * len(list(floor.relaxed(network.layers)))
            counts = {bound: floor.operations(network, bound, share) for bound in BOUNDS}
            assert all(count > 0 for count in counts.values()), name
            assert counts["ibp"] < counts["crown-ibp"] <= counts["deeppoly-sparse"] <= counts["deeppoly-intersect"]


def test_undecided_neurons_are_counted():
    some = population(members=2)
    shares = floor.undecided(some.network, some.parameters, box_around(some.images, some.eps))
    crossing = []
    for weights in some.parameters:
        module = some.architecture.module().double()
        networks.with_parameters(module, weights)
        normalize, convolution = module[0], module[1]
        box = box_around(some.images, some.eps)
        lower, upper = normalize(box.lower).double(), normalize(box.upper).double()
        middle = convolution((lower + upper) / 2)
        spread = nn.functional.conv2d((upper - lower) / 2, convolution.weight.abs(), None, 2, 2)
        crossing.append(((middle - spread < 0) & (middle + spread > 0)).double().mean())
    assert shares[0] == pytest.approx(float(sum(crossing)) / 2, abs=1e-6)
    assert 0 < shares[1] <= 1


class TestLoop:
    @pytest.mark.parametrize("bound", loop.PLAIN)
    @pytest.mark.parametrize(
        ("name", "shape"),
        [("cnn3", (1, 8, 8)), ("cnn5", (3, 8, 8)), ("cnn4", (1, 9, 7)), ("fully_connected", (1, 4, 4))],
    )
    def test_gives_our_bounds(self, monkeypatch, bound, name, shape):
        monkeypatch.setattr(loop, "CHUNK", 2**14)  # in several chunks
        some = population(name, 2 if name.startswith("cnn") else 12, shape, eps=0.02)
        ours = measure.margins(some, bound, Tile(2, 16))
        module = some.architecture.module()
        assert loop.knows(module, bound)
        for weights, expected in zip(some.parameters, ours, strict=True):
            networks.with_parameters(module, weights)
            found = loop.margins(module, some.images, some.labels, some.eps, loop.PLAIN[bound])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_knows_what_it_does_not_know(self):
        assert not loop.knows(population().architecture.module(), "alpha-crown")
        assert not loop.knows(population("resnet", 1, (3, 8, 8)).architecture.module(), "ibp")
        assert loop.PLAIN.keys() <= BOUNDS.keys()


class TestMemory:
    def test_peak_is_what_a_call_adds(self):
        kept = measure.peak(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
        assert 0.9 * 2**26 <= kept <= 1.3 * 2**26

    def test_a_process_of_its_own(self):
        some = population()
        peak = fresh.peak_memory(some, "ibp", Tile(1, 16), torch.device("cpu"))
        assert 0 < peak < 2**28

    def test_what_it_dies_of_in_a_few_words(self):
        with pytest.raises(fresh.ProcessFailed, match="nonsense"):
            fresh.peak_memory(population(), "nonsense", Tile(1, 16), torch.device("cpu"))
        for stderr, words in (("x\nMemoryError\n", "out of memory"), ("a\nlast\n", "last"), ("", "exit status 1")):
            done = subprocess.CompletedProcess([], 1, "", stderr)
            assert fresh._reason(done) == words


def test_time_is_spent_within_limits():
    calls = []
    times = measure.within(-1.0, [lambda: calls.append(1)] * 5, torch.device("cpu"))
    assert len(times) == len(calls) == 1
    rounds = measure.rounds([lambda: calls.append(2), lambda: calls.append(3)], torch.device("cpu"), 2)
    assert calls == [1, 2, 3, 2, 3]
    assert [len(each) for each in rounds] == [2, 2]


class TestWork:
    def test_names(self):
        assert work.named("cnn3") == ("cnn3", 16)
        assert work.named("cnn7") == ("cnn7", 64)
        assert work.named("cnn5:4") == ("cnn5", 4)
        for text in ("cnn9", "cnn3:", "cnn3:0", "cnn3:x", "cnn3:-1", "cnn3:99999", "cnn3:4:4"):
            with pytest.raises(InputError, match=r"--network='cnn[39]"):
                work.named(text)

    def test_images(self, monkeypatch, tmp_path):
        monkeypatch.setenv("EVOCERT_DATA", str(tmp_path))
        small, large = (work.find_images(name, None, None, 5) for name in ("cnn3", "cnn5"))
        assert (tuple(small.images.shape), tuple(large.images.shape)) == ((5, 1, 28, 28), (5, 3, 32, 32))
        assert "random" in small.about
        assert str(tmp_path) in small.about  # why it is not MNIST
        assert 0 <= float(small.images.min()) < float(small.images.max()) <= 1
        assert tuple(work.find_images("cnn5", "digits", None, 5).images.shape) == (5, 1, 8, 8)
        for data, most in (("digits", 359), ("random", 10_000)):
            with pytest.raises(InputError, match=f"--images=10001: allowed is 1 to {most}"):
                work.find_images("cnn3", data, None, 10_001)

    def test_members_are_fresh_and_the_same_every_time(self):
        one, again = population().parameters, population(members=2).parameters
        assert torch.equal(one[:2], again)
        assert not torch.equal(one[0], one[1])

    def test_a_record_is_the_same_population(self, tmp_path):
        some = population()
        torch.save(some.record(), tmp_path / "some.pt")
        other = Work.of(torch.load(tmp_path / "some.pt", weights_only=True))
        assert torch.equal(measure.margins(some, "ibp", Tile(1, 16)), measure.margins(other, "ibp", Tile(1, 16)))

    def test_trained_weights_are_kept(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(work, "STEPS", 3)
        images = work.find_images("cnn3", "digits", None, 4)
        architecture = Architecture("cnn3", 2, (1, 8, 8), images.mean, images.std)
        lines = []

        def train(eps=0.05):
            lines.clear()
            return work.trained_members(architecture, images, eps, 6, lines.append)

        members, about = train()
        assert lines == ["training cnn3 w=2 by gradient IBP: step 0 of 3"]
        assert "sigma 0.001 around weights trained by IBP" in about
        assert members.std(0).mean() == pytest.approx(0.001, rel=0.2)
        assert not torch.allclose(members.mean(0), networks.flat_parameters(architecture.module()), atol=1e-3)
        assert torch.equal(train()[0], members)
        assert lines == []
        train(eps=0.06)
        assert lines
        kept = next((tmp_path / ".cache" / "evocert" / "bench").glob("*.pt"))
        kept.write_bytes(b"damaged")
        train(), train(eps=0.06)
        assert torch.equal(train()[0], members)

    def test_a_cache_that_cannot_be_written_to_is_done_without(self, monkeypatch, tmp_path):
        (tmp_path / ".cache").write_text("a file")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(work, "STEPS", 1)
        images = work.find_images("cnn3", "digits", None, 4)
        architecture = Architecture("cnn3", 1, (1, 8, 8), images.mean, images.std)
        assert len(work.trained_members(architecture, images, 0.05, 2, print)[0]) == 2

    def test_nothing_to_train_on(self):
        images = Images(torch.zeros(1, 1, 28, 28), torch.zeros(1), (0.0,), (1.0,), "random images")
        with pytest.raises(InputError, match=r"--weights=ibp with random images.*--data mnist"):
            work.trained_members(population().architecture, images, 0.1, 2, print)


@pytest.fixture
def stand_in(monkeypatch):
    """A module in auto_LiRPA's place, whose bounds are right for eps = 0: it counts its calls."""

    class BoundedModule:
        def __init__(self, module, example, options, device):
            self.module, self.example, self.calls = module, example, calls
            assert options["conv_mode"] == "patches"

        def eval(self):
            pass

        def compute_bounds(self, *, x, C, method, bound_lower, bound_upper):  # noqa: N803
            calls.append((method, len(C)))
            return torch.einsum("bmk,bk->bm", C, self.module(x[0])), None

    calls = []
    module = types.ModuleType("auto_LiRPA")
    module.__version__ = "0"
    module.BoundedModule = BoundedModule
    module.BoundedTensor = lambda x, perturbation: x
    module.PerturbationLpNorm = lambda norm, x_L, x_U: None  # noqa: N803
    monkeypatch.setitem(sys.modules, "auto_LiRPA", module)
    return calls


def test_auto_lirpa_is_given_every_member_and_image(stand_in):
    some = population(images=5, eps=0.0)
    found = lirpa.measured(some, "CROWN", [5, 2], 1)
    ours = measure.margins(some, "deeppoly", Tile(1, 16))
    torch.testing.assert_close(torch.tensor(found["margins"]), ours[0], rtol=1e-5, atol=1e-5)
    assert found["version"] == "0"
    assert {chunk: len(times) for chunk, times in found["seconds"].items()} == {5: 3, 2: 3}
    assert set(stand_in) == {("CROWN", 5), ("CROWN", 2), ("CROWN", 1)}


# The command


@pytest.fixture
def evocert(evocert):
    """As everywhere, for this command."""
    return partial(evocert, "bench")


@pytest.fixture
def quick(monkeypatch):
    """Nothing in other processes, and no large product."""
    monkeypatch.setattr(floor, "CPU_SIZE", 64)
    monkeypatch.setattr(fresh, "peak_memory", lambda *arguments: 3 * 2**20)
    monkeypatch.setattr(lirpa, "is_there", lambda: False)


TINY = ("--network", "cnn3:2", "--data", "digits", "--members", 2, "--images", 3, "--repeats", 2, "--device", "cpu")


class TestCommand:
    def test_tables_and_json(self, evocert, quick, tmp_path):
        path = tmp_path / "bench.json"
        path.write_text("an older one")
        status, out, err = evocert(*TINY, "--network", "cnn3:1", "--out", path)
        assert (status, err) == (0, "")
        assert out.endswith(f"{path}\n")
        for words in (
            "cnn3 w=2 on 1x8x8, D = 354; 2 members, 3 images, eps = 0.05",
            "cnn3 w=1 on 1x8x8",
            "images: test images of digits",
            "weights: random",
            "per s", "passes", "MiB", "of floor", "loop ms", "off by",
            "undecided by one layer's interval",
            "auto_LiRPA cannot be imported",
        ):  # fmt: skip
            assert words in out
        report = json.loads(path.read_text())
        assert report["settings"]["networks"] == ["cnn3:2", "cnn3:1"]
        assert report["environment"]["threads"] == torch.get_num_threads()
        assert report["multiply_adds_per_second"] > 0
        first = report["networks"][0]
        assert (first["members"], first["images"], first["eps"], first["parameters"]) == (2, 3, 0.05, 354)
        assert [row["bound"] for row in first["bounds"]] == ["ibp", "crown-ibp", "deeppoly", "deeppoly-sparse"]
        for row in first["bounds"]:
            assert len(row["seconds"]) == len(row["forward_seconds"]) == 2
            assert row["per_second"] == pytest.approx(1e3 / row["milliseconds"])
            assert row["milliseconds"] == pytest.approx(1e3 * sum(row["seconds"]) / 2 / 6)
            floor_time = 1e3 * row["operations"] / report["multiply_adds_per_second"]
            assert row["floor_share"] == pytest.approx(floor_time / row["milliseconds"])
            assert row["loop"]["agrees"]
            assert row["loop"]["ratio"] == pytest.approx(row["loop"]["milliseconds"] / row["milliseconds"])
            assert row["peak"] == 3 * 2**20
            assert row["auto_lirpa"] is None
        assert first["bounds"][0]["operations"] == 2 * (32 * 25 + 16 * 32) + 10 * 16 + 9 * 16
        assert list(tmp_path.iterdir()) == [path]

    def test_a_bound_without_a_loop(self, evocert, quick):
        status, out, err = evocert(*TINY, "--bound", "alpha-crown")
        assert (status, err) == (0, "")
        assert "loop ms" not in out
        assert "alpha-crown" in out

    def test_a_loop_that_disagrees_is_said(self, evocert, quick, monkeypatch):
        monkeypatch.setattr(loop, "margins", lambda module, images, labels, *rest: torch.zeros(len(images), 9))
        assert "ibp: the loop DISAGREES, by " in evocert(*TINY, "--bound", "ibp")[1]

    def test_ctrl_c_leaves_nothing(self, evocert, quick, monkeypatch, tmp_path):
        def stop(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(fresh, "peak_memory", stop)
        path = tmp_path / "bench.json"
        assert evocert(*TINY, "--out", path)[::2] == (130, f"evocert: stopped; {path} was not written\n")
        assert evocert(*TINY)[::2] == (130, "evocert: stopped\n")
        assert list(tmp_path.iterdir()) == []

    def test_failures_in_one_line(self, evocert, quick, monkeypatch, tmp_path):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        path = tmp_path / "bench.json"
        with monkeypatch.context() as patch:
            patch.setattr("evocert.runs.Run.write_json", full)
            status, _, err = evocert(*TINY, "--bound", "ibp", "--out", path)
        assert (status, err) == (1, f"evocert: --out={path} could not be written: No space left on device\n")

        def fail(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(fresh, "peak_memory", fail)
        status, _, err = evocert(*TINY)
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith("evocert: out of memory: fewer --members or --images")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--network", "cnn33"), ("--network='cnn33'", "cnn3", "cnn7")),
            (("--network", "cnn3:wide"), ("--network='cnn3:wide'", "NAME:WIDTH", "1 to 1024")),
            (("--bound", "box"), ("--bound='box'", "ibp", "deeppoly")),
            (("--members", "0"), ("--members=0", "1 to 4096")),
            (("--members", "x"), ("--members", "'x'")),
            (("--images", "0"), ("--images=0", "1 or more")),
            (("--images", "360", "--data", "digits"), ("--images=360", "1 to 359")),
            (("--repeats", "0"), ("--repeats=0", "1 to 1000")),
            (("--weights", "trained"), ("--weights='trained'", "random", "ibp")),
            (("--weights", "ibp", "--data", "random"), ("--weights=ibp", "--data mnist", "--weights random")),
            (("--eps", "1.5"), ("--eps='1.5'", "0 to 1")),
            (("--eps", "1/0"), ("--eps='1/0'", "2/255")),
            (("--eps", "nan"), ("--eps='nan'",)),
            (("--data", "cifar10"), ("--data='cifar10'", "digits", "mnist", "random")),
            (("--data", "mnist", "--data-dir", "nowhere"), ("nowhere",)),
            (("--device", "gpu"), ("--device='gpu'", "cuda:0")),
            (("--device", "cuda:99"), ("--device=cuda:99", "cpu")),
            (("--out", "nowhere/bench.json"), ("--out=nowhere/bench.json", "no folder nowhere")),
            (("--out", "."), ("--out=.", "no file")),
            (("--out", "/dev/null"), ("--out=/dev/null", "no file")),
            (("--out", "a\0b"), ("--out",)),
            (("--out", "n" * 300), ("--out", "cannot be written to")),
            (("extra",), ("extra",)),
        ],
    )
    def test_bad_input(self, evocert, monkeypatch, tmp_path, arguments, words):
        monkeypatch.setattr("evocert.data._download", lambda *rest: pytest.fail("it went online"))
        if "nowhere" in arguments and "--data-dir" in arguments:
            monkeypatch.setattr("evocert.data._download", _no_network)
        monkeypatch.chdir(tmp_path)
        status, out, err = evocert(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("evocert: ")
        for word in words:
            assert word in err, err

    def test_help(self, evocert):
        status, out, err = evocert("--help")
        assert (status, err) == (0, "")
        for option in ("--network", "--bound", "--members", "--images", "--weights", "--eps", "--data-dir", "--out"):
            assert option in out


def _no_network(root, *rest):
    raise InputError(f"MNIST could not be downloaded to {root}")


def test_tables_fit_100_columns(capsys):
    """With all columns and numbers that are long."""
    part = {"images": 32, "milliseconds": 12345.6, "ratio": 12345.6, "peak": 99_999 * 2**20}
    row = {
        "bound": "deeppoly-sparse", "per_second": 1234567.8, "milliseconds": 12345.6, "forward_passes": 12345.6,
        "peak": 99_999 * 2**20, "operations": 123456e6, "floor_share": 1.0, "undecided": [0.5] * 6,
        "loop": {"milliseconds": 123456.7, "ratio": 12345.6, "members": 3, "images": 32, "largest_difference": 1e-7,
                 "agrees": True},
        "auto_lirpa": {"version": "0.7.1", "members": 3, "method": "CROWN", "all_images": part, "best_chunk": part,
                       "largest_difference": 1e-7},
    }  # fmt: skip
    broken = {**row, "bound": "deeppoly", "peak": "out of memory", "auto_lirpa": {"method": "CROWN", "failed": "why"}}
    found = {
        "network": "cnn7", "width": 64, "input_shape": [3, 32, 32], "parameters": 17_190_666, "members": 4096,
        "images": 10_000, "eps": 2 / 255, "data": "random images", "weights": "random", "bounds": [row, broken],
    }  # fmt: skip
    tables = Tables()
    tables.network(found)
    tables.footer({"networks": [found], "auto_lirpa": None})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for words in ("auto_LiRPA ms", "best at", "deeppoly: its memory could not be measured: out of memory",
                  "deeppoly: auto_LiRPA's CROWN failed: why", "auto_LiRPA 0.7.1", "on 3 members"):  # fmt: skip
        assert words in out
    assert "…" not in out


@pytest.mark.parametrize(("load", "warned"), [(0.7, False), (0.9, True)])
def test_a_busy_machine_is_said(capsys, load, warned):
    made = {"evocert": "0", "device": "a processor", "threads": 2, "torch": "0", "python": "0"}
    Tables().header({"environment": made, "date": "today", "load": load, "multiply_adds_per_second": 5e10})
    out = capsys.readouterr().out
    assert "a processor, 2 threads" in out
    assert "50.0 thousand million multiply-adds" in out
    assert ("the machine is busy" in out) == warned


def test_a_terminal_sees_what_is_measured():
    tables = Tables()
    tables._console = Console(force_terminal=True, width=100, record=True)
    tables.say("measuring")
    tables.stop()
    assert "measuring" in tables._console.export_text()


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """In a process of its own, as a user would; with auto_LiRPA where it can be imported."""
    path = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-c",
        "from evocert.cli import main; main()",
        "bench",
        *map(str, TINY),
        "--out",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 128
    there = importlib.util.find_spec("auto_LiRPA") is not None
    for row in json.loads(path.read_text())["networks"][0]["bounds"]:
        assert 0 <= row["peak"] < 2**28
        assert row["loop"]["agrees"]
        assert bool(row["auto_lirpa"]) == there
        if there and "failed" not in row["auto_lirpa"]:
            assert row["auto_lirpa"]["largest_difference"] < 1e-3
