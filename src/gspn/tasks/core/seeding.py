"""Randomness as a function of where a run is, so that a resumed run draws what the uninterrupted one would have."""

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
    """What is drawn from PyTorch's generators inside does not count outside."""
    # Of the device that computes: of all devices of a machine, PyTorch would warn.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
