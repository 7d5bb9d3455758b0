"""Where a task runs: accelerate's answer, afresh for each task."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from .errors import UsageError, require

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(
    *, precision: str = "fp32", device: str = "auto", fsdp: bool = False, deterministic: bool = False, **further: Any
) -> Accelerator:
    """An accelerator for one task.

    Args:
        precision: `fp32`, or `bf16` or `fp16` by autocast.
        device: `auto` takes a GPU if there is one, `cpu` none.
        fsdp: Shard over the processes (FSDP2) instead of copying (DDP).
        deterministic: Only deterministic CUDA kernels, where there are such.
        **further: Arguments of ``accelerate.Accelerator``.

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
    # One process may wait for another that encodes or evaluates what the others have not.
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


_LONGEST_WAIT = timedelta(hours=6)

# Parameters from which on a part of a network is gathered by itself.
_SHARDED_FROM = 100_000
