"""Settings of every test session, those of the plugins included."""

from __future__ import annotations

import os
import tempfile

# Models here are tiny: a second thread has nothing to do but wait for the first, which is slow
# where cores are shared. Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is known of scanned files is kept between starts: not those of tests, in the home of a user.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdxl-train-tests-")
# Nothing may reach for the network, whatever the machine allows.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
