"""Large blocks of memory go back when they are freed, whatever was freed before."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from pathlib import Path
from sdxl_train.heap import give_back_holes, give_back_large_blocks
if sys.argv[1] == "given back":
    give_back_large_blocks()
del bytearray(30 << 20)[:]  # glibc takes blocks of up to this size from its heap from now on
large, small = [], []
for _ in range(20):
    large.append(bytearray(b"1") * (12 << 20))
    small.append(bytearray(b"1") * (64 << 10))
large.clear()
if sys.argv[1] == "holes given back":
    give_back_holes()
status = Path("/proc/self/status").read_text()
print(int(status.split("VmRSS:")[1].split()[0]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_blocks_leave_no_holes_in_the_heap_or_they_are_given_back() -> None:
    def megabytes_after(how: str) -> int:
        words = [sys.executable, "-c", _PROGRAM, how]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    # 20 blocks of 12 MB were freed.
    kept = megabytes_after("kept")
    assert kept - megabytes_after("given back") > 200
    assert kept - megabytes_after("holes given back") > 200
