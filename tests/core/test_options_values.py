"""Values of every kind, from words and from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import Field

from sdxl_train.components import Optimizer, OptionModel, StepsOrShare
from sdxl_train.data.dataset_options import Resolution  # noqa: TC001 - pydantic reads it
from sdxl_train.options import (
    Setting,
    Words,
    nearest,
    options_of,
    parse_pairs,
    suggestion,
    validate,
)
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from sdxl_train.errors import Problem


class Values(OptionModel):
    """One option of each kind."""

    count: int | None = Field(None, ge=1, description="A count.")
    rate: float = Field(1.0, ge=0, lt=10, description="A rate.")
    ratio: float | None = None
    switch: bool = False
    wish: bool | None = None
    text: str = ""
    maybe: str | None = None
    path: Path | None = None
    folder: Path = Path()
    mode: Literal["no", "fp16", "bf16"] = "no"
    length: Literal[75, 150, 225] | None = None
    names: list[str] = Field([])
    rates: list[Annotated[float, Field(ge=0)]] | None = None
    dims: list[int] | None = None
    pair: tuple[float, float] = (0.9, 0.999)
    warmup: StepsOrShare = 0
    size: Resolution | None = None
    extra: list[str] | dict[str, Any] | None = None


def _parse(name: str, value: object) -> Any:
    return options_of(Values)[name].parse(value)


def _words(name: str, *words: str) -> Any:
    return _parse(name, Words(words))


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("count", ["8"], 8),
        ("count", ["1e3"], 1000),
        ("count", ["None"], None),
        ("rate", ["1e-4"], 1e-4),
        ("rate", ["3"], 3.0),
        ("ratio", ["-0.5"], -0.5),
        ("ratio", ["-1e-4"], -1e-4),
        ("switch", [], True),
        ("switch", ["true"], True),
        ("switch", ["True"], True),
        ("switch", ["false"], False),
        ("wish", ["False"], False),
        ("wish", [], True),
        ("text", ["True"], "True"),
        ("text", ["1e-4"], "1e-4"),
        ("text", [""], ""),
        ("text", ["None"], "None"),
        ("maybe", ["None"], None),
        ("path", ["a b/c.toml"], Path("a b/c.toml")),
        ("path", [""], None),
        ("mode", ["bf16"], "bf16"),
        ("length", ["150"], 150),
        ("names", ["a", "b,c"], ["a", "b,c"]),
        ("names", ["(masterpiece:1.2)"], ["(masterpiece:1.2)"]),
        ("names", ["1,2"], ["1,2"]),
        ("names", ["['a', 'b']"], ["a", "b"]),
        ("names", [], []),
        ("rates", ["1e-4", "5e-5"], [1e-4, 5e-5]),
        ("rates", ["1e-4,5e-5"], [1e-4, 5e-5]),
        ("rates", ["0.5"], [0.5]),
        ("dims", ["[4, 8]"], [4, 8]),
        ("dims", ["4,8,", "16"], [4, 8, 16]),
        ("pair", ["0.9,0.99"], (0.9, 0.99)),
        ("pair", ["(0.9, 0.99)"], (0.9, 0.99)),
        ("pair", ["0.9", "0.99"], (0.9, 0.99)),
        ("warmup", ["100"], 100),
        ("warmup", ["0.1"], 0.1),
        ("warmup", ["10%"], 0.1),
        ("size", ["1024"], (1024, 1024)),
        ("size", ["1024,768"], (1024, 768)),
        ("size", ["1024", "768"], (1024, 768)),
        ("extra", ["conv_dim=4", "algo=a,b"], ["conv_dim=4", "algo=a,b"]),
    ],
)
def test_words_are_read_as_their_option_asks(name: str, words: list[str], value: object) -> None:
    parsed = _words(name, *words)

    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("count", ["0"], "'0' is not a whole number >= 1"),
        ("count", ["1.5"], "'1.5' is not a whole number >= 1"),
        ("count", ["True"], "'True' is not a whole number >= 1"),
        ("count", [], "got no value, expected a whole number >= 1"),
        ("count", ["1", "2"], "got 2 values (1 2), expected a whole number >= 1"),
        ("rate", ["high"], "'high' is not a number >= 0 and < 10"),
        ("rate", ["nan"], "'nan' is not a number >= 0 and < 10"),
        ("rate", ["10"], "'10' is not a number >= 0 and < 10"),
        ("ratio", ["inf"], "'inf' is not a number"),
        ("ratio", ["-inf"], "'-inf' is not a number"),
        ("ratio", ["1e999"], "'1e999' is not a number"),
        ("ratio", ["True"], "'True' is not a number"),
        ("switch", ["maybe"], "'maybe' is not true or false"),
        ("switch", ["true", "out"], "got 2 values (true out), expected true or false"),
        ("folder", [""], "is empty, expected a path"),
        ("mode", ["bf61"], "'bf61' is not one of no, fp16, bf16; did you mean bf16?"),
        ("length", ["100"], "'100' is not one of 75, 150, 225"),
        ("rates", ["1e-4", "high"], "'1e-4 high' is not a list of numbers >= 0"),
        ("rates", ["-1"], "'-1' is not a list of numbers >= 0"),
        ("rates", ["nan"], "'nan' is not a list of numbers >= 0"),
        ("pair", ["0.9"], "'0.9' is not 2 numbers"),
        ("warmup", ["1.5"], "'1.5' is not a whole number >= 0 or a number >= 0 and < 1"),
    ],
)
def test_wrong_words_are_told_with_what_was_expected(
    name: str, words: list[str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=r"expected|is not") as caught:
        _words(name, *words)

    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("rate", 3, 3.0),
        ("rate", 1e-4, 1e-4),
        ("switch", False, False),
        ("path", "a/b", Path("a/b")),
        ("path", "", None),
        ("length", 75, 75),
        ("names", ["a"], ["a"]),
        ("names", "a", ["a"]),
        ("rates", 1e-4, [1e-4]),
        ("rates", [1, 5e-5], [1.0, 5e-5]),
        ("pair", [0.9, 0.99], (0.9, 0.99)),
        ("warmup", "10%", 0.1),
        ("warmup", 100, 100),
        ("warmup", 0.05, 0.05),
        ("size", 1024, (1024, 1024)),
        ("size", "1024,768", (1024, 768)),
        ("size", [1024, 768], (1024, 768)),
        ("extra", {"conv_dim": 4}, {"conv_dim": 4}),
    ],
)
def test_values_of_toml_keep_their_type(name: str, value: object, parsed: object) -> None:
    result = _parse(name, value)

    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("rate", "1e-4", '"1e-4" is not a number >= 0 and < 10; write it without quotes'),
        ("count", "8", '"8" is not a whole number >= 1; write it without quotes'),
        ("count", True, "true is not a whole number >= 1"),
        ("count", 1.0, "1.0 is not a whole number >= 1"),
        ("rate", False, "false is not a number >= 0 and < 10"),
        ("rate", float("nan"), "NaN is not a number >= 0 and < 10"),
        ("ratio", float("inf"), "Infinity is not a number"),
        ("ratio", [0.5], "[0.5] is not a number"),
        ("switch", "true", '"true" is not true or false; write it without quotes'),
        ("switch", 1, "1 is not true or false"),
        ("text", 5, "5 is not text"),
        ("length", "75", '"75" is not one of 75, 150, 225'),
        ("mode", "bf61", '"bf61" is not one of no, fp16, bf16; did you mean bf16?'),
        ("names", [1], "[1] is not a list of texts"),
        ("rates", ["1e-4"], '["1e-4"] is not a list of numbers >= 0'),
        ("pair", [0.9], "[0.9] is not 2 numbers"),
    ],
)
def test_toml_is_read_strictly(name: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        _parse(name, value)

    assert str(caught.value).startswith(complaint)


def test_paths_hold_home_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "/sets")

    assert _words("path", "~/a") == tmp_path / "a"
    assert _parse("path", "$SETS/b") == Path("/sets/b")


def test_args_take_what_sd_scripts_users_write() -> None:
    problems: list[Problem] = []
    pairs = parse_pairs(
        ["betas=0.9,0.999", "decouple=True", "name='a b'", 'other="c"', "d0=1e-6", "tag=a=b"],
        "--optimizer_args",
        "command line",
        problems,
    )

    assert problems == []
    assert {key: str(setting.value) for key, setting in pairs.items()} == {
        "betas": "0.9,0.999",
        "decouple": "True",
        "name": "a b",
        "other": "c",
        "d0": "1e-6",
        "tag": "a=b",
    }
    assert pairs["d0"].place == "--optimizer_args d0"


def test_args_that_are_no_pairs_are_all_told() -> None:
    problems: list[Problem] = []

    parse_pairs(["dim", "=4", "a=1", "a=2"], "--network_args", "command line", problems)

    assert [str(problem).partition("\n")[0] for problem in problems] == [
        "--network_args: 'dim' is not key=value",
        "--network_args: '=4' is not key=value",
        "--network_args a: stands twice",
    ]


def test_all_mistakes_are_told_at_once() -> None:
    class Strict(OptionModel):
        size: int
        rate: float = Field(1.0, le=1)

    problems: list[Problem] = []
    settings, _ = from_words(["--rate", "2"], [])

    assert validate(Strict, settings, problems) is None
    assert [problem.place for problem in problems] == ["--size", "--rate"]


def test_required_options_of_args_are_named_as_they_are_written() -> None:
    class Momentum(Optimizer):
        momentum: float

        def build(self, groups: Any) -> Any: ...

    problems: list[Problem] = []

    assert validate(Momentum, {}, problems) is None
    assert [problem.place for problem in problems] == ["--optimizer_args momentum"]
    assert options_of(Momentum)["learning_rate"].flag == "--learning_rate"


def test_options_that_contradict_each_other_are_told_where_they_were_given() -> None:
    from pydantic import model_validator

    class Range(OptionModel):
        low: int = 0
        high: int = 10

        @model_validator(mode="after")
        def _ordered(self) -> Range:
            if self.low >= self.high:
                raise ValueError(f"{self.low} is not below {self.high}")
            return self

    problems: list[Problem] = []
    low = Setting(value=20, place="run.toml:3 low", origin="run.toml:3")

    assert validate(Range, {"low": low}, problems) is None
    assert [str(problem) for problem in problems] == ["run.toml:3 low: 20 is not below 10"]


def test_a_command_line_is_read_without_knowing_its_flags() -> None:
    notices: list[str] = []
    line = (
        "go now --max-train-steps 5 --text_encoder_lr=1e-4=x --shift -1.5 -2 --sdpa "
        "--noise a --noise b --seed 1 --seed 2"
    )
    settings, leading = from_words(line.split(), notices)

    assert [str(word.value) for word in leading] == ["go", "now"]
    assert {name: setting.value for name, setting in settings.items()} == {
        "max_train_steps": Words(("5",)),
        "text_encoder_lr": Words(("1e-4=x",)),
        "shift": Words(("-1.5", "-2")),
        "sdpa": Words(()),
        "noise": Words(("a", "b")),
        "seed": Words(("2",)),
    }
    assert notices == ["--seed is given twice: '2' wins over '1'"]


def test_nearest_name_ignores_case_and_separators() -> None:
    assert nearest("Max-Train-Step", ["max_train_steps", "max_train_epochs"]) == "max_train_steps"
    assert nearest("xyz", ["max_train_steps"]) is None
    assert suggestion("xyz", ["b", "a"]) == "known are a, b"


def test_schema_says_what_a_value_may_be() -> None:
    schema = options_of(Values)["rate"].schema

    assert schema["type"] == "number"
    assert schema["minimum"] == 0
    assert schema["exclusiveMaximum"] == 10
