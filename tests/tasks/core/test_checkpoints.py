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
from gspn._locks import DirectoryLock
from gspn.tasks.core.checkpoints import CheckpointStore, Training, _verify
from gspn.tasks.core.devices import make_accelerator
from tasks.runs import as_version_0_1_0, assert_same


def training(optimizer: str = "adamw", *, tied: bool = False, model: torch.nn.Module | None = None) -> Training:
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    accelerator = make_accelerator(device="cpu")
    torch.manual_seed(0)
    if model is None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    if tied:
        model[2].weight = model[0].weight
    ema = ModelEmaV3(model, decay=0.5)
    prepared = accelerator.prepare(model, create_optimizer_v2(model, opt=optimizer, lr=0.1))
    return Training(accelerator, *prepared, ema)


def train(one: Training, updates: int) -> None:
    for update in range(updates):
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(update))
        one.model(images.to(next(one.model.parameters()).dtype)).square().mean().backward()
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


class Odd(torch.nn.Module):
    """Layers in a given order, tied weights, parameters without a gradient, and buffers of every kind."""

    def __init__(self, names: str = "ab") -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})
        self.tied = torch.nn.Linear(3, 3)
        self.tied.weight = self.layers["a"].weight
        self.unused, self.frozen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
        both = torch.arange(6.0)
        buffers = {"empty": both[:0], "count": torch.tensor(3), "flag": torch.tensor([True]), "part": both[2:4]}
        for name, value in {**buffers, "both": both}.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.tied(self.layers["b"](self.layers["a"](x)).relu())


def odd(names: str = "ab") -> Training:
    torch.manual_seed(0)
    return training(model=Odd(names))


def test_models_of_every_kind_of_tensor(store):
    checkpoints, one, other = store[0], odd(), odd()
    train(one, 3)
    assert one.is_finite()  # a mask of minus infinity is not a weight
    checkpoints.save(one, 3, {})
    checkpoints.load_newest(other)
    train(one, 3)
    train(other, 3)
    assert_same(numbers(other), numbers(one))


@pytest.mark.parametrize("old", [False, True])
def test_the_optimizers_state_follows_the_names_of_parameters(store, old):
    checkpoints, one, other = store[0], odd("ab"), odd("ba")
    train(one, 3)
    checkpoints.save(one, 3, {})
    if old:
        as_version_0_1_0(checkpoints.directory / "step-000000003")
    checkpoints.load_newest(other)
    train(one, 3)
    train(other, 3)
    assert_same(numbers(other), numbers(one))
    with pytest.raises(UsageError, match="cannot be loaded into this run"):
        checkpoints.load_newest(odd("abc"))


@pytest.mark.parametrize("name", ["step-000000001.bak", "step-000000001 (copy)", "step-abc", "step-000000009"])
def test_a_copy_is_not_the_newest_checkpoint(store, name):
    checkpoints, one = store
    for step in (1, 2):
        checkpoints.save(one, step, {"step": step})
    shutil.copytree(checkpoints.directory / "step-000000001", checkpoints.directory / name)
    assert checkpoints.load_newest(one)[0] == {"step": 2}
    checkpoints.save(one, 3, {"step": 3})
    assert {"step-000000002", "step-000000003"} < {path.name for path in checkpoints.directory.iterdir()}


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "folder"])
@pytest.mark.parametrize("name", [".part-old-", ".part-PID-", "damaged-"])
def test_what_else_is_in_the_folder_is_in_no_way(store, tmp_path, kind, name):
    checkpoints, one = store
    checkpoints.save(one, 1, {"step": 1})
    name = name.replace("PID", str(os.getpid()))
    path, outside = checkpoints.directory / f"{name}step-000000002", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    make = {"file": path.touch, "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
    make.get(kind, lambda: path.symlink_to(outside))()
    checkpoints.save(one, 2, {"step": 2})
    checkpoints.save(one, 2, {"step": 3})
    assert checkpoints.load_newest(one) == ({"step": 3}, [])
    damage(checkpoints.directory / "step-000000002" / "state.json", "empty")
    assert checkpoints.load_newest(one)[0] == {"step": 1} and (outside / "precious").exists()


def save_and_die(directory: Path, call: int) -> None:
    """Save four checkpoints; dies before that call which changes the disk."""
    count = 0

    def counted(change):
        def changed(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                os._exit(9)
            return change(*arguments, **options)

        return changed

    for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoints, one = CheckpointStore(directory), training()
    for step in range(1, 5):
        checkpoints.save(one, step, {"step": step})
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_between_any_two_changes_of_the_disk(tmp_path):
    newest, one = [], training()
    for call in range(1, 1000, 2):
        directory = tmp_path / str(call) / "checkpoints"
        directory.parent.mkdir()
        process = os.fork()
        if not process:
            save_and_die(directory, call)
        status = os.waitpid(process, 0)[1]
        with DirectoryLock(directory.parent):
            store = CheckpointStore(directory)
            state, lines = store.load_newest(one)
            newest.append(state["step"] if state else 0)
            # All that is left is whole.
            assert not lines and all(path.name.startswith("step-") for path in directory.glob("*"))
            for step, path in store._by_step().items():
                _verify(path, step)
        if not status:
            break
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3, 4}


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
    names |= {"scheduler.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl"}
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
