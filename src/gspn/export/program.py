"""Modules as programs of ``torch.export``, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .._errors import UsageError
from .._files import check_writable, printable, replaced
from .inputs import Dynamic, Inputs, bind, named_leaves


def to_pt2(
    module: nn.Module, args: Any, path: Path | str, *, kwargs: Mapping[str, Any] | None = None, dynamic: Dynamic = True
) -> ExportedProgram:
    """Export a module to a ``.pt2`` file of PyTorch: a graph with its weights, which runs without the module's code.

    ``torch.export.load`` opens it after ``import gspn``, whose operators it calls. Before the function returns, the
    file has been loaded, and its results agree with the module's.

    Args:
        module: in evaluation mode.
        args: example inputs, a tensor or a tuple.
        path: the file to write, replaced if it exists; its name ends in ``.pt2``.
        kwargs: example inputs by name.
        dynamic: as for :func:`to_onnx`.

    Returns:
        The program.

    Raises:
        UsageError: the module, the arguments or ``dynamic`` cannot be exported, or results differ.
        OSError: the file cannot be written.

    Example:
        >>> import gspn.export, tempfile, torch
        >>> from gspn.nn import GSPN2d
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = gspn.export.to_pt2(GSPN2d(4).eval(), torch.randn(2, 4, 8, 8), f"{folder}/layer.pt2")
        ...     torch.export.load(f"{folder}/layer.pt2").module()(torch.randn(3, 4, 5, 9)).shape
        torch.Size([3, 4, 5, 9])
    """
    path = output_path(path, ".pt2")
    inputs = bind(module, args, kwargs, dynamic)
    program = export_program(module, inputs)
    with replaced(path) as part:
        torch.export.save(program, part)
        loaded = torch.export.load(part).module()
        verify(module, lambda example: [*outputs(loaded, example).values()], inputs, path.name)
    return program


def output_path(path: Path | str, ending: str) -> Path:
    """The path of a file to write.

    Raises:
        UsageError: its name ends otherwise, or it is a directory.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ending:
        raise UsageError(f"{printable(path)!r}: the file's name has to end in {ending}.")
    if path.is_dir():
        raise UsageError(f"{printable(path)!r} is a directory; name a file.")
    check_writable(path)
    return path


def export_program(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The graph of a module.

    Raises:
        UsageError: it is in training mode, or PyTorch cannot trace it, with the reason.
    """
    if module.training:
        raise UsageError(f"{type(module).__name__} is in training mode; call .eval() first.")
    args, kwargs = inputs.to_trace().call
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=inputs.dynamic_shapes, strict=False)
    except Exception as error:  # torch.export raises errors of many types, those of the module's own code among them
        raise UsageError(f"{type(module).__name__} cannot be exported: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error's first cause in one line of 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def verify(module: nn.Module, run: Any, inputs: Inputs, what: str) -> None:
    """Compare what ``run`` gives with the module's own outputs, for the example and at other sizes.

    Half of the digits of an output's dtype have to agree: the difference is at most the square root of its epsilon,
    relative to the largest value; integers are the same. The other sizes are the first of
    :meth:`Inputs.of_other_sizes` that the module takes.

    Raises:
        UsageError: they differ, or ``run`` cannot run.
    """
    _compare(module, run, inputs, what)
    for other in inputs.of_other_sizes():
        try:
            expected = outputs(module, other)
        except Exception:  # noqa: S112  (a size that the module does not take)
            continue
        _compare(module, run, other, what, expected)
        return


def outputs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The module's outputs by name: ``output``, ``output_0``, or the keys of a mapping."""
    args, kwargs = inputs.call
    with torch.no_grad():
        result = module(*args, **kwargs)
    named = named_leaves(result, "output")
    named = {name.removeprefix("output_"): t for name, t in named.items()} if isinstance(result, Mapping) else named
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def _compare(module: nn.Module, run: Any, inputs: Inputs, what: str, expected: dict[str, Tensor] | None = None) -> None:
    expected = outputs(module, inputs) if expected is None else expected
    sizes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in inputs.leaves.items() if isinstance(t, Tensor))
    try:
        actual = run(inputs)
    except Exception as error:  # of the runtime, whichever it is
        raise UsageError(f"{what} does not run with {sizes}: {one_line(error)}") from error
    for (name, right), got in zip(expected.items(), actual, strict=True):
        if got.shape != right.shape:
            raise UsageError(f"{what}: {name} is {tuple(got.shape)} and not {tuple(right.shape)} with {sizes}.")
        difference = _difference(got, right)
        allowed = torch.finfo(right.dtype).eps ** 0.5 if right.is_floating_point() else 0.0
        if not difference <= allowed:
            raise UsageError(
                f"{what}: {name} differs from the module's by {difference:.2g} of its largest value, and {allowed:.2g} "
                f"is allowed, with {sizes}; nothing was written."
            )


def _difference(got: Tensor, right: Tensor) -> float:
    """The largest difference as a part of the largest value; NaN where a value is."""
    if right.numel() == 0:
        return 0.0
    right, got = right.double().cpu(), got.double().cpu()
    return float((got - right).abs().max() / right.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
