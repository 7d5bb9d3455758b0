"""Training an autoencoder of images: :func:`train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..._files import replaced, replaced_directory
from ..core.errors import UsageError, require
from ..core.loaders import EvalLoader, open_data, seeded_loader, share_loader
from ..core.loop import Position, TrainingRun, connected, to_device
from ..core.records import EpochRow
from ..core.sections import Resolved
from .config import AutoencodeConfig, DataConfig, ResolvedAutoencoder

# Images that the scale of the latents is measured on.
_SCALED_BY = 512


@dataclass(frozen=True)
class AutoencoderRow(EpochRow):
    """One row of ``metrics.csv``; the last three are None after epochs without an evaluation."""

    eval_psnr: float | None
    """Of whole held-out images, in dB: the mean over them; of the averaged weights where there are any."""
    eval_l1: float | None
    """Mean error of a number in [-1, 1]."""
    latent_std: float | None
    """Standard deviation of training images' latents; ``scaling_factor`` of the saved autoencoder is its inverse."""


@dataclass(frozen=True)
class AutoencodeResult:
    """What a training run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``last``, ``samples``, ``checkpoints``.
        last: The last row of the table.
        broken: Names of training images that could not be read, as far as this process met them.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    last: AutoencoderRow | None
    broken: tuple[str, ...] = ()
    is_main: bool = True


def train(config: AutoencodeConfig, *, resume: bool = False, console: Console | None = None) -> AutoencodeResult:
    r"""Train diffusers' ``AutoencoderKL`` on images, as a configuration says.

    The loss is the mean error of a number of the reconstruction, of latents drawn from the posterior, plus the weighted
    mean divergence of the posterior from a unit Gaussian. There is neither a perceptual nor an adversarial term: for
    photographs, published autoencoders are better.

    Runs in one process, or in each of several started by ``torchrun`` or ``accelerate launch``; killed and resumed, it
    ends with the weights of the uninterrupted run. The output directory receives ``config.yaml``, ``metrics.csv`` (an
    :class:`AutoencoderRow` an epoch), ``samples/`` (held-out images above their reconstructions) and in ``last/`` the
    autoencoder, whose ``scaling_factor`` makes its latents' standard deviation one.

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
        >>> from gspn.tasks.autoencode import load_config, train
        >>> train(load_config("emoji64").changed("schedule.epochs=1", "run.output=/tmp/vae"))  # doctest: +SKIP
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    require("diffusers", extra="diffusers")
    return connected(lambda: _AutoencoderRun(config, resume, console or Console()).fit())


class _AutoencoderRun(TrainingRun[AutoencoderRow, Position]):
    row = AutoencoderRow

    def _open(self, config: AutoencodeConfig) -> nn.Module:
        data = config.data
        images = open_data(data.name, data.train_split, data.root, **data.options)
        images.transform = image_transform(data, training=True)
        self.train_loader = seeded_loader(
            images,
            batch_size=data.batch_size,
            accumulate=config.optim.accumulate,
            seed=config.run.seed,
            workers=data.workers,
            **self.places,
        )
        # Whole images, of which none is used for anything but to measure.
        self.held_out: EvalLoader | None = None
        if data.eval_split is not None:
            self.held_out = self._whole(config, data.eval_split)
        self.measured = self._whole(config, data.train_split)
        return build_autoencoder(config)

    def _whole(self, config: AutoencodeConfig, split: str) -> EvalLoader:
        data = config.data
        images = open_data(data.name, split, data.root, **data.options)
        images.transform = image_transform(data, training=False)
        return share_loader(images, batch_size=data.batch_size, workers=0, **self.places)

    def _classes(self) -> int:
        return 0

    def _resolve(self, config: AutoencodeConfig, network: nn.Module, shared: Resolved) -> ResolvedAutoencoder:
        del network
        factor = 2 ** (len(config.model.block_out_channels) - 1)
        return ResolvedAutoencoder(**asdict(shared), latent_size=config.data.size // factor)

    def _announcement(self) -> list[str]:
        data, resolved = self.config.data, self.config.resolved
        side = resolved.latent_size
        latents = f"{data.size} px to latents of {self.config.model.latent_channels} x {side} x {side}"
        return [
            f"AutoencoderKL, {resolved.parameters / 1e6:.2f} M parameters, on {self._place()}",
            f"{data.name} {data.train_split}: {resolved.train_images:,} images, {latents}",
        ]

    def fit(self) -> AutoencodeResult:
        """Train, and say what came of it."""
        self.run()
        broken = tuple(self.train_loader.broken.names.values())
        return AutoencodeResult(self.output, self.table.last(), broken, self.main)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        del targets
        loss = self.config.loss
        # forward() gives the image alone: the posterior is taken on the way, in the module that DDP wraps.
        found: list[Any] = []
        encoder = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        last = encoder.encoder if encoder.quant_conv is None else encoder.quant_conv
        handle = last.register_forward_hook(lambda _module, _given, moments: found.append(moments))
        try:
            drawn = self.model(images, sample_posterior=True, return_dict=False)[0]
        finally:
            handle.remove()
        mean, log_variance = found[0].float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        distance = F.l1_loss if loss.error == "l1" else F.mse_loss
        return distance(drawn.float(), images.float()) + loss.kl * divergence

    def _finish(self, shared: dict[str, Any], last: bool) -> tuple[AutoencoderRow, list[str], bool]:
        epoch = shared["epoch"]
        if not last and epoch % self.config.run.eval_every:
            return AutoencoderRow(**shared, eval_psnr=None, eval_l1=None, latent_std=None), [], False
        self.reporter.doing("evaluating", epoch - 1)
        model: Any = self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module
        psnr, error = self._held_out(model) if self.held_out is not None else (None, None)
        std = self._latent_std(model)
        found = [] if psnr is None else [f"eval {psnr:.2f} dB"]
        weights = self.weights()
        if self.main:
            with torch.random.fork_rng(devices=[]):
                saved = build_autoencoder(self.config)
            saved.load_state_dict({key: value.cpu() for key, value in weights.get("ema", weights["raw"]).items()})
            saved.register_to_config(scaling_factor=1 / std, sample_size=self.config.data.size)
            with replaced_directory(self.output / "last") as part:
                saved.eval().save_pretrained(part, safe_serialization=True)
            self._draw(saved, epoch)
        return AutoencoderRow(**shared, eval_psnr=psnr, eval_l1=error, latent_std=std), found, False

    @torch.no_grad()
    def _held_out(self, model: nn.Module) -> tuple[float, float]:
        """Mean PSNR and mean error over the held-out images, of the posterior's mean."""
        sums = torch.zeros(3, dtype=torch.float64)
        training = model.training
        model.eval()
        for images, targets in self.held_out or ():
            images = to_device(images, self.accelerator.device, self.config.model.channels_last)
            with self.accelerator.autocast():
                drawn = model(images, return_dict=False)[0]
            apart = (drawn.float().clamp(-1, 1) - images).cpu().double().flatten(1)[targets >= 0]
            psnr = 10 * (4 / apart.square().mean(1).clamp(min=1e-12)).log10()
            sums += torch.stack([psnr.sum(), apart.abs().mean(1).sum(), torch.tensor(len(apart), dtype=torch.float64)])
        model.train(training)
        psnr, error, count = self._summed(sums)
        return psnr / max(count, 1), error / max(count, 1)

    @torch.no_grad()
    def _latent_std(self, model: Any) -> float:
        sums, seen = torch.zeros(3, dtype=torch.float64), 0
        training = model.training
        model.eval()
        most = -(-_SCALED_BY // self.accelerator.num_processes)
        for images, targets in self.measured:
            images = to_device(images, self.accelerator.device, self.config.model.channels_last)
            with self.accelerator.autocast():
                posterior = model.encode(images).latent_dist
            mean, spread = (part.cpu().double()[targets >= 0] for part in (posterior.mean, posterior.var))
            count = torch.tensor(mean.numel(), dtype=torch.float64)
            sums += torch.stack([count, mean.sum(), (mean.square() + spread).sum()])
            seen += len(images)
            if seen >= most:
                break
        model.train(training)
        count, total, squares = self._summed(sums)
        std = (squares / count - (total / count) ** 2) ** 0.5
        if not std > 0:
            raise UsageError(
                f"the latents' standard deviation is {std}; lower loss.kl, which is {self.config.loss.kl:g}."
            )
        return std

    @torch.no_grad()
    def _draw(self, vae: Any, epoch: int) -> None:
        """Some images, above what becomes of them."""
        from PIL import Image

        images = next(iter(self.held_out or self.measured))[0][:12]
        both = torch.cat([images, vae(images).sample.clamp(-1, 1)])  # [2 n, C, H, W]
        rows = torch.cat(list(both.unflatten(0, (2, -1)).permute(0, 2, 3, 1, 4).flatten(3)), dim=1)  # [C, 2 H, n W]
        pixels = ((rows + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous()
        with replaced(self.output / "samples" / f"epoch-{epoch:05d}.png") as part:
            Image.fromarray(pixels.numpy()).save(part, format="PNG")


def build_autoencoder(config: AutoencodeConfig) -> Any:
    """The autoencoder of a configuration, on the CPU.

    Raises:
        UsageError: it does not take these arguments.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model, levels = config.model, len(config.model.block_out_channels)
    kind: Any = AutoencoderKL  # whose annotations speak of one level
    try:
        network = kind(
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
        network.enable_gradient_checkpointing()
    return network


def image_transform(data: DataConfig, *, training: bool) -> Any:
    """From a PIL image to ``[channels, size, size]`` in [-1, 1], or a piece of it where pieces are learnt."""
    from torchvision import transforms

    from ..class_conditional.config import DataConfig as Images
    from ..class_conditional.data import image_transform as whole_image

    steps = [whole_image(Images(size=data.size, channels=data.channels), training=False)]
    if training and data.crop is not None:
        steps.append(transforms.RandomCrop(data.crop))
    if training and data.hflip:
        steps.append(transforms.RandomHorizontalFlip(data.hflip))
    return transforms.Compose(steps)
