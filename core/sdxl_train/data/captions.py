"""Captions: reading them as people write them, and what becomes of one each time it is trained.

Order of the steps, as in sd-scripts: prefix and suffix are put on, the whole caption may be
dropped, one of its lines and the alternatives of its wildcards are drawn, tags are kept, held back
while they warm up, shuffled and dropped, and the secondary separator gives way to the first. Tags
are put together with a comma and a space, whatever separated them before.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


UNBALANCED = "a brace that is no part of a wildcard {red|blue} (enable_wildcard)"
BALANCE = "close it, or write {{ or }} for a brace; wildcards do not hold wildcards"


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """What is done to a caption. The fields carry the names of the options.

    Where the same caption is wanted each time, ``enable_wildcard`` is ``"first"``: the first line
    and the first of the alternatives are taken.
    """

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    enable_wildcard: bool | Literal["first"] = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0

    def in_steps(self, total: int) -> CaptionOptions:
        """Give the same with the warm-up of tags as a number of steps, if it is a share of all."""
        if not 0 < self.token_warmup_step < 1:
            return self
        return replace(self, token_warmup_step=math.floor(self.token_warmup_step * total + 1e-9))

    def without_chance(self) -> CaptionOptions:
        """Give what stays of the options where a caption must be the same each time."""
        return replace(
            self,
            shuffle_caption=False,
            enable_wildcard="first" if self.enable_wildcard else False,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
            token_warmup_step=0,
        )

    @property
    def changes_tags(self) -> bool:
        """Whether the tags of a caption differ from one time to the next."""
        return (
            self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0
        )

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """The options in use that make more captions of one than can be cached."""
        names = (
            "shuffle_caption",
            "caption_tag_dropout_rate",
            "enable_wildcard",
            "token_warmup_step",
        )
        return tuple(name for name in names if getattr(self, name) not in (0, "first"))

    @property
    def drops_captions(self) -> bool:
        """Whether a sample may be trained with an empty caption."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


class CaptionFile(NamedTuple):
    """What a caption file says, and the remarks on how it was read.

    Attributes:
        content: Its lines that are not blank, in their order, with line feeds between them.
        remarks: What its author should know.
        bad_brace: Line and column in the file, counted from 1, of a brace that would be no part
            of a wildcard.
    """

    content: str
    remarks: tuple[str, ...] = ()
    bad_brace: tuple[int, int] | None = None

    @property
    def lines(self) -> list[str]:
        """Its lines that are not blank."""
        return self.content.split("\n") if self.content else []

    @property
    def text(self) -> str:
        """Give the caption where a file holds one."""
        return self.content.partition("\n")[0]


MOST_BYTES = 250_000
"""Length of a caption file beyond which it is taken for something else."""


class CaptionError(ValueError):
    """A caption file is not text, or too long for a caption; the message says why."""


def read_caption(path: Path) -> CaptionFile:
    """Read the lines of a caption file that are not blank.

    UTF-8 with or without a byte order mark; other encodings are recognized and remarked upon.
    White space of any kind becomes single spaces.

    Raises:
        CaptionError: If no encoding fits, or it is far too long.
        OSError: If the file cannot be read.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MOST_BYTES:
        raise CaptionError(
            f"has {num_bytes:,} bytes, and a caption no more than {MOST_BYTES:,}: is it one?"
        )
    text, encoding = _decode(path.read_bytes())
    lines = text.splitlines()
    content = "\n".join(words for line in lines if (words := " ".join(line.split())))
    remarks = []
    if encoding:
        remarks.append(f"not UTF-8, read as {encoding}")
    if not content:
        remarks.append("empty")
    found = ((n, column) for n, line in enumerate(lines, 1) if (column := bad_brace(line)))
    return CaptionFile(content, tuple(remarks), next(found, None))


def bad_brace(text: str) -> int | None:
    """Give the column, counted from 1, of the first brace that is no part of a wildcard.

    Wildcards are ``{red|blue}``, not one inside another; ``{{`` and ``}}`` stand for braces, and
    ``{}`` for itself.
    """
    for match in _BRACES.finditer(text):
        if match[0] in ("{", "}"):
            return match.start() + 1
        inner = (match[1] or "").replace("{{", "  ").find("{")
        if inner >= 0:
            return match.start(1) + inner + 1
    return None


def process_caption(
    caption: str, options: CaptionOptions, rng: random.Random, epoch: int, step: int = 0
) -> str:
    """Give the caption to train with, this time.

    Args:
        caption: The caption as read.
        options: What to do to it; its warm-up counts steps.
        rng: The only source of chance.
        epoch: Number of the epoch, counted from 1.
        step: Optimizer steps done before.
    """
    if _is_dropped(options, rng, epoch):
        return ""
    return _undropped(caption, options, rng, step)


def possible_captions(caption: str, options: CaptionOptions) -> tuple[str, ...]:
    """Give every caption that :func:`process_caption` can give, if it is not unrepeatable."""
    assert not options.unrepeatable
    kept = _undropped(caption, options, random.Random(0), 0)
    return (kept, "") if options.drops_captions else (kept,)


def fullest_captions(options: CaptionOptions) -> Callable[[str], tuple[str, ...]]:
    """Give what finds the longest captions that may be trained of one: of each line, all tags."""
    still = options.without_chance()
    wild = options.enable_wildcard

    def fullest(caption: str) -> tuple[str, ...]:
        whole = _with_affixes(caption, options)
        lines = whole.split("\n") if wild else [whole]
        return tuple(
            _with_tags(_BRACES.sub(_longest, line) if wild else line, still) for line in lines
        )

    return fullest


def split_tags(caption: str, separator: str = ",") -> list[str]:
    """Give the tags of a caption, without blanks around them; empty ones are left out."""
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def caption_warnings(captions: Iterable[str], options: CaptionOptions) -> list[str]:
    """Say where options find nothing in the captions to act on."""
    mark, separator = options.keep_tokens_separator, options.caption_separator
    secondary = options.secondary_separator
    if not (mark or secondary or options.changes_tags or options.enable_wildcard):
        return []
    unmarked = short = total = varied = parted = tagged = 0
    for caption in captions:
        varied += "\n" in caption or "{" in caption
        parted += bool(secondary) and secondary in caption
        for line in caption.split("\n"):
            total += 1
            tagged += separator in line
            if mark and mark in line:
                continue
            unmarked += bool(mark)
            short += len(split_tags(line, separator)) < options.keep_tokens
    warnings = []
    if unmarked:
        warnings.append(f"keep_tokens_separator {mark!r} is not in {unmarked} of {total} captions")
    if short and options.changes_tags:
        warnings.append(
            f"keep_tokens {options.keep_tokens}: {short} of {total} captions have fewer tags"
        )
    if total and options.changes_tags and not tagged:
        warnings.append(
            f"no caption has two tags to shuffle or drop (caption_separator {separator!r})"
        )
    if total and options.enable_wildcard and not varied:
        warnings.append("enable_wildcard: no caption has {red|blue} or a second line")
    if total and secondary and not parted:
        warnings.append(f"secondary_separator {secondary!r} is in none of the captions")
    return warnings


def _is_dropped(options: CaptionOptions, rng: random.Random, epoch: int) -> bool:
    rate, period = options.caption_dropout_rate, options.caption_dropout_every_n_epochs
    if rate > 0 and rng.random() < rate:
        return True
    return period > 0 and epoch % period == 0


def _undropped(caption: str, options: CaptionOptions, rng: random.Random, step: int) -> str:
    caption = _with_affixes(caption, options)
    if options.enable_wildcard:
        caption = _without_wildcards(caption, rng if options.enable_wildcard is True else None)
    return _with_tags(caption, options, rng, step)


def _with_affixes(caption: str, options: CaptionOptions) -> str:
    parts = (options.caption_prefix, caption, options.caption_suffix)
    return " ".join(part for part in parts if part)


_BRACES = re.compile(r"\{\{|\}\}|\{((?:[^{}]|\{\{?|\}\})++)\}|\{\}|[{}]")


def _without_wildcards(caption: str, rng: random.Random | None) -> str:
    """Draw a line and an alternative of each wildcard; without ``rng``, take the first ones."""

    def put(match: re.Match[str]) -> str:
        alternatives = _alternatives(match)
        return rng.choice(alternatives) if rng else alternatives[0]

    lines = caption.split("\n")
    return _BRACES.sub(put, rng.choice(lines) if rng else lines[0])


def _alternatives(match: re.Match[str]) -> list[str]:
    """Give what may stand in the place of braces."""
    if match[1] is None:
        return [match[0] if match[0] == "{}" else match[0][0]]
    return [part.replace("{{", "{").replace("}}", "}") for part in match[1].split("|")]


def _longest(match: re.Match[str]) -> str:
    return max(_alternatives(match), key=len)


def _with_tags(
    caption: str, options: CaptionOptions, rng: random.Random | None = None, step: int = 0
) -> str:
    """Do to the tags what the options ask for."""
    caption = _with_tags_varied(caption, options, rng or random.Random(0), step)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def _with_tags_varied(caption: str, options: CaptionOptions, rng: random.Random, step: int) -> str:
    separator, mark = options.caption_separator, options.keep_tokens_separator
    if mark and mark in caption:
        kept, flexible, *rest = (split_tags(piece, separator) for piece in caption.split(mark))
        tail = [tag for tags in rest for tag in tags]
    elif options.changes_tags:
        tags = split_tags(caption, separator)
        kept, flexible, tail = tags[: options.keep_tokens], tags[options.keep_tokens :], []
    else:
        return separator.join(part for part in caption.split(separator) if part.strip()).strip()
    if step < options.token_warmup_step:
        least, full = options.token_warmup_min, options.token_warmup_step
        flexible = flexible[: math.floor(step * (len(flexible) - least) / full) + least]
    if options.shuffle_caption:
        rng.shuffle(flexible)
    if (rate := options.caption_tag_dropout_rate) > 0:
        flexible = [tag for tag in flexible if rng.random() >= rate]
    return ", ".join([*kept, *flexible, *tail])


_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")


def _decode(data: bytes) -> tuple[str, str | None]:
    """Decode a caption; also give the encoding if it is not UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    else:
        try:
            return data.decode("utf-8-sig"), None
        except UnicodeDecodeError:
            # Chinese text holds its bytes in pairs; Western text has single ones among ASCII.
            paired = all(len(run) % 2 == 0 for run in _HIGH_BYTES.findall(data))
            encodings = ["gb18030", "cp1252"] if paired else ["cp1252", "gb18030"]
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise CaptionError(f"is not text in UTF-8, {' or '.join(encodings)}: save it as UTF-8")
