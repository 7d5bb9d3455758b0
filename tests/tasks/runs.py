"""Files of a run, for comparisons between runs; and stopping a run."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspn.tasks.core import loop

# What a resumed run cannot have in common with an uninterrupted one.
_TIMES = ("seconds", "images_per_second", "peak_memory_mib")


def rows(output: Path, *, timeless: bool = True) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``, without times."""
    with (output / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not (timeless and k in _TIMES)} for row in read]


def newest_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer state of the newest checkpoint."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    state = {f"weights.{k}": v for k, v in load_file(newest / "model.safetensors").items()}
    average = newest / "custom_checkpoint_0.pkl"
    if average.exists():
        state |= {f"average.{k}": v for k, v in torch.load(average, weights_only=True).items()}
    optimizer = torch.load(newest / "optimizer.bin", weights_only=True)["state"]
    for i, moments in optimizer.items():
        state |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    return state


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@contextmanager
def stopped_before(update: int) -> Iterator[None]:
    """Training within the block is interrupted before this update, counted from 1 over the run."""
    plain, calls = loop._Run._update, []

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == update:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(loop._Run, "_update", counted)
        yield
