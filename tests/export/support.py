"""Small models to export, and the comparison of ONNX Runtime with PyTorch."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options)


def run(opened: onnxruntime.InferenceSession, *inputs: Tensor) -> list[Tensor]:
    names = [one.name for one in opened.get_inputs()]
    feeds = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(one) for one in opened.run(None, feeds)]


def operators(path: Path) -> Counter[str]:
    """The types of all nodes of a file, those inside of scans not counted."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def as_plain_pytorch(module: nn.Module) -> nn.Module:
    """The module with the operators in plain PyTorch."""
    plain = copy.deepcopy(module)
    for one in plain.modules():
        if hasattr(one, "impl"):
            one.impl = "reference"  # type: ignore[assignment]
    return plain


def assert_as_exact(module: nn.Module, opened: Any, *inputs: Tensor, draws: int = 6) -> None:
    """The error of ONNX Runtime against float64 is at most twice that of plain PyTorch, each a root mean square.

    The first draw are the inputs. The largest error of few values says more of luck than of either, so it may be four
    times as large; but one wrong value among many is seen by it alone.
    """
    plain, exact = as_plain_pytorch(module), as_plain_pytorch(module).double()
    squares: dict[int, list[Tensor]] = defaultdict(list)
    for draw in range(draws):
        drawn = [torch.randn_like(t) if draw and t.is_floating_point() and t.dim() == 4 else t for t in inputs]
        with torch.no_grad():
            right = exact(*(t.double() if t.is_floating_point() else t for t in drawn))
            rounded = plain(*drawn)
        results = ([*tensors] if isinstance(tensors, (list, tuple)) else [tensors] for tensors in (rounded, right))
        for i, (got, near, true) in enumerate(zip(run(opened, *drawn), *results, strict=True)):
            assert got.shape == true.shape
            if true.numel():
                eps = torch.finfo(near.dtype).eps
                parts = [got.double() - true, near.double() - true, eps * true]
                squares[i].append(torch.stack([part.square().flatten() for part in parts]))
    for i, of_draws in squares.items():
        values = torch.cat(of_draws, 1)  # [error, plain error, rounding; draws x values]
        for of_all, factor in ((values.mean(1), 2), (values.amax(1), 4)):
            error, plain_error, rounding = of_all.sqrt().tolist()
            # Plain PyTorch may be exact by luck: roundings of the values are always allowed.
            allowed = factor * max(plain_error, rounding)
            assert error <= allowed, f"output {i}: error {error:.3g}, plain {plain_error:.3g}, allowed {allowed:.3g}"
