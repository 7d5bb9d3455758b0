"""Files of a run, for comparisons between runs; and stopping a run."""

from __future__ import annotations

import contextlib
import csv
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspn.tasks.core import checkpoints, loop

# What a resumed run cannot have in common with an uninterrupted one.
_TIMES = ("seconds", "images_per_second", "peak_memory_mib")


def rows(output: Path, *, timeless: bool = True) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``, without times."""
    with (output / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not (timeless and k in _TIMES)} for row in read]


def newest_checkpoint(output: Path) -> Path:
    return sorted((output / "checkpoints").glob("step-*"))[-1]


def newest_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer state of the newest checkpoint."""
    newest = newest_checkpoint(output)
    return {f"{file.stem}.{k}": v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


def as_version_0_1_0(checkpoint: Path) -> None:
    """Rewrite a checkpoint as version 0.1.0 did, by accelerate's ``save_state``."""
    values = json.loads((checkpoint / "state.json").read_text())
    average, optimizer = checkpoint / "ema.safetensors", checkpoint / "optimizer.safetensors"
    state = checkpoints._restored(values["optimizer"], load_file(optimizer))
    names = [name for group in state["param_groups"] for name in group["params"]]
    state = checkpoints._renamed(state, {name: i for i, name in enumerate(names)})
    torch.save(state, checkpoint / "optimizer.bin")
    if average.exists():
        # In the order of the model, which safetensors does not keep.
        unordered = load_file(average)
        ordered = {f"module.{name}": unordered[f"module.{name}"] for name in names} | unordered
        torch.save(ordered, checkpoint / "custom_checkpoint_0.pkl")
        average.unlink()
    torch.save({"step": 0, "random_state": random.getstate()}, checkpoint / "random_states_0.pkl")
    optimizer.unlink()
    (checkpoint / "state.json").unlink()
    state = {"best_top1" if key == "best_score" else key: value for key, value in values["state"].items()}
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    (checkpoint / "state.json").write_text(json.dumps({"state": state, "sizes": sizes}, indent=1))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@contextmanager
def stopped_before(update: int, *, strict: bool = True) -> Iterator[None]:
    """Training within the block is interrupted before this update, counted from 1 over the run.

    ``strict``: it is an error if it ends before.
    """
    plain, calls = loop._Run._update, []

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == update:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    expected = pytest.raises(KeyboardInterrupt) if strict else contextlib.suppress(KeyboardInterrupt)
    with pytest.MonkeyPatch.context() as patch, expected:
        patch.setattr(loop._Run, "_update", counted)
        yield
