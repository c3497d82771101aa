"""Settings as text and as values: each type, and what is said of what is not one."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evocert.errors import InputError
from evocert.settings import check_choice, check_types, nearest, parse_setting, plain, shown, type_of


class Thing:
    pass


@dataclass(frozen=True)
class Settings:
    count: int = 1
    size: float = 1.0
    flag: bool = False
    name: str = "a"
    limit: float | None = None
    memory: int | str = 1
    values: Sequence[float] | None = None
    anything: Sequence[Any] = ()
    table: Mapping[str, Any] = field(default_factory=dict)
    part: str | Thing | Callable[..., Thing] = "a"

    def __post_init__(self):
        check_types(self)


class TestText:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("count", "12", 12),
            ("count", " -3 ", -3),
            ("size", "0.5", 0.5),
            ("size", "1e-3", 1e-3),
            ("size", "8/255", 8 / 255),
            ("size", " 1 / 4 ", 0.25),
            ("size", "3", 3.0),
            ("flag", "true", True),
            ("flag", "False", False),
            ("name", " b ", "b"),
            ("name", "none", "none"),
            ("limit", "none", None),
            ("limit", "NULL", None),
            ("limit", "2", 2.0),
            ("memory", "12", 12),
            ("memory", "2GiB", "2GiB"),
            ("values", "0.5", (0.5,)),
            ("values", "[0.1, 1/2,3]", (0.1, 0.5, 3.0)),
            ("values", "(1,)", (1.0,)),
            ("values", "none", None),
            ("part", "cnn3", "cnn3"),
        ],
    )
    def test_read(self, name, text, expected):
        value = parse_setting(name, text, type_of(Settings, name))
        assert value == expected
        assert type(value) is type(expected)

    @pytest.mark.parametrize(
        ("name", "text", "allowed"),
        [
            ("count", "2.0", "a whole number"),
            ("count", "1e3", "a whole number"),
            ("count", "none", "a whole number"),
            pytest.param("count", "9" * 5000, "a whole number", id="more digits than Python reads"),
            ("size", "", "a number"),
            ("size", "1/0", "a number"),
            ("size", "1/2/3", "a number"),
            ("size", "big", "a number"),
            ("flag", "maybe", "true or false"),
            ("limit", "x", "a number or none"),
            ("values", "1,,2", "a list of numbers or none"),
            ("values", "", "a list of numbers or none"),
            ("anything", "StdOutLogger", "in the problem file"),
            ("table", "a", "in the problem file"),
        ],
    )
    def test_refused(self, name, text, allowed):
        with pytest.raises(InputError) as refused:
            parse_setting(name, text, type_of(Settings, name))
        assert str(refused.value).startswith(f"--set {name}={text}")
        assert allowed in str(refused.value)


class TestTypes:
    def test_one_type_for_one_setting(self):
        """However it was written: what is compared and recorded must not depend on it."""
        settings = Settings(size=2, limit=3, values=[1, 2.5], anything=[1, "a"], memory=5)
        assert [type(v) for v in (settings.size, settings.limit, settings.memory)] == [float, float, int]
        assert settings.values == (1.0, 2.5)
        assert {type(v) for v in settings.values} == {float}
        assert settings.anything == (1, "a")

    @pytest.mark.parametrize(
        "good", [{"part": Thing()}, {"part": lambda: Thing()}, {"part": Thing}, {"table": {"a": 1}}, {"values": ()}]
    )
    def test_allowed(self, good):
        Settings(**good)

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ({"count": 1.0}, ("count=1.0", "float", "a whole number")),
            ({"count": True}, ("count=True", "bool", "a whole number")),
            ({"count": None}, ("count=None", "a whole number")),
            ({"size": "1"}, ("size='1'", "str", "a number")),
            ({"size": False}, ("size=False", "bool")),
            ({"size": math.nan}, ("size=nan", "a number")),
            ({"size": 10**400}, ("size=", "finite")),
            ({"size": 10**6000}, ("size=<int>", "finite")),
            ({"flag": 1}, ("flag=1", "true or false")),
            ({"name": b"a"}, ("bytes", "text")),
            ({"limit": "1"}, ("limit='1'", "a number or none")),
            ({"memory": 1.5}, ("memory=1.5", "a whole number or text")),
            ({"values": 3}, ("values=3", "a list of numbers or none")),
            ({"values": [1, "2"]}, ("values=", "a list of numbers")),
            ({"values": [True]}, ("values=", "a list of numbers")),
            ({"values": [10**400]}, ("values=", "finite")),
            ({"values": "12"}, ("values='12'",)),
            ({"anything": "ab"}, ("anything='ab'", "a list")),
            ({"table": [1]}, ("table=[1]", "a dict")),
            ({"part": 3}, ("part=3", "text or a Thing or a function")),
        ],
    )
    def test_refused(self, bad, words):
        with pytest.raises(InputError) as refused:
            Settings(**bad)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 300
        for word in words:
            assert word in str(refused.value)


class TestPlain:
    def test_whatever_there_is_can_be_written_as_json(self):
        value = Settings(
            values=[1, 2],
            part=Thing,
            anything=[
                ("StdOutLogger", {"interval": 3, "directory": Path("a/b"), "limit": math.inf}),
                lambda s: s,
                functools.partial(print),
                Thing(),
            ],
            table={1: None},
        )
        written = json.loads(json.dumps(plain(value), allow_nan=False))
        assert written["values"] == [1.0, 2.0]
        assert written["part"] == "Thing"
        assert written["table"] == {"1": None}
        assert written["anything"][0] == ["StdOutLogger", {"interval": 3, "directory": "a/b", "limit": "inf"}]
        assert written["anything"][1].endswith("<lambda>")
        assert written["anything"][2:] == ["partial", "Thing"]

    def test_long_values_are_cut_in_messages(self):
        class Strange:
            def __repr__(self):
                raise RuntimeError

        assert shown("a\nb") == "'a\\nb'"
        assert len(shown(list(range(10**4)))) == 120
        assert shown(Strange()) == "<Strange>"


class TestNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [("popsze", ["popsize"]), ("PopSize", ["popsize"]), ("batch-size", ["batch_size"]), ("zzz", [])],
    )
    def test_nearest(self, name, expected):
        assert nearest(name, ["popsize", "batch_size", "eps"]) == expected

    def test_choices(self):
        check_choice("a", "x", ("x", "y"))
        with pytest.raises(InputError, match=r"^a='lineer': allowed are linear, cosine \(did you mean linear\?\)$"):
            check_choice("a", "lineer", ("linear", "cosine"))
        with pytest.raises(InputError, match=r"^a='z': allowed are x, or a path$"):
            check_choice("a", "z", ("x",), ", or a path")
