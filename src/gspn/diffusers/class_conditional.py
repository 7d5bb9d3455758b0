"""``ClassConditionalPipeline``: images from classes, with any denoiser that has the signature of DiT."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._files import printable
from .timesteps import set_timesteps

Labels = int | str | Sequence[Any] | Tensor
"""Classes: numbers or names, one or more."""

__all__ = ["ClassConditionalPipeline", "ModelMixin"]


class ClassConditionalPipeline(DiffusionPipeline):
    r"""Generates images of classes with a denoiser of pixels or of an autoencoder's latents.

    Beyond :class:`diffusers.DiTPipeline` it supports pixels, any height and width, grey images, any number of classes,
    a learned variance where the scheduler takes one, flows, and a generator for each image. With guidance scale g, the
    prediction is p + g (p_class - p), with p the prediction without a class (arXiv 2207.12598).

    Args:
        transformer: A :class:`gspn.models.GSPNDenoiser2DModel`, a :class:`diffusers.DiTTransformer2DModel`, or a model
            with the same signature.
        scheduler: A scheduler of diffusers.
        vae: The autoencoder of the latents; None for a model of pixels in [-1, 1].
        id2label: The names of the classes.
        latent_scale: The factor on latents in training, beyond the autoencoder's own scaling factor.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from gspn.diffusers import ClassConditionalPipeline, GSPNDenoiser2DModel
        >>> model = GSPNDenoiser2DModel.from_size("T/2", in_channels=1, num_class_embeds=2, sample_size=8)
        >>> pipeline = ClassConditionalPipeline(model, DDIMScheduler(), id2label={0: "cat", 1: "dog"})
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> pipeline(["cat", "dog"], num_inference_steps=2, height=12, width=16).images[0].size
        (16, 12)
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (as diffusers declares them)

    def __init__(
        self, transformer: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None, latent_scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = _class_names(id2label)
        if isinstance(latent_scale, bool) or not isinstance(latent_scale, Real) or not 0 < latent_scale < math.inf:
            raise ValueError(f"latent_scale={printable(repr(latent_scale))[:80]}: has to be a number above 0.")
        self.register_to_config(id2label=names, latent_scale=latent_scale)
        self.latent_scale = latent_scale
        self.labels = {name: int(key) for key, name in names.items()}

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None for a model without classes."""
        config = self.transformer.config
        return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of the image per pixel of the model, along a side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Height and width of the images in training."""
        return self.transformer.config.sample_size * self.pixels_per_latent

    def label_ids(self, classes: Labels) -> list[int]:
        """Convert numbers or names of classes to numbers.

        Args:
            classes: A list, array or tensor of numbers or names; each may be in a list of its own, as
                :class:`diffusers.DiTPipeline` takes them. A single one is a list of one.

        Raises:
            ValueError: There is none, a name is unknown or that of several classes, a number is out of range, or it is
                no integer.

        Example:
            >>> pipeline.label_ids([["cat"], 1])  # doctest: +SKIP
            [0, 1]
        """
        listed: Any = getattr(classes, "tolist", lambda: classes)()
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            listed = [listed]
        numbers = [self._label_id(one) for one in listed]
        if not numbers:
            raise ValueError(f"class_labels={printable(repr(classes))[:80]}: no classes; name at least one.")
        return numbers

    def _label_id(self, one: Any) -> int:
        count = self.num_classes or 0
        number: Any = getattr(one, "tolist", lambda: one)()
        while isinstance(number, list | tuple) and len(number) == 1:
            number = number[0]
        shown = printable(repr(number))[:80]
        if isinstance(number, str):
            named = [int(key) for key, name in self.config["id2label"].items() if name == number]
            if len(named) > 1:
                raise ValueError(f"class {shown} is the name of the classes {named}; pass a number.")
            if not named:
                known = ", ".join(map(printable, list(self.labels)[:10])) or "no names; pass numbers"
                raise ValueError(f"class {shown} is unknown; the model has {known}{', ...' if count > 10 else ''}.")
            number = named[0]
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"class {shown}: pass an integer or a name for each image.")
        if not 0 <= number < count:
            raise ValueError(f"class {number} is out of range; the model has {count} classes, from 0.")
        return number

    @torch.no_grad()
    def __call__(
        self, class_labels: Labels, *, height: int | None = None, width: int | None = None,
        guidance_scale: float = 4.0, num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Generate an image for each class.

        Args:
            class_labels: Numbers or names of B classes, as for :meth:`label_ids`.
            height: Of the images; by default that in training.
            width: Of the images; by default that in training.
            guidance_scale: Guidance scale; 1 disables guidance, 0 ignores the class.
            num_inference_steps: Denoising steps.
            generator: Generator of the noise; with one for each image, an image does not depend on its batch.
            latents: Noise ``[B, C, h, w]`` of variance 1 to start from.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, C]`` in [0, 1]), ``"pt"`` (``[B, C, H, W]`` in [0, 1]) or
                ``"latent"`` (the model's output).
            return_dict: Whether to return an object with ``images`` instead of a tuple.

        Raises:
            ValueError: A class or output type is unknown, a size is not a multiple of the patches and the autoencoder's
                factor, the scheduler takes fewer steps, or there are more or fewer generators than images.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"{output_type=}: use 'pil', 'np', 'pt' or 'latent'.")
        labels = torch.tensor(self.label_ids(class_labels), device=self._execution_device)
        if isinstance(generator, list | tuple) and len(generator) not in (1, len(labels)):
            raise ValueError(f"{len(generator)} generators for {len(labels)} images: pass one, or one for each.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"{guidance_scale=} has to be finite; 1 disables guidance.")
        set_timesteps(self.scheduler, num_inference_steps, self._execution_device)
        x = self._noise(len(labels), height, width, generator, latents)
        # Flows have no such attribute: they start from noise of variance 1.
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):  # type: ignore[reportGeneralTypeIssues, reportCallIssue]
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            predicted = self._predict(scaled, t, labels, guidance_scale)
            x = self.scheduler.step(predicted, t, x, **options).prev_sample
        images: Any = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, batch: int, height: int | None, width: int | None, generator: Any, latents: Tensor | None
    ) -> Tensor:
        config = self.transformer.config
        factor = self.pixels_per_latent
        step = factor * config.patch_size
        sides = []
        for name, value in (("height", height), ("width", width)):
            value = self.default_size if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % step:
                raise ValueError(f"{name}={value!r} has to be a multiple of {step}.")
            sides.append(value // factor)
        shape = (batch, config.in_channels, *sides)
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"{latents.shape=} has to be {list(shape)}.")
        return latents.to(self._execution_device, self.transformer.dtype)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
        channels = x.shape[1]
        timestep = t.expand(len(x))
        none = torch.full_like(labels, self.num_classes or 0)
        if guidance == 1:
            out = self.transformer(x, timestep=timestep, class_labels=labels).sample
        elif guidance == 0:
            out = self.transformer(x, timestep=timestep, class_labels=none).sample
        else:
            both = self.transformer(
                torch.cat([x, x]), timestep=torch.cat([timestep, timestep]), class_labels=torch.cat([labels, none])
            ).sample
            with_class, without = both.chunk(2)
            guided = without[:, :channels] + guidance * (with_class[:, :channels] - without[:, :channels])
            out = torch.cat([guided, with_class[:, channels:]], dim=1)  # the variance is that with the class
        return out if takes_variance(self.scheduler) else out[:, :channels]

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            shift = self.vae.config.get("shift_factor") or 0.0
            x = x / (self.vae.config.scaling_factor * self.latent_scale) + shift
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)


def _class_names(id2label: Any) -> dict[str, str]:
    """The names by number, whose keys are strings, as in JSON."""
    names = {} if id2label is None else id2label
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label={printable(repr(names))[:80]}: has to map the numbers of classes to their names.")
    names = {str(key): name for key, name in names.items()}
    for key, name in names.items():
        if not (key.isdecimal() and key.isascii() and key == str(int(key[:10])) and isinstance(name, str)):
            raise ValueError(
                f"id2label: {printable(repr(key))[:80]} is named {printable(repr(name))[:80]}; a class has a number "
                "and a name of text."
            )
    return names


def takes_variance(scheduler: Any) -> bool:
    """Whether a scheduler takes a predicted variance after the prediction."""
    # The attribute, because the config also keeps values of the scheduler that it was made from.
    return vars(scheduler).get("variance_type") in ("learned", "learned_range")
