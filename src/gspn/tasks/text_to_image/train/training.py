"""Training the UNet of a text-to-image pipeline: :func:`train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ...._errors import UsageError, require
from ...._files import replaced_directory
from ...core.seeding import derived_seed, random_state_kept
from ...core.task import Context, TrainingResult
from ...diffusion.autoencoder import load_autoencoder, vae_scale_factor
from ...diffusion.config import DiffusionConfig
from ...diffusion.losses import DenoisingLoss
from ..caption_trainer import CaptionRow, CaptionTask
from ..conditioning import Conditioning, unet_arguments
from ..pipelines import load_pipeline, minilm, save_pipeline
from .config import TextToImageConfig


def train(
    config: TextToImageConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[CaptionRow]:
    """Train a text-to-image UNet with self-attention, from random weights or from a pipeline's.

    Latents and captions are first encoded, once, into ``data.cache``. The output directory receives ``config.yaml``,
    ``metrics.csv`` (a :class:`CaptionRow` per epoch), ``samples/``, and in ``last/`` a pipeline of diffusers with the
    average of the weights where one is kept.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`.

    Args:
        config: The configuration.
        resume: Continue from the newest complete checkpoint in the output directory, from the start if there is none.
        console: Where to print; standard output by default.

    Raises:
        UsageError: a request that cannot be met; also a loss that is not finite.
        MissingExtraError: diffusers, accelerate or another package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.train import TextToImageConfig, train
        >>> train(TextToImageConfig.load("emoji64").changed("model.vae=runs/vae/last"))  # doctest: +SKIP
    """
    return UNetTraining(config).train(resume, console)


class UNetTraining(CaptionTask[TextToImageConfig, CaptionRow]):
    """Training of a UNet on encoded images and captions."""

    row_type = CaptionRow
    config: TextToImageConfig

    def open_pipeline(self) -> Any:
        """The pipeline of the configuration, its UNet seeded."""
        diffusers, model, noise = require("diffusers", extra="diffusers"), self.config.model, self.config.noise
        if model.pipeline is not None:
            return load_pipeline(model.pipeline)
        if model.vae is None:
            raise UsageError(
                "model.vae is null; name an AutoencoderKL (gspn autoencode train makes one), or model.pipeline."
            )
        vae = load_autoencoder(model.vae)
        if model.text == "minilm":
            tokenizer, encoder = minilm()
        else:
            whole = load_pipeline(model.text)
            tokenizer, encoder = whole.tokenizer, whole.text_encoder
        options = {
            "in_channels": vae.config.latent_channels,
            "out_channels": vae.config.latent_channels,
            "sample_size": self.config.data.size // vae_scale_factor(vae.config.block_out_channels),
            "cross_attention_dim": encoder.config.hidden_size,
            **model.options,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.config.run.seed, "unet"))
            try:
                unet = diffusers.UNet2DConditionModel(**options)
            except (ValueError, TypeError) as error:
                raise UsageError(f"model.options {model.options}: {error}") from None
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=noise.timesteps, beta_start=noise.beta_start, beta_end=noise.beta_end,
            beta_schedule=noise.beta_schedule, prediction_type=noise.objective, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def build_model(self, context: Context) -> tuple[nn.Module, str, list[str]]:
        """A copy of the pipeline's UNet: the pipeline's own holds what is written."""
        config, unet = self.config, self.pipeline.unet
        scheduler = require("diffusers", extra="diffusers").DDPMScheduler.from_config(self.pipeline.scheduler.config)
        objective, steps = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
        if config.model.pipeline is not None and objective != config.noise.objective:
            raise UsageError(
                f"noise.objective is {config.noise.objective!r}, and {config.model.pipeline!r} predicts {objective!r}; "
                f"set noise.objective={objective}."
            )
        diffusion = DiffusionConfig(objective=objective, timesteps=steps, learned_sigma=False)
        self.denoising = DenoisingLoss(diffusion, scheduler)
        with random_state_kept():
            model = type(unet).from_config(unet.config)
        model.load_state_dict(unet.state_dict())
        if config.model.grad_checkpointing:
            model.enable_gradient_checkpointing()
        self.unfuse_attention(model, context)
        return model, "UNet with self-attention", []

    @property
    def caption_dropout(self) -> float:
        """Probability of dropping a caption."""
        return self.config.noise.caption_dropout

    def losses(self, model: Any, start: Tensor, text: Conditioning, *, epoch: int | None = None) -> dict[str, Tensor]:
        """The denoising loss of each image."""
        del epoch
        arguments = unet_arguments(self.pipeline.unet, text, *self.data.image_size(start))
        # A tuple: what gathers outputs over processes and precisions does not know diffusers' classes.
        labels = torch.zeros(0)  # there are none
        loss = self.denoising.each(lambda x, t, _: model(x, t, **arguments, return_dict=False)[0], start, labels)
        return {"loss": loss}

    def write(self, weights: dict[str, Tensor], directory: Path) -> None:
        """Write the pipeline."""
        self.pipeline.to("cpu")
        self.pipeline.unet.load_state_dict(weights)
        with replaced_directory(directory) as part:
            save_pipeline(self.pipeline, part)

    def draw(self, weights: dict[str, Tensor], context: Context) -> dict[str, list[Image.Image]]:
        """The prompts, drawn by the pipeline just written."""
        del weights
        images = {"": self.drawn(self.pipeline, context)}
        self.pipeline.to("cpu")
        return images
