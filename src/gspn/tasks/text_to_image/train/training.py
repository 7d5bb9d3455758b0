"""Training the UNet of a text-to-image pipeline: :func:`train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ...._files import replaced_directory
from ...class_conditional.config import DiffusionConfig
from ...core.devices import make_accelerator
from ...core.errors import UsageError, require
from ...core.loop import connected, refuse_existing
from ...core.seeding import derived_seed, random_state_kept
from ...diffusion.autoencoder import load_autoencoder
from ...diffusion.losses import DenoisingLoss
from ..caption_trainer import CaptionRow, CaptionRun
from ..conditioning import Conditioning, unet_arguments
from ..config import TextToImageConfig
from ..data import encode_data
from ..denoising import check_chain
from ..pipelines import load_pipeline, minilm, save_pipeline


@dataclass(frozen=True)
class TextToImageResult:
    """What a run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``last``, ``samples``, ``checkpoints``.
        last: The last row of the table.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    last: CaptionRow | None
    is_main: bool = True


def train(config: TextToImageConfig, *, resume: bool = False, console: Console | None = None) -> TextToImageResult:
    """Train a UNet with self-attention that draws what captions say, from nothing or further.

    Latents and captions are encoded first, once, into ``data.cache``. Then as every training run here: in one process
    or several, on accelerate, killed and resumed to the same weights. The output directory receives ``config.yaml``,
    ``metrics.csv`` (a :class:`CaptionRow` an epoch), ``samples/``, and in ``last/`` a pipeline of diffusers with the
    average of the weights where one is kept.

    Args:
        config: What to do.
        resume: Continue from the newest whole checkpoint in the output directory; from the start if there is none.
        console: Where to print; standard output by default.

    Returns:
        Where everything is.

    Raises:
        UsageError: a request that cannot be met; also where the loss is not finite any more.
        MissingExtraError: diffusers, accelerate or another package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.config import TextToImageConfig
        >>> from gspn.tasks.text_to_image.train import train
        >>> train(TextToImageConfig.load("emoji64").changed("model.vae=runs/vae/last"))  # doctest: +SKIP
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    require("diffusers", extra="diffusers")
    return connected(lambda: _train(config, resume, console or Console()))


def _train(config: TextToImageConfig, resume: bool, console: Console) -> TextToImageResult:
    # Processes connect once: closed and opened again between encoding and training, one may find the other's old end.
    make_accelerator(device=config.run.device)
    pipeline = open_pipeline(config)
    # What is wrong is said before hours of encoding.
    check_chain(pipeline.scheduler, ("epsilon", "v_prediction"))
    refuse_existing(config.run.output, resume)
    cache = config.data.cache or config.run.output / "cache"
    data = encode_data(config.data, pipeline, cache, device=config.run.device, console=console)
    return _UNetRun(config, pipeline, data, resume, console).fit()


def open_pipeline(config: TextToImageConfig) -> Any:
    """The pipeline of a configuration, its UNet seeded.

    Raises:
        UsageError: a part of it cannot be opened, or the parts do not fit.
    """
    diffusers = require("diffusers", extra="diffusers")
    model = config.model
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
        "sample_size": config.data.size // 2 ** (len(vae.config.block_out_channels) - 1),
        "cross_attention_dim": encoder.config.hidden_size,
        **model.options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.run.seed, "unet"))
        try:
            unet = diffusers.UNet2DConditionModel(**options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"model.options {model.options}: {error}") from None
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def noise_scheduler(config: TextToImageConfig) -> Any:
    """The scheduler that is saved with the weights: DDIM's steps on the chain that was learnt."""
    noise = config.noise
    return require("diffusers", extra="diffusers").DDIMScheduler(
        num_train_timesteps=noise.timesteps,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        beta_schedule=noise.beta_schedule,
        prediction_type=noise.objective,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class _UNetRun(CaptionRun):
    def _open(self, config: TextToImageConfig) -> nn.Module:
        self._open_loaders(config)
        diffusers = require("diffusers", extra="diffusers")
        scheduler = diffusers.DDPMScheduler.from_config(self.pipeline.scheduler.config)
        objective, steps = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
        if config.model.pipeline is not None and objective != config.noise.objective:
            raise UsageError(
                f"noise.objective is {config.noise.objective!r}, and {config.model.pipeline!r} predicts {objective!r}; "
                f"set noise.objective={objective}."
            )
        self.denoising = DenoisingLoss(
            DiffusionConfig(objective=objective, timesteps=steps, learned_sigma=False), scheduler
        )
        # Another module than the pipeline's, which holds what is written.
        with random_state_kept():
            network = type(self.pipeline.unet).from_config(self.pipeline.unet.config)
        network.load_state_dict(self.pipeline.unet.state_dict())
        if config.model.grad_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def _announcement(self) -> list[str]:
        parameters = self.config.resolved.parameters / 1e6
        return [f"UNet with self-attention, {parameters:.2f} M parameters, on {self._place()}", self._data_line()]

    def fit(self) -> TextToImageResult:
        """Train, and say what came of it."""
        self.run()
        return TextToImageResult(self.output, self.table.last(), self.main)

    def _dropout(self) -> float:
        return self.config.noise.caption_dropout

    def _losses(self, model: Any, start: Tensor, text: Conditioning) -> dict[str, Tensor]:
        given = unet_arguments(self.pipeline.unet, text, *self.image_size)
        # A tuple: what gathers outputs over processes and precisions does not know diffusers' classes.
        loss = self.denoising.each(
            lambda noisy, t, _: model(noisy, t, **given, return_dict=False)[0],
            start,
            torch.zeros(0),  # no labels
        )
        return {"loss": loss}

    def _write(self, weights: Any) -> None:
        self.pipeline.to("cpu")
        self.pipeline.unet.load_state_dict({key: value.cpu() for key, value in weights.items()})
        with replaced_directory(self.output / "last") as part:
            save_pipeline(self.pipeline, part)

    def _draw(self, epoch: int, step: int) -> None:
        self.save_sheet(epoch, step, {"": self.drawn(self.pipeline)})
        self.pipeline.to("cpu")
