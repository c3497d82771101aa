"""Rows that outlive the process that wrote them, and only those."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from evocert.certify import records as module
from evocert.certify.records import Records, Row
from evocert.errors import InputError

KEY = {"weights": "a", "data": "digits", "part": "test", "images": "b", "eps": 0.1}
FIELDS = ["index", "label", "prediction", "verdict", "by", "seconds"]


def row(index, verdict="certified", by="ibp", **more):
    return Row(index, 3, 3, verdict, by, 0.5, **more)


def undecided(index, methods=("ibp", "exact"), timeout=30.0):
    return row(index, "undecided", None, tried={"methods": list(methods), "timeout": timeout})


@pytest.fixture
def opened(tmp_path):
    """Opens records, and closes those before: as the next process would."""
    last = []

    def open_again(key=KEY):
        if last:
            last.pop().close()
        last.append(Records.open(tmp_path / "run", key))
        return last[0]

    yield open_again
    if last:
        last.pop().close()


class TestRows:
    def test_survive(self, opened):
        rows = [row(4), undecided(2), row(7, "attacked", "attack", point="x.npy"), row(1, contradicted="attack")]
        found = opened()
        found.add(rows[:2])
        found.add(rows[2:])
        assert opened().rows == {each.index: each for each in rows}

    def test_have_the_fields_of_the_contract_and_those_that_are_needed(self, opened):
        found = opened()
        found.add([row(4), undecided(2), row(7, "attacked", "attack", point="x.npy"), row(1, contradicted="attack")])
        lines = [json.loads(line) for line in found.path("jsonl").read_text().splitlines()]
        more = [[], ["tried"], ["point"], ["contradicted"]]
        assert [list(line) for line in lines] == [FIELDS + each for each in more]
        assert lines[0] == {
            "index": 4,
            "label": 3,
            "prediction": 3,
            "verdict": "certified",
            "by": "ibp",
            "seconds": 0.5,
        }
        assert lines[1]["by"] is None

    def test_are_on_the_disk_at_once(self, opened):
        found = opened()
        for number in range(3):
            found.add([row(number)])
            assert found.path("jsonl").read_text().count("\n") == number + 1

    def test_replace_what_was_known(self, opened):
        found = opened()
        found.add([undecided(2), row(3)])
        found.add([row(2, by="exact")])
        assert found.path("jsonl").read_text().count("\n") == 2
        assert opened().rows == {2: row(2, by="exact"), 3: row(3)}

    def test_nothing_to_add_is_nothing(self, opened):
        found = opened()
        found.add([])
        assert not found.path("jsonl").exists()


class TestDamage:
    @pytest.mark.parametrize("cut", [1, 2, 20, 60])
    def test_a_torn_last_line_is_cut_off(self, opened, cut):
        found = opened()
        found.add([row(1), row(2), row(3)])
        content = found.path("jsonl").read_bytes()
        found.path("jsonl").write_bytes(content[:-cut])
        again = opened()
        assert again.rows.keys() == ({1, 2, 3} if cut == 1 else {1, 2})  # only the newline was lost
        again.add([row(4)])
        assert opened().rows.keys() == again.rows.keys() | {4}

    def test_a_torn_letter_is_cut_off(self, opened):
        found = opened()
        found.add([row(1)])
        with found.path("jsonl").open("ab") as file:
            file.write(b'{"index": 2, "label": "\xc3')
        assert opened().rows == {1: row(1)}

    @pytest.mark.parametrize(
        "line",
        [
            b"{",
            b"17",
            b'{"index": 1}',
            b"\xff",
            json.dumps({**json.loads(row(1).json()), "colour": 3}).encode(),
            json.dumps({**json.loads(row(1).json()), "verdict": "fine"}).encode(),
            json.dumps({**json.loads(row(1).json()), "index": "1"}).encode(),
        ],
    )
    def test_a_damaged_line_is_refused(self, opened, tmp_path, line):
        found = opened()
        found.add([row(1), row(2)])
        lines = found.path("jsonl").read_bytes().splitlines()
        content = b"\n".join([lines[0], line, lines[1]]) + b"\n"
        found.path("jsonl").write_bytes(content)
        with pytest.raises(InputError, match=r"certify\.jsonl, line 2: .* move the file away"):
            opened()
        assert (tmp_path / "run" / "certify.jsonl").read_bytes() == content
        (tmp_path / "run" / "certify.jsonl").unlink()
        assert opened().rows == {}  # it was not left locked

    def test_a_damaged_summary_is_refused(self, opened, tmp_path):
        opened().path("json").write_text("{")
        with pytest.raises(InputError, match=r"certify\.json is no JSON"):
            opened()

    def test_rows_of_an_unknown_key_are_refused(self, opened):
        """They would be taken for this key's, whatever radius they are of."""
        found = opened()
        found.add([row(1)])
        found.path("json").unlink()
        with pytest.raises(InputError, match=r"certify\.jsonl: certify\.json is gone"):
            opened({**KEY, "eps": 0.2})


class TestKeys:
    def test_another_key_gets_other_files(self, opened, tmp_path):
        found = opened()
        found.add([row(1)])
        for name, value in (("eps", 0.2), ("weights", "c"), ("images", "c"), ("data", "mnist")):
            other = opened({**KEY, name: value})
            assert other.rows == {}
            assert other.name.startswith("certify-")
            other.add([row(5, by=name)])
        assert len(list((tmp_path / "run").glob("certify*.jsonl"))) == 5
        assert opened({**KEY, "eps": 0.2}).rows == {5: row(5, by="eps")}
        assert opened().rows == {1: row(1)}

    def test_the_summary_has_the_key_from_the_beginning(self, opened):
        assert json.loads(opened().path("json").read_text()) == {"key": KEY}

    def test_counterexamples_of_another_key_are_in_another_folder(self, opened):
        first = opened().store(3, torch.zeros(1, 2, 2))
        second = opened({**KEY, "eps": 0.2}).store(3, torch.ones(1, 2, 2))
        assert first != second


class TestLock:
    def test_a_second_one_is_refused(self, opened, tmp_path):
        opened()
        with pytest.raises(InputError, match="another process is certifying there"):
            Records.open(tmp_path / "run", KEY)
        opened()  # closes the first

    def test_another_process_is_refused_until_it_is_gone(self, opened, tmp_path):
        lock = tmp_path / "run" / ".certify.lock"
        lock.parent.mkdir()
        code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
        command = [sys.executable, "-c", code, str(lock)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            with pytest.raises(InputError, match="another process is certifying there"):
                opened()
            process.kill()
        opened()

    def test_what_is_left_of_a_killed_process_is_no_lock(self, opened, tmp_path):
        opened().close()
        (tmp_path / "run" / ".certify.lock").touch()
        opened()

    def test_nothing_hidden_is_left(self, opened, tmp_path):
        found = opened()
        found.add([row(1)])
        found.store(1, torch.zeros(1, 2, 2))
        found.write({"key": KEY})
        found.close()
        assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]

    @pytest.mark.parametrize("place", ["file", "file/below"])
    def test_a_place_that_is_no_folder(self, tmp_path, place):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"file.* cannot be written to"):
            Records.open(tmp_path / place, KEY)


@pytest.mark.parametrize(
    ("tried", "now", "again"),
    [
        ((("ibp", "exact"), 30.0), (("ibp", "exact"), 30.0), False),
        ((("ibp", "exact"), 30.0), (("ibp", "exact"), 20.0), False),
        ((("ibp", "exact"), 30.0), (("ibp", "exact"), 31.0), True),
        ((("ibp", "exact"), 30.0), (("ibp",), 31.0), False),  # the timeout is of the exact method
        ((("ibp", "exact"), 30.0), (("exact",), 30.0), False),
        ((("ibp",), 0.0), (("ibp", "exact"), 1.0), True),
        ((("ibp", "exact"), 30.0), (("ibp", "attack"), 1.0), True),
        ((("ibp", "exact"), 30.0), (("exact", "ibp"), 30.0), False),
    ],
)
def test_what_is_tried_again(tried, now, again):
    assert undecided(1, *tried).to_retry(*now) is again
    for verdict in ("misclassified", "certified", "attacked"):
        assert not row(1, verdict).to_retry(*now)


class TestPoints:
    def test_are_as_they_were_found(self, opened, tmp_path):
        point = torch.rand(3, 4, 5)
        name = opened().store(12, point)
        found = np.load(tmp_path / "run" / name)
        assert found.dtype == np.float32
        assert torch.equal(torch.from_numpy(found), point)

    def test_are_whole_or_not_there(self, opened, tmp_path, monkeypatch):
        found = opened()
        first = torch.zeros(1, 2, 2)
        name = found.store(12, first)

        def full(source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("evocert.files.os.replace", full)
        for index in (12, 13):
            with pytest.raises(OSError, match="No space"):
                found.store(index, first + 1)
        folder = (tmp_path / "run" / name).parent
        assert [path.name for path in folder.iterdir()] == ["000012.npy"]
        assert torch.equal(torch.from_numpy(np.load(tmp_path / "run" / name)), first)

    def test_are_written_by_the_way_that_survives_a_power_cut(self, opened, monkeypatch):
        written = []
        monkeypatch.setattr(module, "write_atomically", lambda path, content: written.append(path.name))
        opened().store(12, torch.zeros(1, 2, 2))
        assert "000012.npy" in written
