"""``evocert compare``, on run folders made of JSON alone: what is averaged, what is said beside it, and the formats."""

import csv
import io
import json
import subprocess
import sys

import pytest

from evocert.compare import compare
from evocert.compare.read import read_curve, read_run
from evocert.compare.rows import Figure
from evocert.compare.write import as_json, comma_separated, markdown
from evocert.errors import InputError

CONFIG = {
    "problem": "toy", "method": "pgpe", "bound": "ibp", "eps": 0.1, "generations": 4, "seed": 0, "data": "digits",
    "data_path": None, "init_from": None, "popsize": 8, "attack": {"steps": 2, "step_size": None}, "optimizer_config": {},
    "device": "auto", "device_type": "cpu", "tile": {"members": 1}, "problem_sha256": "ab" * 32, "imported": {},
    "overrides": [], "evocert": "0.1.0", "checkpoint_seconds": 30.0,
}  # fmt: skip


def write(path, content):
    path.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path):
    """Makes a run folder; keywords are settings, ``accuracy`` and what results.json has beside."""

    def make(
        name,
        *,
        natural=0.8,
        attacked=0.6,
        certified=None,
        examples=359,
        train_seconds=60.0,
        dataset="digits",
        **settings,
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = {**CONFIG, **settings}
        certified = {"ibp": 0.5} if certified is None else certified
        shared = {key: config[key] for key in ("problem", "method", "bound", "eps", "seed", "generations", "init_from")}
        accuracy = {"natural": natural, "attacked": attacked, "certified": certified}
        write(folder / "config.json", config)
        results = {"dataset": dataset, "split": "test", "examples": examples, "train_seconds": train_seconds}
        write(folder / "results.json", {**shared, **results, "accuracy": accuracy})
        rows = []
        for generation in range(1, config["generations"] + 1):
            timing = {"seconds": 0.5 + config["seed"] / 10}
            rows.append({"event": "generation", "generation": generation, "mean_eval": None, "timing": timing})
            if generation % 2 == 0:
                figures = {"natural": generation / 10, "certified": generation / 20 + config["seed"] / 100}
                rows.append({"event": "validation", "generation": generation, **figures, "timing": {"validate": 9.0}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def certification(folder, *, examples=100, eps=0.1, total=0.55, timeout=30.0, name="certify.json", **changes):
    content = {
        "key": {"weights": "00", "data": "digits", "part": "test", "images": "00", "eps": eps},
        "settings": {"network": "toy", "eps": eps, "methods": ["ibp", "attack", "exact"], "timeout": timeout},
        "examples": examples, "natural": 0.81, "attacked": 0.58,
        "certified": {"ibp": 0.5, "exact": total - 0.5, "total": total},
        "undecided": 0.01, "seconds": 3.0, "contradictions": [],
    }  # fmt: skip
    write(folder / name, {**content, **changes})


class TestRows:
    def test_seeds_are_averaged(self, run):
        folders = [run(f"r{seed}", seed=seed, natural=natural) for seed, natural in enumerate((0.7, 0.9, 0.8))]
        (row,) = compare(folders).rows
        figure = row.figure(lambda one: one.natural)
        assert row.seeds == [0, 1, 2]
        assert figure.mean == pytest.approx(0.8)
        assert figure.deviation == pytest.approx(0.1)  # of a sample: its squares are divided by 2
        assert figure.count == 3

    def test_one_run_has_no_deviation(self, run):
        (row,) = compare([run("r")]).rows
        assert row.certified("ibp") == Figure(0.5, None, 1)
        assert row.certified("deeppoly") is None

    def test_what_decides_no_figure_separates_no_rows(self, run):
        other = {"device": "cpu", "tile": {"members": 2}, "checkpoint_seconds": 1.0, "overrides": ["seed=1"]}
        assert len(compare([run("a"), run("b", seed=1, **other)]).rows) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"method": "rgs"}, {"bound": "deeppoly"}, {"generations": 6}, {"popsize": 16}, {"attack": {"steps": 3}},
            {"problem_sha256": "cd" * 32}, {"device_type": "cuda"}, {"imported": {"mine": "00"}}, {"new_setting": 1},
        ],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_any_setting_does(self, run, change):
        comparison = compare([run("a"), run("b", seed=1, **change)])
        assert len(comparison.rows) == 2
        names = [comparison.names(row) for row in comparison.rows]
        assert names[0] != names[1]  # whatever the reason is, it is told

    def test_runs_that_stopped_early_say_how_far_they_came(self, run):
        folders = [run(f"r{seed}", seed=seed) for seed in range(3)]
        for folder, done in zip(folders, (4, 2, 3), strict=True):
            results = json.loads((folder / "results.json").read_text())
            write(folder / "results.json", {**results, "generations": done})
        (row,) = compare(folders).rows
        assert row.generations == "2-4"
        (row,) = compare(folders[:1]).rows
        assert row.generations == "4"

    def test_what_was_wanted_is_told_where_it_is_all_that_differs(self, run):
        folders = [run("a", generations=40), run("b", generations=80)]
        for folder in folders:
            results = json.loads((folder / "results.json").read_text())
            write(folder / "results.json", {**results, "generations": 4})
        comparison = compare(folders)
        assert [row.differs for row in comparison.rows] == [{"generations": 40}, {"generations": 80}]
        assert json.loads(as_json(comparison))["rows"][0]["generations"] == 4

    def test_losses_are_counted_where_all_seeds_have_counts(self, run):
        folders = [run(f"r{seed}", seed=seed) for seed in range(2)]
        for folder, values in zip(folders, (2_000_000, 1_000_000), strict=True):
            results = json.loads((folder / "results.json").read_text())
            write(folder / "results.json", {**results, "evaluations": {"values": values, "gradients": 64_000}})
        comparison = compare(folders)
        assert comparison.rows[0].evaluated("values").mean == 1_500_000
        assert "| 1.5 M + 0.064 M |" in markdown(comparison)
        assert compare([*folders, run("old", seed=2)]).rows[0].evaluated("values") is None
        assert "losses" not in markdown(compare([run("alone")]))

    def test_a_seed_twice_is_no_average(self, run):
        comparison = compare([run("a"), run("b"), run("c", seed=1)])
        assert [row.seeds for row in comparison.rows] == [[0, 1], [0]]
        assert any("repeats seed 0" in line for line in comparison.warnings)

    def test_a_folder_twice_counts_once(self, run):
        folder = run("a")
        comparison = compare(
            [folder, folder.parent / "x" / ".." / "a"] if (folder.parent / "x").mkdir() is None else []
        )
        assert len(comparison.rows) == 1
        assert comparison.warnings == []
        assert any("named twice" in line for line in comparison.notes)

    def test_warm_starts_that_differ_by_seed_are_one(self, run):
        starts = [run(f"s{seed}", seed=seed, method="pgd") for seed in (0, 1)]
        runs = [run(f"r{seed}", seed=seed, init_from=str(start)) for seed, start in enumerate(starts)]
        other = run("r2", seed=2, init_from=str(run("s2", seed=2, method="standard")))
        comparison = compare([*runs, other])
        assert [row.seeds for row in comparison.rows] == [[0, 1], [2]]
        assert "pgd" in comparison.rows[0].settings
        gone = run("r3", seed=3, init_from="/nowhere")
        assert len(compare([*runs, gone]).rows) == 2


class TestWarnings:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"eps": 0.2}, "eps differs"),
            ({"dataset": "mnist", "data": "mnist"}, "data differ"),
            ({"examples": 100}, "data differ"),
            ({"dataset": "npz", "data": "mine.npz"}, "mine.npz"),
            ({"evocert": "0.2.0"}, "versions of evocert differ"),
        ],
    )
    def test_unlike_runs(self, run, evocert, change, words):
        status, out, err = evocert("compare", run("a"), run("b", **change))
        assert (status, err) == (0, "")
        (line,) = [line for line in out.splitlines() if line.startswith("warning: ") and words in line]
        assert line

    def test_like_runs(self, run):
        comparison = compare([run("a"), run("b", method="rgs")])
        assert comparison.warnings == comparison.notes == []

    def test_unfinished_runs_are_named_and_left_out(self, run, evocert):
        done, begun = run("a"), run("b", seed=1)
        (begun / "results.json").unlink()
        status, out, err = evocert("compare", done, begun)
        assert (status, err) == (0, "")
        assert f"left out, not finished: {begun}" in out
        status, out, err = evocert("compare", begun)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(begun) in err


class TestCertify:
    def test_stages_and_total_with_their_examples(self, run, evocert):
        folder = run("a")
        certification(folder)
        _, out, _ = evocert("compare", folder)
        assert "100 of 359" in out
        for words in ("exact", "total", "undecided", "55.0", "not broken"):
            assert words in out

    def test_seeds_of_one_basis_are_averaged(self, run):
        folders = [run(f"r{seed}", seed=seed) for seed in range(3)]
        for folder, total in zip(folders[:2], (0.5, 0.6), strict=True):
            certification(folder, total=total)
        comparison = compare(folders)
        figure = comparison.rows[0].certify(lambda one: one.certified["total"])
        assert (figure.mean, figure.count) == (pytest.approx(0.55), 2)
        assert "55.0 ± 7.1 (2 of 3)" in markdown(comparison)

    @pytest.mark.parametrize("change", [{"examples": 50}, {"timeout": 60.0}])
    def test_seeds_of_two_are_not(self, run, change):
        folders = [run("a"), run("b", seed=1)]
        certification(folders[0])
        certification(folders[1], **change)
        comparison = compare(folders)
        assert comparison.rows[0].certifications == ()
        assert any("not averaged" in line for line in comparison.warnings)

    def test_rows_of_two_are_warned_of(self, run):
        folders = [run("a"), run("b", method="rgs")]
        certification(folders[0])
        certification(folders[1], examples=50)
        assert any("one basis" in line for line in compare(folders).warnings)

    def test_other_radii_and_beginnings_are_not_used(self, run):
        folder = run("a")
        certification(folder, eps=0.2)
        comparison = compare([folder])
        assert comparison.rows[0].certifications == ()
        assert any("eps = 0.2" in line for line in comparison.notes)
        certification(folder, name="certify-0123abcd.json", total=0.6)  # the run's own eps came second
        assert compare([folder]).rows[0].certifications[0].certified["total"] == 0.6
        write(folder / "certify.json", {"key": {"data": "digits", "part": "test", "eps": 0.1}})
        assert any("no figures yet" in line for line in compare([folder]).notes)

    def test_contradictions_are_warned_of(self, run):
        folder = run("a")
        certification(folder, contradictions=[{"index": 3}])
        assert any("contradictions" in line for line in compare([folder]).warnings)


class TestFormats:
    @pytest.fixture
    def comparison(self, run):
        folders = [run(f"r{seed}", seed=seed, natural=0.8 + seed / 10) for seed in (0, 1)]
        deeppoly = run("d", method="rgs", bound="deeppoly", certified={"ibp": 0.2, "deeppoly": 0.55}, popsize=16)
        certification(deeppoly)
        return compare([*folders, deeppoly])

    def test_csv(self, comparison):
        first, second = csv.DictReader(io.StringIO(comma_separated(comparison)))
        assert (first["method"], first["seeds"], first["popsize"]) == ("pgpe", "0 1", "8")
        assert float(first["natural"]) == pytest.approx(0.85)
        assert float(first["natural_deviation"]) == pytest.approx(0.0707, abs=1e-4)
        assert (first["certified.deeppoly"], second["certified.deeppoly"]) == ("", "0.55")
        assert (second["certify.examples"], second["certify.total"]) == ("100", "0.55")

    def test_json(self, comparison):
        content = json.loads(as_json(comparison))
        first, second = content["rows"]
        assert first["figures"]["natural"] == {
            "mean": pytest.approx(0.85),
            "deviation": pytest.approx(0.0707, abs=1e-4),
            "count": 2,
        }
        assert first["certify"] is None
        assert second["certify"]["examples"] == 100
        assert second["figures"]["certify.exact"]["mean"] == pytest.approx(0.05)
        assert [len(row["runs"]) for row in content["rows"]] == [2, 1]

    def test_markdown(self, comparison):
        text = markdown(comparison)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert "| pgpe | ibp | popsize=8 | 0, 1 (2) | 85.0 ± 7.1 | 60.0 ± 0.0 | 50.0 ± 0.0 | - | 1:00 ± 0:00 |" in lines
        assert text.startswith("toy, test images: 359 of digits, eps = 0.1, 4 generations")

    def test_a_narrow_terminal_keeps_words_whole(self, comparison, monkeypatch, capsys):
        from evocert.compare.write import show

        monkeypatch.setattr("evocert.display.Output.is_terminal", True)
        monkeypatch.setenv("COLUMNS", "40")
        show(comparison)
        out = capsys.readouterr().out
        assert "┃" not in out
        assert "certified by ibp 50.0" in " ".join(out.split())

    def test_the_end_of_the_file_decides(self, run, evocert, tmp_path):
        folder = run("a")
        for end in ("md", "csv", "json"):
            status, out, err = evocert("compare", folder, "--out", tmp_path / f"t.{end}")
            assert (status, err) == (0, "")
            assert out.endswith(f"{tmp_path / f't.{end}'}\n")
        assert json.loads((tmp_path / "t.json").read_text())["rows"]
        assert (tmp_path / "t.csv").read_text().startswith("problem,")


class TestPlot:
    def test_curves_are_over_generations_and_their_seconds(self, run):
        curve = read_curve(run("a", seed=1))
        assert curve.generations == [2, 4]
        assert curve.seconds == pytest.approx([1.2, 2.4])  # without the seconds of validations
        assert curve.certified == pytest.approx([0.11, 0.21])
        assert curve.natural == [0.2, 0.4]

    @pytest.mark.parametrize("by", [(), ("--by", "generation"), ("--by", "seconds")])
    def test_a_picture_of_sensible_size(self, run, evocert, tmp_path, by):
        folders = [run(f"{method}{seed}", method=method, seed=seed) for method in ("pgpe", "rgs") for seed in (0, 1)]
        one = run("one", bound="deeppoly", generations=2)
        status, _, err = evocert("compare", *folders, one, "--plot", tmp_path / "curves.png", *by)
        assert (status, err) == (0, "")
        content = (tmp_path / "curves.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        assert width == 1500
        assert 500 <= height <= 1500
        assert len(content) > 20_000

    def test_many_rows_have_styles_of_their_own(self, run):
        from evocert.plots import _styles

        def styles_of(folders):
            comparison = compare(folders)
            return _styles([comparison.names(row) for row in comparison.rows])

        many = styles_of([run(f"r{size}", popsize=size) for size in range(2, 42, 2)])
        assert len({(style["color"], str(style["linestyle"])) for style in many}) == 20
        grid = [run(f"{m}{b}", method=m, bound=b) for m in ("pgpe", "rgs", "mtl-ibp") for b in ("ibp", "deeppoly")]
        styles = styles_of(grid)
        assert [style["color"] for style in styles[::2]] == [styles[0]["color"]] * 3
        assert len({str(style["linestyle"]) for style in styles}) == 3

    @pytest.mark.parametrize("certify", [False, True])
    def test_a_budget_is_a_point_on_the_line_of_its_method(self, run, evocert, tmp_path, monkeypatch, certify):
        from matplotlib.axes import Axes

        from evocert import plots

        for generations, share in ((2, 0.3), (4, 0.5)):
            for seed in (0, 1):
                folder = run(
                    f"{generations}-{seed}",
                    generations=generations,
                    seed=seed,
                    certified={"ibp": share + seed / 10, "deeppoly": 0.9},
                )
                if certify:
                    certification(folder, total=0.8)
        other = run("other", method="rgs", certified={"ibp": 0.7})
        if certify:
            certification(other, total=0.6)
        drawn = []
        draw = Axes.errorbar
        monkeypatch.setattr(
            Axes, "errorbar", lambda self, *args, **more: drawn.append(args) or draw(self, *args, **more)
        )
        folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
        plots.plot(compare(folders), tmp_path / "b.png", plots.BUDGET)
        pgpe, rgs = drawn[:2]
        # 0.5 s a generation, 0.6 s of seed 1; validations, of 9 s each, are not in it
        assert pgpe[0] == pytest.approx([1.1, 2.2])
        assert pgpe[1] == pytest.approx([80.0, 80.0] if certify else [35.0, 55.0])
        assert pgpe[2] == pytest.approx([0.0, 0.0] if certify else [50**0.5, 50**0.5])
        assert rgs[:2] == ([pytest.approx(2.0)], [pytest.approx(60.0 if certify else 70.0)])
        assert [len(line[0]) for line in drawn[2:]] == [2, 1]  # the natural ones beside them
        status, _, err = evocert("compare", *folders, "--plot", tmp_path / "c.png", "--by", "budget")
        assert (status, err) == (0, "")
        assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"

    def test_a_line_joins_what_differs_by_generations_alone(self, run, tmp_path, monkeypatch):
        from matplotlib.axes import Axes

        from evocert import plots

        many = {f"setting{number}": 0 for number in range(6)}  # more than a legend shows
        folders = [
            run("one", **many),
            run("longer", generations=6, **many),
            run("other", **{**many, "setting5": 1}, eps=0.1),
            run("near", **many, eps=0.100004),
            run("again", **many),
        ]
        drawn = []
        draw = Axes.errorbar
        monkeypatch.setattr(
            Axes, "errorbar", lambda self, *args, **more: drawn.append(args) or draw(self, *args, **more)
        )
        plots.plot(compare(folders), tmp_path / "b.png", plots.BUDGET)
        assert [line[0] for line in drawn[:4]] == [pytest.approx(x) for x in ([2.0, 3.0], [2.0], [2.0], [2.0])]


class TestRefused:
    @pytest.fixture
    def refused(self, evocert):
        def check(*arguments, words=()):
            status, out, err = evocert("compare", *arguments)
            assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
            for word in words:
                assert str(word) in err

        return check

    def test_arguments(self, run, refused, tmp_path):
        folder = run("a")
        refused(words=["Missing argument"])
        refused(tmp_path / "absent", words=["absent"])
        refused(tmp_path, words=[tmp_path, "config.json"])
        refused(folder, "--out", "table.txt", words=["table.txt", ".md", ".csv", ".json"])
        refused(folder, "--out", tmp_path / "no" / "t.md", words=[tmp_path / "no"])
        refused(folder, "--out", folder / "results.json", words=["results.json"])
        refused(folder, "--plot", "curves.jpg", words=["curves.jpg", ".png"])
        refused(folder, "--plot", "curves.png", "--by", "epoch", words=["epoch", "generation", "seconds", "budget"])
        refused(folder, "--by", "seconds", words=["--plot"])

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
    @pytest.mark.parametrize("name", ["results.json", "config.json", "certify.json"])
    def test_files_that_are_no_records(self, run, refused, name, content):
        folder = run("a")
        (folder / name).write_bytes(content)
        refused(folder, words=[folder / name])

    @pytest.mark.parametrize(
        "change",
        [
            {"eps": 0.3}, {"eps": "0.1"}, {"seed": 5}, {"examples": -1}, {"examples": None}, {"train_seconds": float("nan")},
            {"evaluations": 3}, {"evaluations": {"values": -1}},
            {"accuracy": None}, {"accuracy": {"natural": 1.5, "attacked": 0.5, "certified": {}}}, {"dataset": 3},
            {"accuracy": {"natural": 0.5, "attacked": 0.5, "certified": {"ibp": True}}},
        ],
    )  # fmt: skip
    def test_results_that_cannot_be(self, run, refused, change):
        folder = run("a")
        results = json.loads((folder / "results.json").read_text())
        write(folder / "results.json", results | change)
        refused(folder, words=["results.json"])

    @pytest.mark.parametrize("change", [{"certified": {"ibp": 0.5}}, {"settings": {}}, {"natural": None}, {"key": 1}])
    def test_certifications_that_cannot_be(self, run, refused, change):
        folder = run("a")
        certification(folder, **change)
        refused(folder, words=["certify.json"])

    @pytest.mark.parametrize("line", ["{", '{"event": "generation"}', '{"event": "validation", "generation": 1}'])
    def test_metrics(self, run, refused, tmp_path, line):
        folder = run("a")
        path = folder / "metrics.jsonl"
        path.write_text(line + "\n" + path.read_text())
        refused(folder, "--plot", tmp_path / "c.png", words=[path, "line 1"])
        path.write_text("")
        refused(folder, "--plot", tmp_path / "c.png", words=[path])
        path.unlink()
        refused(folder, "--plot", tmp_path / "c.png", words=[path])
        assert read_run(folder) is not None  # a table alone does not need them

    def test_sweeps(self, run, refused, tmp_path):
        folder = run("a")
        write(tmp_path / "sweep.json", {"cells": {"a": [], "not begun": []}})
        comparison = compare([tmp_path])
        assert [row.first.path for row in comparison.rows] == [folder]
        assert comparison.notes == [f"left out, not begun: {tmp_path / 'not begun'}"]
        (tmp_path / "sweep.json").write_text("{}")
        refused(tmp_path, words=["sweep.json"])


def test_a_library_user_can_catch_it(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        compare([tmp_path / "absent"])


def test_it_needs_no_torch():
    code = (
        "import sys, evocert.compare.write, evocert.cli_studies\n"
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
