"""The cascade on a small trained network: who sees what, what is on record, and what a process that died leaves to do."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from evocert import bounds
from evocert.attacks import apgd, worst_margin
from evocert.bounds import BOUNDS, box_around, read_network
from evocert.certify import cascade, solver
from evocert.certify.cascade import Settings
from evocert.certify.command import certify
from evocert.certify.display import Silent
from evocert.certify.records import Records
from evocert.certify.subject import Subject
from evocert.certify.verdict import Outcome
from evocert.networks import flat_parameters

INDICES = [*range(0, 100, 5), *range(100, 359, 20)]  # of every block
CHEAP = {"steps": 10, "restarts": 3}


@pytest.fixture
def some(prepared, tmp_path):
    """What is certified in most tests here: some images, in a folder of their own."""
    return dataclasses.replace(prepared, indices=INDICES, folder=tmp_path / "records")


def certified(prepared, *methods, **more):
    settings = Settings(prepared.eps, methods or cascade.DEFAULT, **{**CHEAP, **more})
    return certify(prepared, settings, Silent())


def rows_of(folder, name="certify"):
    """By index, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}


def correct(prepared):
    images, labels = prepared.part.batch(torch.tensor(prepared.indices))
    with torch.no_grad():
        right = prepared.subject.module(images).argmax(1) == labels
    return [index for index, is_right in zip(prepared.indices, right.tolist(), strict=True) if is_right]


class Double:
    """A bound that proves some examples, and notes which ones it was given."""

    def __init__(self, prepared, proved):
        self.prepared, self.proved, self.given = prepared, set(proved), []
        self.cost = BOUNDS["ibp"].cost

    def __call__(self, network, parameters, box, labels, *, tile):
        assert parameters.dtype == box.lower.dtype == torch.float64
        images = self.prepared.part.batch(torch.arange(len(self.prepared.part)))[0].double()
        boxes = box_around(images, self.prepared.eps)
        places = [int((boxes.lower == low).flatten(1).all(1).nonzero()) for low in box.lower]
        self.given += places
        margins = torch.tensor([1.0 if place in self.proved else -1.0 for place in places])
        return margins[None, :, None].expand(1, -1, network.num_classes - 1)


@pytest.fixture
def registered(monkeypatch):
    """Registers test doubles among the bounds."""

    def register(**doubles):
        for name, double in doubles.items():
            monkeypatch.setitem(BOUNDS, name, double)
        monkeypatch.setattr(cascade, "METHODS", (*cascade.METHODS, *doubles))

    return register


class TestStages:
    def test_each_sees_what_is_correct_and_undecided_in_its_order(self, some, registered, monkeypatch):
        right = correct(some)
        wrong = set(INDICES) - set(right)
        assert wrong
        first, second = Double(some, {*right[::3], *wrong}), Double(some, right[1::3])
        registered(first=first, second=second)
        attacked, solved = [], []

        def attack(module, images, labels, eps, *, numbers, steps, restarts):
            attacked.extend(numbers)
            return apgd(module, images, labels, eps, numbers=numbers, steps=1, restarts=1)

        def solve(members, image, label, eps, timeout):
            images = some.part.batch(torch.arange(len(some.part)))[0]
            solved.append(int((images == image).flatten(1).all(1).nonzero()))
            return Outcome("undecided"), 0.0

        monkeypatch.setattr(cascade, "apgd", attack)
        monkeypatch.setattr(solver, "_solve", solve)
        monkeypatch.setattr(cascade, "pgd", lambda *a, **k: apgd(*a, numbers=[0] * len(a[1]), steps=1, restarts=1))
        certified(some, "second", "attack", "first", "exact")
        rows = rows_of(some.folder)
        by = {index: row["by"] for index, row in rows.items()}
        assert second.given == right
        left = [index for index in right if index not in right[1::3]]
        assert attacked == left
        left = [index for index in left if by[index] != "attack"]
        assert first.given == left
        left = [index for index in left if index not in right[::3]]
        assert solved == left
        assert len(left) > 3
        assert {by[index] for index in wrong} == {"clean"}
        assert {by[index] for index in right[1::3]} == {"second"}
        assert {by[index] for index in left} == {None}
        assert {rows[index]["verdict"] for index in left} == {"undecided"}

    def test_the_first_to_prove_is_named(self, some):
        certified(some, "ibp", "deeppoly")
        other = dataclasses.replace(some, folder=some.folder.with_name("other"))
        certified(other, "deeppoly", "ibp")
        one, two = rows_of(some.folder), rows_of(other.folder)
        proved = [{index for index, row in rows.items() if row["verdict"] == "certified"} for rows in (one, two)]
        assert proved[0] == proved[1]
        changed = {index for index in proved[0] if one[index]["by"] == "ibp" and two[index]["by"] == "deeppoly"}
        assert len(changed) > 5  # nearly all: neither bound is the tighter one everywhere

    def test_rows_are_those_of_one_example_after_another(self, some):
        """Written anew, in the plainest way."""
        methods = ("ibp", "attack", "crown-ibp", "exact")
        certified(some, *methods)
        subject, found = some.subject, {}
        parameters = subject.parameters.double().unsqueeze(0)
        for index in some.indices:
            image, label = some.part.batch(torch.tensor([index]))
            prediction = int(subject.module(image).argmax())
            verdict, by = ("misclassified", "clean") if prediction != int(label) else ("undecided", None)
            for method in methods if by is None else ():
                if method == "attack":
                    attack = apgd(subject.module, image, label, some.eps, numbers=[index], **CHEAP)
                    done = "attacked" if bool(attack.broken) else None
                elif method == "exact":
                    done = solver._solve(subject.members, image[0], int(label), some.eps, 30.0)[0].verdict
                else:
                    margins = BOUNDS[method](subject.network, parameters, box_around(image.double(), some.eps), label)
                    done = "certified" if bool((margins > 1e-9).all()) else None
                if done is not None:
                    verdict, by = done, method
                    break
            found[index] = (int(label), prediction, verdict, by)
        rows = rows_of(some.folder).items()
        assert {i: (r["label"], r["prediction"], r["verdict"], r["by"]) for i, r in rows} == found
        sorts = Counter((verdict, by) for *_, verdict, by in found.values())
        assert len(sorts) >= 4, sorts
        assert {"misclassified", "certified", "attacked"} <= {verdict for verdict, _ in sorts}

    def test_a_tie_is_misclassified(self, some):
        """Even where the first of the largest logits is that of the label."""
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            module[1].bias[:2] = 1.0
        subject = Subject("tie", module, read_network(module, (1, 8, 8)), flat_parameters(module).detach(), b"", "x")
        tied = dataclasses.replace(some, subject=subject)
        content, records = certified(tied, "ibp")
        assert {row.verdict for row in records.rows.values()} == {"misclassified"}
        assert any(row.label == row.prediction for row in records.rows.values())
        assert content["natural"] == 0

    def test_a_network_that_the_exact_stage_does_not_take_is_left_undecided(self, some, monkeypatch):
        monkeypatch.setattr(cascade.exact, "takes", lambda members: False)
        monkeypatch.setattr(solver, "_solve", None)  # would be an error
        certified(some, "ibp", "exact")
        assert {row["verdict"] for row in rows_of(some.folder).values()} == {"misclassified", "certified", "undecided"}

    @pytest.mark.slow
    def test_several_processes_find_the_same(self, some):
        certified(some, "ibp", "exact")
        other = dataclasses.replace(some, folder=some.folder.with_name("other"))
        certified(other, "ibp", "exact", workers=2)
        one, two = rows_of(some.folder), rows_of(other.folder)
        assert one == two
        assert sum(row["by"] == "exact" for row in one.values()) > 5


class TestCounterexamples:
    def test_break_the_network_where_they_are_replayed(self, some):
        certified(some, "ibp", "attack", "exact", steps=2, restarts=1)
        broken = [row for row in rows_of(some.folder).values() if row["verdict"] == "attacked"]
        assert {row["by"] for row in broken} == {"attack", "exact"}
        session = onnxruntime.InferenceSession(some.subject.onnx)
        name = session.get_inputs()[0].name
        for row in broken:
            point = np.load(some.folder / row["point"])
            image, label = some.part.batch(torch.tensor([row["index"]]))
            assert point.dtype == np.float32
            assert label.item() == row["label"]
            image = image[0].double().numpy()
            assert bool(
                (point >= np.maximum(image - some.eps, 0)).all() and (point <= np.minimum(image + some.eps, 1)).all()
            )
            logits = torch.from_numpy(session.run(None, {name: point[None]})[0])
            assert bool(worst_margin(logits, label) <= 0)

    @pytest.mark.parametrize("method", ["attack", "exact"])
    def test_of_which_onnx_runtime_knows_nothing_count_for_nothing(self, some, monkeypatch, method):
        monkeypatch.setattr(Subject, "onnx_logits", _of_the_label(some))
        certified(some, "ibp", method)
        rows = rows_of(some.folder).values()
        assert {row["verdict"] for row in rows} == {"misclassified", "certified", "undecided"}
        assert not any("point" in row for row in rows)


def _of_the_label(prepared):
    """Logits of a file in which nothing is ever broken."""

    def logits(subject, images):
        known = prepared.part.batch(torch.arange(len(prepared.part)))
        near = (known[0][None] - images[:, None]).flatten(2).abs().amax(2) <= prepared.eps + 1e-6  # [N, all]
        labels = known[1][near.double().argmax(1)]
        return nn.functional.one_hot(labels, 10).double()

    return logits


class TestAgain:
    def test_what_is_decided_is_not_looked_at_again(self, some, monkeypatch):
        certified(some, "ibp", "exact")
        before = (some.folder / "certify.jsonl").read_bytes()
        monkeypatch.setattr(solver, "_solve", None)  # would be an error
        monkeypatch.setitem(BOUNDS, "ibp", None)
        certified(some, "ibp", "exact")
        assert (some.folder / "certify.jsonl").read_bytes() == before

    @pytest.fixture
    def slow(self, monkeypatch):
        """An exact stage that needs ten seconds, or so it says."""
        decide = solver.exact.decide

        def slowly(members, box, label, deadline, replay):
            return decide(members, box, label, deadline, replay) if deadline.left > 10 else Outcome("undecided")

        monkeypatch.setattr(solver.exact, "decide", slowly)

    def test_more_methods_or_a_larger_timeout_try_what_is_undecided(self, some, slow):
        certified(some, "ibp")
        first = (some.folder / "certify.jsonl").read_text().splitlines()
        undecided = {index for index, row in rows_of(some.folder).items() if row["verdict"] == "undecided"}
        assert {json.loads(line)["tried"]["timeout"] for line in first if "tried" in line} == {0.0}
        certified(some, "ibp", "exact", timeout=5.0)
        rows = rows_of(some.folder)
        still = {index for index, row in rows.items() if row["verdict"] == "undecided"}
        assert len(still) > 3
        assert still == undecided
        assert rows[min(still)]["tried"] == {"methods": ["ibp", "exact"], "timeout": 5.0}
        certified(some, "ibp", "exact", timeout=60.0)
        rows = rows_of(some.folder)
        assert not [row for row in rows.values() if row["verdict"] == "undecided"]
        kept = {json.loads(line)["index"]: line for line in (some.folder / "certify.jsonl").read_text().splitlines()}
        for line in first:  # with their seconds
            index = json.loads(line)["index"]
            assert (kept[index] == line) is (index not in undecided)

    def test_what_was_tried_before_is_remembered(self, some, slow):
        certified(some, "ibp", "exact", timeout=5.0)
        certified(some, "deeppoly")
        left = [row for row in rows_of(some.folder).values() if row["verdict"] == "undecided"]
        assert left
        assert all(row["tried"] == {"methods": ["ibp", "exact", "deeppoly"], "timeout": 5.0} for row in left)

    def test_other_examples_are_added(self, some):
        content, _ = certified(dataclasses.replace(some, indices=INDICES[:7]), "ibp")
        assert content["examples"] == 7
        before = rows_of(some.folder)
        content, _ = certified(some, "ibp")
        assert content["examples"] == len(INDICES)
        assert before.items() <= rows_of(some.folder).items()
        content, _ = certified(
            dataclasses.replace(some, indices=INDICES[:7]), "ibp"
        )  # the summary is of what is asked for
        assert content["examples"] == 7

    def test_another_radius_is_another_question(self, some):
        certified(some, "ibp")
        other = dataclasses.replace(some, eps=0.01)
        _, records = certified(other, "ibp")
        assert records.name != "certify"
        few, many = (
            sum(row["verdict"] == "certified" for row in rows_of(some.folder, name).values())
            for name in ("certify", records.name)
        )
        assert few < many

    def test_a_process_that_dies_while_writing_changes_nothing(self, some, monkeypatch):
        """At every moment at which something is written, with a part of it on the disk."""
        some = dataclasses.replace(some, indices=INDICES[:14])
        other = dataclasses.replace(some, folder=some.folder.with_name("other"))
        certified(other, "ibp", "exact")
        expected = rows_of(other.folder)
        add, left = Records.add, 0

        class Died(BaseException):
            pass

        def dying(records, rows):
            nonlocal left
            rows, left = list(rows), left - 1
            if left >= 0 or not rows:
                return add(records, rows)
            path = records.path("jsonl")
            content = "".join(f"{row.json()}\n" for row in rows).encode()
            with path.open("ab") as file:
                file.write(content[: len(content) * 2 // 3])
            raise Died

        monkeypatch.setattr(Records, "add", dying)
        deaths, done = 0, False
        while not done:
            left = deaths % 3
            try:
                certified(some, "ibp", "exact")
                done = True
            except Died:
                deaths += 1
            assert deaths < 40
        assert deaths > 3
        assert rows_of(some.folder) == expected


class TestContradictions:
    """A bound that is not sound must not pass in silence."""

    @pytest.fixture
    def unsound(self, registered, some):
        double = Double(some, range(len(some.part)))
        registered(unsound=double)
        return double

    def test_are_listed(self, some, unsound):
        content, records = certified(some, "unsound")
        assert content["certified"]["unsound"] == pytest.approx(len(correct(some)) / len(INDICES))
        found = content["contradictions"]
        assert len(found) > 3
        assert all(each["certified_by"] == "unsound" and each["broken_by"] == "attack" for each in found)
        for each in found:
            row = records.rows[each["index"]]
            assert (row.verdict, row.by, row.contradicted) == ("certified", "unsound", "attack")
            point = torch.from_numpy(np.load(some.folder / row.point))
            assert bool(some.subject.replayed(point[None], torch.tensor([row.label])))

    def test_stay_on_record(self, some, unsound):
        first = certified(some, "unsound")[0]["contradictions"]
        assert certified(some, "unsound")[0]["contradictions"] == first

    def test_of_the_exact_stage_are_listed(self, some, monkeypatch):
        monkeypatch.setattr(solver.exact, "decide", lambda *arguments: Outcome("certified"))
        content, _ = certified(some, "exact")
        assert len(content["contradictions"]) > 3
        assert {each["certified_by"] for each in content["contradictions"]} == {"exact"}

    def test_sound_ones_have_none(self, some):
        content, _ = certified(some, "deeppoly", "exact")
        assert content["contradictions"] == []
        assert content["certified"]["total"] > 0.3

    def test_end_the_command_with_status_1(self, evocert, run_folder, registered, prepared):
        registered(unsound=Double(prepared, range(len(prepared.part))))
        status, out, err = evocert("certify", run_folder, "--eps", "0.1", "--examples", 60, "--methods", "unsound")
        assert (status, err) == (1, "")
        assert "CONTRADICTION: example " in out
        assert "is certified by unsound and broken by attack" in out
        content = json.loads((run_folder / "certify.json").read_text())
        assert out.count("CONTRADICTION") == len(content["contradictions"]) > 0


def test_the_summary_is_of_the_rows(some):
    content, records = certified(some, "ibp", "attack", "crown-ibp")
    rows, count = records.rows.values(), len(INDICES)
    sorts = Counter((row.verdict, row.by) for row in rows)
    assert content == json.loads((some.folder / "certify.json").read_text())
    assert content["examples"] == count == len(rows)
    wrong, broken = sorts["misclassified", "clean"], sorts["attacked", "attack"]
    assert wrong
    assert broken
    assert content["natural"] == pytest.approx(1 - wrong / count)
    assert content["attacked"] == pytest.approx(1 - (wrong + broken) / count)
    parts = content["certified"]
    assert parts.keys() == {"ibp", "crown-ibp", "total"}
    assert parts["ibp"] == pytest.approx(sorts["certified", "ibp"] / count)
    assert parts["total"] == pytest.approx(parts["ibp"] + parts["crown-ibp"])
    assert content["undecided"] == pytest.approx(sorts["undecided", None] / count)
    total = parts["total"] + content["undecided"] + (wrong + broken) / count
    assert total == pytest.approx(1)
    assert content["seconds"] == pytest.approx(sum(row.seconds for row in rows), abs=1e-2)
    assert content["key"]["eps"] == content["settings"]["eps"] == 0.1
    assert content["settings"]["methods"] == ["ibp", "attack", "crown-ibp"]


def test_every_bound_of_the_registry_is_a_method(some):
    few = dataclasses.replace(some, indices=INDICES[:4])
    for name in bounds.BOUNDS:
        content, _ = certified(dataclasses.replace(few, folder=some.folder.with_name(name)), name)
        assert name in content["certified"]


COMMAND = [sys.executable, "-c", "from evocert.cli import main; main()", "certify"]


def started(*arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for_lines(process, path, count):
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def group_size(process):
    """How many processes there are in the group of one."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            count += os.getpgid(int(name)) == process.pid
    return count


@pytest.mark.slow
def test_killed_and_run_again_it_finds_the_same(run_folder, evocert):
    """With SIGKILL, where nothing can be tidied up."""
    arguments = ["certify", run_folder, "--eps", "0.09", "--methods", "ibp,exact", "--examples", 180, "--quiet"]
    assert evocert(*arguments, "--out", run_folder / "whole")[0] == 0
    expected = rows_of(run_folder / "whole")
    results = (run_folder / "results.json").stat()
    stopped_at = []
    for lines in (1, 130):
        with started(*arguments[1:]) as process:
            wait_for_lines(process, run_folder / "certify.jsonl", lines)
            process.send_signal(signal.SIGKILL)
        stopped_at.append((run_folder / "certify.jsonl").read_bytes().count(b"\n"))
    assert stopped_at[0] < stopped_at[1] < len(expected)
    assert evocert(*arguments)[0] == 0
    assert rows_of(run_folder) == expected
    assert (run_folder / "results.json").stat().st_mtime_ns == results.st_mtime_ns
    summaries = [json.loads((folder / "certify.json").read_text()) for folder in (run_folder, run_folder / "whole")]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_says_how_to_go_on(run_folder, workers):
    """As in a terminal, where every process of the group gets it; with several, at the moment at which they begin."""
    with started(
        run_folder, "--eps", "0.1", "--methods", "ibp,exact", "--examples", 350, "--workers", workers
    ) as process:
        wait_for_lines(process, run_folder / "certify.jsonl", 1)
        while workers > 1 and group_size(process) < 4:  # with the tracker of their resources
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.count("\n") == 1, err
    assert "of 350 examples are on record in" in err
    assert "the same command goes on" in err
    assert not (run_folder / ".certify.lock").exists()


def test_ctrl_c_waits_until_processes_are_made():
    """Whichever thread it reaches: a thread that was there before does not have the main thread's mask."""
    asked, answered, inside = threading.Event(), threading.Event(), []

    def stop():
        asked.wait(10)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        answered.set()

    before = signal.getsignal(signal.SIGINT)
    other = threading.Thread(target=stop)
    other.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (where in it is the point)
        with solver._without_interrupts():
            asked.set()
            answered.wait(10)
            other.join()
            inside.append(sum(range(1000)))  # Python looks for signals between its own instructions
        inside.append("behind")
    assert inside == [499500]
    assert signal.getsignal(signal.SIGINT) is before
