"""Detectors of torchvision on a feature pyramid over a backbone of gspn."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

detection = pytest.importorskip("torchvision.models.detection", reason="needs gspn[train]")
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402

import gspn.models  # noqa: E402, F401


class Pyramid(nn.Module):
    """The maps of a backbone, all of one width, under the names that torchvision gives them."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.body = timm.create_model("gspn_tiny", features_only=True, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels)
        self.out_channels = channels

    def forward(self, images):
        return self.fpn({str(i): one for i, one in enumerate(self.body(images))})


@pytest.mark.parametrize("name", ["RetinaNet", "FasterRCNN"])
def test_detector(name):
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4)
    options = dict(min_size=64, max_size=96)
    if name == "RetinaNet":
        model = detection.RetinaNet(Pyramid(), 3, anchor_generator=anchors, score_thresh=0.0, **options)
    else:
        head = detection.faster_rcnn.TwoMLPHead(16 * 7**2, 32)
        predictor = detection.faster_rcnn.FastRCNNPredictor(32, 3)
        model = detection.FasterRCNN(
            Pyramid(), rpn_anchor_generator=anchors, box_head=head, box_predictor=predictor, box_score_thresh=0.0,
            **options,
        )  # fmt: skip
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 60)]
    target = dict(boxes=torch.tensor([[4.0, 4.0, 40.0, 50.0]]), labels=torch.tensor([1]))

    losses = model.train()(images, [target, target])
    sum(losses.values()).backward()
    assert all(one.isfinite() for one in losses.values())
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    with torch.no_grad():
        found = model.eval()(images)
    for one, image in zip(found, images, strict=True):
        boxes = one["boxes"]
        assert len(boxes) == len(one["scores"]) == len(one["labels"]) > 0
        assert boxes.min() >= 0 and (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()
