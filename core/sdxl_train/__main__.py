"""``python -m sdxl_train``, which is what ``accelerate launch -m sdxl_train`` runs."""

from __future__ import annotations

import sys

from sdxl_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
