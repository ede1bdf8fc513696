"""What the site changes of the pages: links that lead out of them name the file instead."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn ``[text](../file)`` into the text and the file's path; the site holds no sources."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2` in the repository)", markdown)
