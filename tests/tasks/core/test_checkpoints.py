"""Checkpoints are whole or not there, verified when they are loaded, and run no code."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs gspn[train]")
pytest.importorskip("timm", reason="needs gspn[train]")

from gspn._errors import UsageError
from gspn.tasks.core.checkpoints import CheckpointStore, Training
from gspn.tasks.core.devices import make_accelerator
from tasks.runs import as_version_0_1_0


def training(optimizer: str = "adamw", *, tied: bool = False) -> Training:
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    accelerator = make_accelerator(device="cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    if tied:
        model[2].weight = model[0].weight
    ema = ModelEmaV3(model, decay=0.5)
    prepared = accelerator.prepare(model, create_optimizer_v2(model, opt=optimizer, lr=0.1))
    return Training(accelerator, *prepared, ema)


def train(one: Training, updates: int) -> None:
    for update in range(updates):
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(update))
        # With create_graph, for optimizers of second order.
        one.model(images).square().mean().backward()
        one.optimizer.step()
        one.optimizer.zero_grad()
        one.ema.update(one.model)


def numbers(one: Training) -> dict[str, torch.Tensor]:
    state = {f"model.{k}": v.clone() for k, v in one.model.state_dict().items()}
    return state | {f"ema.{k}": v.clone() for k, v in one.ema.state_dict().items()}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints"), training()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "adafactor", "sgd", "lookahead_radam"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_continues_to_the_same_bits(tmp_path, optimizer, tied):
    store, one = CheckpointStore(tmp_path), training(optimizer, tied=tied)
    train(one, 3)
    store.save(one, 3, {"epoch": 1, "loss": 0.1})
    train(one, 3)
    other = training(optimizer, tied=tied)
    assert store.load_newest(other) == ({"epoch": 1, "loss": 0.1}, [])
    train(other, 3)
    expected, actual = numbers(one), numbers(other)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_there_is_none(store):
    checkpoints, one = store
    assert checkpoints.load_newest(one) == (None, []) and not checkpoints.exists()


def test_keeps_two(store):
    checkpoints, one = store
    for step in (1, 2, 10):
        checkpoints.save(one, step, {"step": step})
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-000000002", "step-000000010"]
    assert checkpoints.load_newest(one) == ({"step": 10}, [])


FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "bit":
        content[-5] ^= 1
    elif how == "zeroed":
        content = bytearray(len(content))
    elif how == "shorter":
        content = content[:-3]
    elif how == "empty":
        content = bytearray()
    elif how == "wrong":
        content = bytearray(b"[" * 100_000 if path.suffix == ".json" else b"\xff" * len(content))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "zeroed", "shorter", "empty", "wrong", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_the_one_before_is_taken_where_the_newest_is_damaged(store, file, how):
    checkpoints, one = store
    train(one, 1)
    checkpoints.save(one, 1, {"step": 1})
    checkpoints.save(one, 2, {"step": 2})
    damage(checkpoints.directory / "step-000000002" / file, how)
    state, lines = checkpoints.load_newest(one)
    assert state == {"step": 1}
    assert len(lines) == 1 and "step-000000002 is damaged" in lines[0] and file in lines[0], lines
    assert "\n" not in lines[0] and "step-000000001 is taken" in lines[0]
    # It is left aside, and no checkpoint any more.
    assert (checkpoints.directory / "damaged-step-000000002").is_dir()
    damage(checkpoints.directory / "step-000000001" / file, how)
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole \(step-000000001: .*remove that directory"):
        checkpoints.load_newest(one)
    checkpoints.save(one, 2, {"step": 2})
    assert checkpoints.load_newest(one) == ({"step": 2}, [])


@pytest.mark.parametrize("change", [{"state": 3}, {"files": []}, {"files": {"model.safetensors": 7}}, {"sizes": "x"}])
def test_a_state_of_other_types(store, change):
    checkpoints, one = store
    checkpoints.save(one, 1, {"step": 1})
    path = checkpoints.directory / "step-000000001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=r"state\.json"):
        checkpoints.load_newest(one)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("old", [False, True])
def test_no_file_of_a_checkpoint_runs_code(store, tmp_path, old):
    """Each file in turn is a pickle that would make a directory, as a plain one and as ``torch.save`` writes it."""
    checkpoints, one = store
    train(one, 1)
    checkpoints.save(one, 1, {"step": 1})
    whole, mark = checkpoints.directory / "step-000000001", tmp_path / "mark"
    if old:
        as_version_0_1_0(whole)
    shutil.copytree(whole, tmp_path / "kept")
    names = {path.name for path in whole.iterdir()}
    # And what other versions of accelerate would read.
    names |= {"scheduler.bin", "sampler.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl"}
    names |= {"pytorch_model.bin", "optimizer.bin", "dl_state_dict.bin", "pytorch_model_fsdp_0/.metadata"}
    for name in sorted(names):
        for save in (pickle.dump, torch.save):
            shutil.rmtree(checkpoints.directory)
            shutil.copytree(tmp_path / "kept", whole)
            (whole / name).parent.mkdir(exist_ok=True)
            with (whole / name).open("wb") as file:
                save(Bomb(mark), file)
            if old and name != "state.json":  # as somebody who sends a checkpoint would have it
                state = json.loads((whole / "state.json").read_text())
                state["sizes"][name] = (whole / name).stat().st_size
                (whole / "state.json").write_text(json.dumps(state))
            with contextlib.suppress(UsageError):
                checkpoints.load_newest(one)
            assert not mark.exists(), name


def test_numbers_that_are_not_finite_are_seen(store):
    _, one = store
    train(one, 1)
    assert one.is_finite()
    tensors = [one.model[0].weight, one.model[1].running_var, one.ema.module[0].bias]
    tensors.append(one.optimizer.state[one.model[0].weight]["exp_avg"])
    for tensor in tensors:
        for value in (float("nan"), float("inf")):
            kept = tensor.detach().clone()
            with torch.no_grad():
                tensor.view(-1)[0] = value
                assert not one.is_finite()
                tensor.copy_(kept)
    assert one.is_finite()
