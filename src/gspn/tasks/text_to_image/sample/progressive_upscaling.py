"""From an image of the size that a model was trained at to larger ones, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import UsageError
from ..denoising import Guide, begin_of, noise_level, predict

UPSCALINGS = ("latents", "pixels")
"""Where a finished stage is enlarged."""


@dataclass(frozen=True)
class LadderConfig:
    r"""How the stages of a ladder are drawn.

    The two options are those of DemoFusion (Du et al., arXiv 2311.16973). Both are led by weights that decay over the n
    steps of a stage, :func:`cosine_weight`: at step i

    .. math::
        c_i(a) = \Bigl(\tfrac{1 + \cos(\pi i / n)}{2}\Bigr)^a

    Attributes:
        strengths: How much of the chain is walked again at the second stage, the third, ...; the last is repeated.
        skip_residual: Before each step, pull the latents to those of the stage before: :func:`skip_residual`.
        skip_power: Its exponent; larger ones let go sooner.
        dilated: Mix in what the UNet predicts for the map's strided sub-maps: :class:`Dilated`.
        dilated_power: The exponent of its weight.
        blur: The width of the Gaussian before the map is strided, in latent pixels, at a stage's first step.
        blur_power: The exponent with which it falls, to 0.01.
        restart: Beyond the first stage, restart an adapter's scans after as many lines as the first stage's maps have:
            :mod:`~gspn.tasks.text_to_image.sample.segments`.
        upscale: ``"latents"``: bicubic in latent space; ``"pixels"``: decoded, bicubic, and encoded again.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> LadderConfig(strengths=(0.5, 0.3), dilated=True).strength(3)
        0.3
    """

    strengths: tuple[float, ...] = (0.42, 0.32, 0.32, 0.28)
    skip_residual: bool = True
    skip_power: float = 3.0
    dilated: bool = False
    dilated_power: float = 1.0
    blur: float = 1.0
    blur_power: float = 1.0
    restart: bool = True
    upscale: str = "latents"

    def __post_init__(self) -> None:
        if not self.strengths or any(not 0 < one <= 1 for one in self.strengths):
            raise UsageError(f"strengths {list(self.strengths)} have to be numbers above 0, up to 1, one at least.")
        for name in ("skip_power", "dilated_power", "blur", "blur_power"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} has to be above 0.")
        if self.upscale not in UPSCALINGS:
            raise UsageError(f"upscale={self.upscale!r} is unknown; use one of {', '.join(UPSCALINGS)}.")

    def strength(self, stage: int) -> float:
        """Of a stage, counted from 1 for the second."""
        return self.strengths[min(stage, len(self.strengths)) - 1]


@dataclass(frozen=True)
class Stage:
    """One stage of an image.

    Attributes:
        height: In pixels.
        width: Likewise.
        steps: Of denoising that are taken.
        strength: Of the noise that is added to what the stage before left; None for the first, which is all noise.
        dilation: The stride of sub-maps: about the side over that of the first stage.
    """

    height: int
    width: int
    steps: int
    strength: float | None = None
    dilation: int = 1


def trained_area(unet: Any, factor: int) -> int:
    """The pixels of an image that a UNet was trained on, by its ``sample_size``."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * width * factor**2


def plan_stages(
    height: int, width: int, *, area: int, multiple: int, steps: int, ladder: LadderConfig | None = None
) -> tuple[Stage, ...]:
    """The stages of an image: with a ladder from about the trained area up, else one.

    All have about the image's aspect ratio. From one to the next no side grows more than twice, all by about the same
    ratio; the last is exactly the image.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        area: That the model was trained at, in pixels.
        multiple: Of which every side is one: the VAE's factor.
        steps: Of the whole chain.
        ladder: None for none.

    Raises:
        UsageError: a side is no multiple, or a strength leaves a stage without a step.

    Example:
        >>> stages = plan_stages(2048, 4096, area=1024 * 1024, multiple=8, steps=30, ladder=LadderConfig())
        >>> [(stage.width, stage.height, stage.steps) for stage in stages]
        [(1448, 728, 30), (2432, 1216, 12), (4096, 2048, 9)]
    """
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise UsageError(f"{name} {side} is no multiple of {multiple}, the VAE's factor; take {near}.")
    if ladder is None:
        return (Stage(height, width, steps),)
    sizes = _sizes(height, width, area, multiple)
    stages = [Stage(*sizes[0], steps)]
    for number, (h, w) in enumerate(sizes[1:], start=1):
        strength = ladder.strength(number)
        taken = steps - begin_of(steps, strength)
        if not taken:
            raise UsageError(
                f"strength {strength} of {steps} steps leaves stage {number + 1} without a step; take {1 / steps:.2g} "
                "at least, or more steps."
            )
        dilation = max(2, round(math.sqrt(h * w / math.prod(sizes[0]))))
        stages.append(Stage(h, w, taken, strength, min(dilation, h // multiple, w // multiple)))
    return tuple(stages)


def _sizes(height: int, width: int, area: int, multiple: int) -> list[tuple[int, int]]:
    scale = math.sqrt(height * width / area)
    count = max(0, math.ceil(math.log2(scale) - 1e-6))  # a hair above a power of two is that power
    sizes = [(height, width)]
    for left in range(1, count + 1):

        def below(side: int, after: int, left: int = left) -> int:
            even = round(side / scale ** (left / count) / multiple) * multiple
            half = math.ceil(after / 2 / multiple) * multiple
            return min(max(even, half, multiple), after)

        sizes.append((below(height, sizes[-1][0]), below(width, sizes[-1][1])))
    return sizes[::-1]


def cosine_weight(step: int, steps: int, power: float) -> float:
    """1 at a stage's first step, falling to 0 behind its last: ``((1 + cos(pi step / steps)) / 2) ** power``.

    Example:
        >>> [round(cosine_weight(step, 4, 3.0), 3) for step in range(4)]
        [1.0, 0.622, 0.125, 0.003]
    """
    return ((1 + math.cos(math.pi * step / steps)) / 2) ** power


def enlarge(x: Tensor, height: int, width: int) -> Tensor:
    """Maps ``[B, C, H, W]`` at another size, bicubic."""
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False)


def skip_residual(
    scheduler: Any, clean: Tensor, noise: Tensor, begin: int, power: float
) -> Callable[[Tensor, int], Tensor]:
    r"""What pulls a stage's latents to those that the stage before left (DemoFusion, arXiv 2311.16973, section 3.2).

    With :math:`z'_0` the enlarged latents and :math:`z'_t` the same with the noise of the current step, always from one
    draw, before step i of n

    .. math::
        z_t \leftarrow c\, z'_t + (1 - c)\, z_t, \qquad c = \Bigl(\tfrac{1 + \cos(\pi i / n)}{2}\Bigr)^{a}

    i counts the steps that the stage takes. (DemoFusion's stages walk the whole chain, where it is the same.)

    Args:
        scheduler: With its timesteps set.
        clean: The enlarged latents.
        noise: That the stage began with.
        begin: The stage's first step.
        power: The exponent a.

    Returns:
        For :func:`~gspn.tasks.text_to_image.denoising.denoise`, its ``blend``.
    """
    steps = len(scheduler.timesteps) - begin

    def blend(latents: Tensor, step: int) -> Tensor:
        weight = cosine_weight(step - begin, steps, power)
        if step == begin:
            return latents  # they are the enlarged latents with this very noise
        noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[step].reshape(1))
        return weight * noisy + (1 - weight) * latents

    return blend


class Dilated:
    r"""Predictions for the whole map from its strided sub-maps (dilated sampling; DemoFusion, arXiv 2311.16973).

    With the stride s, sub-map (i, j) takes rows i, i + s, ... and columns j, j + s, ...: each is the whole image at
    about the size that the model was trained at. The s x s of them are denoised each by itself, told its own size, and
    put back where they came from. So that a sub-map does not alias, the map is blurred first by a Gaussian
    of 4 s - 3 latent pixels, its mean and deviation restored; the Gaussian's width falls from ``blur`` to 0.01 as

    .. math::
        w_i = 0.01 + (w - 0.01)\, c_i(a_{blur})

    The prediction g is one for the blurred map :math:`\tilde x`. What the blur took away counts as noise: the same
    estimate of the clean map, written for x, is

    .. math::
        \hat g = g + k\,(x - \tilde x), \qquad
        k = 1 / \sigma \text{ (noise)}, \quad \alpha / \sigma \text{ (v)}, \quad 0 \text{ (sample)}

    with :math:`\alpha, \sigma` the shares of signal and noise at the step, and the prediction becomes
    :math:`c\, \hat g + (1 - c)\, p`, with c of exponent ``dilated_power``.

    Args:
        unet: A ``UNet2DConditionModel``.
        scheduler: With its timesteps set.
        guide: Of the images.
        stride: s.
        factor: Of the VAE: pixels a latent pixel.
        begin: The stage's first step.
        config: The exponents and the blur.
    """

    def __init__(
        self, unet: Any, scheduler: Any, guide: Guide, *, stride: int, factor: int, begin: int, config: LadderConfig
    ) -> None:
        self.unet, self.scheduler, self.guide = unet, scheduler, guide
        self.stride, self.factor, self.begin, self.config = stride, factor, begin, config

    def __call__(self, x: Tensor, prediction: Tensor, step: int) -> Tensor:
        """The prediction with that of the sub-maps in it.

        Args:
            x: What the UNet was given, ``[B, C, H, W]``.
            prediction: What it predicted.
            step: The number of the step.
        """
        taken, steps = step - self.begin, len(self.scheduler.timesteps) - self.begin
        width = 0.01 + (self.config.blur - 0.01) * cosine_weight(taken, steps, self.config.blur_power)
        blurred = gaussian_blur(x, width, 4 * self.stride - 3)
        found = self._of_sub_maps(blurred, self.scheduler.timesteps[step])
        alpha, sigma = noise_level(self.scheduler, step)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        found = found + {"epsilon": 1 / sigma, "v_prediction": alpha / sigma, "sample": 0.0}[kind] * (x - blurred)
        weight = cosine_weight(taken, steps, self.config.dilated_power)
        return weight * found + (1 - weight) * prediction

    def _of_sub_maps(self, x: Tensor, t: Tensor) -> Tensor:
        found = torch.empty_like(x)
        for places in sub_map_groups(x.shape[-2], x.shape[-1], self.stride):
            maps = torch.stack([x[..., i :: self.stride, j :: self.stride] for i, j in places], 1)  # [B, n, C, h, w]
            count, (height, width) = len(places), maps.shape[-2:]
            predicted = predict(
                self.unet, maps.flatten(0, 1), t, self.guide.repeated(count),
                height=height * self.factor, width=width * self.factor,
            ).unflatten(0, (-1, count))  # fmt: skip
            for number, (i, j) in enumerate(places):
                found[..., i :: self.stride, j :: self.stride] = predicted[:, number]
        return found


def sub_map_groups(height: int, width: int, stride: int) -> list[list[tuple[int, int]]]:
    """The offsets of all strided sub-maps of a map, in groups of one size: up to four where the stride does not divide.

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
    """Maps ``[B, C, H, W]`` under a Gaussian, edges repeated, each map's mean and deviation restored.

    Args:
        x: The maps.
        width: The Gaussian's standard deviation.
        taps: Odd.
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


def describe(stages: Sequence[Stage]) -> str:
    """Sizes one after another: ``724x360, 1328x664``."""
    return ", ".join(f"{stage.width}x{stage.height}" for stage in stages)
