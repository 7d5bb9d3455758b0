"""Training an autoencoder of images: :func:`train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..._files import replaced_directory
from ..core.loaders import EvalLoader, open_data
from ..core.loop import fit
from ..core.metrics_table import EpochRow, metric
from ..core.seeding import random_state_kept
from ..core.task import Context, Models, Setup, Task, TrainingResult, Weights
from ..diffusion.autoencoder import load_autoencoder
from ..diffusion.transforms import image_transform
from .config import AutoencodeConfig

# Images that the standard deviation of the latents is measured on.
_SCALED_BY = 512


@dataclass(frozen=True)
class AutoencoderRow(EpochRow):
    """One row of ``metrics.csv``. Metrics are None after an epoch without evaluation.

    They are those of the averaged weights where an average is kept.
    """

    eval_psnr: float | None = metric("eval {:.2f} dB")
    """Mean over whole held-out images, in dB."""
    eval_l1: float | None = metric()
    """Mean absolute error of a value in [-1, 1]."""
    latent_std: float | None = metric()
    """Standard deviation of training images' latents; ``scaling_factor`` of the saved autoencoder is its inverse."""


def train(
    config: AutoencodeConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[AutoencoderRow]:
    """Train diffusers' ``AutoencoderKL`` on images.

    The loss is the mean error of the reconstruction from latents that are drawn from the posterior, plus the weighted
    mean divergence of the posterior from a unit Gaussian. It has no perceptual and no adversarial term: for
    photographs, published autoencoders are better.

    With ``model.decoder_of`` the decoder alone is trained, from the weights of another autoencoder.

    The output directory receives ``config.yaml``, ``metrics.csv`` (an :class:`AutoencoderRow` per epoch),
    ``samples/`` (held-out images above their reconstructions) and in ``last/`` the autoencoder, whose
    ``scaling_factor`` gives its latents a standard deviation of one.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`
    for this, for ``resume`` and ``console``, and for the errors.

    Example:
        >>> from gspn.tasks.autoencode import AutoencodeConfig, train
        >>> config = AutoencodeConfig.load("emoji64").changed("schedule.epochs=3", "run.output=/tmp/vae")
        >>> train(config)  # doctest: +SKIP
    """
    require("diffusers", extra="diffusers")
    return fit(Autoencoding(config), resume=resume, console=console)


class Autoencoding(Task[AutoencodeConfig, AutoencoderRow]):
    """Training of an autoencoder."""

    row_type = AutoencoderRow

    def setup(self, context: Context) -> Setup:
        """Open the images and build the autoencoder."""
        data, model = self.config.data, self.config.model
        images = open_data(data.name, data.train_split, data.root, **data.options)
        images.transform = image_transform(data.size, channels=data.channels, crop=data.crop, hflip=data.hflip)
        transforms = {size: image_transform(size, data.channels, hflip=data.hflip) for size in data.sizes or ()}
        self.held_out = None if data.eval_split is None else self._whole_images(data.eval_split, context)
        self.measured = self._whole_images(data.train_split, context)
        side = data.size // model.factor
        self.scaling_factor: float | None = None
        vae = build_autoencoder(self.config)
        if model.decoder_of is not None:
            self.scaling_factor = _start_from(vae, model.decoder_of)
        return Setup(
            model=vae,
            train=context.train_loader(images, transforms),
            evaluation=self.held_out,
            model_title="AutoencoderKL",
            data_title=f"{data.name} {data.train_split}: {len(images):,} images, {data.size} pixels to latents of "
            f"{model.latent_channels} x {side} x {side}",
            resolved={"latent_size": side},
        )

    def _whole_images(self, split: str, context: Context) -> EvalLoader:
        data = self.config.data
        images = open_data(data.name, split, data.root, **data.options)
        images.transform = image_transform(data.size, channels=data.channels)
        return context.eval_loader(images, workers=0)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Reconstruction error plus weighted divergence of the posterior."""
        del targets, epoch
        from accelerate.utils import extract_model_from_parallel

        # forward() returns the image alone, and DDP needs forward(): a hook takes the posterior's moments on the way.
        moments: list[Tensor] = []
        vae: Any = extract_model_from_parallel(model, keep_torch_compile=False)
        last = vae.encoder if vae.quant_conv is None else vae.quant_conv
        handle = last.register_forward_hook(lambda _module, _args, output: moments.append(output))
        try:
            reconstructed = model(images, sample_posterior=True, return_dict=False)[0]
        finally:
            handle.remove()
        mean, log_variance = moments[0].float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        distance = F.l1_loss if self.config.loss.error == "l1" else F.mse_loss
        return distance(reconstructed.float(), images.float()) + self.config.loss.kl * divergence

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """Error on held-out images, and the standard deviation of the latents."""
        model: Any = context.accelerator.unwrap_model(models.raw) if models.ema is None else models.ema
        metrics: dict[str, float | None] = {}
        if self.held_out is not None:
            metrics.update(context.mean_metrics(model, self.held_out, _errors))
        return {**metrics, "latent_std": self._latent_std(model, context)}

    @torch.no_grad()
    def _latent_std(self, model: Any, context: Context) -> float:
        sums, seen = torch.zeros(3, dtype=torch.float64), 0
        training = model.training
        model.eval()
        most = -(-_SCALED_BY // context.accelerator.num_processes)
        for images, targets in self.measured:
            with context.accelerator.autocast():
                posterior = model.encode(context.to_device(images)).latent_dist
            mean, variance = (one.cpu().double()[targets >= 0] for one in (posterior.mean, posterior.var))
            count = torch.tensor(mean.numel(), dtype=torch.float64)
            sums += torch.stack([count, mean.sum(), (mean.square() + variance).sum()])
            seen += len(images)
            if seen >= most:
                break
        model.train(training)
        count, total, squares = context.sum(sums)
        std = (squares / count - (total / count) ** 2) ** 0.5
        if not std > 0:
            raise UsageError(
                f"the latents' standard deviation is {std}; lower loss.kl, which is {self.config.loss.kl:g}."
            )
        return std

    def save(
        self, weights: Weights, row: AutoencoderRow, output: Path, context: Context, *, best: bool
    ) -> Image.Image | None:
        """Write the autoencoder after each evaluation; returns images above their reconstructions."""
        del context, best
        if row.latent_std is None:
            return None
        with random_state_kept():
            vae = build_autoencoder(self.config)
        vae.load_state_dict(weights.averaged)
        scaling_factor = self.scaling_factor or 1 / row.latent_std
        vae.register_to_config(scaling_factor=scaling_factor, sample_size=self.config.data.size)
        with replaced_directory(output / "last") as part:
            vae.eval().save_pretrained(part, safe_serialization=True)
        images = next(iter(self.held_out or self.measured))[0][:12]
        with torch.no_grad():
            both = torch.cat([images, vae(images).sample.clamp(-1, 1)])  # [2 n, C, H, W]
        rows = torch.cat(list(both.unflatten(0, (2, -1)).permute(0, 2, 3, 1, 4).flatten(3)), dim=1)  # [C, 2 H, n W]
        pixels = ((rows + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous()
        return Image.fromarray(pixels.numpy())


def _errors(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and mean absolute error of each image, reconstructed from the posterior's mean."""
    del targets
    reconstructed = model(images, return_dict=False)[0]
    errors = (reconstructed.float().clamp(-1, 1) - images).cpu().double().flatten(1)
    psnr = 10 * (4 / errors.square().mean(1).clamp(min=1e-12)).log10()
    return {"eval_psnr": psnr, "eval_l1": errors.abs().mean(1)}


def _start_from(vae: Any, source: str) -> float:
    """Give an autoencoder the weights of another, and fix the encoder's. Returns the other's ``scaling_factor``."""
    other = load_autoencoder(source)
    try:
        vae.load_state_dict(other.state_dict())
    except RuntimeError:
        raise UsageError(
            f"model.decoder_of is {source!r}, which has another architecture; give the model section its widths, "
            f"{list(other.config.block_out_channels)}, and its other arguments."
        ) from None
    for part in (vae.encoder, vae.quant_conv):
        if part is not None:
            part.requires_grad_(False)
    return other.config.scaling_factor


def build_autoencoder(config: AutoencodeConfig) -> Any:
    """The autoencoder of a configuration, on the CPU.

    Raises:
        UsageError: arguments that it does not take.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model, levels = config.model, len(config.model.block_out_channels)
    kind: Any = AutoencoderKL  # whose annotations allow one level only
    try:
        vae = kind(
            in_channels=config.data.channels,
            out_channels=config.data.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(model.block_out_channels),
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_num_groups=model.norm_num_groups,
            sample_size=config.data.size,
            mid_block_add_attention=model.attention,
            **model.options,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"model {model}: {error}") from None
    if model.grad_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae
