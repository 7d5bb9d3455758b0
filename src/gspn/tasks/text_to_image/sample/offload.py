"""Offloading a UNet's skip tensors to host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...._errors import UsageError

OFFLOADS = ("none", "auto", "model", "activations", "all")
"""The parts to keep in host memory: none, those that do not fit, whole models, skip tensors, or both."""

MODELS = ("model", "all")
"""The values that offload whole models, by diffusers' ``enable_model_cpu_offload``."""

SKIPS = ("activations", "all")
"""The values that offload skip tensors, by :func:`offloaded_skips`."""


class _LoadOnAccess:
    """A sequence of skip tensors in host memory; each is copied to the device when it is indexed."""

    def __init__(self, stored: Sequence[Tensor], device: torch.device) -> None:
        self._stored, self._device = stored, device

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: Any) -> Any:
        stored = self._stored[index]
        return _LoadOnAccess(stored, self._device) if isinstance(index, slice) else stored.to(self._device)


@contextmanager
def offloaded_skips(unet: Any, *, storage: torch.device | str | None = None) -> Iterator[None]:
    """Within the block, a UNet's skip tensors are on another device between its down blocks and its up blocks.

    At large sizes they are most of the memory in use at the lowest level. Hooks move them when a down block ends, and
    back one by one when an up block takes them. The results are the same bit for bit. ``storage`` is the other device,
    host memory by default.

    Raises:
        UsageError: The UNet itself is in host memory.

    Example:
        >>> with offloaded_skips(pipeline.unet):  # doctest: +SKIP
        ...     pipeline("a cat", height=4096, width=4096)
    """
    if storage is None:
        if next(unet.parameters()).device.type == "cpu":
            raise UsageError(
                "offload 'activations': the UNet is on the CPU, and its skip tensors are in host memory already; leave "
                "it out, or choose a GPU."
            )
        storage = "cpu"
    # The device of each call's input: a model that is offloaded itself moves between calls.
    home: list[torch.device] = []

    def store(tensor: Tensor) -> Tensor:
        # A copy even on the same device, so that tests without a GPU take the same path.
        return tensor.to(storage, copy=True)

    def after_input(_module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        home[:] = [result.device]
        return store(result)  # the UNet keeps this as its first skip tensor

    def before_first(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(home[0])}

    def after_down(_module: nn.Module, _args: Any, result: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        sample, skips = result
        return sample, tuple(store(skip) for skip in skips)

    def before_up(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        skips = _LoadOnAccess(kwargs["res_hidden_states_tuple"], home[0])
        return args, {**kwargs, "res_hidden_states_tuple": skips}

    handles = [
        unet.conv_in.register_forward_hook(after_input),
        unet.down_blocks[0].register_forward_pre_hook(before_first, with_kwargs=True),
        *(block.register_forward_hook(after_down) for block in unet.down_blocks),
        *(block.register_forward_pre_hook(before_up, with_kwargs=True) for block in unet.up_blocks),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
