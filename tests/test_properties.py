"""What holds for every input: of options, files, captions, prompts, sizes, names and headers.

Hypothesis makes the inputs, the same ones in each run; SDXL_TRAIN_EXAMPLES asks for more of them.
"""

# ruff: noqa: PT017 - whether there is a fault depends on the input; what it says is the property

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from sdxl_lora_plugins.observers.prompts import read_prompts
from sdxl_train import UserError
from sdxl_train.checkpoint import file_name, prune, state_name
from sdxl_train.config import CORE_OPTIONS, OutputOptions
from sdxl_train.counts import SavePoint
from sdxl_train.data.buckets import BucketOptions, SizeError, check_buckets, fitter
from sdxl_train.data.captions import (
    CaptionError,
    CaptionOptions,
    bad_brace,
    process_caption,
    read_caption,
    split_tags,
)
from sdxl_train.earlier import files_of_earlier_run
from sdxl_train.ldm.headers import BadFileError, read_header
from sdxl_train.options import Words, options_of, parse_pairs
from sdxl_train.packing import pack, unpack
from sdxl_train.plugins import PluginRequest
from sdxl_train.settings import from_file, from_words

PROFILE = settings(
    max_examples=int(os.environ.get("SDXL_TRAIN_EXAMPLES", "100")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
OPTIONS = [option for model in CORE_OPTIONS for option in options_of(model).values()]


@contextlib.contextmanager
def written(data: bytes, name: str) -> Any:
    """Give a file of its own with this content; a fixture would be one for all examples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


# ------------------------------------------------------------------------------ options and files


@PROFILE
@given(words=st.lists(WORDS | st.sampled_from(["--", "---", "-1", "--x=", "--=", "="])))
def test_any_command_line_is_read_to_the_last_word(words: list[str]) -> None:
    found, leading = from_words(words, [])
    assert len(leading) <= len(words)
    assert all(isinstance(setting.value, Words) for setting in found.values())


@PROFILE
@given(option=st.sampled_from(OPTIONS), words=st.lists(WORDS, max_size=3).map(tuple))
@example(option=OPTIONS[0], words=())
def test_any_words_give_a_value_or_say_what_was_expected(option: Any, words: Any) -> None:
    try:
        option.parse(Words(words))
    except ValueError as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@PROFILE
@given(option=st.sampled_from(OPTIONS), value=JSON)
def test_any_value_of_a_file_fits_or_is_told(option: Any, value: Any) -> None:
    try:
        parsed = option.parse(value)
    except ValueError as error:
        assert str(error)
    else:
        assert not isinstance(parsed, float) or math.isfinite(parsed)


KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
PLAIN = st.booleans() | st.integers(-(2**53), 2**53) | WORDS | st.lists(st.integers(0, 9))


@PROFILE
@given(values=st.dictionaries(KEYS, PLAIN, max_size=5), table=KEYS)
def test_what_is_written_as_toml_is_read_back(values: dict[str, Any], table: str) -> None:
    with written(tomli_w.dumps({table: values}).encode(), "run.toml") as path:
        try:
            found = from_file(path)
        except UserError as error:
            assert any(name in values for name in ("config_file", "output_config")) or "twice" in (
                str(error)
            )
            return
    if not table.endswith("_args"):
        plural = {"plugins": "plugin"}
        assert {n: s.value for n, s in found.items()} == {
            plural.get(name, name): value for name, value in values.items()
        }


@PROFILE
@given(data=st.binary(max_size=60) | WORDS.map(str.encode))
@example(data=b"\xff\xfe[\x00")
@example(data=b"a = " + b"[" * 2000)
def test_any_bytes_as_a_file_of_options_are_read_or_told(data: bytes) -> None:
    with written(data, "run.toml") as path, contextlib.suppress(UserError):
        from_file(path)


@PROFILE
@given(words=st.lists(WORDS | st.sampled_from(["a=", "=b", "a=b=c", "a='", '"'])))
def test_any_pairs_are_taken_or_told(words: list[str]) -> None:
    problems: list[Any] = []
    pairs = parse_pairs(words, "--network_args", "command line", problems)
    assert len(pairs) + len(problems) == len(words)


@PROFILE
@given(text=WORDS | st.from_regex(r"(no:)?[a-z-]{1,5}[<>=~!]{0,2}[0-9.a*]{0,4}", fullmatch=True))
def test_any_request_for_a_plugin_is_read_or_told(text: str) -> None:
    with contextlib.suppress(ValueError):
        request = PluginRequest.parse(text)
        assert request.name


# --------------------------------------------------------------------------- captions and prompts

CAPTIONS = st.text(st.sampled_from(list("ab ,|{}#;\n猫")), max_size=30)
CAPTION_OPTIONS = st.builds(
    CaptionOptions,
    shuffle_caption=st.booleans(),
    caption_separator=st.sampled_from([",", ";", "#"]),
    keep_tokens=st.integers(0, 5),
    keep_tokens_separator=st.sampled_from(["", "|", "||"]),
    secondary_separator=st.sampled_from(["", "#"]),
    caption_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
    caption_dropout_every_n_epochs=st.integers(0, 3),
    caption_tag_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
)


@PROFILE
@given(caption=CAPTIONS, options=CAPTION_OPTIONS, seed=st.integers(0, 9), epoch=st.integers(1, 4))
def test_a_processed_caption_holds_tags_of_its_own_only(
    caption: str, options: CaptionOptions, seed: int, epoch: int
) -> None:
    assume(options.secondary_separator != options.caption_separator)
    first, again = (process_caption(caption, options, random.Random(seed), epoch) for _ in "ab")
    assert first == again
    marks = (options.keep_tokens_separator, options.secondary_separator, ",")
    pattern = "|".join(re.escape(m) for m in (*marks, options.caption_separator) if m)
    known = {part.strip() for part in re.split(pattern, caption)}
    assert {part.strip() for part in re.split(pattern, first)} <= known | {""}
    kept = split_tags(caption, options.caption_separator)[: options.keep_tokens]
    marked = options.keep_tokens_separator and options.keep_tokens_separator in caption
    if first and options.changes_tags and not marked and not options.secondary_separator:
        assert first.startswith(", ".join(kept))


@PROFILE
@given(caption=CAPTIONS, seed=st.integers(0, 9))
def test_balanced_wildcards_leave_no_brace(caption: str, seed: int) -> None:
    assume(all(bad_brace(line) is None for line in caption.split("\n")))
    assume(not any(pair in caption for pair in ("{{", "}}", "{}")))
    drawn = process_caption(caption, CaptionOptions(enable_wildcard=True), random.Random(seed), 1)
    assert "{" not in drawn
    assert "}" not in drawn


@PROFILE
@given(data=st.binary(max_size=40) | WORDS.map(lambda text: text.encode("utf-16")))
def test_any_bytes_as_a_caption_are_lines_or_told(data: bytes) -> None:
    with written(data, "a.txt") as path, contextlib.suppress(CaptionError):
        lines = read_caption(path).lines
        assert all(line and line == " ".join(line.split()) for line in lines)


PROMPTS = st.text(st.sampled_from(list("ab -\n#=[]\"'{}:1.")), max_size=40)
FLAGS = st.lists(
    st.tuples(st.sampled_from(["w", "h", "s", "l", "d", "n", "ss", "am", "zz"]), WORDS), max_size=4
).map(lambda flags: "a cat " + " ".join(f"--{letter} {value}" for letter, value in flags))


@PROFILE
@given(text=PROMPTS | FLAGS, ending=st.sampled_from(["txt", "toml", "json"]))
@example(text="[" * 5000, ending="json")
def test_any_file_of_prompts_is_read_or_told_by_place(text: str, ending: str) -> None:
    with written(text.encode(), f"prompts.{ending}") as path:
        try:
            prompts = read_prompts(path)
        except UserError as error:
            assert all(str(path) in problem.place for problem in error.problems)
            return
    for prompt in prompts:
        assert prompt.options.prompt
        sides = [prompt.side(name) or 64 for name in ("width", "height")]
        assert all(side % 8 == 0 and side >= 64 for side in sides)


# -------------------------------------------------------------------------- sizes, names, packing


@PROFILE
@given(
    size=st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
    resolution=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(
        lambda sides: (sides[0] * 32, sides[1] * 32)
    ),
    options=st.builds(
        BucketOptions,
        enable_bucket=st.booleans(),
        min_bucket_reso=st.integers(1, 1024),
        max_bucket_reso=st.integers(1, 2048),
        bucket_reso_steps=st.sampled_from([32, 64, 96, 128]),
        bucket_no_upscale=st.booleans(),
    ),
)
def test_every_image_covers_a_bucket_of_the_models_sides(
    size: tuple[int, int], resolution: tuple[int, int], options: BucketOptions
) -> None:
    assume(not check_buckets(resolution, options, multiple=32, place=lambda name: name))
    try:
        fit = fitter(resolution, options)(size)
    except SizeError as error:
        assert options.bucket_no_upscale
        assert "too small" in str(error)
        return
    for axis in (0, 1):
        assert fit.bucket[axis] > 0
        assert fit.bucket[axis] % 32 == 0
        assert 0 <= fit.crop[axis] <= fit.resized[axis] - fit.bucket[axis]
        assert (
            not options.bucket_no_upscale
            or not options.enable_bucket
            or (fit.resized[axis] <= size[axis])
        )
    if options.enable_bucket:
        assert fit.bucket[0] * fit.bucket[1] <= resolution[0] * resolution[1]


NAMES = st.text(st.sampled_from(list("ab-.0+*[(猫")), min_size=1, max_size=6)


@PROFILE
@given(
    name=NAMES,
    other=NAMES,
    steps=st.lists(st.integers(1, 40), unique=True, max_size=8).map(sorted),
    keep=st.integers(1, 4),
    keep_states=st.none() | st.integers(1, 4),
)
def test_exactly_the_newest_files_of_this_run_stay(
    name: str, other: str, steps: list[int], keep: int, keep_states: int | None
) -> None:
    assume(name != other)
    with tempfile.TemporaryDirectory() as folder:
        output = OutputOptions(
            output_dir=Path(folder),
            output_name=name,
            save_last_n_steps=keep,
            save_last_n_steps_state=keep_states,
        )
        foreign = Path(folder) / f"{other}-step00000001.safetensors"
        foreign.touch()
        for step in steps:
            point = SavePoint(kind="step", number=step, state=True)
            (Path(folder) / file_name(output, point)).touch()
            (Path(folder) / state_name(output, point)).mkdir()
            for path in prune(output, point):
                path.rmdir() if path.is_dir() else path.unlink()
        assert foreign.exists()
        mine = {path.name for path in files_of_earlier_run(output)}
        assert mine == {
            *(f"{name}-step{step:08d}.safetensors" for step in steps[-keep:]),
            *(f"{name}-step{step:08d}-state" for step in steps[-(keep_states or keep) :]),
        }


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(WORDS | st.integers() | st.just("$tensor"), inner, max_size=3)
    ),
    max_leaves=8,
)


@PROFILE
@given(value=NESTED)
def test_nested_values_of_states_come_back(value: Any) -> None:
    packed = json.loads(json.dumps(pack(value, {}, "root")))
    assert unpack(packed, {}) == value


# -------------------------------------------------------------------------------------- headers


def framed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


TENSORS = st.dictionaries(
    WORDS | st.just("__metadata__"),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F16", "F32", "F7", 3, None]),
            "shape": st.lists(st.integers(-2, 4) | st.none(), max_size=2) | st.integers(),
            "data_offsets": st.lists(st.integers(-1, 8) | WORDS, max_size=3),
            "more": st.none(),
        },
    )
    | JSON,
    max_size=3,
)


@PROFILE
@given(
    data=st.binary(max_size=40)
    | st.binary(max_size=40).map(framed)
    | TENSORS.map(lambda table: framed(json.dumps(table).encode(), bytes(8)))
)
@example(data=framed(b"{" * 8))
@example(data=framed(b'{"a":' * 5000))
@example(data=framed(b'{"a":' + b"[" * 200_000))
@example(data=(2**63).to_bytes(8, "little") + b"{")
@example(data=framed(b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,8]}}', bytes(8)))
def test_any_bytes_as_a_weight_file_have_a_header_or_a_fault(data: bytes) -> None:
    with written(data, "net.safetensors") as path:
        try:
            header = read_header(path)
        except BadFileError as error:
            assert error.fault.message.startswith("net.safetensors")
            return
    assert set(header.shapes) == set(header.dtypes)


@PROFILE
@given(
    shapes=st.dictionaries(WORDS, st.lists(st.integers(0, 3), max_size=3), max_size=4),
    metadata=st.none() | st.dictionaries(WORDS, WORDS, max_size=2),
    cut=st.integers(0, 4),
)
def test_a_weight_file_is_read_as_it_was_written_or_told_to_be_cut(
    shapes: dict[str, list[int]], metadata: dict[str, str] | None, cut: int
) -> None:
    assume("__metadata__" not in shapes)
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    data = framed(json.dumps(table).encode(), bytes(end))
    with written(data[: len(data) - cut], "net.safetensors") as path:
        if cut:
            with pytest.raises(BadFileError):
                read_header(path)
            return
        header = read_header(path)
    assert header.shapes == {name: tuple(shape) for name, shape in shapes.items()}
    assert header.metadata == (metadata or {})
