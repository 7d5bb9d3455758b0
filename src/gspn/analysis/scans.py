"""The scans inside a network: which there are, what reaches them, and the maps they run with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspn.nn import GSPN2d
from gspn.nn.official_alignment import turn
from gspn.ops import Direction, line_scan, stochastic_taps
from gspn.ops.projections import project, project_taps


@dataclass(frozen=True)
class Scan:
    """One direction of a :class:`gspn.nn.GSPN2d` on one input, with all maps computed: linear in ``x`` from here on."""

    direction: Direction
    """The module's name of it."""
    along: Direction
    """The direction in which ``line_scan`` runs; differs from ``direction`` with ``alignment="official"`` alone."""
    taps: Tensor
    """``[B, G, 3, H, W]``."""
    lam: Tensor
    """``[B, C, H, W]``."""
    u: Tensor
    """``[B, C, H, W]``, times the direction's merge weight."""
    skip: Tensor | None
    """``[B, C, H, W]``, times the direction's merge weight."""
    segment: int | None
    impl: str

    def turned(self, x: Tensor) -> Tensor:
        """``x`` as this scan reads it."""
        return x if self.along == self.direction else turn(x, self.direction)

    def states(self, x: Tensor) -> Tensor:
        """``h``, ``[B, C, H, W]``."""
        return line_scan(
            self.turned(x), self.taps, self.lam, direction=self.along, segment=self.segment, impl=self.impl
        )


@torch.no_grad()
def scans_of(module: GSPN2d, x: Tensor) -> list[Scan]:
    """The scans of ``module`` on ``x``, in the order of its directions.

    Maps are computed in the module's precision, as its forward does, and kept in that of ``x`` or float32, whichever
    is wider.

    Args:
        module: the propagation.
        x: its input, ``[B, C, H, W]``.

    Returns:
        A scan for each direction.
    """
    return list(_scans_of(module, x))


def _scans_of(module: Any, x: Tensor) -> Iterator[Scan]:
    wide = torch.promote_types(x.dtype, torch.float32)
    proxy = module.proxy(x)
    for d, direction in enumerate(module.directions):
        along: Direction = "right" if module.alignment == "official" else direction
        logits = project_taps(proxy, module.tap_proj[d])
        merge = module.merge[d].to(wide)
        yield Scan(
            direction=direction,
            along=along,
            taps=stochastic_taps(logits.to(wide), direction=along),
            lam=project(proxy, module.lam_proj[d]).to(wide),
            u=project(proxy, module.u_proj[d]).to(wide) * merge,
            skip=None if module.skip_proj is None else project(proxy, module.skip_proj[d]).to(wide) * merge,
            segment=module.segment,
            impl=module.impl,
        )


def find_scans(model: nn.Module) -> dict[str, GSPN2d]:
    """Every :class:`gspn.nn.GSPN2d` of a network by its name, in the order of the network.

    Example:
        >>> from gspn.analysis.scans import find_scans
        >>> from gspn.models import GSPN
        >>> list(find_scans(GSPN(dims=(16, 32), depths=(1, 2))))
        ['stages.0.blocks.0.mixer.gspn', 'stages.1.blocks.0.mixer.gspn', 'stages.1.blocks.1.mixer.gspn']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, GSPN2d)}


def choose_scan(model: nn.Module, stage: int = -1, block: int = -1) -> str:
    """The name of the :class:`gspn.nn.GSPN2d` of a stage's block, both counted from 0, or from the end if negative.

    Args:
        model: a network with ``stages`` of ``blocks``, as those of :mod:`gspn.models`.
        stage: which stage.
        block: which block of it.

    Returns:
        The name, as in :func:`find_scans`.

    Raises:
        ValueError: there is no such block, or no such module in it.
    """
    stages = list(getattr(model, "stages", []))
    if not stages:
        raise ValueError(
            f"{type(model).__name__} has no stages; name one of its scans instead: {_names(find_scans(model))}."
        )
    chosen = _at(stages, stage, "stage")
    at = _at(list(getattr(chosen, "blocks", [])), block, f"block of stage {stage}")
    for name, module in model.named_modules():
        if isinstance(module, GSPN2d) and any(module is inner for inner in at.modules()):
            return name
    raise ValueError(f"block {block} of stage {stage} has no GSPN2d; there are {_names(find_scans(model))}.")


def _at(items: Sequence[nn.Module], index: int, what: str) -> nn.Module:
    if not -len(items) <= index < len(items):
        raise ValueError(f"there is no {what} {index}: counted from 0, the last is {len(items) - 1}.")
    return items[index]


def _names(scans: dict[str, GSPN2d]) -> str:
    return ", ".join(scans) or "it has none"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@torch.no_grad()
def visit_scans(
    model: nn.Module, image: Tensor, visit: Callable[[str, GSPN2d, Tensor], None], names: Sequence[str] | None = None
) -> None:
    """Run a network in evaluation mode and show ``visit`` each scan's module and its input on the way.

    Args:
        model: the network; its training flags are as before afterwards.
        image: ``[B, in_chans, H, W]``, normalised as the network wants it.
        visit: called with name, module and input, once for each module in the order of the network. What it is given
            is not kept, so that a deep network on a large image needs no more memory than its own forward.
        names: those of :func:`find_scans` to visit; None for all.

    Raises:
        ValueError: a name is not there, the network has no scans, or one of them was not reached.
    """
    scans = find_scans(model)
    wanted = list(scans) if names is None else list(names)
    unknown = [name for name in wanted if name not in scans]
    if unknown or not wanted:
        raise ValueError(f"{unknown or type(model).__name__}: the network's GSPN2d modules are: {_names(scans)}.")
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def call(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if name not in seen and isinstance(module, GSPN2d):
                seen.add(name)
                visit(name, module, arguments[0].detach())

        return call

    handles = [scans[name].register_forward_pre_hook(hook(name)) for name in wanted]
    try:
        with _evaluating(model):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in wanted if name not in seen]
    if missed:
        raise ValueError(f"the forward did not reach {missed}.")
