"""The checks and conversions of the operators. The registered operators call the checks, in each of their entries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .directions import DIRECTIONS, scan_axes

Named = tuple[tuple[str, Tensor | None], ...]
"""Tensors with the names of their arguments, in messages; None for one that is absent."""

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
)  # fmt: skip

_STRIDED = torch.strided
_SEQUENCES = {",".join(names): names for n in range(1, 5) for names in itertools.permutations(DIRECTIONS, n)}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a scan over ``dtype`` accumulates: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_is_tensor(name: str, tensor: Any) -> None:
    """Raise TypeError unless ``tensor`` is one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")


def check_kind(name: str, tensor: Tensor, like: tuple[str, Tensor], *dtypes: torch.dtype) -> None:
    """Raise TypeError or ValueError unless a tensor has one of the dtypes, strides, and the device of another one."""
    if tensor.dtype in dtypes and tensor.device == like[1].device and tensor.layout is _STRIDED:
        return
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{like[0]}.dtype={like[1].dtype} but {name}.dtype is {tensor.dtype}; convert it to {allowed}.")
    if tensor.device != like[1].device:
        raise ValueError(
            f"{like[0]}.device={like[1].device} but {name}.device is {tensor.device}; move all of them to one device."
        )
    raise TypeError(f"{name}.layout is {tensor.layout}; a scan needs strides, so convert with .to_dense().")


def check_scannable(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless there are scans over tensors of this dtype."""
    if tensor.dtype not in _DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"{name}.dtype is {tensor.dtype}; a scan needs floating point ({dtypes}), so convert with .float()."
        )


def _check_image(name: str, image: Tensor, op: str) -> torch.Size:
    """The shape; raise unless it is ``[B, C, H, W]``, in a dtype that scans have."""
    check_scannable(name, image)
    shape = image.shape
    if len(shape) != 4:
        raise ValueError(f"{name}.shape={shape}: {name} has {len(shape)} axes; {op} needs [B, C, H, W].")
    if image.layout is not _STRIDED:
        check_kind(name, image, (name, image), image.dtype)
    return shape


def check_same(name: str, tensor: Tensor, image: tuple[str, Tensor], shape: torch.Size) -> None:
    """Raise unless a tensor is like an image, whose shape this is."""
    check_kind(name, tensor, image, image[1].dtype)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}.shape={tensor.shape} differs from {image[0]}.shape={shape}; {name} has an element for each of "
            f"{image[0]}, so expand it to that shape."
        )


def _check_groups(name: str, shape: torch.Size, image: str, channels: int) -> None:
    """Raise ValueError unless the second axis of ``shape`` divides the channels."""
    groups = shape[1]
    if groups == 0 or channels % groups != 0:
        raise ValueError(
            f"{name}.shape={shape} has {groups} groups, which do not divide the {channels} channels of {image}; use "
            f"1 group (shared taps), {channels} (per-channel taps) or a divisor between."
        )


def check_segment(segment: Any) -> None:
    """Raise TypeError or ValueError unless ``segment`` is None or a number of lines."""
    if segment is None:
        return
    if isinstance(segment, bool) or not isinstance(segment, (int, torch.SymInt)):
        raise TypeError(
            f"{segment=} is a {type(segment).__name__}; pass a number of lines as an int, or None for a global scan."
        )
    if segment < 1:
        raise ValueError(f"{segment=} is below 1; pass a number of lines, or None for a global scan.")
    if isinstance(segment, int) and segment >= 2**63:
        raise ValueError(f"{segment=} is more than any image's number of lines; pass None for a global scan.")


def check_directions(directions: Any) -> None:
    """Raise ValueError unless ``directions`` is a sequence of names, each once."""
    if (
        isinstance(directions, str)
        or not isinstance(directions, Sequence)
        or not directions
        or any(not isinstance(d, str) or d not in DIRECTIONS for d in directions)
        or len(set(directions)) != len(directions)
    ):
        raise ValueError(f"{directions=}: pass one or more of {DIRECTIONS}, each once.")


def split_directions(directions: str) -> tuple[str, ...]:
    """The names in a string, between commas; ValueError unless each is a direction and there once."""
    if directions not in _SEQUENCES:
        check_directions(tuple(directions.split(",")))
    return _SEQUENCES[directions]


def check_line_scan(image: tuple[str, Tensor], same: Named, taps: Tensor, direction: str, segment: int | None) -> None:
    """Raise unless these are arguments of ``line_scan``, or of its gradients.

    Args:
        image: a tensor of the image's shape, and its name in messages.
        same: tensors that must be like it, or None.
        taps: as those below, an argument of :func:`gspn.line_scan`.
        direction: its name.
        segment: None or an integer.
    """
    scan_axes(direction)
    check_segment(segment)
    name, x = image
    batch, channels, height, width = shape = _check_image(name, x, "line_scan")
    for other, tensor in same:
        if tensor is not None:
            check_same(other, tensor, image, shape)
    check_kind("taps", taps, image, x.dtype)
    own = taps.shape
    if len(own) != 5 or own[2] != 3:
        raise ValueError(f"taps.shape={own}: taps must be [B, G, 3, H, W], three taps for each pixel of each group.")
    if own[0] != batch or own[3] != height or own[4] != width:
        raise ValueError(
            f"taps.shape={own} does not fit {name}.shape={shape}: taps must be [{batch}, G, 3, {height}, {width}], "
            f"of {name}'s batch and frame size."
        )
    _check_groups("taps", own, name, channels)


def check_propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: Sequence[str], segment: int | None,
) -> None:  # fmt: skip
    """Raise unless these are arguments of the registered ``propagate``; see :func:`gspn.ops.unfused.compose`.

    The projections must be of the state's dtype.
    """
    check_segment(segment)
    batch, channels, height, width = shape = _check_image("x", x, "propagate")
    image = ("x", x)
    check_kind("proxy", proxy, image, x.dtype)
    own = proxy.shape
    if len(own) != 4 or own[0] != batch or own[2] != height or own[3] != width or own[1] == 0:
        raise ValueError(
            f"proxy.shape={own} does not fit x.shape={shape}: proxy must be [{batch}, S, {height}, {width}], S at "
            f"least 1."
        )
    wide, proxy_channels, count = state_dtype(x.dtype), own[1], len(directions)
    check_kind("tap_proj", tap_proj, image, wide)
    own = tap_proj.shape
    if len(own) != 4 or own[0] != count or own[2] != 3 or own[3] != proxy_channels:
        raise ValueError(
            f"tap_proj.shape={own}: tap_proj must be [{count}, G, 3, {proxy_channels}], three taps for each of {count} "
            f"directions and G groups, from the {proxy_channels} channels of the proxy."
        )
    _check_groups("tap_proj", own, "x", channels)
    gate = (count, channels, proxy_channels)
    check_kind("lam_proj", lam_proj, image, wide)
    check_gate("lam_proj", lam_proj, gate)
    check_kind("u_proj", u_proj, image, wide)
    check_gate("u_proj", u_proj, gate)
    if skip_proj is not None:
        check_kind("skip_proj", skip_proj, image, wide)
        check_gate("skip_proj", skip_proj, gate[1:])


def check_gate(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a projection to gates has the shape expected: directions, x's channels, the proxy's."""
    if tensor.shape != expected:
        directions = "a map for each direction, of " if len(expected) == 3 else ""
        raise ValueError(
            f"{name}.shape is {tensor.shape}; it must be {list(expected)}, {directions}x's channels and the proxy's."
        )


def check_memory(names: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor reaches beyond its storage, as one does whose storage was freed or shrunk.

    Args:
        names: those of the arguments, with spaces between.
        *tensors: the arguments.
    """
    for t in tensors:
        if t is None:
            continue
        size = t.untyped_storage().nbytes()
        if size == t.nbytes and t.is_contiguous():
            continue
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel() and (t.storage_offset() + last + 1) * t.element_size() > size:
            name = names.split()[[other is t for other in tensors].index(True)]
            raise ValueError(
                f"{name}.shape={t.shape} needs more than the {size} bytes of its storage, which was freed or resized; "
                f"pass a tensor that has its data."
            )


def autocast(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors as autocast takes them on the first one's device.

    float64, and what is not a floating-point tensor, stay as they are; the checks refuse what is wrong. The state grows
    with the number of lines and float16 ends at 65504: under autocast to float16 a scan runs in float32, like cumsum.
    """
    like = tensors[0]
    if not isinstance(like, Tensor):
        return tensors  # type: ignore[return-value]
    device = like.device.type
    # Meta has no autocast, and the question is an error there. PyTorch 2.10 cannot trace is_autocast_available.
    if like.is_meta or not torch.is_autocast_enabled(device):
        return tensors  # type: ignore[return-value]
    dtype = torch.get_autocast_dtype(device)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in tensors
    )  # type: ignore[return-value]
