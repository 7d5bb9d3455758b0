"""What a command does to its process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from gspn.tasks.core.devices import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(3):  # the heap finds its size
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    def faults(keep: bool) -> int:
        run = subprocess.run([sys.executable, "-c", COUNT.format(keep=keep)], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults(keep=True) < 10 < faults(keep=False)  # pages of 4 KiB, or of 2 MiB
