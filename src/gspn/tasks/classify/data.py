"""Training and evaluation data of a classifier."""

from __future__ import annotations

from typing import Any

from ..core.errors import UsageError, require
from ..core.loaders import EvalLoader, TrainLoader, class_names, open_data, seeded_loader, share_loader
from .config import AugmentConfig, DataConfig, TrainConfig
from .model import Preprocessing


def open_pair(data: DataConfig) -> tuple[Any, Any]:
    """The training and the evaluation data of a configuration, with the same classes.

    Raises:
        UsageError: one of them cannot be opened, or they differ in their classes.
    """
    train = open_data(data.name, data.train_split, data.root, **data.options)
    classes = class_names(train)
    options = dict(data.options)
    if data.name in ("", "folder"):
        options.setdefault("classes", classes)  # a class without held-out images must not shift the others
    evaluated = open_data(data.name, data.eval_split, data.root, **options)
    if class_names(evaluated) != classes:
        raise UsageError(
            f"data {data.name!r}: split {data.train_split!r} has {len(classes)} classes and {data.eval_split!r} has "
            f"{len(class_names(evaluated))} others; name two splits of one data set."
        )
    return train, evaluated


def train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> Any:
    """The training transform: timm's, optionally with the whole image instead of a crop, and with ``RandomAffine``."""
    if not augment.enabled:
        return preprocessing.transform()
    timm_data = require("timm.data", "torchvision")
    from torchvision import transforms

    size = preprocessing.input_size[-2:]
    composed = timm_data.create_transform(
        preprocessing.input_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
        re_count=augment.re_count,
    )
    steps = list(composed.transforms)
    if augment.crop == "none":
        # timm's first step is the random crop.
        whole = preprocessing.interpolation if augment.interpolation == "random" else augment.interpolation
        steps[0] = transforms.Resize(size, transforms.InterpolationMode(whole))
    if augment.affine is not None:
        affine = augment.affine
        steps.insert(
            1,
            transforms.RandomAffine(
                affine.degrees,
                affine.translate,
                affine.scale,
                affine.shear or None,
                interpolation=transforms.InterpolationMode.BILINEAR,
                fill=affine.fill,
            ),
        )
    return transforms.Compose(steps)


def train_loader(
    dataset: Any, config: TrainConfig, preprocessing: Preprocessing, *, processes: int, process: int, pin: bool
) -> TrainLoader:
    """The training batches of a process."""
    dataset.transform = train_transform(config.augment, preprocessing)
    return seeded_loader(
        dataset,
        batch_size=config.data.batch_size,
        accumulate=config.optim.accumulate,
        seed=config.run.seed,
        workers=config.data.workers,
        processes=processes,
        process=process,
        pin=pin,
    )


def eval_loader(
    dataset: Any,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    processes: int = 1,
    process: int = 0,
    pin: bool = False,
) -> EvalLoader:
    """The evaluation batches of a process."""
    dataset.transform = preprocessing.transform()
    return share_loader(dataset, batch_size=batch_size, workers=workers, processes=processes, process=process, pin=pin)
