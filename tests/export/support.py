"""Small models to export, and the comparison of ONNX Runtime with PyTorch."""

from __future__ import annotations

import copy
from collections import Counter
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


def assert_as_exact(module: nn.Module, opened: Any, *inputs: Tensor) -> None:
    """The error of ONNX Runtime against float64 is at most twice that of plain PyTorch."""
    plain, exact = as_plain_pytorch(module), as_plain_pytorch(module).double()
    with torch.no_grad():
        right = exact(*(t.double() if t.is_floating_point() else t for t in inputs))
        rounded = plain(*inputs)
    for got, near, true in zip(run(opened, *inputs), *([*tensors] if isinstance(tensors, (list, tuple)) else [tensors]
                               for tensors in (rounded, right)), strict=True):  # fmt: skip
        assert got.shape == true.shape
        if not true.numel():
            continue
        error, plain_error = ((one.double() - true).abs().max().item() for one in (got, near))
        # Plain PyTorch may be exact by luck: two roundings of the largest value are always allowed.
        allowed = max(2 * plain_error, 2 * torch.finfo(near.dtype).eps * true.abs().max().item())
        assert error <= allowed, f"error {error:.3g}, plain PyTorch {plain_error:.3g}, allowed {allowed:.3g}"
