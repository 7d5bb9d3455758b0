"""Augmentation that does not depend on the process that computes it."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .base import Wrapped


class DeterministicAugmentation(Wrapped):
    """A map-style data set around another one, whose sample ``i`` depends only on ``(seed, epoch, i)``.

    Transforms draw from the global generators of ``random``, numpy and torch. For each sample these are seeded with the
    three numbers, and restored afterwards. So the number of workers and processes, the order of the samples and other
    random draws make no difference, and a run that is resumed at epoch n continues as if it had not been interrupted.
    This takes about 0.1 ms for each sample.

    It does not cover draws elsewhere, such as shuffling, mixup, or timm's random erasing in its prefetcher.

    Raises:
        TypeError: the data set is a stream, in which a sample has no index.

    Example:
        >>> import random
        >>> from gspn.data import Digits, DeterministicAugmentation
        >>> dataset = DeterministicAugmentation(Digits("val", transform=lambda image: random.random()), seed=0)
        >>> first = dataset[3]
        >>> random.seed(5)
        >>> dataset[3] == first
        True
        >>> dataset.set_epoch(1)
        >>> dataset[3] == first
        False
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed
        # Shared memory, because persistent workers hold a copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the samples, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, also in running workers.

        Call it before ``iter(loader)``, which already requests samples from the workers.
        """
        self._epoch.fill_(epoch)
        inner = getattr(self.dataset, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __getitem__(self, index: int) -> Any:
        states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
        # A hash, because neighbouring seeds give similar numbers in some generators.
        text = f"{self.seed} {self.epoch} {index % len(self)}".encode()
        for_random, for_numpy, for_torch = struct.unpack("<QIQ", hashlib.blake2b(text, digest_size=20).digest())
        random.seed(for_random)
        np.random.seed(for_numpy)  # noqa: NPY002  (transforms draw from the legacy global generator)
        # torch.manual_seed would also seed every CUDA device.
        torch.default_generator.manual_seed(for_torch)
        try:
            return self.dataset[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.default_generator.set_state(states[2])
