"""The example arguments of an export: their names, and the axes whose lengths stay free."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from .._errors import UsageError, nearest
from .._files import short

Dynamic = bool | Mapping[str, Mapping[int, str]]
"""Which axes may have other lengths: names of axes by input and position, or True for batch, height and width."""

_TRACED = 128
"""Height and width are traced at this length at least. The maps inside a model are then longer than one pixel, which
PyTorch would take for a length that never changes."""


@dataclass(frozen=True)
class Inputs:
    """Example arguments of a module, bound to its parameters' names.

    Attributes:
        arguments: the arguments by parameter, in the order of the signature.
        axes: for each leaf of the arguments, the names of its axes that are dynamic.
    """

    arguments: inspect.BoundArguments
    axes: list[dict[int, str]]

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional arguments, and those by name."""
        return self.arguments.args, self.arguments.kwargs

    @property
    def leaves(self) -> dict[str, Any]:
        """The leaves of the arguments by name."""
        return _named(self.arguments)

    @property
    def lengths(self) -> dict[str, int]:
        """The length of each dynamic axis by its name.

        Raises:
            UsageError: axes of one name differ in length.
        """
        lengths: dict[str, int] = {}
        for (name, leaf), axes in zip(self.leaves.items(), self.axes, strict=True):
            for axis, label in axes.items():
                length = lengths.setdefault(label, leaf.shape[axis])
                if leaf.shape[axis] != length:
                    raise UsageError(
                        f"dynamic: {label!r} is {length} in one input and {leaf.shape[axis]} in axis {axis} of {name}; "
                        "give axes of different lengths different names."
                    )
        return lengths

    @property
    def dynamic_shapes(self) -> dict[str, Any] | None:
        """The dynamic axes as ``torch.export`` takes them."""
        if not any(self.axes):
            return None
        _, structure = pytree.tree_flatten(dict(self.arguments.arguments))
        leaves = [dict.fromkeys(axes, Dim.DYNAMIC) or None for axes in self.axes]
        return pytree.tree_unflatten(leaves, structure)

    def resized(self, lengths: Mapping[str, int]) -> Inputs:
        """The same arguments with other lengths of the dynamic axes: their values repeated, or left out at the end."""
        leaves, structure = pytree.tree_flatten(dict(self.arguments.arguments))
        changed = [_resized(leaf, {n: lengths[label] for n, label in axes.items()})
                   for leaf, axes in zip(leaves, self.axes, strict=True)]  # fmt: skip
        bound = inspect.BoundArguments(self.arguments.signature, pytree.tree_unflatten(changed, structure))
        return Inputs(bound, self.axes)

    def to_trace(self) -> Inputs:
        """Arguments in which no dynamic axis has length one, nor any map inside the model."""
        first = {label for axes in self.axes for axis, label in axes.items() if axis == 0}
        return self.resized({
            label: max(n, 2) if label in first else n * -(-_TRACED // n) for label, n in self.lengths.items()
        })  # fmt: skip

    def of_other_sizes(self) -> Iterable[Inputs]:
        """The arguments at about half the length, and at twice the length, of every dynamic axis."""
        lengths = self.lengths
        if lengths:
            yield self.resized({label: n // 2 or 2 for label, n in lengths.items()})
            yield self.resized({label: 2 * n for label, n in lengths.items()})


def bind(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, dynamic: Dynamic) -> Inputs:
    """Bind arguments to the signature of ``module.forward``, and names to their dynamic axes.

    Raises:
        UsageError: the arguments do not fit the signature, or ``dynamic`` does not fit the arguments.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"module is a {type(module).__name__}; pass a torch.nn.Module.")
    args = (args,) if isinstance(args, Tensor) else args
    if not isinstance(args, tuple | list):
        raise UsageError(f"args is {short(args)}; pass a tensor or a tuple of example inputs.")
    try:
        bound = inspect.signature(module.forward).bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise UsageError(f"{type(module).__name__} cannot be called with these arguments: {error}.") from None
    leaves = _named(bound)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    if not tensors:
        raise UsageError("args has no tensor; pass example inputs of the module.")
    axes = _usual_axes(tensors) if dynamic is True else {} if dynamic is False else _checked_axes(dynamic, tensors)
    inputs = Inputs(bound, [dict(axes.get(name, {})) for name in leaves])
    _ = inputs.lengths  # raises where they differ
    return inputs


def named_leaves(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested mappings, tuples and lists: ``name`` itself, ``name_0``, ``name_key``."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value}
    return {k: leaf for key, part in parts for k, leaf in named_leaves(part, f"{name}_{key}").items()}


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    return {k: leaf for name, value in bound.arguments.items() for k, leaf in named_leaves(value, name).items()}


def _usual_axes(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch: the first axis of all that have its length; height and width: the last axes of ``[B, C, H, W]``."""
    batch = next((t.shape[0] for t in tensors.values() if t.dim()), None)
    frames = {t.shape[2:] for t in tensors.values() if t.dim() == 4}
    axes: dict[str, dict[int, str]] = {}
    for name, t in tensors.items():
        axes[name] = {0: "batch"} if t.dim() and t.shape[0] == batch else {}
        if t.dim() == 4:
            own = "" if len(frames) == 1 else f"_of_{name}"
            axes[name] |= {2: f"height{own}", 3: f"width{own}"}
    return axes


def _checked_axes(dynamic: Any, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    example = "use True, False, or names of axes such as {'x': {0: 'batch', 2: 'height', 3: 'width'}}"
    if not isinstance(dynamic, Mapping):
        raise UsageError(f"dynamic={short(dynamic)}: {example}.")
    for name, axes in dynamic.items():
        if name not in tensors:
            hint = nearest(str(name), tensors) or f"; the inputs are {', '.join(tensors)}."
            raise UsageError(f"dynamic has {short(name)}, which is not an input{hint}")
        if not isinstance(axes, Mapping) or not all(isinstance(label, str) for label in axes.values()):
            raise UsageError(f"dynamic[{name!r}] is {short(axes)}; {example}.")
        for axis in axes:
            if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < tensors[name].dim():
                raise UsageError(
                    f"dynamic[{name!r}] has axis {short(axis)}, and {name} has the axes 0 to {tensors[name].dim() - 1}."
                )
    return {name: dict(axes) for name, axes in dynamic.items()}


def _resized(leaf: Any, lengths: Mapping[int, int]) -> Any:
    for axis, length in lengths.items():
        repeats = [1] * leaf.dim()
        repeats[axis] = -(-length // leaf.shape[axis])
        leaf = leaf.repeat(repeats).narrow(axis, 0, length)
    return leaf.contiguous() if lengths else leaf


def dtypes(module: nn.Module, inputs: Inputs) -> set[torch.dtype]:
    """The floating-point dtypes of parameters, buffers and inputs."""
    tensors = [*module.parameters(), *module.buffers(), *inputs.leaves.values()]
    return {t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
