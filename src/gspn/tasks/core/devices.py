"""Devices and processes: accelerate's choice, made again for each task."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gspn.distributed.exchange import naming_lost_process

from ..._errors import UsageError, require

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

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


@dataclass(frozen=True)
class Processes:
    """The processes that share the work of a task that does not train: one, or those that ``torchrun`` started.

    All have to call the methods that exchange something, in the same order.
    """

    device: torch.device
    """Where this one computes."""
    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str) -> Processes:
        """Connect to the others; ``device`` is as for :func:`inference_device`, a GPU for each process."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(inference_device(device))
        accelerator = make_accelerator(device=device)
        where = accelerator.device
        if where.type == "cpu":
            where = torch.device("cpu")  # "cpu:0" is another device for fake tensors
        return cls(where, accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The values of all processes in their order.

        Raises:
            ProcessLostError: Another process has ended.
        """
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with naming_lost_process():
                torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """``x``, contiguous, with the numbers of the process ``source``; raises as :meth:`gather` does."""
        if self.count > 1:
            with naming_lost_process():
                torch.distributed.broadcast(x.view(torch.uint8), source)  # not every backend knows every dtype
        return x

    def wait(self) -> None:
        """Wait for the others; raises as :meth:`gather` does."""
        self.gather(None)


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or the first of those that ``torchrun`` started.

    Example:
        >>> is_main_process()
        True
    """
    return int(os.environ.get("RANK", "0")) == 0


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
