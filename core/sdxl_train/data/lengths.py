"""How many tokens the captions have, and which of them are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_train.data.captions import fullest_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sdxl_train.data.sources import Scan


@dataclass(frozen=True, kw_only=True)
class CaptionLengths:
    """The captions of a scan in tokens, each at its longest: with every tag.

    Attributes:
        limit: Tokens that the model reads.
        longest: Tokens of the longest caption.
        truncated: The images whose captions are cut, and their tokens, the longest first.
        total: Number of images.
    """

    limit: int
    longest: int
    truncated: tuple[tuple[Path, int], ...]
    total: int

    @classmethod
    def of(
        cls, scan: Scan, limit: int, count_tokens: Callable[[Sequence[str]], list[int]]
    ) -> CaptionLengths:
        """Count the tokens of every caption, the held-out images' too."""
        captions = []
        for dataset in (*scan.datasets, *scan.validation):
            fullest = [fullest_captions(subset.captions) for subset in dataset.config.subsets]
            captions += [(image, fullest[image.subset](image.caption)) for image in dataset.images]
        texts = list(dict.fromkeys(text for _, several in captions for text in several))
        tokens = dict(zip(texts, count_tokens(texts), strict=True))
        lengths: dict[tuple[Path, str], int] = {}
        for image, several in captions:
            file = (image.folder, image.name)
            longest = max(tokens[text] for text in several)
            lengths[file] = max(longest, lengths.get(file, 0))
        cut = [(folder / name, n) for (folder, name), n in lengths.items() if n > limit]
        return cls(
            limit=limit,
            longest=max(lengths.values(), default=0),
            truncated=tuple(sorted(cut, key=lambda entry: -entry[1])),
            total=len(lengths),
        )

    def as_json(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return {
            "limit": self.limit,
            "longest": self.longest,
            "truncated": [{"path": str(path), "tokens": n} for path, n in self.truncated],
        }

    def remarks(self) -> list[str]:
        """Say that captions are cut, if they are."""
        if not self.truncated:
            return []
        shown = ", ".join(f"{path} ({length})" for path, length in self.truncated[:5])
        more = f" and {len(self.truncated) - 5} more" if len(self.truncated) > 5 else ""
        return [
            f"{len(self.truncated)} of {self.total} captions are cut after {self.limit} tokens; "
            f"the longest has {self.longest}: {shown}{more}; shorten them, or raise "
            "--max_token_length (75, 150 or 225)"
        ]
