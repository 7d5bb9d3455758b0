from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The result of a run with an average of the weights, and what it printed."""
    from rich.console import Console

    from gspn.tasks.classify import train
    from tasks.classify.runs import tiny

    torch.set_num_threads(1)
    said = io.StringIO()
    settings = ["schedule.epochs=3", "ema.decay=0.9", "run.trackers=[tensorboard]", "run.log_every=5"]
    config = tiny(tmp_path_factory.mktemp("finished"), *settings)
    return train(config, console=Console(file=said, width=200)), said.getvalue()
