"""Training and evaluation data of a classifier."""

from __future__ import annotations

from typing import Any

from ..._errors import UsageError, require
from ..core.loaders import class_names, open_data
from .config import AugmentConfig, DataConfig
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
    keys = ("scale", "ratio", "hflip", "vflip", "auto_augment", "interpolation", "re_prob", "re_mode", "re_count")
    composed = timm_data.create_transform(
        preprocessing.input_size,
        is_training=True,
        color_jitter=augment.color_jitter or None,
        mean=preprocessing.mean,
        std=preprocessing.std,
        **{key: getattr(augment, key) for key in keys},
    )
    steps = list(composed.transforms)
    if augment.crop == "none":
        # timm's first step is the random crop.
        whole = preprocessing.interpolation if augment.interpolation == "random" else augment.interpolation
        steps[0] = transforms.Resize(size, transforms.InterpolationMode(whole))
    if augment.affine is not None:
        affine, bilinear = augment.affine, transforms.InterpolationMode.BILINEAR
        shear = affine.shear or None
        moved = transforms.RandomAffine(affine.degrees, affine.translate, affine.scale, shear, bilinear, affine.fill)
        steps.insert(1, moved)
    return transforms.Compose(steps)
