"""Seeds as functions of the position in a run, so that a resumed run draws the numbers of the uninterrupted one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2**32)`` that depends on every part and on nothing else.

    Example:
        >>> derived_seed(0, "order", 3) == derived_seed(0, "order", 3) != derived_seed(0, "order", 4)
        True
    """
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (which timm's mixup draws from) and PyTorch on every device."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global generator is the one that timm uses)
    torch.manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the state of PyTorch's generators after the block."""
    # Only the current device: PyTorch warns when the states of many devices are kept.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
