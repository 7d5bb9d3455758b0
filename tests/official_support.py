"""The authors' official classifier in float64, written naively from its description, to compare our reading with.

It computes on a state dict with the names and shapes of the official checkpoints. It shares nothing with ``gspn``: the
reoriented inputs, the chunks and the sums are loops over the columns, as in the official code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def official_shapes(
    dims: Sequence[int], depths: Sequence[int], *, state: int, ratio: float = 1.5, kernel: int = 7, classes: int = 1000
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint."""
    half = dims[0] // 2
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.0.weight": (half, 3, 3, 3),
        "patch_embed.0.bias": (half,),
        "patch_embed.2.weight": (half,),
        "patch_embed.2.bias": (half,),
        "patch_embed.5.weight": (dims[0], half, 3, 3),
        "patch_embed.5.bias": (dims[0],),
        "patch_embed.7.weight": (dims[0],),
        "patch_embed.7.bias": (dims[0],),
    }
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        inner, hidden = int(ratio * dim), 4 * dim
        for j in range(depth):
            block = {
                "norm.weight": (dim,),
                "norm.bias": (dim,),
                "op.in_proj.weight": (inner, dim),
                "op.conv2d.weight": (inner, 1, kernel, kernel),
                "op.x_conv_down.weight": (state, inner, 1, 1),
                "op.w_conv_up.weight": (12 * inner, state, 1, 1),
                "op.l_conv_up.weight": (4 * inner, state, 1, 1),
                "op.u_conv_up.weight": (4 * inner, state, 1, 1),
                "op.d_conv.weight": (4 * inner, state, 1, 1),
                "op.m_conv.weight": (1, 4, 1, 1),
                "op.grn.gamma": (1, inner, 1, 1),
                "op.grn.beta": (1, inner, 1, 1),
                "op.out_norm.weight": (inner,),
                "op.out_norm.bias": (inner,),
                "op.out_proj.weight": (dim, inner),
                "norm2.weight": (dim,),
                "norm2.bias": (dim,),
                "mlp.fc1.weight": (hidden, dim),
                "mlp.fc1.bias": (hidden,),
                "mlp.fc2.weight": (dim, hidden),
                "mlp.fc2.bias": (dim,),
            }
            shapes |= {f"layers.{i}.blocks.{j}.{name}": shape for name, shape in block.items()}
        if i + 1 < len(dims):
            place = f"layers.{i}.downsample"
            shapes[f"{place}.1.weight"] = (2 * dim, dim, 3, 3)
            for name in ("1.bias", "3.weight", "3.bias"):
                shapes[f"{place}.{name}"] = (2 * dim,)
    shapes["classifier.norm.weight"] = shapes["classifier.norm.bias"] = (dims[-1],)
    shapes["classifier.head.weight"] = (classes, dims[-1])
    shapes["classifier.head.bias"] = (classes,)
    return shapes


def random_official_state(shapes: dict[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Tensor]:
    """Weights at random, large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weight.flatten(1), x)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def _operator(x: Tensor, state: dict[str, Tensor], place: str, chunk: int | None) -> Tensor:
    """Everything of a block's ``op``: ``[B, D, N, N]`` to ``[B, D, N, N]``."""

    def weight(name: str) -> Tensor:
        return state[f"{place}.op.{name}"]

    x = _linear(x, weight("in_proj.weight"))
    channels, size = x.shape[1:3]
    kernel = weight("conv2d.weight")
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=channels)
    low = _linear(x, weight("x_conv_down.weight"))
    w = _linear(low, weight("w_conv_up.weight"))  # [B, 12C, N, N]: channel (tap * 4 + direction) * C + c
    lam, u, skip = (_linear(low, weight(f"{name}.weight")) for name in ("l_conv_up", "u_conv_up", "d_conv"))

    # What each direction scans from left to right, in image coordinates of its (row r, column t).
    turned = torch.stack(
        [
            torch.stack([torch.stack([at(r, t) for t in range(size)], -1) for r in range(size)], -2)
            for at in (
                lambda r, t: x[:, :, r, t],
                lambda r, t: x[:, :, t, r],
                lambda r, t: x[:, :, r, size - 1 - t],
                lambda r, t: x[:, :, size - 1 - t, r],
            )
        ],
        dim=1,
    )  # [B, 4, C, N, N]

    merged = torch.zeros_like(x)
    for k in range(4):
        mine = slice(k * channels, (k + 1) * channels)
        left, middle, right = (torch.sigmoid(w[:, (tap * 4 + k) * channels :][:, :channels]) for tap in range(3))
        h = torch.zeros_like(x)
        for t in range(size):
            for r in range(size):
                value = lam[:, mine, r, t] * turned[:, k, :, r, t]
                if t % min(size, chunk or size) != 0:
                    terms = [(left, r - 1), (middle, r), (right, r + 1)]
                    exist = [(gate[:, :, r, t], row) for gate, row in terms if 0 <= row < size]
                    total = sum(gate for gate, _ in exist)
                    for gate, row in exist:
                        value = value + gate / total * h[:, :, row, t - 1]
                h[:, :, r, t] = value
        merged += weight("m_conv.weight")[0, k, 0, 0] * (u[:, mine] * h + skip[:, mine] * turned[:, k])

    z = _norm(merged, weight("out_norm.weight"), weight("out_norm.bias"))
    response = torch.sqrt((z * z).sum((2, 3), keepdim=True))
    relative = response / (response.mean(1, keepdim=True) + 1e-6)
    z = weight("grn.gamma") * (z * relative) + weight("grn.beta") + z
    return _linear(z, weight("out_proj.weight"))


def official_logits(state: dict[str, Tensor], x: Tensor, chunks: Sequence[Sequence[int | None]]) -> Tensor:
    """Logits of images ``[B, 3, H, W]``; ``chunks`` has the columns a scan runs, None for all, block by block."""

    def conv(x: Tensor, place: str) -> Tensor:
        return F.conv2d(x, state[f"{place}.weight"], state[f"{place}.bias"], stride=2, padding=1)

    def norm(x: Tensor, place: str) -> Tensor:
        return _norm(x, state[f"{place}.weight"], state[f"{place}.bias"])

    def mlp(x: Tensor, place: str) -> Tensor:
        x = _linear(x, state[f"{place}.fc1.weight"]) + state[f"{place}.fc1.bias"].view(1, -1, 1, 1)
        return _linear(_gelu(x), state[f"{place}.fc2.weight"]) + state[f"{place}.fc2.bias"].view(1, -1, 1, 1)

    x = _gelu(norm(conv(x, "patch_embed.0"), "patch_embed.2"))
    x = norm(conv(x, "patch_embed.5"), "patch_embed.7")
    for i, stage in enumerate(chunks):
        for j, chunk in enumerate(stage):
            place = f"layers.{i}.blocks.{j}"
            x = x + _operator(norm(x, f"{place}.norm"), state, place, chunk)
            x = x + mlp(norm(x, f"{place}.norm2"), f"{place}.mlp")
        if i + 1 < len(chunks):
            x = norm(conv(x, f"layers.{i}.downsample.1"), f"layers.{i}.downsample.3")
    x = norm(x, "classifier.norm").mean((2, 3))
    return x @ state["classifier.head.weight"].T + state["classifier.head.bias"]
