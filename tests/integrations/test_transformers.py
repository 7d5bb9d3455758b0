"""transformers builds backbones of gspn by name, and loads the directories that timm and `gspn classify` write."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

transformers = pytest.importorskip("transformers", reason="needs gspn[text]")
from timm.models import save_for_hf  # noqa: E402

import gspn.models  # noqa: E402, F401
from gspn.tasks.classify.config import ModelConfig  # noqa: E402
from gspn.tasks.classify.model import resolve_preprocessing, save_config, save_weights  # noqa: E402


def backbone(name: str = "gspn_pico", stages: tuple[int, ...] = (0, 1, 2)):
    return transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=stages)


def test_timm_backbone_gives_the_maps_of_its_stages():
    model, x = transformers.TimmBackbone(backbone()).eval(), torch.randn(1, 3, 37, 50)
    twin = timm.create_model("gspn_pico", features_only=True).eval()
    twin.load_state_dict(model._backbone.state_dict())
    maps = model(x).feature_maps
    assert list(model.channels) == [32, 64, 128] == [one.shape[1] for one in maps]
    assert all(torch.equal(a, b) for a, b in zip(maps, twin(x), strict=True))


def test_timm_backbone_loads_the_weights_of_the_package():
    model = transformers.TimmBackbone.from_pretrained("gspn_pico.mnist5k", out_indices=(2,))
    shipped = timm.create_model("gspn_pico.mnist5k", pretrained=True)
    own, theirs = model._backbone.stages_2.state_dict(), shipped.stages[2].state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in own.items())


@pytest.mark.parametrize("name", ["UperNetForSemanticSegmentation", "DetrForObjectDetection"])
def test_a_model_with_such_a_backbone_is_trained_saved_and_loaded(name, tmp_path):
    if name.startswith("UperNet"):
        config = transformers.UperNetConfig(
            backbone_config=backbone("gspn_nano", (0, 1, 2, 3)), hidden_size=16, num_labels=3,
            auxiliary_in_channels=128, auxiliary_channels=16,
        )  # fmt: skip
        labels = torch.randint(0, 3, (2, 32, 48))
    else:
        config = transformers.DetrConfig(
            backbone_config=backbone(stages=(2,)), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=3,
        )  # fmt: skip
        labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))] * 2
    model, images = getattr(transformers, name)(config), torch.randn(2, 3, 32, 48)
    model(images, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    if name.startswith("UperNet"):
        model.save_pretrained(tmp_path)
        same = getattr(transformers, name).from_pretrained(tmp_path).eval()
    else:  # transformers 5.24 renames every out_proj of a DETR to o_proj when it loads it, and so loses the mixers'
        safetensors.torch.save_model(model, tmp_path / "model.safetensors")
        same = getattr(transformers, name)(config).eval()
        safetensors.torch.load_model(same, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(same(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("written_by", ["timm", "gspn"])
def test_timm_wrapper_classifies_as_timm_does_and_is_saved_again(written_by, tmp_path):
    source, names = timm.create_model("gspn_pico.mnist5k", pretrained=True).eval(), list("0123456789")
    if written_by == "timm":
        save_for_hf(source, str(tmp_path), model_config=dict(label_names=names), safe_serialization=True)
        # timm 1.0.31 writes num_classes twice, and the wrapper of transformers 5.24 passes both on, for any model.
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["model_args"].pop("num_classes", None)
        path.write_text(json.dumps(config))
    else:
        save_config(tmp_path, source, ModelConfig(name="gspn_pico"), resolve_preprocessing(source), names)
        save_weights(tmp_path, source.state_dict(), {})
    images = torch.randn(2, 3, 28, 28)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    assert model.config.id2label == dict(enumerate(names))
    result = model(images, labels=torch.tensor([3, 5]))
    assert torch.equal(result.logits, source(images))
    result.loss.backward()

    model.save_pretrained(tmp_path / "again")
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(images).logits, result.logits)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
