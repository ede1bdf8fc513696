"""Captions: reading them as people write them, and what becomes of one each time it is trained.

Order of the steps, as in sd-scripts: prefix and suffix are put on, the whole caption may be
dropped, then tags are kept, shuffled and dropped. Tags are put together with a comma and a space,
whatever separated them before.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """What is done to a caption. The fields carry the names of the options."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0

    def without_chance(self) -> CaptionOptions:
        """Give what stays of the options where a caption must be the same each time."""
        return replace(
            self,
            shuffle_caption=False,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
        )

    @property
    def changes_tags(self) -> bool:
        """Whether the tags of a caption differ from one time to the next."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """The options in use that make more captions of one than can be cached."""
        names = ("shuffle_caption", "caption_tag_dropout_rate")
        return tuple(name for name in names if getattr(self, name))

    @property
    def drops_captions(self) -> bool:
        """Whether a sample may be trained with an empty caption."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionFile:
    """What a caption file says, and the remarks on how it was read."""

    text: str
    remarks: tuple[str, ...] = field(default=())


class CaptionError(ValueError):
    """A caption file is not text; the message says why."""


def read_caption(path: Path) -> CaptionFile:
    """Read a caption: the first line of the file that is not blank.

    UTF-8 with or without a byte order mark; other encodings are recognized and remarked upon.
    White space of any kind becomes single spaces.

    Raises:
        CaptionError: If no encoding fits.
        OSError: If the file cannot be read.
    """
    text, encoding = _decode(path.read_bytes())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    filled = [line for line in lines if line]
    remarks = []
    if encoding:
        remarks.append(f"not UTF-8, read as {encoding}")
    if not filled:
        remarks.append("empty")
    if len(filled) > 1:
        remarks.append("more than one line, only the first is used")
    return CaptionFile(text=filled[0] if filled else "", remarks=tuple(remarks))


def process_caption(caption: str, options: CaptionOptions, rng: random.Random, epoch: int) -> str:
    """Give the caption to train with, this time.

    Args:
        caption: The caption as read.
        options: What to do to it.
        rng: The only source of chance.
        epoch: Number of the epoch, counted from 1.
    """
    if _is_dropped(options, rng, epoch):
        return ""
    return _undropped(caption, options, rng)


def possible_captions(caption: str, options: CaptionOptions) -> tuple[str, ...]:
    """Give every caption that :func:`process_caption` can give. Tags must not change."""
    assert not options.changes_tags
    kept = _undropped(caption, options, random.Random(0))
    return (kept, "") if options.drops_captions else (kept,)


def split_tags(caption: str, separator: str = ",") -> list[str]:
    """Give the tags of a caption, without blanks around them; empty ones are left out."""
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def caption_warnings(captions: Iterable[str], options: CaptionOptions) -> list[str]:
    """Say where options that keep tags cannot do so."""
    mark, separator = options.keep_tokens_separator, options.caption_separator
    unmarked = short = total = 0
    for caption in captions:
        total += 1
        if mark and mark in caption:
            continue
        unmarked += bool(mark)
        short += len(split_tags(caption, separator)) < options.keep_tokens
    warnings = []
    if unmarked:
        warnings.append(f"keep_tokens_separator {mark!r} is not in {unmarked} of {total} captions")
    if short and options.changes_tags:
        warnings.append(
            f"keep_tokens {options.keep_tokens}: {short} of {total} captions have fewer tags"
        )
    return warnings


def _is_dropped(options: CaptionOptions, rng: random.Random, epoch: int) -> bool:
    rate, period = options.caption_dropout_rate, options.caption_dropout_every_n_epochs
    if rate > 0 and rng.random() < rate:
        return True
    return period > 0 and epoch % period == 0


def _undropped(caption: str, options: CaptionOptions, rng: random.Random) -> str:
    parts = (options.caption_prefix, caption, options.caption_suffix)
    caption = " ".join(part for part in parts if part)
    separator, mark = options.caption_separator, options.keep_tokens_separator
    if mark and mark in caption:
        kept, flexible, *rest = (split_tags(piece, separator) for piece in caption.split(mark))
        tail = [tag for tags in rest for tag in tags]
    elif options.changes_tags:
        tags = split_tags(caption, separator)
        kept, flexible, tail = tags[: options.keep_tokens], tags[options.keep_tokens :], []
    else:
        return separator.join(part for part in caption.split(separator) if part.strip()).strip()
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
