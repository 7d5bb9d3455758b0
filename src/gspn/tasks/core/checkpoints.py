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
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..._files import file_digest, naming, printable, read_json, sync, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

_PREFIX, _DAMAGED = "step-", "damaged-"
_STATE = "state.json"
_OLD_SHARDS = "pytorch_model_fsdp_0"


@dataclass
class Training:
    """What a run trains: the objects whose state a checkpoint holds."""

    accelerator: Accelerator
    model: nn.Module
    """As accelerate prepared it."""
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights."""
        return self.accelerator.distributed_type == "FSDP"

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every number of weights, average and optimizer state is finite, in all processes."""
        states: list[Any] = [self.model.parameters(), self.model.buffers(), self.optimizer.state.values()]
        states += [] if self.ema is None else [self.ema.parameters(), self.ema.buffers()]
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for value in _tensors(states):
            value = getattr(value, "to_local", lambda value=value: value)()  # this process's part of a sharded one
            if value.is_floating_point() or value.is_complex():
                finite &= value.isfinite().all().to(finite.device)
        broken = self.accelerator.reduce((~finite).float()[None], "sum")
        return not bool(broken.item())  # type: ignore[union-attr]


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
        return bool(self._named())

    def save(self, training: Training, step: int, state: Mapping[str, Any]) -> None:
        """Save a training, and ``state``, as JSON.

        Raises:
            OSError: the disk is full or the directory not writable; earlier checkpoints stay.
        """
        accelerator = training.accelerator
        model, optimizer = _state_dicts(training)
        if accelerator.is_main_process:
            tensors: dict[str, Tensor] = {}
            written = {"state": dict(state), "optimizer": _flattened(optimizer, "", tensors)}
            if accelerator.scaler is not None:
                written["scaler"] = accelerator.scaler.state_dict()
            files = {"model": model, "optimizer": tensors}
            if training.ema is not None:
                files["ema"] = training.ema.state_dict()
            self._write(f"{_PREFIX}{step:09d}", files, written)
        accelerator.wait_for_everyone()

    def load_newest(self, training: Training) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint.

        One that is damaged is renamed, and the one before is taken.

        Returns:
            The ``state`` that was saved with it, None where there is no checkpoint; and lines that say what is damaged.

        Raises:
            UsageError: there are checkpoints, and none of them is whole, or the whole one is of another training.
        """
        accelerator = training.accelerator
        found: list[Any] = [None, [], ""]  # the name of the checkpoint, lines, an error
        if accelerator.is_main_process:
            found = self._find()
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            found = broadcast_object_list(found)
        name, lines, error = found
        if error:
            raise UsageError(error)
        if name is None:
            return None, lines
        path = self.directory / name
        from safetensors import SafetensorError

        try:
            state = _load(training, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as wrong:
            if isinstance(wrong, UsageError | torch.OutOfMemoryError):
                raise
            reason = " ".join(str(wrong).split())[:300]
            raise UsageError(
                f"{printable(path)} cannot be loaded into this run ({printable(reason)}); remove it, and the run "
                "resumes from the one before, or start another run with --output."
            ) from wrong
        return state, lines

    def _write(self, name: str, files: Mapping[str, Mapping[str, Tensor]], written: dict[str, Any]) -> None:
        final, part = self.directory / name, self.directory / f".part-{name}"
        with naming(self.directory):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                records = {}
                for kind, tensors in files.items():
                    path = part / f"{kind}.safetensors"
                    require("safetensors.torch").save_file(_alone(tensors), path, metadata={"format": "pt"})
                    records[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                written["files"] = records
                write_text(part / _STATE, json.dumps({**written, "sha256": _digest(written)}))
                for path in (*part.iterdir(), part):
                    sync(path)
                if final.exists():  # one that is not whole: update numbers grow
                    final.rename(self.directory / f".part-old-{name}")
                part.rename(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            sync(self.directory)
            self._remove_older()

    def _find(self) -> list[Any]:
        named = self._named()
        damaged = []
        for path in reversed(named):
            problem = _problem(path)
            if problem is None:
                lines = [f"checkpoint {wrong.name} is damaged and left aside: {why}" for wrong, why in damaged]
                for wrong, _ in damaged:
                    aside = wrong.with_name(f"{_DAMAGED}{wrong.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    wrong.rename(aside)
                return [path.name, [printable(f"{line}; {path.name} is taken.") for line in lines], ""]
            damaged.append((path, problem))
        if not named:
            return [None, [], ""]
        reasons = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        return [None, [], printable(
            f"no checkpoint in {str(self.directory)!r} is whole ({reasons}); restore one from a backup, or remove "
            "that directory to train from the start."
        )]  # fmt: skip

    def _named(self) -> list[Path]:
        return sorted(path for path in self.directory.glob(f"{_PREFIX}*") if path.is_dir())

    def _remove_older(self) -> None:
        for path in self._named()[: -self.keep]:
            # Renamed first, in one step: a half-removed directory must not look like a checkpoint.
            gone = path.with_name(f".part-old-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        for path in self.directory.glob(".part-*"):
            shutil.rmtree(path, ignore_errors=True)


# --- Files ------------------------------------------------------------------------------------------------------------


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        values = read_json(path / _STATE)
        if not isinstance(values, dict) or not isinstance(values.get("state"), dict):
            return f"{_STATE} is not that of a checkpoint"
        if "sizes" in values:  # of version 0.1.0, without checksums
            records = {name: {"bytes": size} for name, size in values["sizes"].items()}
        else:
            records = values["files"]
            if values.pop("sha256", None) != _digest(values):
                return f"{_STATE} does not have its checksum"
        for name, record in records.items():
            file = path / name
            if file.stat().st_size != record["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes and not {record['bytes']:,}"
            if "sha256" in record and file_digest(file) != record["sha256"]:
                return f"{name} does not have its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror or error}"
    except UsageError as error:
        return str(error).removesuffix(".")
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError):
        return f"{_STATE} is not that of a checkpoint"
    return None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _load(training: Training, path: Path) -> dict[str, Any]:
    values = read_json(path / _STATE)
    safetensors = require("safetensors.torch")
    names = values.get("files", ["model.safetensors"])
    files = {Path(name).stem: safetensors.load_file(path / name) for name in names}
    if "sizes" in values:
        files, values = _of_version_0_1_0(path, files, values)
    else:
        values["optimizer"] = _restored(values["optimizer"], files["optimizer"])
    _set_state_dicts(training, files["model"], values["optimizer"])
    if training.ema is not None:
        training.ema.load_state_dict(_with_twins(training.ema, files["ema"]))
    if training.accelerator.scaler is not None:
        training.accelerator.scaler.load_state_dict(values["scaler"])
    return values["state"]


def _of_version_0_1_0(path: Path, files: dict[str, Any], values: dict[str, Any]) -> tuple[Any, Any]:
    """The same from a checkpoint that accelerate wrote; its random states are not needed, and not read."""
    if (path / _OLD_SHARDS).exists():
        raise UsageError(
            f"{printable(path)} is a sharded checkpoint of version 0.1.0, whose index is a pickle and could run code; "
            "start another run from the weights in the run's last/, or resume it with version 0.1.0."
        )

    def safely(name: str) -> Any:
        try:
            return torch.load(path / name, map_location="cpu", weights_only=True)
        except Exception:  # many types; and PyTorch's message recommends to load it with code in it
            raise ValueError(f"{name} does not hold tensors and numbers alone, or is damaged") from None

    wrapped = all(name.startswith("module.") for name in files["model"])  # by DDP
    weights = {name.removeprefix("module." if wrapped else ""): value for name, value in files["model"].items()}
    average = path / "custom_checkpoint_0.pkl"
    scaler = path / "scaler.pt"
    found = {"model": weights} | ({"ema": safely(average.name)} if average.exists() else {})
    state = values | {"optimizer": safely("optimizer.bin")}
    return found, state | ({"scaler": safely(scaler.name)} if scaler.exists() else {})


# --- State dicts ------------------------------------------------------------------------------------------------------


def _state_dicts(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Those of the model and the optimizer, whole; under FSDP in the first process, on the CPU."""
    if training.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(training.model, _bare(training), options=options)
        return dict(model), dict(optimizer)  # type: ignore[arg-type]
    return training.accelerator.unwrap_model(training.model).state_dict(), _bare(training).state_dict()


def _set_state_dicts(training: Training, model: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
    if training.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            training.model, _bare(training), model_state_dict={**model}, optim_state_dict=optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )  # fmt: skip
        return
    plain = training.accelerator.unwrap_model(training.model)
    plain.load_state_dict(_with_twins(plain, model))
    _bare(training).load_state_dict(optimizer)


def _bare(training: Training) -> torch.optim.Optimizer:
    return getattr(training.optimizer, "optimizer", training.optimizer)  # accelerate wraps it


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for one in value:
            yield from _tensors(one)


def _memory(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors writes them: contiguous, and weights that are tied only once."""
    unique = {_memory(value) if value.numel() else name: name for name, value in reversed(list(tensors.items()))}
    kept = {name: tensors[name].detach().cpu().contiguous() for name in tensors if name in set(unique.values())}
    return {k: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for k, v in kept.items()}


def _with_twins(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the weights that are tied to others, and were written once."""
    own = module.state_dict()
    written = {_memory(own[name]): value for name, value in tensors.items() if name in own}
    twins = {name: written[_memory(v)] for name, v in own.items() if name not in tensors and _memory(v) in written}
    return {**tensors, **twins}


def _flattened(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors go to ``tensors``, under names that the JSON has in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = ((key, f"{name}.{key}" if name else str(key)) for key in value)
        return {"items": [[key, _flattened(value[key], path, tensors)] for key, path in pairs]}
    if isinstance(value, list | tuple):
        some = [_flattened(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
        return some if isinstance(value, list) else {"tuple": some}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NotImplementedError(
        f"{name!r} of the optimizer's state is of type {type(value).__name__}, which a checkpoint cannot hold; choose "
        "another optim.name."
    )


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`_flattened` made JSON of."""
    if isinstance(value, list):
        return [_restored(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == "tensor":
        return tensors[inner].clone()  # not a part of the file in memory
    if kind == "tuple":
        return tuple(_restored(one, tensors) for one in inner)
    return {key: _restored(one, tensors) for key, one in inner}
