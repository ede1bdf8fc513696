"""Captions: the golden outputs as sets of what is possible, and files as people leave them."""

from __future__ import annotations

import random
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.data.captions import (
    CaptionError,
    CaptionOptions,
    bad_brace,
    caption_warnings,
    fullest_captions,
    possible_captions,
    process_caption,
    read_caption,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import ReadGolden


def outputs(
    caption: str, epoch: int = 1, seeds: int = 400, step: int = 0, total: int = 0, **options: Any
) -> set[str]:
    chosen = CaptionOptions(**options).in_steps(total)
    return {process_caption(caption, chosen, random.Random(n), epoch, step) for n in range(seeds)}


def test_golden_cases_are_among_the_possible_outputs(golden: ReadGolden) -> None:
    checked = 0
    for case in golden("captions")["cases"]:
        state = case["state"]
        ours = outputs(
            case["caption"],
            state.get("current_epoch", 1),
            seeds=20,
            step=state.get("current_step", 0),
            total=state.get("max_train_steps", 0),
            **case["subset"],
        )
        theirs = set(case["out_seed0_7"])
        if len(theirs) == 1 or "enable_wildcard" in case["subset"]:
            assert ours == theirs, case["name"]
        else:
            keep = case["subset"].get("keep_tokens", 0) if "|||" not in case["caption"] else 2
            mine, tags = next(iter(ours)).split(", "), next(iter(theirs)).split(", ")
            assert mine[:keep] == tags[:keep], case["name"]
            every = {tag for text in theirs for tag in text.split(", ")}
            assert {tag for text in ours for tag in text.split(", ")} == every, case["name"]
            # At step 20 of 50 three of eight tags are in, in any of six orders.
            assert len(ours) > (2 if "warmup" in case["name"] else 8), case["name"]
        checked += 1
    assert checked == 11


@pytest.mark.parametrize(("step", "num_tags"), [(0, 1), (2, 1), (5, 3), (9, 4), (10, 5), (500, 5)])
def test_tags_warm_up_as_the_reference_tells(step: int, num_tags: int) -> None:
    """The example of reference 4 and A.7: warm-up 10, min 1, five tags."""
    tags = ["a", "b", "c", "d", "e"]
    options = {"token_warmup_step": 10, "token_warmup_min": 1, "seeds": 3, "step": step}
    expected = ", ".join(tags[:num_tags])
    assert outputs("a,b,c,d,e", **options) == {expected}
    # Kept tags do not count; a caption with fewer tags than the least is whole.
    assert outputs("k,a,b,c,d,e", keep_tokens=1, **options) == {f"k, {expected}"}
    few = {**options, "token_warmup_min": 4}
    assert outputs("a,b", **few) == {"a, b"}


def test_a_warm_up_below_one_is_a_share_of_the_run() -> None:
    half = CaptionOptions(token_warmup_step=0.5).in_steps(30)
    assert half.token_warmup_step == 15
    assert CaptionOptions(token_warmup_step=7).in_steps(30).token_warmup_step == 7
    assert half.unrepeatable == ("token_warmup_step",)
    assert half.without_chance().token_warmup_step == 0


def test_shuffling_gives_every_order_and_nothing_else() -> None:
    orders = {f"a, {', '.join(p)}" for p in permutations("bcd")}
    assert outputs("a,b, c,d", shuffle_caption=True, keep_tokens=1) == orders


def test_tag_dropout_spares_the_kept_tags() -> None:
    found = outputs("a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert found == {"a", "a, b", "a, c", "a, b, c"}
    assert outputs("a,b,c", caption_tag_dropout_rate=1.0, keep_tokens=1) == {"a"}


def test_separator_parts_the_caption_into_kept_flexible_and_tail() -> None:
    found = outputs("a, b ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||")
    assert found == {"a, b, c, d, e", "a, b, d, c, e"}


def test_separator_text_never_stays_in_the_caption() -> None:
    assert outputs("a ||| b ||| c ||| d", keep_tokens_separator="|||") == {"a, b, c, d"}
    assert outputs("a,b", keep_tokens_separator="|||") == {"a,b"}


def test_tags_are_joined_with_a_comma_whatever_parted_them() -> None:
    assert outputs("a; b", caption_separator=";", shuffle_caption=True) == {"a, b", "b, a"}


def test_captions_that_do_not_change_stay_as_written() -> None:
    assert outputs("a,b,  a photo of c.") == {"a,b,  a photo of c."}


def test_empty_tags_are_dropped() -> None:
    assert outputs(", a, , b,") == {"a, b"}
    assert outputs("a, , b,", shuffle_caption=True) == {"a, b", "b, a"}


def test_prefix_and_suffix_are_part_of_the_caption() -> None:
    found = outputs("a", caption_prefix="P,", caption_suffix=", S")
    assert found == {"P, a , S"}
    assert outputs("a", caption_prefix="P", caption_dropout_rate=1.0) == {""}
    assert outputs("", caption_prefix="P") == {"P"}


def test_captions_are_dropped_at_their_rate_and_in_their_epochs() -> None:
    options = CaptionOptions(caption_dropout_rate=0.25)
    rng = random.Random(0)
    dropped = sum(process_caption("a", options, rng, 1) == "" for _ in range(4000))
    assert 900 < dropped < 1100  # 1000 +- 3.6 standard deviations
    by_epoch = [outputs("a", epoch, caption_dropout_every_n_epochs=3) for epoch in range(1, 7)]
    assert by_epoch == [{"a"}, {"a"}, {""}, {"a"}, {"a"}, {""}]


def test_keeping_more_tags_than_there_are_is_no_crash() -> None:
    assert outputs("a, b", shuffle_caption=True, keep_tokens=5) == {"a, b"}
    options = CaptionOptions(shuffle_caption=True, keep_tokens=3, keep_tokens_separator="|||")
    warnings = caption_warnings(["a, b", "a, b, c", "a ||| b"], options)
    assert warnings == [
        "keep_tokens_separator '|||' is not in 2 of 3 captions",
        "keep_tokens 3: 1 of 3 captions have fewer tags",
    ]


def test_options_that_find_nothing_to_act_on_are_told() -> None:
    wild = CaptionOptions(enable_wildcard=True)
    assert caption_warnings(["a", "b"], wild) == [
        "enable_wildcard: no caption has {red|blue} or a second line"
    ]
    assert caption_warnings(["a", "{b|c}"], wild) == []
    assert caption_warnings(["a", "b\nc"], wild) == []
    parted = CaptionOptions(secondary_separator=";;;")
    assert caption_warnings(["a;b"], parted) == [
        "secondary_separator ';;;' is in none of the captions"
    ]
    assert caption_warnings(["a;;;b", "c"], parted) == []
    assert caption_warnings([], parted) == []


def test_the_fullest_captions_have_every_tag_and_line() -> None:
    options = CaptionOptions(
        shuffle_caption=True,
        caption_tag_dropout_rate=0.9,
        caption_dropout_rate=1.0,
        token_warmup_step=100,
        enable_wildcard=True,
        secondary_separator=";;;",
        caption_prefix="P",
        caption_suffix="S",
    )
    lines = fullest_captions(options)("a, {b|long}\nc;;;d")
    assert lines == ("P a, long", "c,d S")
    assert fullest_captions(CaptionOptions(keep_tokens_separator="|||"))("a, b") == ("a, b",)


def test_possible_captions_include_the_empty_one_where_captions_drop() -> None:
    options = CaptionOptions(caption_prefix="P", caption_dropout_every_n_epochs=2)
    assert possible_captions("a", options) == ("P a", "")
    assert possible_captions("a", CaptionOptions()) == ("a",)


@pytest.mark.parametrize(
    ("caption", "possible"),
    [
        ("{a|b} {{x}} {c}", {"a {x} c", "b {x} c"}),
        ("x {} y {a|} z", {"x {} y a z", "x {} y  z"}),
        ("{a|{{b}}} c", {"a c", "{b} c"}),
        ("one\ntwo, {x|y}", {"one", "two, x", "two, y"}),
        ("no wildcard", {"no wildcard"}),
    ],
)
def test_wildcards_give_each_line_and_alternative(caption: str, possible: set[str]) -> None:
    assert outputs(caption, enable_wildcard=True) == possible


def test_wildcards_are_drawn_before_tags_are_shuffled() -> None:
    found = outputs("k, {a|b, c}", enable_wildcard=True, shuffle_caption=True, keep_tokens=1)
    assert found == {"k, a", "k, b, c", "k, c, b"}


def test_prefix_goes_to_the_first_line_and_suffix_to_the_last() -> None:
    found = outputs("a\nb", enable_wildcard=True, caption_prefix="P", caption_suffix="S")
    assert found == {"P a", "b S"}


def test_braces_stay_without_wildcards() -> None:
    assert outputs("{a|b} {{c}}") == {"{a|b} {{c}}"}


def test_validation_takes_the_first_line_and_alternative() -> None:
    options = CaptionOptions(enable_wildcard=True, secondary_separator=";;;")
    assert options.unrepeatable == ("enable_wildcard",)
    still = options.without_chance()
    assert still.unrepeatable == ()
    assert possible_captions("{a|b};;;c\nd", still) == ("a,c",)


def test_tags_joined_by_the_secondary_separator_stay_together() -> None:
    assert outputs("sky;;;cloud, b", secondary_separator=";;;") == {"sky,cloud, b"}
    found = outputs("sky;;;cloud, b", secondary_separator=";;;", shuffle_caption=True)
    assert found == {"sky,cloud, b", "b, sky,cloud"}


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("a {b|c} {{ }} {}", None),
        ("a {b|c", 3),
        ("a b|c}", 6),
        ("{a|{b} c", 4),
        ("{a|{b|c}}", 1),
        ("{a} {", 5),
    ],
)
def test_braces_that_are_no_wildcard_are_found(text: str, column: int | None) -> None:
    assert bad_brace(text) == column


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "text", "remark"),
    [
        ("\ufeffcafé".encode(), "café", ""),
        (b"a,\tb \r\n", "a, b", ""),
        ("a,\u00a0b".encode(), "a, b", ""),
        (b"it\x92s caf\xe9", "it\u2019s caf\u00e9", "not UTF-8, read as cp1252"),
        ("一个女孩, red".encode("gb18030"), "一个女孩, red", "not UTF-8, read as gb18030"),
        ("a, é".encode("utf-16"), "a, é", "not UTF-8, read as utf-16"),
        (b"", "", "empty"),
        (b" \r\n\t\n", "", "empty"),
        (b"first\nsecond\n", "first", ""),
        (b"\n\nfirst\n\n", "first", ""),
        ("🐈, 猫".encode(), "🐈, 猫", ""),
    ],
)
def test_captions_are_read_as_people_save_them(
    tmp_path: Path, data: bytes, text: str, remark: str
) -> None:
    caption = read_caption(written(tmp_path, data))
    assert caption.text == text
    assert caption.bad_brace is None
    assert caption.remarks == ((remark,) if remark else ())


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="save it as UTF-8"):
        read_caption(written(tmp_path, b"\x81\xff\x8d\xff\x90\xff\xff"))


def test_lines_are_kept_and_bad_braces_are_placed_in_the_file(tmp_path: Path) -> None:
    caption = read_caption(written(tmp_path, b"\r\n a  b\r\n\r\n  {c|d\r\n"))
    assert caption.lines == ["a b", "{c|d"]
    assert caption.bad_brace == (4, 3)
