"""``to_onnx``: a module as a file of ONNX."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._errors import UsageError, require
from .._files import naming, sync
from .inputs import Dynamic, Inputs, bind, dtypes
from .program import export_program, one_line, output_path, outputs, verify

OPSET = 20
OPSETS = range(18, 24)
_DTYPES = {torch.float32, torch.float16}


def to_onnx(
    module: nn.Module,
    args: Any,
    path: Path | str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Dynamic = True,
    opset: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """Export a module to a file of ONNX, and verify it in ONNX Runtime.

    Each scan of :func:`gspn.propagate` or :func:`gspn.line_scan` becomes one ``Scan`` node, whatever the height and
    width. Before the function returns, ONNX Runtime has run the file, and its results agree with the module's: with
    the example inputs and, where axes are dynamic, at other sizes.

    Args:
        module: in evaluation mode, with weights and inputs in float32 or float16. Any module of PyTorch, such as a
            backbone of timm or a model of diffusers with an adapter mounted.
        args: example inputs, a tensor or a tuple. What is not a tensor becomes a constant.
        path: the file to write, replaced if it exists; its name ends in ``.onnx``. Weights of more than 1.5 GiB are
            in a second file beside it, ``NAME.onnx.data``.
        kwargs: example inputs by name.
        dynamic: True for axes that may have any length later: the batch, which is the first axis of all inputs that
            have the same length there, and height and width of inputs ``[B, C, H, W]``. False for none. Or names of
            axes, such as ``{"x": {0: "batch"}}``; axes of one name have one length.
        opset: the version of ONNX's operators, 18 to 23.

    Returns:
        What ``torch.onnx.export`` returns. Inputs have the names of the parameters of ``module.forward``; outputs are
        ``output``, ``output_0`` and so on, or the names of a dictionary's entries.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        UsageError: the module, the arguments, ``dynamic`` or ``opset`` cannot be exported; or an output differs from
            the module's. Nothing is written then.
        OSError: the file cannot be written.

    Example:
        >>> import gspn.export, onnxruntime, tempfile, torch
        >>> from gspn.nn import GSPN2d
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = gspn.export.to_onnx(GSPN2d(4).eval(), torch.randn(2, 4, 8, 8), f"{folder}/layer.onnx")
        ...     session = onnxruntime.InferenceSession(f"{folder}/layer.onnx")
        >>> session.run(["output"], {"x": torch.randn(3, 4, 5, 9).numpy()})[0].shape
        (3, 4, 5, 9)
    """
    require("onnx", "onnxscript", "onnxruntime", extra="export")
    from .translations import TRANSLATIONS

    path = output_path(path, ".onnx")
    if opset not in OPSETS:
        raise UsageError(f"{opset=}: use {OPSETS[0]} to {OPSETS[-1]}.")
    inputs = bind(module, args, kwargs, dynamic)
    unknown = dtypes(module, inputs) - _DTYPES
    if unknown:
        raise UsageError(
            f"{type(module).__name__} has {', '.join(sorted(map(str, unknown)))}, which ONNX Runtime does not compute "
            "convolutions in; convert module and inputs with .float() or .half()."
        )
    program = export_program(module, inputs)
    tensors = [name for name, leaf in inputs.leaves.items() if isinstance(leaf, Tensor)]
    results = [f"out_{name}" if name in tensors else name for name in outputs(module, inputs)]
    try:
        exported = torch.onnx.export(
            program, custom_translation_table=TRANSLATIONS, input_names=tensors, output_names=results,
            opset_version=opset, verbose=False,
        )  # fmt: skip
    except Exception as error:  # the exporter has no class for what it does not know
        raise UsageError(f"{type(module).__name__} cannot be written as ONNX: {one_line(error)}") from error
    exported = cast("torch.onnx.ONNXProgram", exported)
    graph: Any = exported.model.graph
    _name_scans_apart(graph)
    axes = dict(zip(inputs.leaves, inputs.axes, strict=True))
    exported.rename_axes(
        {one.shape[axis]: label for one in graph.inputs for axis, label in axes.get(one.name, {}).items()}
    )
    # In a folder of its own first, because a second file may be beside it, whose name is in the first.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryDirectory(prefix=f".part-{os.getpid()}-", dir=target.parent) as folder:
        part = Path(folder) / target.name
        exported.save(part)
        verify(module, _runner(part), inputs, path.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            sync(file)
            file.replace(target.with_name(file.name))
    return exported


def _name_scans_apart(graph: Any) -> None:
    """Names inside of scans must differ from those outside, and an output may have any name."""
    for i, node in enumerate(node for node in graph if node.op_type == "Scan"):
        body = node.attributes["body"].as_graph()
        for value in (*body.inputs, *(value for inner in body for value in inner.outputs)):
            value.name = f"scan{i}.{value.name}"


def _runner(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own errors have no class in common
        raise UsageError(f"ONNX Runtime cannot load the exported model: {one_line(error)}") from error
    used = [one.name for one in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        leaves = inputs.leaves
        return [*map(torch.from_numpy, session.run(None, {name: leaves[name].numpy(force=True) for name in used}))]

    return run
