"""``examples/train_minimal.py`` for one epoch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("sklearn", reason="needs scikit-learn")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_minimal.py"


def test_it_learns_and_writes_its_weights(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("train_minimal", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    output = tmp_path / "weights.pt"
    accuracy = example.main(["--epochs", "1", "--output", str(output)])
    assert accuracy > 70
    printed = capsys.readouterr().out
    assert f"top-1 {accuracy:.1f} %" in printed and str(output) in printed
    model = example.timm.create_model("gspn_pico", num_classes=10, in_chans=1)
    model.load_state_dict(torch.load(output, weights_only=True))
    data = torch.utils.data.DataLoader(example.load_digits("val", 16), batch_size=100)
    assert example.accuracy(model, data) == pytest.approx(accuracy)
