"""Schedules: exact ends, monotone, and each shape as its words say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocert.errors import InputError
from evocert.schedules import CONSTANT, SHAPES, Schedule

RAMPS = [shape for shape in SHAPES if shape != "constant"]
FRACTIONS = st.floats(0, 1)
FACTORS = st.floats(1e-6, 1e6)


@st.composite
def schedules(draw):
    start, end = sorted((draw(FRACTIONS), draw(FRACTIONS)))
    shape = draw(st.sampled_from(list(SHAPES)))
    if shape == "constant":
        return Schedule(last=draw(FACTORS))
    return Schedule(shape, start, end, draw(FACTORS), draw(FACTORS), steps=draw(st.integers(1, 9)))


def test_the_default_changes_nothing():
    assert {CONSTANT(fraction) for fraction in (0, 0.3, 1)} == {1.0}


def test_a_constant_is_its_last_factor():
    schedule = Schedule("constant", last=0.5)
    assert {schedule(fraction) for fraction in (0, 0.2, 0.4, 0.9)} == {0.5}
    assert schedule.reach == (0.5, 0.5)


@pytest.mark.parametrize("setting", [{"first": 0.0}, {"start": 0.1}, {"end": 0.4}, {"steps": 2}])
def test_a_schedule_without_a_shape_is_refused(setting):
    """It would silently change nothing."""
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"{name}={value}: allowed is .* with shape='constant': name another shape"):
        Schedule(**setting)


@pytest.mark.parametrize("shape", RAMPS)
def test_ends_are_exact_and_stay(shape):
    schedule = Schedule(shape, start=0.25, end=0.7, first=0.3, last=0.1, steps=3)
    assert [schedule(fraction) for fraction in (0, 0.1, 0.25)] == [0.3] * 3
    assert [schedule(fraction) for fraction in (0.7, 0.9, 1)] == [0.1] * 3


@pytest.mark.parametrize("shape", RAMPS)
def test_a_ramp_of_no_length_is_a_jump(shape):
    schedule = Schedule(shape, start=0.5, end=0.5, first=1, last=0.1)
    assert (schedule(0.4999), schedule(0.5)) == (1, 0.1)


@given(schedules(), FRACTIONS, FRACTIONS)
def test_monotone_and_within_its_reach(schedule, one, other):
    early, late = schedule(min(one, other)), schedule(max(one, other))
    low, high = schedule.reach
    assert low <= early <= high
    assert low <= late <= high
    if schedule.shape != "constant":
        # Rounding alone may turn two neighbours round.
        slack = 1e-12 * high
        assert early <= late + slack if schedule.last >= schedule.first else early >= late - slack


@given(schedules(), st.integers(1, 10))
def test_any_number_of_generations_is_valid(schedule, generations):
    assert all(math.isfinite(schedule(g * (1 / generations))) for g in range(generations))


@pytest.mark.parametrize(
    ("shape", "quarter", "middle"),
    [
        ("linear", 1.5, 2.0),
        # t^4 to a quarter, its tangent after: 1/256 there, slope 1/16, so 1/256 + 3/64 = 13/256 at the end.
        ("smooth", 1 + 2 / 13, 1 + 2 * 5 / 13),
        ("cosine", 2 - math.sqrt(0.5), 2.0),
    ],
)
def test_values_by_hand(shape, quarter, middle):
    schedule = Schedule(shape, start=0.2, end=0.6, first=1, last=3)
    assert schedule(0.3) == pytest.approx(quarter)
    assert schedule(0.4) == pytest.approx(middle)


def slope(schedule, fraction, h=1e-6):
    return (schedule(fraction + h) - schedule(fraction - h)) / (2 * h)


def test_smooth_has_no_kink_but_at_its_end():
    schedule = Schedule("smooth", start=0.2, end=0.6, first=0)
    bend = 0.2 + 0.4 / 4
    assert schedule(bend - 1e-9) == pytest.approx(schedule(bend + 1e-9), abs=1e-7)
    assert slope(schedule, bend - 1e-4) == pytest.approx(slope(schedule, bend + 1e-4), rel=0.01)
    assert slope(schedule, 0.2) == pytest.approx(0, abs=1e-6)
    # Straight after the bend, convex before it.
    assert slope(schedule, 0.35) == pytest.approx(slope(schedule, 0.55), rel=1e-6)
    assert slope(schedule, 0.25) < slope(schedule, 0.29) < slope(schedule, 0.35)


def test_cosine_has_no_kink():
    schedule = Schedule("cosine", start=0.2, end=0.6, last=0.1)
    assert slope(schedule, 0.2) == pytest.approx(0, abs=1e-4)
    assert slope(schedule, 0.6) == pytest.approx(0, abs=1e-4)


def test_steps_are_of_equal_ratio_at_equal_distances():
    schedule = Schedule("step", start=0.4, end=0.8, last=0.01, steps=2)
    assert [schedule(fraction) for fraction in (0.0, 0.4, 0.5, 0.59)] == [1.0] * 4
    # At 0.6 exactly, where (0.6 - 0.4) / 0.4 rounds to less than a half.
    assert [schedule(fraction) for fraction in (0.6, 0.7, 0.79)] == pytest.approx([0.1] * 3)
    assert [schedule(fraction) for fraction in (0.8, 1.0)] == [0.01] * 2


def test_one_step_is_a_drop_at_the_end():
    schedule = Schedule("step", start=0.1, end=0.5, last=0.1)
    assert (schedule(0.499), schedule(0.5)) == (1.0, 0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": "liner"}, ("shape='liner'", "linear", "cosine")),
        ({"shape": 3}, ("shape=3", "int", "text")),
        ({"start": 0.5, "end": 0.4}, ("start=0.5", "end=0.4", "0 <= start <= end <= 1")),
        ({"end": 1.1}, ("end=1.1",)),
        ({"start": -0.1}, ("start=-0.1",)),
        ({"start": math.nan}, ("start=nan",)),
        ({"first": -1}, ("first=-1", "0 or more")),
        ({"last": math.inf}, ("last=inf", "finite")),
        ({"last": "1"}, ("last='1'", "number")),
        ({"shape": "step", "last": 0}, ("last=0", "over 0")),
        ({"steps": 0}, ("steps=0", "1 or more")),
        ({"steps": 2.0}, ("steps=2.0", "whole number")),
        ({"steps": True}, ("steps=True", "bool")),
    ],
)
def test_refused(settings, words):
    with pytest.raises(InputError) as refused:
        Schedule(**settings)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
