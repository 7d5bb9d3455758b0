"""The scans inside a model: their names, their inputs and their maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UsageError
from ..nn import GSPN2d
from ..nn.gspn2d import over_normalized_axis
from ..nn.official_alignment import reorient
from ..ops import Direction, line_scan, stochastic_taps
from ..ops.unfused import project, project_taps


@dataclass(frozen=True)
class Scan:
    """One direction of a :class:`gspn.nn.GSPN2d` with the maps of one input: a linear function of ``x``."""

    direction: Direction
    """The direction as the module names it."""
    scan_direction: Direction
    """The direction in which ``line_scan`` runs; it differs from ``direction`` only with ``alignment="official"``."""
    taps: Tensor
    """``[B, G, 3, H, W]``."""
    lam: Tensor | None
    """``[B, C, H, W]``, with the factor of ``reference_lines``; or None for ones."""
    u: Tensor
    """``[B, C, H, W]``, times the direction's merge weight."""
    skip: Tensor | None
    """``[B, C, H, W]``, times the direction's merge weight."""
    segment: int | None
    impl: str

    def reoriented(self, x: Tensor) -> Tensor:
        """``x`` as this scan reads it."""
        return x if self.scan_direction == self.direction else reorient(x, self.direction)

    def states(self, x: Tensor) -> Tensor:
        """``h``, ``[B, C, H, W]``."""
        return line_scan(
            self.reoriented(x), self.taps, self.lam, direction=self.scan_direction, segment=self.segment, impl=self.impl
        )


@torch.no_grad()
def scans_of(module: GSPN2d, x: Tensor) -> list[Scan]:
    """Compute the maps of all scans of ``module`` on ``x``, in the order of its directions.

    Maps are computed in the module's precision, as in its forward pass, and kept in the wider of that of ``x``,
    ``[B, C, H, W]``, and float32.
    """
    options: Any = module  # whose attributes torch types as Tensor | Module
    wide = torch.promote_types(x.dtype, torch.float32)
    proxy = options.proxy(x)
    lam_proj = over_normalized_axis(options.lam_proj, x, options.directions, options.segment, options.reference_lines)
    scans = []
    for d, direction in enumerate(options.directions):
        scan_direction: Direction = "right" if options.alignment == "official" else direction
        logits = project_taps(proxy, options.tap_proj[d])
        merge = options.merge[d].to(wide)
        skip = None if options.skip_proj is None else project(proxy, options.skip_proj[d]).to(wide) * merge
        scans.append(
            Scan(
                direction=direction,
                scan_direction=scan_direction,
                taps=stochastic_taps(logits.to(wide), direction=scan_direction),
                lam=project(proxy, lam_proj[d].to(proxy.dtype)).to(wide),
                u=project(proxy, options.u_proj[d]).to(wide) * merge,
                skip=skip,
                segment=options.segment,
                impl=options.impl,
            )
        )
    return scans


def find_scans(model: nn.Module) -> dict[str, GSPN2d]:
    """Find every :class:`gspn.nn.GSPN2d` of a model by its name, in the order of the model.

    Example:
        >>> from gspn.analysis.scans import find_scans
        >>> from gspn.models import GSPN
        >>> list(find_scans(GSPN(dims=(16, 32), depths=(1, 2))))
        ['stages.0.blocks.0.mixer.gspn', 'stages.1.blocks.0.mixer.gspn', 'stages.1.blocks.1.mixer.gspn']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, GSPN2d)}


def choose_scan(model: nn.Module, stage: int = -1, block: int = -1) -> str:
    """Find the name of the :class:`gspn.nn.GSPN2d` in a stage's block.

    Args:
        model: a model with ``stages`` of ``blocks``, such as those of :mod:`gspn.models`.
        stage: index of the stage; a negative index counts from the end.
        block: index of the block in that stage; a negative index counts from the end.

    Returns:
        The name, as in :func:`find_scans`.

    Raises:
        ValueError: the block does not exist, or has no such module.
    """
    stages = list(getattr(model, "stages", []))
    if not stages:
        raise UsageError(f"{type(model).__name__} has no stages; pass the name of a scan: {_names(find_scans(model))}.")
    blocks = list(getattr(_item(stages, stage, "stage"), "blocks", []))
    inner = set(_item(blocks, block, f"block of stage {stage}").modules())
    for name, module in find_scans(model).items():
        if module in inner:
            return name
    raise UsageError(f"block {block} of stage {stage} has no GSPN2d; the model has {_names(find_scans(model))}.")


def position(name: str) -> str:
    """The stage and the block of a scan in words, counted from 0; its name where it is in no such block.

    Example:
        >>> position("stages.2.blocks.3.mixer.gspn"), position("mixer.gspn")
        ('stage 2, block 3', 'mixer.gspn')
    """
    parts = name.split(".")
    in_stage = len(parts) > 3 and parts[0] == "stages" and parts[2] == "blocks"
    return f"stage {parts[1]}, block {parts[3]}" if in_stage else name


def _item(items: Sequence[nn.Module], index: int, what: str) -> nn.Module:
    if not -len(items) <= index < len(items):
        raise UsageError(f"there is no {what} {index}: counted from 0, the last is {len(items) - 1}.")
    return items[index]


def _names(scans: dict[str, GSPN2d]) -> str:
    return ", ".join(scans) or "none"


@torch.no_grad()
def visit_scans(
    model: nn.Module, image: Tensor, visit: Callable[[str, GSPN2d, Tensor], None], names: Sequence[str] | None = None
) -> None:
    """Run a model in evaluation mode and call ``visit`` with the module and the input of each scan.

    Args:
        model: the model; its training flags are restored afterwards.
        image: ``[B, in_chans, H, W]``, normalized for the model.
        visit: called with name, module and input, once for each module in the order of the model. The inputs are not
            kept, so a deep model on a large image needs no more memory than its forward pass.
        names: names of :func:`find_scans` to visit; None for all.

    Raises:
        ValueError: a name is unknown, the model has no scans, or the forward pass did not reach one of them.
    """
    scans = find_scans(model)
    requested = list(scans) if names is None else list(names)
    unknown = [name for name in requested if name not in scans]
    if unknown or not requested:
        raise UsageError(f"{unknown or type(model).__name__}: the GSPN2d modules of the model are: {_names(scans)}.")
    seen: set[str] = set()

    def hook(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        if name not in seen:
            seen.add(name)
            visit(name, module, arguments[0].detach())

    training = {module: module.training for module in model.modules()}
    handles = [scans[name].register_forward_pre_hook(partial(hook, name)) for name in requested]
    try:
        model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    missed = [name for name in requested if name not in seen]
    if missed:
        raise UsageError(f"the forward pass did not reach {missed}.")
