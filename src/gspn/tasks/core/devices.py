"""Devices and processes: accelerate's choice, made again for each task."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._errors import UsageError, require

if TYPE_CHECKING:
    from accelerate import Accelerator

# One process may wait for another that encodes or evaluates for all.
_LONGEST_WAIT = timedelta(hours=6)

# A submodule with at least this many parameters is sharded as one unit.
_SHARDED_FROM = 100_000


def make_accelerator(
    *, precision: str = "fp32", device: str = "auto", fsdp: bool = False, deterministic: bool = False, **further: Any
) -> Accelerator:
    """An accelerator for one task, with the settings of :class:`~.sections.RunConfig` and ``further`` ones of its own.

    `bf16` and `fp16` are by autocast; the device `auto` is a GPU if there is one.

    Raises:
        UsageError: the device cannot compute in that precision.
    """
    accelerate = require("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    # accelerate keeps the first task's precision and device for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = None
    if fsdp:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=_SHARDED_FROM,
            state_dict_type="SHARDED_STATE_DICT",
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    handlers = [accelerate.InitProcessGroupKwargs(timeout=_LONGEST_WAIT), *further.pop("kwargs_handlers", [])]
    try:
        return accelerate.Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            fsdp_plugin=plugin,
            kwargs_handlers=handlers,
            **further,
        )
    except ValueError as error:
        raise UsageError(f"precision {precision!r}: {' '.join(str(error).split())}") from None


def inference_device(name: str) -> torch.device:
    """The device to compute on without training: for ``"auto"`` a GPU if there is one, otherwise the CPU.

    Example:
        >>> inference_device("cpu")
        device(type='cpu')
    """
    gpu = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else None
    return gpu or torch.device("cpu")


@contextmanager
def distributed_context() -> Iterator[None]:
    """Close the connection between processes that the block opened; one that existed before stays open."""

    def connected() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    before = connected()
    yield
    # Not after an error: other processes may still wait for this one, and closing would wait for them.
    if connected() and not before:
        torch.distributed.destroy_process_group()


@contextmanager
def batchnorm_errors() -> Iterator[None]:
    """Turn PyTorch's error of BatchNorm, where it has a single value to average, into one line."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        raise UsageError(
            "BatchNorm needs more than one value of each channel, and a batch of one image has one; raise "
            "data.batch_size, or choose a model without BatchNorm."
        ) from error


def process_info(accelerator: Accelerator) -> dict[str, Any]:
    """The arguments of data loaders that depend on the process."""
    return {
        "processes": accelerator.num_processes,
        "process": accelerator.process_index,
        "pin": accelerator.device.type == "cuda",
    }


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """A batch of images on a device, in the model's memory format."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


def peak_memory_mib(device: torch.device) -> float:
    """The peak memory in MiB: allocated on a CUDA device, else occupied by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
