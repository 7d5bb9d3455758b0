"""A sample is a function of seed, epoch and index, whoever computes it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gspn.data import DeterministicAugmentation, Emoji


class Noise(Dataset):
    """A sample is what the three global generators give."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index) -> torch.Tensor:
        drawn = [random.random(), np.random.rand(), torch.rand(()).item(), index]  # noqa: NPY002
        return torch.tensor(drawn, dtype=torch.float64)


def epoch(dataset, **options) -> torch.Tensor:
    rows = torch.cat(list(DataLoader(dataset, batch_size=5, **options)))
    return rows[rows[:, 3].argsort()]


def test_workers_and_order_make_no_difference() -> None:
    dataset = DeterministicAugmentation(Noise(), seed=1)
    dataset.set_epoch(3)
    expected = epoch(dataset)
    assert expected[:, :3].unique().numel() == 36  # no number comes twice
    for options in ({"shuffle": True}, {"num_workers": 1}, {"num_workers": 2, "shuffle": True}):
        assert torch.equal(epoch(dataset, **options), expected), options
    again = DeterministicAugmentation(Noise(), seed=1)
    again.set_epoch(3)
    assert torch.equal(torch.stack([again[i][:3] for i in (7, -5)]), expected[[7, 7], :3])


def test_seed_and_epoch_make_one() -> None:
    one, two = DeterministicAugmentation(Noise(), seed=1), DeterministicAugmentation(Noise(), seed=2)
    first = epoch(one)
    assert not (epoch(two) == first)[:, :3].any()
    one.set_epoch(1)
    assert one.epoch == 1
    assert not (epoch(one) == first)[:, :3].any()
    one.set_epoch(0)
    assert torch.equal(epoch(one), first)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_set_epoch_reaches_persistent_workers(context) -> None:
    dataset = DeterministicAugmentation(
        Noise() if context == "fork" else Emoji("val", transform=_random_number), seed=1
    )
    loader = DataLoader(
        dataset, batch_size=400, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )

    def numbers() -> list:
        batch = next(iter(loader))
        return (batch if context == "fork" else batch[0]).tolist()

    first = numbers()
    dataset.set_epoch(1)
    second = numbers()
    assert first != second
    dataset.set_epoch(0)
    assert numbers() == first


def _random_number(image) -> float:
    return random.random()


def test_the_generators_are_put_back() -> None:
    dataset = DeterministicAugmentation(Noise(), seed=1)
    draws = []
    for touch in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        if touch:
            dataset[3]
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_the_generators_are_put_back_after_an_error() -> None:
    def transform(image):
        random.random()
        raise KeyError("a bug")

    state = random.getstate()
    with pytest.raises(KeyError):
        DeterministicAugmentation(Emoji("val", transform=transform), seed=0)[0]
    assert random.getstate() == state


def test_set_epoch_goes_through() -> None:
    inner = DeterministicAugmentation(Noise(), seed=0)
    DeterministicAugmentation(inner, seed=1).set_epoch(4)
    assert inner.epoch == 4
