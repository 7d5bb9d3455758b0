"""The operators in ONNX Runtime and OpenVINO, at sizes, batches and options of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gspn
import gspn.export
from export.support import assert_as_exact, operators, run, session
from gspn.nn import GSPN2d

C = 6
OPTIONS = [
    {},
    {"groups": 1},
    {"groups": 2, "segment": 5, "skip": False},
    {"groups": 3, "segment": 2, "directions": ("up", "left"), "proxy_bias": True},
    {"directions": ("left",), "reference_lines": 7, "segment": 3},
]
SIZES = [(1, 1, 1), (2, 1, 5), (1, 7, 1), (3, 17, 9), (1, 9, 17), (2, 16, 16)]


class Scans(nn.Module):
    """Every kind of layer, and scans alone, as outputs of one model: an export takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(GSPN2d(C, proxy_dim=3, **options) for options in OPTIONS)
        self.taps = nn.Conv2d(C, 6, 1)
        self.impl = "auto"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.taps(x).unflatten(1, (2, 3))
        scans = {}
        for segment in (None, 4):
            for direction in gspn.DIRECTIONS:
                taps = gspn.stochastic_taps(logits, direction=direction)
                lam = None if direction in ("down", "left") else x.sin()
                scans[f"{direction}_{segment}"] = gspn.line_scan(
                    x, taps, lam, direction=direction, segment=segment, impl=self.impl
                )
        return {**{f"layer_{i}": layer(x) for i, layer in enumerate(self.layers)}, **scans}


class Values(nn.Module):
    """The outputs of a model that returns a dictionary, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x).values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, and the path of the file."""
    torch.manual_seed(0)  # whatever other tests drew before
    model, path = Scans().eval(), tmp_path_factory.mktemp("export") / "scans.onnx"
    gspn.export.to_onnx(model, torch.randn(2, C, 8, 8), path)
    return model, path


@pytest.mark.slow
def test_every_option_at_every_size(exported) -> None:
    model, path = exported
    opened = session(path)
    assert [one.name for one in opened.get_outputs()][:2] == ["layer_0", "layer_1"]
    torch.manual_seed(1)
    for size in SIZES:
        assert_as_exact(Values(model), opened, torch.randn(size[0], C, *size[1:]))


@pytest.mark.slow
def test_a_scan_is_one_node_and_a_layer_few(exported) -> None:
    count = operators(exported[1])
    scans = 3 * 4 + 2 + 1 + 8
    assert count["Scan"] == scans
    assert count.total() < 30 * scans
    assert not {"Loop", "If", "ScatterND", "Reverse", "ReverseSequence"} & set(count)


@pytest.mark.slow
def test_openvino_reads_and_runs_it(exported) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'gspn[integrations]'")
    _, path = exported
    compiled = openvino.compile_model(openvino.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, height, width in SIZES[2:]:
        x = torch.randn(batch, C, height, width)
        results = compiled(x.numpy())
        for result, right in zip(results.values(), run(session(path), x), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), right)


def test_the_exporter_of_pytorch_finds_the_translations_and_is_told_where_they_are(monkeypatch) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            taps = torch.full((1, 1, 3, 5, 4), 1 / 3)
            return gspn.line_scan(x, taps, direction="up")

    monkeypatch.delitem(__import__("sys").modules, "gspn.export")
    with pytest.warns(UserWarning, match="add `import gspn.export`, or call gspn.export.to_onnx"):
        program = torch.onnx.export(Sum(), (torch.randn(1, 2, 5, 4),), verbose=False)
    assert [node.op_type for node in program.model.graph].count("Scan") == 1
