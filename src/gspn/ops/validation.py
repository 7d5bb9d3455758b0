"""The checks and conversions of the operators. The registered operators call the checks, in each of their entries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .directions import DIRECTIONS, scan_axes

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


def check_scannable(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless there are scans over tensors of this dtype."""
    if tensor.dtype not in _DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"{name}.dtype is {tensor.dtype}; a scan needs floating point ({dtypes}), so convert with .float()."
        )


def _check_tensors(
    image: tuple[str, Tensor], has_data: bool, *expected: tuple[str, Tensor | None, tuple[int, ...], torch.dtype]
) -> None:
    """Raise unless each tensor that is there has its shape and dtype, strides, the image's device, and memory."""
    like, x = image
    device = x.device
    for name, t, shape, dtype in expected:
        if t is None:
            continue
        if t.dtype is not dtype:
            raise TypeError(f"{like}.dtype={x.dtype} but {name}.dtype is {t.dtype}; convert it to {dtype}.")
        if t.device != device:
            raise ValueError(f"{like}.device={device} but {name}.device is {t.device}; move all of them to one device.")
        if t.layout is not _STRIDED:
            raise TypeError(f"{name}.layout is {t.layout}; a scan needs strides, so convert with .to_dense().")
        if t.shape != shape:
            free = "S" if name == "proxy" else "G"
            lengths = ", ".join(free if n == _FREE else str(n) for n in shape)
            meaning = _MEANINGS.get(name, "of the same shape, so expand it")
            raise ValueError(
                f"{name}.shape={t.shape} does not fit {like}.shape={x.shape}: {name} must be [{lengths}], {meaning}."
            )
        if has_data:
            check_memory(name, t)


def check_memory(name: str, t: Tensor) -> None:
    """Raise ValueError unless all elements are within the tensor's storage."""
    size, needed = t.untyped_storage().nbytes(), t.nbytes
    if size == needed and t.is_contiguous() and not t.storage_offset():
        return
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    if needed and (last + 1) * t.element_size() > size:
        raise ValueError(
            f"{name}.shape={t.shape} needs more than the {size} bytes of its storage, which was freed or resized; pass "
            "a tensor that has its data."
        )


_FREE = -1
"""In the shape wanted, a length that is free and not possible as it is."""

_MEANINGS = {
    "taps": "three taps for each pixel of each of G groups, which divide the channels: 1 (shared taps) up to all",
    "proxy": "of x's batch and frame size, S at least 1",
    "tap_proj": "three taps for each direction and each of G groups, which divide x's channels: 1 (shared taps) up to "
    "all, from the proxy's channels",
    "merge": "a weight for each direction",
    **dict.fromkeys(("lam_proj", "u_proj"), "a map for each direction, of x's channels and the proxy's"),
    "skip_proj": "of x's channels and the proxy's",
}


def _check_image(name: str, image: Tensor, op: str) -> torch.Size:
    """The shape; raise unless it is ``[B, C, H, W]``, in a dtype that scans have."""
    check_scannable(name, image)
    shape = image.shape
    if len(shape) != 4:
        raise ValueError(f"{name}.shape={shape}: {name} has {len(shape)} axes; {op} needs [B, C, H, W].")
    return shape


def _groups(shape: torch.Size, channels: int) -> int:
    groups = shape[1] if len(shape) > 1 else 0
    return groups if groups and channels % groups == 0 else _FREE


def check_segment(segment: Any) -> None:
    """Raise TypeError or ValueError unless ``segment`` is None or a number of lines."""
    _check_lines("segment", segment, "a global scan")


def check_reference_lines(lines: Any) -> None:
    """Raise TypeError or ValueError unless ``lines`` is None or a number of lines."""
    _check_lines("reference_lines", lines, "lam as it is, whatever the number of lines")


def _check_lines(name: str, lines: Any, none: str) -> None:
    if lines is None:
        return
    if isinstance(lines, bool) or not isinstance(lines, (int, torch.SymInt)):
        raise TypeError(
            f"{name}={lines!r} is a {type(lines).__name__}; pass a number of lines as an int, or None for {none}."
        )
    if lines < 1:
        raise ValueError(f"{name}={lines!r} is below 1; pass a number of lines, or None for {none}.")
    if isinstance(lines, int) and lines >= 2**63:
        raise ValueError(f"{name}={lines!r} is more than any image's number of lines; pass None for {none}.")


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


def check_line_scan(
    image: tuple[str, Tensor], taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, has_data: bool,
    *, h: Tensor | None = None, x: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise unless these are arguments of ``line_scan`` or of its gradients; ``image`` is x or grad with its name.

    With ``has_data`` the tensors' memory is checked too, which they have except while PyTorch traces.
    """
    scan_axes(direction)
    check_segment(segment)
    name, like = image
    batch, channels, height, width = shape = _check_image(name, like, "line_scan")
    dtype, of_taps = like.dtype, (batch, _groups(taps.shape, channels), 3, height, width)
    _check_tensors(
        image, has_data,
        (name, like, shape, dtype), ("taps", taps, of_taps, dtype), ("lam", lam, shape, dtype), ("h", h, shape, dtype),
        ("x", x, shape, dtype),
    )  # fmt: skip


def check_propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    count: int, segment: int | None, has_data: bool, *, grad: Tensor | None = None, merge: Tensor | None = None,
    skip_axes: int = 2,
) -> None:  # fmt: skip
    """Raise unless these are arguments of ``propagate`` over ``count`` directions, or of its gradients.

    Projections must be of the state's dtype. The skip has no axis of directions where it is the sum over them.
    """
    check_segment(segment)
    batch, channels, height, width = shape = _check_image("x", x, "propagate")
    dtype, wide, own = x.dtype, state_dtype(x.dtype), proxy.shape
    proxy_channels = own[1] if len(own) > 1 and own[1] else _FREE
    gate = (count, channels, proxy_channels)
    _check_tensors(
        ("x", x), has_data,
        ("x", x, shape, dtype), ("proxy", proxy, (batch, proxy_channels, height, width), dtype),
        ("tap_proj", tap_proj, (count, _groups(tap_proj.shape, channels), 3, proxy_channels), wide),
        ("lam_proj", lam_proj, gate, wide), ("u_proj", u_proj, gate, wide),
        ("skip_proj", skip_proj, gate[-skip_axes:], wide), ("merge", merge, (count,), wide),
        ("grad", grad, shape, dtype),
    )  # fmt: skip


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
