"""Device memory that need not be taken: models that wait on the host, and the UNet's skip tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ...core.errors import UsageError

OFFLOADS = ("none", "auto", "model", "activations", "all")
"""What may wait in host memory: nothing, what does not fit, whole models, skip tensors, both."""

MODELS = ("model", "all")
"""Those with which whole models wait."""

SKIPS = ("activations", "all")
"""Those with which skip tensors wait."""

_WEIGHTS_SHARE = 0.8  # of free memory, above which `auto` lets models wait


class _OnCall(Sequence[Tensor]):
    """Skip tensors of a level, each brought to the device when it is asked for, and not before."""

    def __init__(self, stored: Sequence[Tensor], device: torch.device) -> None:
        self._stored, self._device = stored, device

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> _OnCall: ...

    def __getitem__(self, index: int | slice) -> Tensor | _OnCall:
        if isinstance(index, slice):
            return _OnCall(self._stored[index], self._device)
        return self._stored[index].to(self._device)


@contextmanager
def offloaded_skips(unet: nn.Module, *, storage: torch.device | str | None = None) -> Iterator[None]:
    """Within the block, a UNet's skip tensors wait on another device between its way down and its way up.

    At large sizes they are the greater part of what is alive at the bottom. Hooks move them as a down block ends, and
    back one by one as an up block takes them; results are the same bit for bit.

    Args:
        unet: A ``UNet2DConditionModel``, with or without an adapter.
        storage: Where they wait; by default host memory.

    Raises:
        UsageError: the UNet computes in host memory itself.

    Example:
        >>> with offloaded_skips(pipeline.unet):  # doctest: +SKIP
        ...     pipeline("a cat", height=4096, width=4096)
    """
    if storage is None:
        device = next(unet.parameters()).device
        if device.type == "cpu":
            raise UsageError(
                "offload 'activations': the UNet is on the CPU, and its skip tensors are in host memory already; leave "
                "it out, or choose a GPU."
            )
        storage = "cpu"
    place = torch.device(storage)
    blocks: Any = unet
    first: nn.Module = blocks.down_blocks[0]
    # The device is that of each call's input: what computes there may be moved between calls.
    home: list[torch.device] = []

    def store(tensor: Tensor) -> Tensor:
        # A copy even where both are one device, so that a test there is one of the same path.
        return tensor.to(place, copy=True)

    def after_input(_module: nn.Module, _args: Any, found: Tensor) -> Tensor:
        home[:] = [found.device]
        return store(found)  # the UNet keeps what it gets here as its first skip tensor

    def before_first(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(home[0])}

    def after_down(_module: nn.Module, _args: Any, found: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        sample, skips = found
        return sample, tuple(store(skip) for skip in skips)

    def before_up(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        skips = _OnCall(kwargs["res_hidden_states_tuple"], home[0])
        return args, {**kwargs, "res_hidden_states_tuple": skips}

    handles = [
        blocks.conv_in.register_forward_hook(after_input),
        first.register_forward_pre_hook(before_first, with_kwargs=True),
        *(block.register_forward_hook(after_down) for block in blocks.down_blocks),
        *(block.register_forward_pre_hook(before_up, with_kwargs=True) for block in blocks.up_blocks),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def offloaded_models(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Within the block, each model of a pipeline is on the device only while it computes.

    Mount adapters before, and unmount them after.

    Args:
        pipeline: On the CPU.
        device: That computes.

    Raises:
        UsageError: the device is the CPU.
    """
    check_offload("model", device)
    pipeline.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipeline.remove_all_hooks()
        pipeline.to("cpu")


def check_offload(offload: str, device: torch.device) -> None:
    """Raise unless this can be offloaded from the device."""
    if offload not in OFFLOADS:
        raise UsageError(f"offload {offload!r} is unknown; use one of {', '.join(OFFLOADS)}.")
    if device.type == "cpu" and offload in {*MODELS, *SKIPS}:
        raise UsageError(
            f"offload {offload!r}: the run is on the CPU, which has nothing to offload to; use none, or choose a GPU."
        )


def moved(pipeline: Any, device: torch.device, offload: str) -> str:
    """Put a pipeline on its device, unless its models are to wait.

    Args:
        pipeline: Anywhere.
        device: That computes.
        offload: One of :data:`OFFLOADS`.

    Returns:
        What is offloaded: ``"model"`` instead of ``"auto"`` where the weights leave too little room.

    Raises:
        UsageError: the weights do not fit.
    """
    if offload in MODELS:
        return offload
    if device.type != "cpu" and offload == "auto":
        weights = sum(_bytes(model) for model in pipeline.components.values() if isinstance(model, nn.Module))
        if weights > _WEIGHTS_SHARE * free_memory(device):
            pipeline.to("cpu")
            return "model"
    try:
        pipeline.to(device)
    except torch.OutOfMemoryError:
        raise UsageError(
            f"the weights do not fit on {device}: use --precision bf16, --offload model, or --device cpu."
        ) from None
    return offload


def drawing_weights(pipeline: Any) -> int:
    """Bytes of the models that are called while an image is drawn: what is on the device although models wait."""
    return _bytes(pipeline.unet) + _bytes(pipeline.vae)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device: of a GPU with what PyTorch holds and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1  # nothing says how much there is: then nothing is refused


def _bytes(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())
