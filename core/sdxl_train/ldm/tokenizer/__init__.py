"""The tokenizers of CLIP's text encoders.

All use CLIP's vocabulary. Its table of merges ships with this package, under the MIT licence of
OpenAI's CLIP (see NOTICE), so that a single-file checkpoint needs no network.
"""

from __future__ import annotations

import gzip
import itertools
import logging
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from transformers import CLIPTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdxl_train.ldm.family import ClipEncoder

_log = logging.getLogger(__name__)

_TABLE: Final = "bpe_simple_vocab_16e6.txt.gz"
_NUM_TOKENS: Final = 49408
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def load_tokenizers(
    encoders: Sequence[ClipEncoder], folder: Path | None, cache_dir: Path | None
) -> tuple[CLIPTokenizer, ...]:
    """Load the tokenizer of each text encoder.

    Args:
        encoders: They.
        folder: A diffusers folder; its tokenizers are taken where it has them.
        cache_dir: Where to look next. What is not there is written there.
    """
    return tuple(_load(encoder, folder, cache_dir) for encoder in encoders)


@cache
def clip_tokenizer(padding: str = _EOS) -> CLIPTokenizer:
    """Give CLIP's tokenizer, built once from the table that ships with this package.

    Of the tokens that fill up texts, ``!`` without the end of a word is token 0.
    """
    vocabulary, merges = _read_table()
    arguments: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "pad_token": padding}
    return CLIPTokenizer(**arguments, model_max_length=77)


@cache
def _read_table() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Give the vocabulary and, in order of priority, the pairs that merge."""
    raw = resources.files(__name__).joinpath(_TABLE).read_bytes()
    # The first line names the version. The table goes on after the merges that CLIP uses.
    lines = gzip.decompress(raw).decode("utf-8").splitlines()[1:]
    letters = _byte_letters()
    num_merges = _NUM_TOKENS - 2 * len(letters) - 2
    merges = [(left, right) for left, right in map(str.split, lines[:num_merges])]
    tokens = itertools.chain(
        letters,
        (letter + _END_OF_WORD for letter in letters),
        (left + right for left, right in merges),
        (_BOS, _EOS),
    )
    return {token: index for index, token in enumerate(tokens)}, merges


def _load(encoder: ClipEncoder, folder: Path | None, cache_dir: Path | None) -> CLIPTokenizer:
    if folder is not None and (own := folder / encoder.tokenizer).is_dir():
        if cache_dir is not None:
            _log.warning("--tokenizer_cache_dir is not used: the model brings %s", own.name)
        return _read(own)
    if cache_dir is None:
        return clip_tokenizer(encoder.padding or _EOS)
    cached = cache_dir / encoder.cache_name
    if cached.is_dir():
        return _read(cached)
    tokenizer = clip_tokenizer(encoder.padding or _EOS)
    tokenizer.save_pretrained(cached)
    return tokenizer


def _read(folder: Path) -> CLIPTokenizer:
    files = sorted((path.name, path.stat()) for path in folder.iterdir())
    return _read_once(folder, tuple((name, at.st_mtime_ns, at.st_size) for name, at in files))


@lru_cache(maxsize=8)
def _read_once(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> CLIPTokenizer:
    """Read a folder as it is now: a plan and its run need the same, which takes half a second."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _byte_letters() -> list[str]:
    """Give the letter of each byte value, in the order of the vocabulary.

    Byte-level BPE (Radford et al. 2019, section 2.2) writes every byte as a visible letter: the
    printable ones of Latin-1 as themselves, and first, the others as letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    num_others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(0x100, 0x100 + num_others))]
