"""Models by name or folder, with pretrained weights where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .. import models as _models  # noqa: F401  (registers the models of gspn with timm)
from .._errors import UsageError
from ..models.saved import check_model_name, hub_or_cache, load_saved, refusing


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and the source of its weights."""

    model: nn.Module
    name: str
    weights: str
    """``"pretrained"`` and its tag, ``"from FOLDER"`` or ``"random, seed 0"``."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """The channels, height and width that the model was made for."""
        return tuple(_cfg(self.model).get("input_size", (3, 224, 224)))

    def normalize(self, image: Tensor) -> Tensor:
        """Turn an image ``[3, H, W]`` in 0 to 1 into the model's input ``[1, in_chans, H, W]``."""
        channels = self.input_size[0]
        if channels == 1:
            image = image.mean(0, keepdim=True)
        elif channels != 3:
            raise UsageError(f"{self.name} takes {channels} channels; an image has 3, or 1 in grey.")
        cfg = _cfg(self.model)
        mean = image.new_tensor(cfg.get("mean", IMAGENET_DEFAULT_MEAN))[:channels].view(-1, 1, 1)
        std = image.new_tensor(cfg.get("std", IMAGENET_DEFAULT_STD))[:channels].view(-1, 1, 1)
        return ((image - mean) / std).unsqueeze(0)


def _cfg(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "pretrained_cfg", None) or {})


def load_model(name: str, *, seed: int = 0) -> LoadedModel:
    """Load a model of timm's registry, which includes those of gspn, or one that was saved to a folder.

    Args:
        name: a registered name with or without a tag, ``hf-hub:...``, or a folder with ``config.json`` and weights as
            written by ``timm.models.save_for_hf``, with or without the prefix ``local-dir:``.
        seed: the seed of the weights if there are no pretrained ones. The caller's random state is not changed.

    Returns:
        The model, with its pretrained weights if it has any.

    Raises:
        UsageError: the name is unknown, or the folder or repository holds no model that can be loaded.
        OSError: pretrained weights cannot be fetched or read.

    Example:
        >>> from gspn.analysis.loading import load_model
        >>> load_model("gspn_nano.untrained", seed=3).weights
        'random, seed 3'
    """
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or folder.is_dir():
        model = load_saved(folder)
        return LoadedModel(model, _cfg(model).get("architecture") or folder.name, f"from {folder}")
    if name.startswith("hf-hub:"):
        with refusing(name, (OSError, RuntimeError)), hub_or_cache():
            return LoadedModel(timm.create_model(name, pretrained=True).eval(), name, "pretrained")
    check_model_name(name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.has_weights:
        tag = f", {cfg.tag}" if cfg.tag else ""
        return LoadedModel(timm.create_model(name, pretrained=True).eval(), name, f"pretrained{tag}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoadedModel(timm.create_model(name.partition(".")[0]).eval(), name, f"random, seed {seed}")
