"""A dense model as the teacher: its encoder is distilled from images alone, and the student is the model with GSPN."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("segmentation_models_pytorch", reason="needs gspn[dense]")

from gspn._errors import UsageError
from gspn.cli import app
from gspn.data import ImagesOnly, open_maps
from gspn.tasks.core.attention_matching import sharing_copy
from gspn.tasks.dense import evaluate
from gspn.tasks.dense.model import DenseModel, load_model, save_model
from gspn.tasks.distill import DistillConfig, distill, load_student
from gspn.tasks.distill.attention_matching import Distiller
from gspn.tasks.distill.training import build_adapter, open_teacher
from gspn.timm import GSPNAdapter
from tasks.dense.dense_runs import CLASSES, tiny_model, write_shapes
from tasks.runs import rows

DPT = {"decoder_readout": "ignore", "decoder_intermediate_channels": [8] * 4, "decoder_fusion_channels": 8}
VIT = ["model.name=test_vit", "model.decoder=DPT", f"model.decoder_kwargs={json.dumps(DPT)}"]
KWARGS = "model.kwargs={img_size: 64, dynamic_img_size: %s}"


def save(folder, *overrides):
    torch.manual_seed(0)
    model = tiny_model(CLASSES, *overrides)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "blocks" in name:
                weight *= 4  # attention that is not uniform
    folder.mkdir()
    save_model(folder, model, model.state_dict(), {})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Dense models, untrained, in ``vit``, ``fixed`` (of one size) and ``convnext``, and images with maps."""
    where = tmp_path_factory.mktemp("dense_teacher")
    save(where / "vit", *VIT, KWARGS % "true")
    save(where / "fixed", *VIT, KWARGS % "false")
    save(where / "convnext")
    write_shapes(where / "shapes", {"train": 8, "val": 2})
    for label in (where / "shapes").rglob("labels/*.png"):
        label.write_bytes(b"no map")  # which nobody reads
    write_shapes(where / "sound", {"val": 2})
    return where


def tiny(place, output, teacher="vit", **keys) -> DistillConfig:
    return DistillConfig(teacher=str(place / teacher)).changed(**{
        "data.name": "folder", "data.root": str(place / "shapes"), "data.eval_split": "val", "data.size": 64,
        "data.batch_size": 4, "data.workers": 0, "model.latent_dim": 8, "distillation.block_epochs": 1,
        "schedule.epochs": 3, "run.output": str(output), "run.trackers": [], "run.device": "cpu", **keys,
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(place):
    distill(tiny(place, place / "run"))
    return place / "run"


def test_the_student_is_the_dense_model_with_the_adapter(place, trained):
    table = rows(trained)
    assert float(table[-1]["eval_loss"]) < float(table[0]["eval_loss"])
    assert table[-1]["broken_images"] == "0"  # the maps are not images
    assert not table[-1]["agreement"] and not table[-1]["eval_logits"]  # the encoder has no classes of its own
    student, teacher = load_student(trained), load_model(place / "vit")
    assert isinstance(student, DenseModel) and student.target == CLASSES
    adapter = GSPNAdapter.from_pretrained(trained / "last")
    assert adapter.config["prefix_tokens"] == 1 and list(adapter.mixers) == [f"blocks.{i}.attn" for i in range(6)]
    with torch.no_grad():
        for size in ((64, 64), (70, 101)):
            images = torch.randn(1, 3, *size)
            expected = teacher(images)
            with adapter.mounted(teacher.core.encoder.model):
                mounted = teacher(images)
            assert torch.equal(student(images), mounted) and not torch.allclose(mounted, expected)
    result = evaluate(student, data="folder", root=place / "sound", window=0, device="cpu")
    assert result.images == 2 and result.scores.pixels == 2 * 62 * 80


def test_the_encoder_is_what_the_decoder_is_given(place, tmp_path):
    config = tiny(place, tmp_path)
    teacher, base, former, dense = open_teacher(config)
    assert dense and not former
    assert base.pretrained_cfg["mean"] == CLASSES.normalization.mean
    images, whole = torch.randn(2, 3, 64, 64), load_model(place / "vit").core.encoder.model
    distiller = Distiller(teacher, base, build_adapter(config, sharing_copy(base)), config.distillation)
    with torch.no_grad():
        assert torch.equal(teacher.forward_features(images), whole.forward_features(images))
        parts = distiller(images)
        distiller.adapter.unmount()
        with distiller.adapter.mounted(whole):
            student = whole.forward_features(images)
    target = teacher.forward_features(images)
    error = (student - target).square().mean((1, 2)) / target.square().mean()
    assert parts.keys() == {"propagation", "blocks", "features"}
    torch.testing.assert_close(parts["features"], error)


def test_the_second_stage_at_a_larger_size(place, trained, tmp_path):
    keys = {"model.init_from": str(trained), "distillation.block_epochs": 0, "schedule.epochs": 1}
    distill(tiny(place, tmp_path / "two", **keys))
    keys |= {"model.init_from": str(tmp_path / "two"), "data.size": 128, "distillation.teacher_size": 64}
    distill(tiny(place, tmp_path / "large", **keys).changed(teacher=str(tmp_path / "two")))
    student = load_student(tmp_path / "large")
    assert student.target.size == 128
    assert student(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 128, 128)


def test_a_teacher_of_one_size(place, tmp_path):
    distill(tiny(place, tmp_path / "run", "fixed", **{"data.size": 128, "schedule.epochs": 1}))
    student = load_student(tmp_path / "run")
    assert student(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 128, 128)


def test_images_that_have_no_maps(place, tmp_path):
    shutil.copytree(place / "shapes" / "train" / "images", tmp_path / "loose")
    keys = {"data.root": str(tmp_path / "loose"), "data.train_split": "all", "data.eval_split": None,
            "schedule.epochs": 1}  # fmt: skip
    with pytest.raises(UsageError, match="data 'folder'"):
        distill(tiny(place, tmp_path / "run", **keys))
    assert distill(tiny(place, tmp_path / "run", **keys, **{"data.maps": False})).last is not None


def test_images_only(place):
    maps = open_maps("folder", "train", place / "shapes")
    images = ImagesOnly(maps)
    assert len(images) == 8 and images.classes == [] and images.identity() == maps.identity()
    image, target = images[3]
    assert target == 0 and image.size == (80, 64) and images.filename(3) == maps.filename(3)


def test_an_encoder_that_is_no_vision_transformer(place, tmp_path):
    with pytest.raises(UsageError, match=r"convnext.*: an adapter cannot be mounted on a"):
        distill(tiny(place, tmp_path, "convnext"))


def test_the_commands_take_the_run(place, trained, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})

    result = run("dense", "evaluate", trained, "--data", "folder", "--root", place / "sound", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"{trained}, " in result.output and "mIoU" in result.output
    image = place / "sound" / "val" / "images" / "0.png"
    result = run("dense", "predict", image, "--model", trained, "--output", tmp_path / "maps", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "maps" / "0.png").size == (80, 64)
    result = run("classify", "evaluate", trained, "--data", "emoji")
    assert result.exit_code == 2 and "use that command" in result.output
