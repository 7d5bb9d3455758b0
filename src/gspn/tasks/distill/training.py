"""Distilling an adapter from a vision transformer: :func:`distill`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gspn.timm import GSPNAdapter

from ..._errors import UsageError, require
from ..classify.data import train_transform
from ..classify.model import label_names, pretrained_cfg, resolve_preprocessing
from ..core.attention_matching import sharing_copy
from ..core.loaders import open_data
from ..core.loop import fit
from ..core.metrics_table import EpochRow, metric
from ..core.seeding import derived_seed, random_state_kept
from ..core.task import Context, Models, Setup, Task, TrainingResult, Weights
from ..dense.model import DenseModel
from ..diffusion.digests import fingerprint
from .attention_matching import Distiller
from .config import DistillConfig
from .initialization import fit_gates
from .student import load_adapter, open_model, resize, vision_transformer

# Images that the gates are fitted on, and images at a time.
_FITTED_ON, _FITTED_AT_ONCE = 64, 16


@dataclass(frozen=True)
class DistillRow(EpochRow):
    """One row of ``metrics.csv``, of the averaged weights where they exist; None after an epoch without evaluation."""

    eval_loss: float | None = metric("eval {:.4f}")
    """That of the second stage, also in the first."""
    eval_propagation: float | None = metric()
    """Squared error of the mixers' outputs over the mean square of the attentions', a mean over the layers."""
    eval_blocks: float | None = metric()
    eval_features: float | None = metric()
    eval_logits: float | None = metric()
    agreement: float | None = metric("agreement {:.2f}")
    """Percentage of the images that student and teacher classify alike."""
    top1: float | None = metric("top-1 {:.2f}")
    """The student's accuracy in percent, where the labels are the teacher's classes."""
    teacher_top1: float | None = metric("teacher {:.2f}")


def distill(
    config: DistillConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[DistillRow]:
    """Train an adapter that replaces a vision transformer's self-attention and computes the same features.

    Teacher and student are one model, with attention and with GSPN in its place; only the adapter is trained. In the
    first ``distillation.block_epochs`` epochs every mixer separately learns the attention's output from the attention's
    own input. This runs no student. Then the student learns end to end, with the loss::

        w_1 mean_l E(mixer_l) + w_2 mean_l E(block_l) + w_3 E(last tokens) + w_4 T^2 KL(p_teacher | p_student)

    where E is the squared error over the mean square of the teacher's. Images need no labels. Of a dense model the
    encoder is distilled, with images at their own size: there are no class probabilities, and the decoder, which the
    student keeps as it is, does not run. For higher resolutions
    the former student is the teacher (``teacher``, and ``model.init_from`` to start from it), sees the images at its
    own size (``distillation.teacher_size``), and all of its tokens are enlarged to the student's map.

    The output directory receives ``config.yaml``, ``metrics.csv`` (a :class:`DistillRow` per epoch) and in ``last/``
    the adapter, :class:`gspn.timm.GSPNAdapter`, with the average of the weights where one is kept.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`
    for this, for ``resume`` and ``console``, and for the errors.

    Example:
        >>> from gspn.tasks.distill import DistillConfig, distill
        >>> distill(DistillConfig.load("emoji_vit").changed("schedule.epochs=10"))  # doctest: +SKIP
    """
    return fit(Distillation(config), resume=resume, console=console)


class Distillation(Task[DistillConfig, DistillRow]):
    """Distillation of an adapter for a vision transformer."""

    row_type = DistillRow

    def setup(self, context: Context) -> Setup:
        """Open the images and the teacher, and initialize the student."""
        config, data, device = self.config, self.config.data, context.accelerator.device
        teacher, base, former, dense = open_teacher(config)
        mapped, options = dense if data.maps is None else data.maps, dict(data.options)
        images = _open(config, data.train_split, mapped, options)
        if data.name in ("", "folder") and images.classes:
            options.setdefault("classes", list(images.classes))  # also those without held-out images
        held_out = None if data.eval_split is None else _open(config, data.eval_split, mapped, options)
        names = label_names(base)
        self.labelled = held_out is not None and names is not None and list(held_out.classes or ()) == names
        preprocessing = replace(resolve_preprocessing(base), input_size=(3, data.size, data.size))
        evaluated = preprocessing.transform("native" if dense else "crop")
        if dense:
            evaluated.transforms.insert(0, require("torchvision.transforms").CenterCrop(data.size))
        images.transform = train_transform(config.augment, preprocessing) if config.augment.enabled else evaluated
        self.held_out = None
        if held_out is not None:
            held_out.transform = evaluated
            self.held_out = context.eval_loader(held_out)

        adapter = build_adapter(config, base)
        self.distiller = Distiller(teacher, base, adapter, config.distillation)
        self.distiller.move_to(device, channels_last=config.model.channels_last)
        notes = []
        if config.model.initialize == "fit" and config.model.init_from is None:
            with random_state_kept():
                batches = _first_batches(images, evaluated, config, context)
            with context.accelerator.autocast():
                explained = fit_gates(self.distiller, batches)
            mean = sum(explained.values()) / len(explained)
            notes.append(f"constant gates explain {100 * mean:.0f} % of the attention's variance, a mean over layers")
        if config.model.grad_checkpointing:
            self.distiller.student.set_grad_checkpointing(True)
        kept, depth = adapter.config["layers"], len(base.blocks)
        return Setup(
            model=self.distiller,
            train=context.train_loader(images),
            evaluation=self.held_out,
            model_title=f"adapter of {len(kept)} of {depth} layers for {config.teacher}",
            data_title=f"{images.name}: {len(images):,} images, {data.size} pixels",
            notes=tuple(notes),
            resolved={"teacher": fingerprint(teacher), "former_student": former},
        )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """The mean error of separate mixers in the first stage, else the loss of the student."""
        del targets
        if epoch < self.config.distillation.block_epochs:
            return model(images, blocks=True)["propagation"].mean()
        return self._loss(model(images)).mean()

    def _loss(self, parts: dict[str, Tensor]) -> Tensor:
        weights, names = self.config.distillation, ("propagation", "blocks", "features", "logits")
        return torch.stack([getattr(weights, name) * parts[name] for name in names if name in parts]).sum(0)  # [B]

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """The errors on held-out images, and the share that is classified alike and rightly."""
        if self.held_out is None:
            return {}

        def metrics(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            parts = model(images)
            row = {"eval_loss": self._loss(parts)}
            predicted, other = (parts.pop(name, None) for name in ("predicted", "teacher_predicted"))
            row |= {f"eval_{name}": value for name, value in parts.items()}
            if predicted is not None and other is not None:
                row["agreement"] = 100.0 * (predicted == other)
                if self.labelled:
                    row |= {"top1": 100.0 * (predicted == targets), "teacher_top1": 100.0 * (other == targets)}
            return row

        return dict(context.mean_metrics(models.raw if models.ema is None else models.ema, self.held_out, metrics))

    def save(self, weights: Weights, row: DistillRow, output: Path, context: Context, *, best: bool) -> None:
        """Write the adapter."""
        del row, context, best
        adapter = GSPNAdapter(**self.distiller.adapter.config, device="meta").to_empty(device="cpu")
        adapter.load_state_dict({key.removeprefix("adapter."): value for key, value in weights.averaged.items()})
        adapter.save_pretrained(output / "last")


def open_teacher(config: DistillConfig) -> tuple[Any, Any, bool, bool]:
    """The teacher at its size, the same model without an adapter at the student's, whether it is a former student, and
    whether it is the encoder of a dense model.

    Raises:
        UsageError: the teacher cannot be loaded, or is not a vision transformer of the size.
    """
    require("timm", "safetensors")
    from gspn.timm.mounting import check_model

    model, former = open_model(config.teacher)
    base, dense = vision_transformer(model), isinstance(model, DenseModel)
    try:
        check_model(base)
    except (TypeError, ValueError) as error:
        raise UsageError(f"teacher {config.teacher!r}: {error}") from None
    if dense:
        base.reset_classifier(0)  # the decoder is in the place of one
        base.pretrained_cfg = {**pretrained_cfg(base), **asdict(model.target.normalization)}
    teacher = sharing_copy(base)  # resizing gives it a position embedding of its own
    resize(base, config.data.size)
    resize(teacher, config.distillation.teacher_size or config.data.size)
    if former is not None:
        former.mount(teacher)
    return teacher, base, former is not None, dense


def _open(config: DistillConfig, split: str, mapped: bool, options: dict[str, Any]) -> Any:
    data = config.data
    if not mapped:
        return open_data(data.name, split, data.root, **options)
    return require("gspn.data").ImagesOnly(open_data(data.name, split, data.root, kind="mapped", **options))


def build_adapter(config: DistillConfig, base: Any) -> GSPNAdapter:
    """The adapter of a configuration, seeded, before its gates are fitted.

    Raises:
        UsageError: the adapter does not fit the model.
    """
    model = config.model
    try:
        if model.init_from is not None:
            adapter = load_adapter(model.init_from)
            with adapter.mounted(base):
                return adapter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.run.seed, "adapter"))
            return GSPNAdapter.from_model(
                base, keep_attention=model.keep_attention, latent_dim=model.latent_dim, proxy_dim=model.proxy_dim,
                groups=model.groups, segment=model.segment, skip=model.skip, proxy_bias=model.proxy_bias,
                normalize_scans=model.normalize_scans, copy_projections=model.initialize != "random",
            )  # fmt: skip
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"model: {error}") from None


def _first_batches(images: Any, transform: Any, config: DistillConfig, context: Context) -> list[Tensor]:
    """Some training images, the same in every process and whenever the run is resumed."""
    generator = torch.Generator().manual_seed(derived_seed(config.run.seed, "fit"))
    corrupt = require("gspn.data").CorruptImageError
    own, images.transform = images.transform, transform
    read = []
    try:
        for index in torch.randperm(len(images), generator=generator).tolist():
            with suppress(corrupt):  # the training reports them
                read.append(images[index][0])
            if len(read) == _FITTED_ON:
                break
    finally:
        images.transform = own
    if not read:
        raise UsageError(f"data {config.data.name!r} has no image that can be read.")
    return [context.to_device(torch.stack(read[i : i + _FITTED_AT_ONCE])) for i in range(0, len(read), _FITTED_AT_ONCE)]
