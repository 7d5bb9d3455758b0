"""gspn_tiny as the encoder of segmentation-models-pytorch, below every decoder that does not need dilation."""

from __future__ import annotations

import pytest
import torch

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs gspn[integrations]")
import gspn.models  # noqa: E402, F401

SMALL = dict(dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), encoder_weights=None, classes=3)
NARROW = dict(decoder_channels=(24, 16, 8, 8, 8))
DECODERS = {
    "Unet": NARROW,
    "UnetPlusPlus": NARROW,
    "MAnet": NARROW,
    "Linknet": {},
    "FPN": dict(decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    "PSPNet": dict(psp_out_channels=16),
    "UPerNet": dict(decoder_channels=16),
    "Segformer": dict(decoder_segmentation_channels=16),
    "DPT": dict(
        decoder_readout="ignore", decoder_intermediate_channels=(16, 16, 16, 16), decoder_fusion_channels=16
    ),
    "PAN": dict(encoder_output_stride=32, decoder_channels=16),
}  # fmt: skip
DILATED = ("DeepLabV3", "DeepLabV3Plus")


def test_no_decoder_is_left_out():
    assert {one.__name__ for one in smp.MODEL_ARCHITECTURES_MAPPING.values()} == {*DECODERS, *DILATED}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    model = getattr(smp, name)("tu-gspn_tiny", **SMALL, **DECODERS[name])
    height, width = (64, 96) if name != "PAN" else (256, 288)  # PAN halves the last map three times
    masks = model(torch.randn(2, 3, height, width))
    assert masks.shape == (2, 3, height, width)
    masks.square().mean().backward()
    # DPT asks for the intermediate maps of the whole classifier, and leaves what follows them without a gradient.
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused <= {f"encoder.model.{end}.{kind}" for end in ("norm", "head.fc") for kind in ("weight", "bias")}
    assert not unused or name == "DPT"
    with torch.no_grad():
        other = model.eval()(torch.randn(1, 3, width, height))
    assert other.shape == (1, 3, width, height) and other.isfinite().all()


@pytest.mark.parametrize("name", DILATED)
def test_a_decoder_that_needs_dilation_is_refused(name):
    with pytest.raises(TypeError, match="output_stride"):
        getattr(smp, name)("tu-gspn_tiny", **SMALL)
