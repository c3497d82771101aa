"""What a user sees of a certification while it goes on."""

import io

import pytest

from evocert.certify import display
from evocert.certify.display import Silent, Terminal
from evocert.certify.records import Row
from evocert.display import Output


def rows(*verdicts):
    return [Row(index, 1, 1, verdict, "ibp", 0.1) for index, verdict in enumerate(verdicts)]


@pytest.fixture
def shown(monkeypatch):
    """A display, what it prints, and a clock that stands still."""
    clock, streams = [100.0], []
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])

    def begin(total, done, *, terminal=False):
        streams.append(io.StringIO())
        output = Output(highlight=False, file=streams[-1], force_terminal=terminal, width=80)
        monkeypatch.setattr(display, "Output", lambda **options: output)
        found = Terminal()
        found.begin("mine [1]", total, done)
        return found

    return begin, lambda: streams[-1].getvalue(), clock


def test_plain_lines_come_every_ten_seconds_and_at_the_end(shown):
    begin, printed, clock = shown
    found = begin(8, 0)
    found.decided([])
    found.working("ibp", 8)
    found.working("exact", 5)
    found.decided(rows("certified", "misclassified"))
    assert printed().splitlines() == ["mine [1]: 8 test images", "0/8  - left  ibp on 8"]
    clock[0] += 10
    found.decided(rows("attacked", "undecided"))
    assert printed().splitlines()[2:] == [
        "4/8  0:10 left  exact on 5  natural 75.0 %  certified 25.0 %  broken 25.0 %  undecided 25.0 %"
    ]
    found.decided(rows("certified", "certified", "certified", "certified"))
    assert printed().splitlines()[3:] == [
        "8/8  0:00 left  natural 87.5 %  certified 62.5 %  broken 12.5 %  undecided 12.5 %"
    ]


def test_what_was_on_record_counts_but_says_nothing_of_the_pace(shown):
    begin, printed, clock = shown
    found = begin(4, 2)
    found.decided(rows("certified", "misclassified"))
    assert printed().splitlines() == [
        "mine [1]: 4 test images, 2 on record",
        "2/4  - left  natural 50.0 %  certified 50.0 %  broken 0.0 %  undecided 0.0 %",
    ]
    clock[0] += 12
    found.decided(rows("certified"))
    assert "3/4  0:12 left" in printed()


def test_a_terminal_names_every_method_at_once(shown):
    """A method may take minutes, in which nothing else moves."""
    begin, printed, _ = shown
    found = begin(100, 0, terminal=True)
    for method in ("ibp", "attack", "alpha-crown"):
        found.working(method, 100)
        assert f"{method} on 100" in printed()
    assert "%" not in printed()  # nothing is known yet
    found.stop()
    found.stop()


def test_silence_is_silent(capsys):
    found = Silent()
    found.begin("mine", 3, 0)
    found.working("ibp", 3)
    found.decided(rows("certified"))
    found.stop()
    assert capsys.readouterr() == ("", "")
