"""Backbones, denoisers and a UNet with an adapter, from the function's arguments to what a runtime gives."""

from __future__ import annotations

import pytest
import torch

import gspn.export
from diffusers_support import inputs, make_unet
from export.support import assert_as_exact, operators, run, session
from gspn.models import GSPN, GSPNDenoiser2DModel
from support import run_python

pytestmark = pytest.mark.slow


def small(**options) -> GSPN:
    torch.manual_seed(0)
    return GSPN(dims=(8, 16), depths=(1, 1), num_classes=5, stem_stride=2, segment=(2, None), **options).eval()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    model, path = small(), tmp_path_factory.mktemp("backbone") / "backbone.onnx"
    gspn.export.to_onnx(model, torch.randn(1, 3, 24, 24), path)
    return model, path


def test_a_backbone_at_three_sizes_and_batches(backbone) -> None:
    model, path = backbone
    opened = session(path)
    for size in ((24, 24), (31, 7), (1, 2)):
        for batch in (1, 2, 5):
            assert_as_exact(model, opened, torch.randn(batch, 3, *size))
    count = operators(path)
    assert count["Scan"] == 4 * 2
    assert count.total() < 320


def test_openvino_runs_a_backbone(backbone) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'gspn[integrations]'")
    _, path = backbone
    compiled = openvino.compile_model(openvino.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((1, 3, 24, 24), (3, 3, 15, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), run(session(path), x)[0])


def test_features_of_a_fixed_size_in_half_precision(tmp_path) -> None:
    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return self.model.forward_intermediates(image, intermediates_only=True)  # type: ignore[return-value]

    model, x = Features().half().eval(), torch.randn(1, 3, 9, 12).half()
    gspn.export.to_onnx(model, x, tmp_path / "features.onnx", dynamic=False)
    opened = session(tmp_path / "features.onnx")
    assert [(one.name, one.shape, one.type) for one in opened.get_outputs()] == [
        ("output_0", [1, 8, 5, 6], "tensor(float16)"), ("output_1", [1, 16, 3, 3], "tensor(float16)")
    ]  # fmt: skip


def test_a_denoiser(tmp_path) -> None:
    torch.manual_seed(0)
    model = GSPNDenoiser2DModel(in_channels=1, num_class_embeds=10, dim=8, num_layers=1).eval()
    for one in model.parameters():
        torch.nn.init.normal_(one, std=0.2)  # a new one predicts zero
    kwargs = {"class_labels": torch.tensor([3, 10]), "timestep": torch.tensor([7, 900])}
    gspn.export.to_onnx(model, torch.randn(2, 1, 8, 12), tmp_path / "denoiser.onnx", kwargs=kwargs)
    opened = session(tmp_path / "denoiser.onnx")
    assert [one.name for one in opened.get_inputs()] == ["hidden_states", "timestep", "class_labels"]
    assert [one.name for one in opened.get_outputs()] == ["sample"]
    x, t, labels = torch.randn(3, 1, 14, 6), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        right = model(x, t, labels).sample
    torch.testing.assert_close(run(opened, x, t, labels)[0], right)


def test_a_unet_with_an_adapter_mounted(tmp_path) -> None:
    from gspn.diffusers import GSPNAdapter

    model, path = make_unet(), tmp_path / "unet.onnx"
    GSPNAdapter.from_model(model, segment=3).mount(model)
    # Of a fixed size: with all axes dynamic, tracing this one takes a minute.
    gspn.export.to_onnx(model, (), path, kwargs={**inputs(model), "return_dict": False}, dynamic=False)
    opened = session(path)
    arguments = inputs(model, seed=2)
    with torch.no_grad():
        right = model(**arguments).sample
    torch.testing.assert_close(run(opened, *(arguments[one.name] for one in opened.get_inputs()))[0], right)
    assert operators(path)["Scan"] == 4 * sum(type(m).__name__ == "GSPN2d" for m in model.modules())


def test_programs_of_pytorch(tmp_path) -> None:
    model = small()
    gspn.export.to_pt2(model, torch.randn(1, 3, 24, 24), tmp_path / "backbone.pt2")
    loaded = torch.export.load(tmp_path / "backbone.pt2").module()
    for shape in ((2, 3, 24, 24), (5, 3, 31, 7)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


_AOTINDUCTOR = """
import timm, torch
import gspn.export, gspn.models

model = timm.create_model({name!r}, num_classes=3, depths={depths}).eval()  # the whole ones compile for up to a minute
x = torch.randn(2, 3, 64, 64)
program = gspn.export.to_pt2(model, x, {folder!r} + "/model.pt2", dynamic={{"x": {{0: "batch"}}}})
package = torch._inductor.aoti_compile_and_package(program, package_path={folder!r} + "/compiled.pt2")
compiled = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)))
"""


@pytest.mark.parametrize(("name", "depths"), [("gspn_pico", (1, 1, 1)), ("gspn_tiny", (1, 1, 1, 1))])
def test_packages_of_aotinductor_call_the_kernels(name, depths, tmp_path) -> None:
    import shutil

    if shutil.which("c++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    # In a process of its own, as people run it: after the rest of the suite, setuptools, which it imports, found the
    # distutils of Python instead of its own.
    run_python(_AOTINDUCTOR.format(name=name, depths=depths, folder=str(tmp_path)))
