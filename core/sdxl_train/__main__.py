"""``python -m sdxl_train``, which is what ``accelerate launch -m sdxl_train`` runs."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.path[:1] == [str(Path.cwd())] and not sys.flags.safe_path:
        # Python puts the current folder first. What lies in it must not become a plugin, nor
        # take the place of a library, as it does not for the command `sdxl-train`.
        del sys.path[0]

    from sdxl_train.cli import main

    sys.exit(main())
