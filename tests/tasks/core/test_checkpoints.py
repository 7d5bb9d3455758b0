"""Checkpoints and files are whole or not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="needs gspn[train]")

from gspn.tasks.core.checkpoints import CheckpointStore
from gspn.tasks.core.devices import make_accelerator


@pytest.fixture
def store(tmp_path):
    accelerator = make_accelerator(device="cpu")
    model = torch.nn.Linear(3, 2)
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return CheckpointStore(tmp_path / "checkpoints"), accelerator, prepared[0]


def test_loads_what_it_saved(store):
    checkpoints, accelerator, model = store
    assert checkpoints.newest() is None
    expected = model.weight.detach().clone()
    checkpoints.save(accelerator, 7, {"epoch": 1, "loss": 0.1})
    with torch.no_grad():
        model.weight.zero_()
    newest = checkpoints.newest()
    assert newest is not None
    assert checkpoints.load(accelerator, newest) == {"epoch": 1, "loss": 0.1}
    assert torch.equal(model.weight, expected)


def test_keeps_two(store):
    checkpoints, accelerator, _ = store
    for step in (1, 2, 10):
        checkpoints.save(accelerator, step, {"step": step})
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-000000002", "step-000000010"]
    assert checkpoints.load(accelerator, checkpoints.newest()) == {"step": 10}


@pytest.mark.parametrize("damage", ["shorter", "missing", "no_state", "half_a_state"])
def test_one_that_is_not_whole_is_ignored_and_replaced(store, damage):
    checkpoints, accelerator, _ = store
    checkpoints.save(accelerator, 1, {"step": 1})
    checkpoints.save(accelerator, 2, {"step": 2})
    newest = checkpoints.directory / "step-000000002"
    weights, state = newest / "model.safetensors", newest / "state.json"
    if damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:-9])
    assert checkpoints.newest() == checkpoints.directory / "step-000000001"
    checkpoints.save(accelerator, 2, {"step": 2})
    assert checkpoints.newest() == newest
