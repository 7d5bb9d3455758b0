"""Checkpoints of a run: written as a whole or ignored, verified when they are loaded; the last two are kept.

====================================  ==================================================================================
``model.safetensors``                 the weights
``ema.safetensors``                   their average, where one is kept
``optimizer.safetensors``             the tensors of the optimizer's state, by the names in ``state.json``
``state.json``                        everything else, and size and SHA-256 of the files; also of its own content
====================================  ==================================================================================
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..._files import (
    file_digest,
    open_regular,
    printable,
    read_json,
    read_tensors,
    remove,
    replaced_directory,
    write_text,
)
from .config import from_mapping

if TYPE_CHECKING:
    from accelerate import Accelerator

_STATE = "state.json"
_REFUSALS = (UsageError, KeyError, RuntimeError)  # from files, by us and by PyTorch, where names or shapes are others


@dataclass
class Training:
    """The objects that a run trains, whose state a checkpoint holds."""

    accelerator: Accelerator
    model: nn.Module
    """As accelerate prepared it."""
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights."""
        return self.accelerator.distributed_type == "FSDP"

    @property
    def plain_model(self) -> nn.Module:
        """The model as the task made it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every number of weights, average and optimizer state is finite, in all processes."""
        tensors: dict[str, Tensor] = {}
        states = [one.state_dict() for one in (self.model, self.plain_optimizer, self.ema) if one is not None]
        _flattened(states, "", tensors)
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for value in tensors.values():
            value = getattr(value, "to_local", lambda value=value: value)()  # this process's part of a sharded one
            finite &= value.isfinite().all().to(finite.device)
        broken = self.accelerator.reduce((~finite).float()[None], "sum")
        return not bool(broken.item())  # type: ignore[union-attr]


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Files:
    model: _File
    optimizer: _File
    ema: _File | None = None


@dataclass(frozen=True)
class _Contents:
    """``state.json``."""

    step: int
    state: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    files: _Files
    sha256: str


@dataclass(frozen=True)
class _OldContents:
    """``state.json`` of version 0.1.0, which has no checksums."""

    state: dict[str, Any]
    sizes: dict[str, int]


class CheckpointStore:
    """The checkpoints in one directory, each a directory named after its update.

    A checkpoint is written under a temporary name, synced to the disk and then renamed, so that an interrupted one
    never has the name of a complete one. Older ones are removed only after that. Loading executes no code from files:
    all tensors are in safetensors, everything else is JSON. Those of version 0.1.0 are read by
    ``torch.load(weights_only=True)``.

    All processes of a run call :meth:`save` and :meth:`load_newest` together, on a file system that they share.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def exists(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return bool(self._by_step())

    def save(self, training: Training, step: int, state: Mapping[str, Any]) -> None:
        """Save a training, and ``state``, as JSON.

        Raises:
            OSError: the disk is full or the directory not writable; earlier checkpoints stay.
        """
        accelerator, ema = training.accelerator, training.ema
        model, optimizer = _state_dicts(training)
        if accelerator.is_main_process:
            tensors: dict[str, Tensor] = {}
            written: dict[str, Any] = {
                "step": step,
                "state": dict(state),
                "optimizer": _flattened(optimizer, "", tensors),
                "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                "files": {},
            }
            files = {"model": model, "optimizer": tensors} | ({} if ema is None else {"ema": ema.state_dict()})
            with replaced_directory(self.directory / f"step-{step:09d}") as part:
                for kind, one in files.items():
                    file = part / f"{kind}.safetensors"
                    # Copies: some may share memory, which the format does not know.
                    copies = {name: torch.empty(v.shape, dtype=v.dtype).copy_(v.detach()) for name, v in one.items()}
                    require("safetensors.torch").save_file(copies, file, metadata={"format": "pt"})
                    written["files"][kind] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                write_text(part / _STATE, json.dumps({**written, "sha256": _digest(written)}))
            for path in list(self._by_step().values())[: -self.keep]:
                # Renamed first, in one step: a half-removed directory must not look like a checkpoint.
                remove(path.rename(path.with_name(f".part-0-{path.name}")))
        accelerator.wait_for_everyone()

    def load_newest(self, training: Training) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint.

        One that is damaged is renamed, and the one before is taken.

        Returns:
            The ``state`` that was saved with it, None where there is no checkpoint; and lines that say what is damaged.

        Raises:
            UsageError: there are checkpoints, and none of them is whole, or the whole one is of another training.
        """
        from accelerate.utils import broadcast_object_list

        chosen: list[Any] = self._choose() if training.accelerator.is_main_process else [None, [], ""]
        name, lines, error = broadcast_object_list(chosen)
        if error:
            raise UsageError(error)
        return None if name is None else _load(training, self.directory / name), lines

    def _choose(self) -> list[Any]:
        """The name of the newest whole checkpoint, lines that say what is damaged, and an error."""
        damaged: dict[Path, str] = {}
        for step, path in reversed(self._by_step().items()):
            try:
                _verify(path, step)
            except UsageError as error:
                damaged[path] = printable(str(error).removesuffix("."))
                continue
            except OSError as error:
                damaged[path] = printable(f"{Path(error.filename or path).name}: {error.strerror}")
                continue
            lines = [f"checkpoint {wrong.name} is damaged and left aside: {why}; {path.name} is taken."
                     for wrong, why in damaged.items()]  # fmt: skip
            for wrong in damaged:
                aside = wrong.with_name(f"damaged-{wrong.name}")
                remove(aside)
                wrong.rename(aside)
            return [path.name, lines, ""]
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        return [None, [], reasons and (
            f"no checkpoint in {printable(self.directory)!r} is whole ({reasons}); restore one from a backup, or "
            "remove that directory to train from the start."
        )]  # fmt: skip

    def _by_step(self) -> dict[int, Path]:
        """By its update, from the oldest on; a copy that somebody made has another name."""
        named = {path: re.fullmatch(r"step-(\d{9,18})", path.name, re.ASCII) for path in self.directory.glob("step-*")}
        return dict(sorted((int(name[1]), path) for path, name in named.items() if name and path.is_dir()))


# --- Files ------------------------------------------------------------------------------------------------------------


def _verify(path: Path, step: int) -> None:
    """Refuse a checkpoint that is not whole.

    Raises:
        UsageError: a file is damaged.
        OSError: a file cannot be read.
    """
    values = read_json(path / _STATE)
    if isinstance(values, dict) and "sizes" in values:
        records = {name: (size, None) for name, size in from_mapping(_OldContents, values, _STATE).sizes.items()}
    else:
        contents = from_mapping(_Contents, values, _STATE)
        if values.pop("sha256") != _digest(values) or contents.step != step:
            raise UsageError(f"{_STATE} does not have its checksum, or is of another update")
        files = {kind: getattr(contents.files, kind) for kind in ("model", "optimizer", "ema")}
        records = {f"{kind}.safetensors": (one.bytes, one.sha256) for kind, one in files.items() if one is not None}
    for name, (size, checksum) in records.items():
        actual = (path / name).stat().st_size
        if actual != size:
            raise UsageError(f"{name} has {actual:,} bytes and not {size:,}")
        if checksum is not None and file_digest(path / name) != checksum:
            raise UsageError(f"{name} does not have its checksum")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _load(training: Training, path: Path) -> dict[str, Any]:
    """Load a checkpoint, and return its ``state``."""
    values = read_json(path / _STATE)
    old = "sizes" in values  # of version 0.1.0, without checksums: anything may be in its files
    try:
        if old:
            model, ema, optimizer, scaler = _of_version_0_1_0(training, path)
        else:
            model, tensors = (read_tensors(path / f"{kind}.safetensors") for kind in ("model", "optimizer"))
            ema = read_tensors(path / "ema.safetensors") if "ema" in values["files"] else {}
            optimizer, scaler = _restored(values["optimizer"], tensors), values["scaler"]
        _set_state_dicts(training, model, optimizer)
        if training.ema is not None:
            training.ema.load_state_dict(ema)
        if training.accelerator.scaler is not None:
            training.accelerator.scaler.load_state_dict(scaler)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not (old or isinstance(error, _REFUSALS)):
            raise
        raise UsageError(
            f"{printable(path)} cannot be loaded into this run ({printable(' '.join(str(error).split())[:300])}); "
            "remove it, and the run resumes from the one before, or start another run with --output."
        ) from error
    return values["state"]


def _of_version_0_1_0(training: Training, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
    """Weights, average, optimizer and scaler that accelerate saved; its random states are not needed, and not read."""
    if (path / "pytorch_model_fsdp_0").exists():
        raise ValueError("it is sharded, and the index of its parts is a pickle that could run code")

    def safely(name: str) -> Any:
        try:
            with open_regular(path / name) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return {}
        except Exception:  # many types; and PyTorch's message recommends to load it with code in it
            raise ValueError(f"{name} does not hold tensors and numbers alone, or is damaged") from None

    model, ema = read_tensors(path / "model.safetensors"), safely("custom_checkpoint_0.pkl")
    if all(name.startswith("module.") for name in model):  # by DDP
        model = {name.removeprefix("module."): value for name, value in model.items()}
    # Weights that are tied to others were written once.
    own = training.plain_model.state_dict()
    written = {own[name].data_ptr(): value for name, value in model.items() if name in own}
    model |= {name: written[v.data_ptr()] for name, v in own.items() if name not in model and v.data_ptr() in written}
    # The optimizer's state was saved by the places of the parameters, of which the average has the order of then.
    place = {name.removeprefix("module."): i for i, name in enumerate(ema)}
    groups = [sorted(names, key=lambda name: place.get(name, 0)) for names in _parameter_names(training)]
    optimizer = _renamed(safely("optimizer.bin"), dict(enumerate(itertools.chain(*groups))))
    return model, ema, optimizer, safely("scaler.pt")


# --- State dicts ------------------------------------------------------------------------------------------------------


def _state_dicts(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Those of the model and the optimizer, by the names of parameters; under FSDP whole, on the CPU."""
    optimizer = training.plain_optimizer
    if training.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, whole = get_state_dict(training.model, optimizer, options=options)
        return dict(model), dict(whole)  # type: ignore[arg-type]
    names = dict(enumerate(itertools.chain(*_parameter_names(training))))
    return training.plain_model.state_dict(), _renamed(optimizer.state_dict(), names)


def _set_state_dicts(training: Training, model: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
    if training.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            training.model, training.plain_optimizer, model_state_dict={**model}, optim_state_dict=optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )  # fmt: skip
        return
    training.plain_model.load_state_dict(model)
    names = _parameter_names(training)
    if [sorted(one["params"]) for one in optimizer["param_groups"]] != [sorted(one) for one in names]:
        raise UsageError("its optimizer has other parameters, or groups of them")
    numbers = {name: i for i, name in enumerate(itertools.chain(*names))}
    # PyTorch takes parameters by their places, which a later version may change.
    groups = [{**one, "params": own} for one, own in zip(optimizer["param_groups"], names, strict=True)]
    training.plain_optimizer.load_state_dict(_renamed({**optimizer, "param_groups": groups}, numbers))


def _parameter_names(training: Training) -> list[list[str]]:
    """The names of the parameters in each group of the optimizer."""
    names = {id(parameter): name for name, parameter in training.plain_model.named_parameters()}
    return [[names[id(one)] for one in group["params"]] for group in training.plain_optimizer.param_groups]


def _renamed(optimizer: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with other keys for the parameters."""
    groups = [{**group, "params": [names[one] for one in group["params"]]} for group in optimizer["param_groups"]]
    state = {names.get(key, key): value for key, value in optimizer["state"].items()}
    return {**optimizer, "state": state, "param_groups": groups}


def _flattened(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors go to ``tensors``, under names that the JSON has in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {key: _flattened(one, f"{name}.{key}" if name else key, tensors) for key, one in value.items()}
    if isinstance(value, list | tuple):
        some = [_flattened(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
        return some if isinstance(value, list) else {"tuple": some}
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that :func:`_flattened` made JSON of."""
    if isinstance(value, list):
        return [_restored(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]].clone()  # not a part of the file in memory
    inner = {key: _restored(one, tensors) for key, one in value.items()}
    return tuple(inner["tuple"]) if inner.keys() == {"tuple"} else inner
