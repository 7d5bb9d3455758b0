from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")
pytest.importorskip("segmentation_models_pytorch", reason="needs gspn[dense]")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    from tasks.dense.dense_runs import write_shapes

    return write_shapes(tmp_path_factory.mktemp("shapes"), {"train": 48, "val": 4})


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """The result of a run with an average of the weights, and what it printed."""
    from rich.console import Console

    from gspn.tasks.dense import train
    from tasks.dense.dense_runs import tiny

    torch.set_num_threads(1)
    said = io.StringIO()
    settings = ["schedule.epochs=8", "ema.decay=0.9", "loss.class_weights=balanced", "run.eval_every=4"]
    config = tiny(shapes, tmp_path_factory.mktemp("finished"), *settings)
    return train(config, console=Console(file=said, width=200)), said.getvalue()
