"""Scans over maps larger than those of the training: restarted after as many lines as they were trained over.

A scan's taps sum to one, and its input is added line after line: without restarts the state grows with the number of
lines, and over a map of twice the size it is not what the gates after it were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gspn.diffusers import GSPNTokenMixer

from ..conditioning import Conditioning
from .memory_and_flops import unet_usage


def lines_of(unet: Any, text: Conditioning, *, height: int, width: int, factor: int) -> dict[str, int]:
    """For each mixer of a UNet the lines of its map, along its longer side; on fake tensors.

    Args:
        unet: With an adapter mounted; without one the result is empty.
        text: Any prompts.
        height: Of an image in pixels.
        width: Likewise.
        factor: Of the VAE.
    """
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_mixer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            found[name] = max(kwargs["map_size"])

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in unet.named_modules()
        if isinstance(module, GSPNTokenMixer)
    ]
    if handles:
        try:
            unet_usage(unet, text, height=height, width=width, factor=factor, batch=1, device=torch.device("cpu"))
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextmanager
def restarting(unet: Any, lines: Mapping[str, int]) -> Iterator[None]:
    """Mixers by name restart their scans after as many lines, unless they do so sooner by themselves.

    Args:
        unet: With an adapter mounted.
        lines: By the mixer's name; of others nothing changes.
    """
    scans: list[Any] = [getattr(unet.get_submodule(name), "scan") for name in lines]  # noqa: B009  (for pyright)
    before = [scan.segment for scan in scans]
    for scan, own, most in zip(scans, before, lines.values(), strict=True):
        scan.segment = most if own is None else min(own, most)
    try:
        yield
    finally:
        for scan, own in zip(scans, before, strict=True):
            scan.segment = own
