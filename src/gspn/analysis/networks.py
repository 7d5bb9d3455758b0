"""Networks by name or folder, with the weights there are."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import gspn.models  # noqa: F401  (registers the networks of gspn with timm)


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode and where its weights come from."""

    model: nn.Module
    name: str
    weights: str
    """``"pretrained"`` and its tag, ``"from FOLDER"`` or ``"random, seed 0"``."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width that it was made for."""
        return tuple(self._cfg.get("input_size", (3, 224, 224)))

    def normalised(self, image: Tensor) -> Tensor:
        """An image ``[3, H, W]`` in 0 to 1 as the network's input, ``[1, in_chans, H, W]``."""
        channels = self.input_size[0]
        if channels == 1:
            image = image.mean(0, keepdim=True)
        elif channels != 3:
            raise ValueError(f"{self.name} takes {channels} channels; an image has 3, or 1 as grey.")
        mean = image.new_tensor(self._cfg.get("mean", IMAGENET_DEFAULT_MEAN))[:channels].view(-1, 1, 1)
        std = image.new_tensor(self._cfg.get("std", IMAGENET_DEFAULT_STD))[:channels].view(-1, 1, 1)
        return ((image - mean) / std).unsqueeze(0)

    @property
    def _cfg(self) -> dict[str, Any]:
        return dict(getattr(self.model, "pretrained_cfg", None) or {})


def open_network(name: str, *, seed: int = 0) -> Network:
    """A network of timm's registry, those of gspn included, or one that was saved to a folder.

    Args:
        name: a registered name, with a tag if wanted, ``hf-hub:...``, or a folder with ``config.json`` and weights, as
            timm saves them (``timm.models.save_for_hf``), with or without ``local-dir:`` before it.
        seed: of the weights where there are no pretrained ones. The generator of the caller stays as it is.

    Returns:
        The network, with its pretrained weights if it has some.

    Raises:
        ValueError: no such name, or a folder that holds no network.
        OSError: pretrained weights cannot be fetched or read.

    Example:
        >>> from gspn.analysis.networks import open_network
        >>> open_network("gspn_nano.untrained", seed=3).weights
        'random, seed 3'
    """
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or folder.is_dir():
        return _from_folder(folder)
    if name.startswith("hf-hub:"):
        return Network(timm.create_model(name, pretrained=True).eval(), name, "pretrained")
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{name!r} is neither a folder nor a network that timm knows; {meant}See gspn models.")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r}: {error} Leave the tag out for the default.") from None
    if cfg is not None and cfg.has_weights:
        tag = f", {cfg.tag}" if cfg.tag else ""
        return Network(timm.create_model(name, pretrained=True).eval(), name, f"pretrained{tag}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(timm.create_model(plain).eval(), name, f"random, seed {seed}")


def _from_folder(folder: Path) -> Network:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        # A missing or broken config.json, an unknown architecture, weights that are missing or do not fit.
        raise ValueError(f"{folder} holds no network that timm can load: {error}") from error
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    return Network(model.eval(), cfg.get("architecture") or folder.name, f"from {folder}")
