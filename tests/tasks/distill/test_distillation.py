"""Distillation of a vision transformer into GSPN: what is compared, what is trained, and how runs continue."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.tasks.classify import ModelConfig, evaluate
from gspn.tasks.classify.model import Preprocessing, load_model, save_config, save_weights
from gspn.tasks.core.attention_matching import recorded, sharing_copy
from gspn.tasks.core.config import write_yaml
from gspn.tasks.distill import DistillConfig, distill, load_student
from gspn.tasks.distill.attention_matching import Distiller
from gspn.tasks.distill.config import DistillationConfig
from gspn.tasks.distill.initialization import fit_gates
from gspn.tasks.distill.student import resize
from gspn.timm import GSPNAdapter
from tasks.runs import assert_same, newest_state, rows, stopped_before

KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
CLASSES = ["blue", "red"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher with two classes, in ``teacher``, and a folder of images of each, in ``images``."""
    where = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **KWARGS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "blocks" in name:
                weight *= 4  # attention that is not uniform
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    other = timm.create_model("test_convnext", num_classes=2)
    for folder, one, name, kwargs in (
        ("teacher", model, "vit_tiny_patch16_224", KWARGS), ("convnext", other, "test_convnext", {}),
    ):  # fmt: skip
        save_config(where / folder, one, ModelConfig(name=name, kwargs=kwargs), preprocessing, CLASSES)
        save_weights(where / folder, one.state_dict(), {})
    noise = torch.randint(0, 255, (12, 20, 20, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for split, label, some in (("train", "blue", noise[:5]), ("train", "red", noise[5:8]), ("val", "blue", noise[8:])):
        folder = where / "images" / split / label
        folder.mkdir(parents=True)
        for number, one in enumerate(some):
            Image.fromarray(one.numpy()).save(folder / f"{number}.png")
    return where


def tiny(place, output, **keys) -> DistillConfig:
    return DistillConfig(teacher=str(place / "teacher")).changed(**{
        "data.name": "folder", "data.root": str(place / "images"), "data.eval_split": "val", "data.size": 16,
        "data.batch_size": 4, "data.workers": 0, "model.latent_dim": 4, "distillation.block_epochs": 1,
        "schedule.epochs": 3, "ema.decay": 0.9, "run.output": str(output), "run.trackers": [],
        "run.device": "cpu", **keys,
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(place):
    output = place / "run"
    distill(tiny(place, output))
    return output


def teacher_of(place):
    return load_model(place / "teacher")


def make(place, teacher_size=16, size=16, **options) -> Distiller:
    vit = teacher_of(place)
    base = sharing_copy(vit)
    resize(base, size)
    resize(vit, teacher_size)
    torch.manual_seed(3)
    return Distiller(vit, base, GSPNAdapter.from_model(base, **options), DistillationConfig())


def test_the_errors_are_those_of_both_run_by_hand(place):
    distiller, images = make(place, latent_dim=4, keep_attention=[0]), torch.randn(2, 3, 16, 16)
    parts = distiller(images)
    teacher, student = teacher_of(place), teacher_of(place)
    names = ["blocks.1", "blocks.2"]
    with torch.no_grad():
        with (
            recorded({name: teacher.get_submodule(name) for name in names}) as whole,
            recorded({name: teacher.get_submodule(f"{name}.attn") for name in names}) as attended,
        ):
            target = teacher.forward_features(images)
        logits = teacher.forward_head(target)
        copy.deepcopy(distiller.adapter).mount(student)
        with (
            recorded({name: student.get_submodule(name) for name in names}) as blocks,
            recorded({name: student.get_submodule(f"{name}.attn") for name in names}) as mixed,
        ):
            last = student.forward_features(images)
        own = student.forward_head(last)

    def relative(actual, expected):
        return (actual - expected).square().mean((1, 2)) / expected.square().mean()

    for part, ours, theirs in (("propagation", mixed, attended), ("blocks", blocks, whole)):
        layers = [relative(ours[name][1], theirs[name][1]) for name in names]
        torch.testing.assert_close(parts[part], torch.stack(layers).mean(0))
    torch.testing.assert_close(parts["features"], relative(last, target))
    p, q = logits.softmax(-1), own.softmax(-1)
    torch.testing.assert_close(parts["logits"], (p * (p / q).log()).sum(-1))
    assert torch.equal(parts["predicted"], own.argmax(-1)) and torch.equal(
        parts["teacher_predicted"], logits.argmax(-1)
    )
    # The first stage: each mixer on the input of the teacher's attention.
    separate = distiller(images, blocks=True)
    mixers = distiller.adapter.mixers
    layers = [relative(mixers[f"{name}.attn"](attended[name][0], map_size=(4, 4)), attended[name][1]) for name in names]
    assert separate.keys() == {"propagation"}
    torch.testing.assert_close(separate["propagation"], torch.stack(layers).mean(0))


def test_the_adapter_alone_is_trained(place):
    distiller = make(place)
    assert {name.partition(".")[0] for name, _ in distiller.named_parameters()} == {"adapter"}
    assert not any(weight.requires_grad for weight in distiller.teacher.parameters())
    copied = copy.deepcopy(distiller)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(copied(images)["features"], distiller(images)["features"])
    with torch.no_grad():
        for weight in copied.adapter.parameters():
            weight.zero_()
    assert copied(images)["features"].mean() > distiller(images)["features"].mean()  # the original has its own
    assert copied.teacher is distiller.teacher


def test_a_smaller_teacher_is_enlarged(place):
    distiller = make(place, teacher_size=8, size=16)
    images = torch.randn(2, 3, 16, 16)
    small = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
    vit = teacher_of(place)
    resize(vit, 8)
    with torch.no_grad():
        expected = vit.forward_features(small)
        grid = F.interpolate(expected[:, 1:].transpose(1, 2).unflatten(2, (2, 2)), size=(4, 4), mode="bilinear")
        expected = torch.cat((expected[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)
        own = distiller.student.forward_features(images)
    error = (own - expected).square().mean((1, 2)) / expected.square().mean()
    torch.testing.assert_close(distiller(images)["features"], error)
    assert distiller(images, blocks=True)["propagation"].isfinite().all()


@pytest.mark.parametrize("latent_dim", [None, 6])
def test_fitted_gates_are_a_better_start(place, latent_dim):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    fitted, copied = make(place, latent_dim=latent_dim), make(place, latent_dim=latent_dim)
    explained = fit_gates(fitted, [images[:4], images[4:]])
    assert explained.keys() == fitted.adapter.mixers.keys() and all(0 < share <= 1 for share in explained.values())
    with torch.no_grad():
        errors = [one(images, blocks=True)["propagation"].mean() for one in (fitted, copied)]
    assert errors[0] < 0.8 * errors[1]
    for mixer in fitted.adapter.mixers.values():
        if latent_dim is not None:  # a projection onto the principal directions
            up, down = mixer.scan.up.weight[:, :, 0, 0], mixer.scan.down.weight[:, :, 0, 0]
            torch.testing.assert_close(down @ up, torch.eye(latent_dim), atol=1e-5, rtol=0)


def test_it_learns_and_writes(place, trained):
    table = rows(trained)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert all(float(row["eval_loss"]) > 0 for row in table)
    assert float(table[2]["eval_loss"]) < float(table[0]["eval_loss"])
    assert 0 <= float(table[2]["agreement"]) <= 100 and table[2]["teacher_top1"]
    student = load_student(trained)
    state = load_file(trained / "last" / "model.safetensors")
    mounted = student.state_dict()
    assert state and all(torch.equal(mounted[name], weight) for name, weight in state.items())
    result = evaluate(student, data="folder", root=place / "images", split="val")
    assert result.top1 == pytest.approx(float(table[2]["top1"]))
    # The commands take the run as the model.
    arguments = ["classify", "evaluate", str(trained), "--data", "folder", "--root", str(place / "images")]
    shown = CliRunner().invoke(app, [*arguments, "--output", str(trained / "tests")], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    written = json.loads((trained / "tests" / "evaluation.json").read_text())
    assert written["top1"] == result.top1 and written["model"] == str(trained)


@pytest.mark.parametrize("update", [2, 4])
def test_stopped_and_resumed_is_the_same_run(place, trained, tmp_path, update):
    config = tiny(place, tmp_path / "run", **{"run.checkpoint_every_s": 0})
    with stopped_before(update):
        distill(config)
    distill(config, resume=True)
    assert_same(newest_state(config.run.output), newest_state(trained))
    assert rows(config.run.output) == rows(trained)


def test_a_former_student_teaches_at_a_larger_size(place, trained, tmp_path):
    keys = {"teacher": str(trained), "model.init_from": str(trained), "data.size": 32, "distillation.teacher_size": 16}
    config = tiny(place, tmp_path / "run", **keys, **{"schedule.epochs": 2})
    distill(config)
    student = load_student(config.run.output)
    assert student.patch_embed.grid_size == (8, 8)
    former, adapter = load_student(trained), GSPNAdapter.from_pretrained(config.run.output / "last")
    assert adapter.config["reference_lines"] == 4  # of the size that it was first trained at
    assert student(torch.zeros(1, 3, 32, 32)).shape == former(torch.zeros(1, 3, 16, 16)).shape


def test_images_without_labels(place, tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted((place / "images").rglob("*.png"))):
        (loose / f"{number}.png").write_bytes(file.read_bytes())
    keys = {"data.root": str(loose), "data.train_split": "all", "data.eval_split": "all", "schedule.epochs": 1}
    result = distill(tiny(place, tmp_path / "run", **keys))
    assert result.last is not None and result.last.agreement is not None and result.last.top1 is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": "convnext"}, "cannot be mounted on a ConvNeXt"),
        ({"data.size": 18}, "do not divide into patches"),
        ({"model.keep_attention": [7]}, "keep_attention has 7"),
        ({"model.init_from": "/nowhere"}, "has no config.json"),
        ({"data.sizes": [16, 32]}, "one size at a time"),
        ({"distillation.teacher_size": 32}, "more than data.size 16"),
        ({"distillation.block_epochs": 4}, "more than schedule.epochs 3"),
        ({"model.proxy_bias": False}, "constant gates need it"),
        ({"augment.mixup": 0.8}, "mix labels"),
        ({"run.fsdp": True, "ema.decay": None}, "FSDP"),
        ({f"distillation.{one}": 0 for one in ("propagation", "blocks", "features", "logits")}, "nothing is learnt"),
    ],
)
def test_what_cannot_be_met(place, tmp_path, keys, message):
    if "teacher" in keys:
        keys = {"teacher": str(place / keys["teacher"])}
    with pytest.raises(UsageError, match=message):
        distill(tiny(place, tmp_path / "run").changed(**keys))


def test_another_teacher_does_not_resume(place, trained, tmp_path):
    config = tiny(place, tmp_path / "run", **{"schedule.epochs": 1})
    distill(config)
    with pytest.raises(UsageError, match="teacher"):
        distill(config.changed(teacher=str(trained)), resume=True)
    with pytest.raises(UsageError, match="not the directory of a distillation run"):
        load_student(place / "teacher")


def test_a_run_that_names_itself_as_its_teacher(trained, tmp_path):
    for name, teacher in (("a", "b"), ("b", "a"), ("c", "c")):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        config = DistillConfig.load(trained / "config.yaml").changed(teacher=str(tmp_path / teacher))
        (tmp_path / name / "config.yaml").write_text(write_yaml(config))
    for name in "abc":
        with pytest.raises(UsageError, match="again"):
            load_student(tmp_path / name)


def test_presets():
    assert DistillConfig.preset_names()
    for name in DistillConfig.preset_names():
        assert DistillConfig.load(name).distillation.block_epochs > 0
