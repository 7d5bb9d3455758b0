"""The transform of training images."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..._errors import require
from .config import AugmentConfig
from .model import Preprocessing


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
    trimmed = partial(require("gspn.data").trimmed, width=size[1], height=size[0])
    return transforms.Compose([trimmed, *steps])
