"""A LightningModule around a backbone of gspn: two steps on a CPU, and its checkpoint without unpickling."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="needs gspn[integrations]")
from lightning.fabric.utilities.throughput import measure_flops  # noqa: E402

import gspn.models  # noqa: E402, F401


class Classifier(lightning.LightningModule):
    def __init__(self, name: str = "gspn_pico", num_classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=num_classes)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_fit_and_load(tmp_path):
    images = torch.randn(8, 3, 20, 28)
    loader = DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=4)
    module = Classifier()
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert trainer.global_step == 2
    assert not any(torch.equal(before[name], p) for name, p in module.named_parameters())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    same = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, map_location="cpu").eval()
    with torch.no_grad():
        assert torch.equal(same.model(images), module.eval().model(images))


def test_its_count_of_operations_has_the_scans():
    with torch.device("meta"):
        model, x = timm.create_model("gspn_pico"), torch.randn(1, 3, 28, 28)
        count = measure_flops(model, lambda: model(x))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    assert count == counter.get_total_flops() and counter.get_flop_counts()["Global"][torch.ops.gspn.propagate] > 0
