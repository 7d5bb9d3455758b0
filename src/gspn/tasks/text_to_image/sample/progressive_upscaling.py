"""Progressive upscaling: an image larger than the training size is drawn in stages, each starting from the one before.

The options follow DemoFusion (Du et al., arXiv 2311.16973), with one addition for GSPN: beyond the first stage, the
scans of an adapter without ``reference_lines`` restart after as many lines as the first stage's maps have. Taps sum to
one and the input is added line after line, so over more lines the states grow beyond the range that the gates after
them were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.diffusers import GSPNTokenMixer

from ...._errors import UsageError
from ..conditioning import Conditioning, recorded_map_sizes
from .denoising import GuidanceInputs, first_step, noise_level, predict
from .estimate import unet_cost

SPACES = ("latents", "pixels")
"""Where a finished stage can be enlarged."""


@dataclass(frozen=True)
class UpscalingConfig:
    """Options of progressive upscaling.

    The skip residual and dilated sampling are weighted by :func:`cosine_weight`, which decays over the n steps of a
    stage. At step i it is::

        c_i(a) = ((1 + cos(π i / n)) / 2) ** a

    Attributes:
        strengths: The share of the denoising steps that the second stage repeats, then the third, ...; the last value
            holds for all further stages.
        skip_residual: Before each step, pull the latents towards those of the stage before: :func:`skip_residual`.
        skip_power: Exponent of the skip residual's weight; a larger one decays sooner.
        dilated: Blend in predictions for the strided sub-maps of the latents: :class:`DilatedSampling`.
        dilated_power: Exponent of the weight of those predictions.
        blur: Width, in latent pixels, of the Gaussian blur before the latents are strided, at a stage's first step.
        blur_power: Exponent with which that width decays to 0.01.
        segment_scans: Beyond the first stage, restart an adapter's scans after as many lines as the first stage's
            maps have; None for those alone that have no ``reference_lines``, whose states would grow.
        space: Where a finished stage is enlarged: ``"latents"``, bicubic on the latents, or ``"pixels"``, decoded,
            bicubic, and encoded again.

    Raises:
        UsageError: A value is out of range.

    Example:
        >>> UpscalingConfig(strengths=(0.5, 0.3), dilated=True).strength(3)
        0.3
    """

    strengths: tuple[float, ...] = (0.42, 0.32, 0.32, 0.28)
    skip_residual: bool = True
    skip_power: float = 3.0
    dilated: bool = False
    dilated_power: float = 1.0
    blur: float = 1.0
    blur_power: float = 1.0
    segment_scans: bool | None = None
    space: str = "latents"

    def __post_init__(self) -> None:
        if not self.strengths or any(not 0 < one <= 1 for one in self.strengths):
            raise UsageError(f"strengths {list(self.strengths)}: give at least one number, each above 0 and up to 1.")
        for name in ("skip_power", "dilated_power", "blur", "blur_power"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} has to be above 0.")
        if self.space not in SPACES:
            raise UsageError(f"space={self.space!r} is unknown; use one of {', '.join(SPACES)}.")

    def strength(self, stage: int) -> float:
        """The strength of a stage; the second stage is number 1."""
        return self.strengths[min(stage, len(self.strengths)) - 1]


@dataclass(frozen=True)
class Stage:
    """One stage of an image, at a size in pixels, and the denoising steps that it takes."""

    height: int
    width: int
    steps: int
    strength: float | None = None
    """Strength of the noise added to the enlarged latents; None for the first stage."""
    dilation: int = 1
    """The stride of the sub-maps, about the side divided by that of the first stage."""


def trained_size(unet: Any, factor: int) -> tuple[int, int]:
    """Height and width in pixels of the images that a UNet was trained on, from its ``sample_size``."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def plan_stages(
    height: int, width: int, *, area: int, multiple: int, steps: int, upscaling: UpscalingConfig | None = None
) -> tuple[Stage, ...]:
    """The stages of an image: from about the trained area up with progressive upscaling, else one.

    All have about the image's aspect ratio. From one to the next, both sides grow by about the same ratio, at most 2;
    the last stage is exactly the image. The trained ``area`` is in pixels, ``multiple`` is the VAE's factor, which
    divides every side, and ``steps`` are those from pure noise.

    Raises:
        UsageError: A side is not a multiple, or a strength leaves a stage without a step.

    Example:
        >>> stages = plan_stages(2048, 4096, area=1024 * 1024, multiple=8, steps=30, upscaling=UpscalingConfig())
        >>> [(stage.width, stage.height, stage.steps) for stage in stages]
        [(1448, 728, 30), (2432, 1216, 12), (4096, 2048, 9)]
    """
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise UsageError(f"{name} {side} is not a multiple of {multiple}, the VAE's factor; take {near}.")
    if upscaling is None:
        return (Stage(height, width, steps),)
    sizes = stage_sizes(height, width, area, multiple)
    stages = [Stage(*sizes[0], steps)]
    for number, (h, w) in enumerate(sizes[1:], start=1):
        strength = upscaling.strength(number)
        taken = steps - first_step(steps, strength)
        if not taken:
            raise UsageError(
                f"strength {strength} of {steps} steps leaves stage {number + 1} without a step; use a strength of at "
                f"least {1 / steps:.2g}, or more steps."
            )
        dilation = max(2, round(math.sqrt(h * w / math.prod(sizes[0]))))
        stages.append(Stage(h, w, taken, strength, min(dilation, h // multiple, w // multiple)))
    return tuple(stages)


def stage_sizes(height: int, width: int, area: int, multiple: int) -> list[tuple[int, int]]:
    """The heights and widths of the stages of an image with progressive upscaling."""
    scale = math.sqrt(height * width / area)
    count = max(0, math.ceil(math.log2(scale) - 1e-6))  # rounding must not put a power of two into another stage
    sizes = [(height, width)]
    for left in range(1, count + 1):
        smaller = []
        for side, after in zip((height, width), sizes[-1], strict=True):
            even = round(side / scale ** (left / count) / multiple) * multiple
            half = math.ceil(after / 2 / multiple) * multiple
            smaller.append(min(max(even, half, multiple), after))
        sizes.append((smaller[0], smaller[1]))
    return sizes[::-1]


def cosine_weight(step: int, steps: int, power: float) -> float:
    """A weight that falls from 1 at a stage's first step to 0: ``((1 + cos(pi step / steps)) / 2) ** power``.

    Example:
        >>> [round(cosine_weight(step, 4, 3.0), 3) for step in range(4)]
        [1.0, 0.622, 0.125, 0.003]
    """
    return ((1 + math.cos(math.pi * step / steps)) / 2) ** power


def enlarge(x: Tensor, height: int, width: int) -> Tensor:
    """Resize maps ``[B, C, H, W]``, bicubic."""
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False)


def skip_residual(
    scheduler: Any, clean: Tensor, noise: Tensor, begin: int, power: float
) -> Callable[[Tensor, int], Tensor]:
    r"""A function that pulls a stage's latents towards those of the stage before (arXiv 2311.16973, section 3.2).

    With :math:`z'_0` the enlarged latents, and :math:`z'_t` the same with the noise of the current step, always from
    one draw, it computes before step i of n

    .. math::
        z_t \leftarrow c\, z'_t + (1 - c)\, z_t, \qquad c = \Bigl(\tfrac{1 + \cos(\pi i / n)}{2}\Bigr)^{a}

    i counts the steps that the stage takes. (DemoFusion's stages take all steps, where this is the same.) ``clean`` are
    the enlarged latents, ``noise`` is what the stage began with at the step ``begin``, and ``power`` is the exponent a.
    The function is the ``blend`` of :func:`~gspn.tasks.text_to_image.sample.denoising.denoise`.
    """
    steps = len(scheduler.timesteps) - begin

    def blend(latents: Tensor, step: int) -> Tensor:
        weight = cosine_weight(step - begin, steps, power)
        if step == begin:
            return latents  # these are the enlarged latents with this very noise
        noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[step].reshape(1))
        return weight * noisy + (1 - weight) * latents

    return blend


@dataclass(frozen=True)
class DilatedSampling:
    r"""Blends predictions for strided sub-maps into the prediction for the whole map (arXiv 2311.16973).

    With the stride s, sub-map (i, j) takes rows i, i + s, ... and columns j, j + s, ...: each shows the whole image at
    about the trained size. The UNet predicts each of the s x s sub-maps separately, conditioned on its own size, and
    the predictions are put back where the sub-maps came from. Against aliasing, the map is first blurred by a Gaussian
    of 4 s - 3 latent pixels, and its mean and deviation are restored; the Gaussian's width falls from ``blur`` to 0.01:

    .. math::
        w_i = 0.01 + (w - 0.01)\, c_i(a_{blur})

    The prediction g holds for the blurred map :math:`\tilde x`. What the blur removed counts as noise: the same
    estimate of the clean map, expressed for x, is

    .. math::
        \hat g = g + k\,(x - \tilde x), \qquad
        k = 1 / \sigma \text{ (noise)}, \quad \alpha / \sigma \text{ (v)}, \quad 0 \text{ (sample)}

    with :math:`\alpha, \sigma` the shares of signal and noise at the step. The prediction becomes
    :math:`c\, \hat g + (1 - c)\, p`, with c of exponent ``dilated_power``. ``factor`` is the VAE's pixels per latent
    pixel, and ``begin`` the stage's first step.
    """

    unet: Any
    scheduler: Any
    inputs: GuidanceInputs
    stride: int
    factor: int
    begin: int
    config: UpscalingConfig

    def __call__(self, x: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Blend the predictions for the sub-maps into the UNet's ``prediction`` for its input ``x [B, C, H, W]``."""
        taken, steps = step - self.begin, len(self.scheduler.timesteps) - self.begin
        width = 0.01 + (self.config.blur - 0.01) * cosine_weight(taken, steps, self.config.blur_power)
        blurred = gaussian_blur(x, width, 4 * self.stride - 3)
        dilated = self._predict_sub_maps(blurred, self.scheduler.timesteps[step])
        alpha, sigma = noise_level(self.scheduler, step)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        dilated = dilated + {"epsilon": 1 / sigma, "v_prediction": alpha / sigma, "sample": 0.0}[kind] * (x - blurred)
        weight = cosine_weight(taken, steps, self.config.dilated_power)
        return weight * dilated + (1 - weight) * prediction

    def _predict_sub_maps(self, x: Tensor, t: Tensor) -> Tensor:
        result = torch.empty_like(x)
        for offsets in sub_map_groups(x.shape[-2], x.shape[-1], self.stride):
            maps = torch.stack([x[..., i :: self.stride, j :: self.stride] for i, j in offsets], 1)  # [B, n, C, h, w]
            count, (height, width) = len(offsets), maps.shape[-2:]
            predicted = predict(
                self.unet, maps.flatten(0, 1), t, self.inputs.repeated(count),
                height=height * self.factor, width=width * self.factor,
            ).unflatten(0, (-1, count))  # fmt: skip
            for number, (i, j) in enumerate(offsets):
                result[..., i :: self.stride, j :: self.stride] = predicted[:, number]
        return result


def sub_map_groups(height: int, width: int, stride: int) -> list[list[tuple[int, int]]]:
    """The offsets of a map's strided sub-maps, grouped by size; where the stride does not divide there are up to four.

    Example:
        >>> sub_map_groups(4, 5, 2)
        [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]
    """
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(min(stride, height)):
        for j in range(min(stride, width)):
            size = (math.ceil((height - i) / stride), math.ceil((width - j) / stride))
            groups.setdefault(size, []).append((i, j))
    return list(groups.values())


def gaussian_blur(x: Tensor, width: float, taps: int) -> Tensor:
    """Blur maps ``[B, C, H, W]``, edges repeated, and restore each map's mean and deviation.

    The Gaussian has the standard deviation ``width`` and ``taps`` pixels a side, an odd number.
    """
    offsets = torch.arange(taps, device=x.device, dtype=x.dtype) - taps // 2
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    y = F.pad(x, (taps // 2,) * 4, mode="replicate")
    y = F.conv2d(F.conv2d(y, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])

    def deviation(maps: Tensor) -> Tensor:
        return maps.std((-2, -1), correction=0, keepdim=True)

    mean = x.mean((-2, -1), keepdim=True)
    return (y - y.mean((-2, -1), keepdim=True)) * (deviation(x) / deviation(y).clamp(min=1e-8)) + mean


def segments_beyond(
    unet: Any, text: Conditioning, *, height: int, width: int, factor: int, segment_scans: bool | None
) -> dict[str, int]:
    """The lines after which each GSPN mixer's scans restart beyond the first stage, by the mixer's name.

    They are the longer side of the mixer's map at the first stage, whose height and width are given in pixels; counted
    on fake tensors. ``segment_scans`` is that of :class:`UpscalingConfig`. Mixers that do not restart are left out.
    """
    mixers = {name: module for name, module in unet.named_modules() if isinstance(module, GSPNTokenMixer)}
    if segment_scans is None:
        mixers = {name: mixer for name, mixer in mixers.items() if mixer.scan.reference_lines is None}
    elif not segment_scans:
        mixers = {}
    with recorded_map_sizes(mixers) as sizes:
        if mixers:
            unet_cost(unet, text, height=height, width=width, factor=factor, batch=1, device=torch.device("cpu"))
    return {name: max(size) for name, size in sizes.items()}


@contextmanager
def segmented_scans(unet: Any, segments: Mapping[str, int]) -> Iterator[None]:
    """Within the block, mixers restart their scans after that many lines at most, by the mixer's name.

    A mixer whose own segment is shorter keeps it.
    """
    scans: list[Any] = [getattr(unet.get_submodule(name), "scan") for name in segments]  # noqa: B009  (for pyright)
    before = [scan.segment for scan in scans]
    for scan, own, most in zip(scans, before, segments.values(), strict=True):
        scan.segment = most if own is None else min(own, most)
    try:
        yield
    finally:
        for scan, own in zip(scans, before, strict=True):
            scan.segment = own
