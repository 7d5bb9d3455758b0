"""The ceiling of an operator that is bound by memory: how fast this machine copies."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .timing import Candidate, Timing

_PREFIX = "copy: "
_PAGE = 4096


@dataclass(frozen=True)
class Copies:
    """Ways to copy one buffer to another; the best of them is what the machine can do."""

    src: Tensor
    dst: Tensor
    candidates: tuple[Candidate, ...]

    @property
    def traffic(self) -> int:
        """Bytes read plus bytes written by one copy."""
        return self.src.nbytes + self.dst.nbytes

    def best(self, timings: Mapping[str, Timing]) -> tuple[str, float]:
        """The name of the fastest copy and its GB/s (10^9 bytes, read plus written)."""
        fastest = min(self.candidates, key=lambda c: timings[c.name].p50)
        return fastest.name.removeprefix(_PREFIX), self.traffic / timings[fastest.name].p50 / 1e6


def copies(traffic: int, device: torch.device) -> Copies:
    """Candidates that read half of ``traffic`` bytes and write the other half.

    The first is ``dst.copy_(src)``. The second is there so that the ceiling is honest where the first is not the best:
    on the CPU a memmove split over PyTorch's threads, which the C library may do with streaming stores, and on CUDA an
    element-wise kernel in the place of the copy engine's.
    """
    count = max(traffic // 8, 1)
    src = torch.ones(count, device=device)
    dst = torch.zeros_like(src)  # written here, so that no copy pays for its first touch
    candidates = [Candidate(f"{_PREFIX}torch copy_", lambda: dst.copy_(src))]
    if device.type == "cuda":
        candidates.append(Candidate(f"{_PREFIX}torch neg", lambda: torch.neg(src, out=dst)))
    else:
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads)
        share = -(-src.nbytes // threads)
        share += -share % _PAGE

        def memmove() -> None:
            # ctypes lets go of the interpreter lock while it copies.
            parts = [
                pool.submit(ctypes.memmove, dst.data_ptr() + at, src.data_ptr() + at, min(share, src.nbytes - at))
                for at in range(0, src.nbytes, share)
            ]
            for part in parts:
                part.result()

        candidates.append(Candidate(f"{_PREFIX}memmove, {threads} threads", memmove))
    return Copies(src, dst, tuple(candidates))
