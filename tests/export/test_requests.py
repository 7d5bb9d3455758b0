"""Requests that the export refuses, in one line and without a file; and how it reads arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gspn.export
from gspn._errors import MissingExtraError, UsageError
from gspn.export.inputs import bind


class Sum(nn.Module):
    def forward(self, x: Tensor, other: Tensor | None = None, twice: bool = False) -> Tensor:
        y = x if other is None else x + other
        return y * 2 if twice else y


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Sized(nn.Module):
    """Right at one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :4] if torch.compiler.is_compiling() else x * 2


X = torch.randn(2, 3, 8, 6)


@pytest.mark.parametrize(
    ("module", "args", "options", "message"),
    [
        (nn.Conv2d(3, 3, 1), X, {}, "Conv2d is in training mode; call .eval() first"),
        (torch.sin, X, {}, "module is a builtin_function_or_method; pass a torch.nn.Module"),
        (Sum().eval(), (), {}, "Sum cannot be called with these arguments: missing a required argument: 'x'"),
        (Sum().eval(), 3, {}, "args is 3; pass a tensor or a tuple"),
        (Sum().eval(), (3,), {}, "args has no tensor"),
        (Sum().eval(), X, {"kwargs": {"y": X}}, "got an unexpected keyword argument 'y'"),
        (Sum().eval(), X, {"opset": 17}, "opset=17: use 18 to 23"),
        (Sum().eval(), X, {"dynamic": "batch"}, "dynamic='batch': use True, False, or names of axes"),
        (Sum().eval(), X, {"dynamic": {"y": {0: "n"}}}, "dynamic has 'y', which is not an input; the inputs are x"),
        (Sum().eval(), X, {"dynamic": {"x": {4: "n"}}}, "axis 4, and x has the axes 0 to 3"),
        (Sum().eval(), X, {"dynamic": {"x": {2: "n", 3: "n"}}}, "'n' is 8 in one input and 6 in axis 3 of x"),
        (Sum().eval(), X, {"dynamic": {"x": [0]}}, "dynamic['x'] is [0]"),
        (Sum().eval(), X.double(), {}, "torch.float64, which ONNX Runtime does not compute"),
        (nn.Conv2d(3, 3, 1).bfloat16().eval(), X.bfloat16(), {}, "Conv2d has torch.bfloat16"),
        (Branch().eval(), X, {}, "Branch cannot be exported: "),
    ],
)
def test_wrong_requests_in_one_line(module, args, options, message, tmp_path) -> None:
    with pytest.raises(UsageError) as caught:
        gspn.export.to_onnx(module, args, tmp_path / "model.onnx", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_paths(tmp_path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    for name, message in (("model.pb", "has to end in .onnx"), ("folder.onnx", "is a directory; name a file")):
        with pytest.raises(UsageError, match=message):
            gspn.export.to_onnx(Sum().eval(), X, tmp_path / name)
    with pytest.raises(UsageError, match=r"has to end in \.pt2"):
        gspn.export.to_pt2(Sum().eval(), X, tmp_path / "model.onnx")


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"this needs onnxscript; pip install 'gspn\[export\]'"):
        gspn.export.to_onnx(Sum().eval(), X, tmp_path / "model.onnx")


@pytest.mark.parametrize("write", [gspn.export.to_pt2, gspn.export.to_onnx])
def test_a_wrong_result_is_named_and_not_written(write, tmp_path) -> None:
    path = tmp_path / f"model.{'pt2' if write is gspn.export.to_pt2 else 'onnx'}"
    path.write_text("mine")
    with pytest.raises(UsageError, match=rf"{path.name}: output is \(2, 3, 4, 6\) and not \(2, 3, 8, 6\)"):
        write(Sized().eval(), X, path)
    assert path.read_text() == "mine"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_outputs_may_be_of_every_kind(tmp_path) -> None:
    class Every(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"largest": x.argmax(1), "nested": [x.sin(), (x > 0, 3)]}

    gspn.export.to_pt2(Every().eval(), X, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(X[:1])["largest"], X[:1].argmax(1))


def test_a_small_difference_is_measured(tmp_path) -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1.01 if torch.compiler.is_compiling() else 1)

    with pytest.raises(
        UsageError, match=r"output differs from the module's by 0\.01 of its largest value, and 0\.00035"
    ):
        gspn.export.to_pt2(Off().eval(), X, tmp_path / "model.pt2")


def test_the_axes_that_are_dynamic() -> None:
    inputs = bind(Sum(), (X,), {"twice": True, "other": torch.randn(2, 3, 8, 6)}, True)
    assert list(inputs.leaves) == ["x", "other", "twice"]
    assert inputs.axes == [{0: "batch", 2: "height", 3: "width"}] * 2 + [{}]
    assert inputs.lengths == {"batch": 2, "height": 8, "width": 6}
    assert inputs.to_trace().lengths == {"batch": 2, "height": 128, "width": 132}
    assert [one.lengths for one in inputs.of_other_sizes()] == [
        {"batch": 1, "height": 4, "width": 3}, {"batch": 4, "height": 16, "width": 12}
    ]  # fmt: skip
    first = next(iter(inputs.of_other_sizes())).leaves["x"]
    assert torch.equal(first, X[:1, :, :4, :3])


def test_a_constant_argument_and_one_by_name(tmp_path) -> None:
    program = gspn.export.to_onnx(
        Sum().eval(),
        (X,),
        tmp_path / "model.onnx",
        kwargs={"twice": True, "other": X},
        dynamic={"x": {0: "n"}, "other": {0: "n"}},
    )
    graph = program.model.graph
    assert [(one.name, str(one.shape)) for one in graph.inputs] == [("x", "[n,3,8,6]"), ("other", "[n,3,8,6]")]
    assert [(one.name, str(one.shape)) for one in graph.outputs] == [("output", "[n,3,8,6]")]
