"""Shared by the tests of images of several sizes: batches, their padding, and each image computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from support import assert_as_exact_as_pytorch

Results = dict[str, Tensor]


def random_sizes(count: int, height: int, width: int) -> list[tuple[int, int]]:
    """``count`` sizes up to that of the map: the whole map, none, one pixel, one line, and others, many of them odd."""
    generator = torch.Generator().manual_seed(0)
    some = [(height, width), (0, 0), (1, 1), (1, width), (height, 1), (height, width - 1), (0, width)]
    rest = [[int(torch.randint(1, n + 1, (), generator=generator)) for n in (height, width)] for _ in range(count)]
    return [*some, *((h, w) for h, w in rest)][:count]


def poisoned(maps: Sequence[Tensor | None], sizes: Sequence[tuple[int, int]], value: float) -> list[Tensor | None]:
    """The maps ``[B, .., H, W]`` with a value in the padding, in the same memory layout."""
    filled = [None if one is None else torch.empty_like(one).copy_(one) for one in maps]
    for i, (height, width) in enumerate(sizes):
        for one in filled:
            if one is not None:
                one[i, ..., height:, :], one[i, ..., :height, width:] = value, value
    return filled


def alone(
    call: Callable[..., Results], maps: Sequence[Tensor | None], sizes: Sequence[tuple[int, int]], *,
    terms: bool = False,
) -> Results:  # fmt: skip
    """The results of each image by itself in one tensor, zeros in the padding; those without pixels are added up.

    With ``terms`` there is ``|name|`` beside these sums: that of the images' absolute terms, since a sum may vanish.
    """
    whole: Results = {}
    height, width = next(one.shape[-2:] for one in maps if one is not None)
    for i, (h, w) in enumerate(sizes):
        if not h * w:
            continue
        # A layout of its own, as an image has that is by itself: `contiguous` or channels last.
        own = [None if one is None else one[i : i + 1, ..., :h, :w].clone() for one in maps]
        for name, result in call(*own).items():
            if "proj" in name:
                whole[name] = whole[name] + result if name in whole else result
                if terms:
                    of_terms = f"|{name}|"
                    whole[of_terms] = whole[of_terms] + result.abs() if of_terms in whole else result.abs()
            else:
                shape = (len(sizes), *result.shape[1:-2], height, width)
                whole.setdefault(name, result.new_zeros(shape))[i, ..., :h, :w] = result[0]
    return whole


def assert_equals_alone(actual: Results, plain: Results, exact: Results) -> None:
    """The rule for right, with each image alone by the same implementation in the place of plain PyTorch."""
    for name, result in actual.items():
        scale = exact[name].abs() * 4 + exact[name].abs().max() / 4
        scale = torch.maximum(scale, exact.get(f"|{name}|", scale))
        like = torch.empty_like(result).copy_(plain[name])
        assert result.isfinite().all(), name
        assert_as_exact_as_pytorch(result, like, exact[name], scale, name)


def sizes_as(kind: str, sizes: Sequence[tuple[int, int]]) -> Any:
    """The sizes as a list, or as a tensor of a dtype or with other strides."""
    if kind == "list":
        return list(sizes)
    tensor = torch.tensor(sizes)
    return tensor.int() if kind == "int32" else tensor.mT.contiguous().mT if kind == "transposed" else tensor
