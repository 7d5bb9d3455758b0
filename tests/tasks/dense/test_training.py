"""Training: it learns classes and numbers, resumes to the same bits, and writes what segmentation-models loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import register_model

from gspn._errors import UsageError
from gspn.tasks.dense import DenseConfig, evaluate, train
from gspn.tasks.dense.data import class_weights, make_target, open_split
from gspn.tasks.dense.model import decoders, load_model, resolve_normalization
from gspn.tasks.dense.training import DensePrediction
from gspn.tasks.dense.transforms import Normalization
from tasks.dense.dense_runs import CLASSES, HALF, NUMBERS, tiny, tiny_model
from tasks.runs import assert_same, newest_state, rows, stopped_before

pytestmark = pytest.mark.slow


def test_it_learns_classes(finished):
    result, said = finished
    table = rows(result.output)
    assert [row["epoch"] for row in table] == [str(i) for i in range(1, 9)]
    assert float(table[-1]["miou"]) > 70, said
    assert result.best_score == pytest.approx(max(float(row["miou"]) for row in table if row["miou"]))
    assert [bool(row["miou"]) for row in table] == [i in (4, 8) for i in range(1, 9)]
    sample = Image.open(result.output / "samples" / "epoch-00008.png")
    assert sample.width > 3 * 80 and not (result.output / "samples" / "epoch-00007.png").exists()


def test_evaluation_agrees_with_training(finished, shapes):
    result, _ = finished
    best = evaluate(result.output, data="folder", root=shapes, window=0, device="cpu")
    assert best.scores.miou == pytest.approx(result.best_score, rel=1e-6)
    assert (best.images, best.classes) == (4, tuple(CLASSES.classes))
    assert best.scores.pixels == 4 * 62 * 80  # two rows are ignored
    near, far = best.scores.by_distance["1"], best.scores.by_distance["over 32"]
    assert near < best.scores.accuracy < far
    assert best.worst_classes(1)[0][1] == min(best.scores.iou)
    windows = evaluate(result.output, data="folder", root=shapes, device="cpu")
    assert windows.window == 64 and windows.scores.miou > 0.8 * best.scores.miou
    with pytest.raises(UsageError, match="the model has the classes 'ground', 'disc', 'square', and data"):
        evaluate(result.output, data="folder", root=shapes, options={"classes": ["a", "b", "c"]})
    with pytest.raises(UsageError, match="evaluate it on data like those"):
        evaluate(result.output, data="folder", root=shapes, options={"unit": "m"})


def test_segmentation_models_loads_what_it_writes(finished):
    result, _ = finished
    ours = load_model(result.output)
    theirs = smp.from_pretrained(str(result.output / "best")).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))
    with safe_open(result.output / "best" / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["gspn"])
    assert header == {"epoch": result.best_epoch, "weights": "ema", "miou": pytest.approx(result.best_score)}


def test_it_learns_numbers(shapes, tmp_path):
    result = train(tiny(shapes, tmp_path, "schedule.epochs=6", "data.options.labels=depth", "data.options.unit=m",
                        "data.options.ignore=null"))  # fmt: skip
    assert result.last.mae < 12 and result.last.abs_rel < 0.15 and result.last.miou is None
    target = load_model(tmp_path).target
    assert target.unit == "m" and 95 < target.mean < 110
    assert result.best_score == pytest.approx(100 / (1 + min(float(r["mae"]) for r in rows(tmp_path)) / target.std))


def test_stopped_and_resumed_is_the_same_run(shapes, tmp_path):
    settings = ["ema.decay=0.9", "run.checkpoint_every_s=0", "model.drop_path=0.1", "data.sizes=[32, 64]",
                "loss.class_weights=balanced", "optim.label_smoothing=0.1"]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny(shapes, whole, *settings))
    with stopped_before(9):
        train(tiny(shapes, stopped, *settings, "data.workers=1"))
    train(tiny(shapes, stopped, *settings), resume=True)
    assert_same(newest_state(stopped), newest_state(whole))
    assert rows(stopped) == rows(whole)
    for name in ("best", "last"):
        for file in ("model.safetensors", "config.json", "dense.json"):
            assert (stopped / name / file).read_bytes() == (whole / name / file).read_bytes()


def test_a_corrupt_map_is_passed_over_and_counted(shapes, tmp_path):
    root = tmp_path / "shapes"
    import shutil

    shutil.copytree(shapes, root)
    Image.fromarray(np.full((64, 80), 9, np.uint8)).save(root / "train" / "labels" / "5.png")
    Image.fromarray(np.zeros((64, 79), np.uint8)).save(root / "val" / "labels" / "1.png")
    result = train(tiny(root, tmp_path / "run", "schedule.epochs=1"))
    assert result.broken == ("5.png",) and result.last.broken_images == 1
    evaluation = evaluate(tmp_path / "run" / "last", data="folder", root=root, device="cpu")
    assert evaluation.broken == ("1.png",) and evaluation.scores.pixels == 3 * 62 * 80


def test_the_loss_is_the_mean_over_what_is_labelled():
    task = DensePrediction(DenseConfig())
    task.target, task.weights = CLASSES, torch.tensor([1.0, 2.0, 0.5])
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    labels = torch.randint(3, (2, 5, 4))
    maps = labels.float()
    maps[0, :2] = torch.nan
    samples = torch.cat([torch.zeros(2, 3, 5, 4), maps[:, None]], 1)
    loss = task.loss(lambda images: logits, samples, None, 0)
    expected = F.cross_entropy(logits, labels.masked_fill(maps.isnan(), -100), task.weights)
    torch.testing.assert_close(loss, expected)
    task.target, task.weights = NUMBERS, None
    outputs = torch.randn(2, 1, 5, 4)
    loss = task.loss(lambda images: outputs, samples, None, 0)
    error = ((outputs[:, 0] * 20 + 100) - maps).abs() / 20
    torch.testing.assert_close(loss, error[~maps.isnan()].mean())
    samples[:, 3] = torch.nan
    assert task.loss(lambda images: outputs, samples, None, 0) == 0


def test_balanced_weights(shapes, tmp_path):
    dataset = open_split("folder", "train", shapes)
    weights = class_weights(tiny(shapes, tmp_path, "loss.class_weights=balanced"), dataset)
    counts = np.zeros(3)
    for i in range(len(dataset)):
        values = dataset.map(i)
        counts += [(values == k).sum() for k in range(3)]
    share = counts / counts.sum()
    assert (weights.numpy() * np.sqrt(share)).std() < 1e-3  # the inverse square roots
    assert float((weights.numpy() * share).sum()) == pytest.approx(1, rel=1e-3)
    with pytest.raises(UsageError, match="of 2 weights; there are 3 classes"):
        class_weights(tiny(shapes, tmp_path, "loss.class_weights=[1, 2]"), dataset)
    numbers = open_split("folder", "train", shapes, labels="depth", unit="m", ignore=None)
    with pytest.raises(UsageError, match="the maps hold numbers"):
        class_weights(tiny(shapes, tmp_path, "loss.class_weights=balanced"), numbers)
    target = make_target(numbers, HALF, 64)
    every = np.concatenate([numbers.map(i).ravel() for i in range(len(numbers))])
    assert target.mean == pytest.approx(every.mean(), rel=1e-4) and target.std == pytest.approx(every.std(), rel=1e-4)


def test_an_encoder_that_was_registered_without_a_normalisation():
    @register_model
    def plain_convnext(pretrained=False, **kwargs):
        return timm.create_model("test_convnext", **kwargs)

    config = DenseConfig().changed("model.name=plain_convnext", "data.std=[0.5, 0.5, 0.5]")
    assert resolve_normalization(config.model, config.data) == Normalization(IMAGENET_DEFAULT_MEAN, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=tset_convnext", "did you mean 'test_convnext'"),
        ("model.decoder=Unet3", "did you mean 'Unet'"),
        ("model.name=test_vit", "a plain vision transformer takes model.decoder=DPT"),
        ("model.decoder=DeepLabV3", "does not take these arguments"),
        ("model.kwargs.no_such=1", "no_such"),
        ("model.decoder_kwargs={classes: 7}", "classes, which follows from other keys"),
        ("model.decoder_kwargs={upsampling: 2}", "makes 32 x 32 pixels of 64 x 64; set upsampling"),
        ("data.options.images=photographs", "no folder train/photographs"),
        ("data.options.classes=[a, b]", "value 2 in row|are corrupt"),
        ("loss.class_weights=[0, 0, 0]", "no weight above 0"),
        ("augment.scale=[2, 1]", "has to be the smaller one"),
        ("data.name=earth", "holds no Earth; build it with: gspn dense earth"),
        ("run.fsdp=true", "torchrun"),
    ],
)
def test_errors_name_the_value_and_the_remedy(shapes, tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(shapes, tmp_path / "out", "schedule.epochs=1", "data.batch_size=48", override))


@pytest.mark.parametrize(
    ("name", "decoder", "kwargs"),
    [
        ("gspn_tiny", "FPN", {"dims": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}),
        ("gspn_pico", "Unet", {"dims": [8, 12, 16], "depths": [1, 1, 1]}),
        ("test_vit", "DPT", {"dynamic_img_size": True}),
        ("test_resnet", "Unet", {}),
        ("swin_tiny_patch4_window7_224", "FPN",
         {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4,
          "strict_img_size": False, "always_partition": True}),
    ],
)  # fmt: skip
def test_encoders_of_all_kinds_take_any_size(name, decoder, kwargs):
    options = {"decoder_readout": "ignore", "decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8,
               }  # fmt: skip
    overrides = {"model.name": name, "model.decoder": decoder, "model.kwargs": kwargs}
    overrides |= {"model.decoder_kwargs": options} if decoder == "DPT" else {}
    overrides |= {"model.decoder_kwargs": {}} if decoder == "Unet" else {}
    from gspn.tasks.dense.model import build_model
    from tasks.dense.dense_runs import TINY

    model = build_model(DenseConfig.from_values(TINY).changed(**overrides).model, CLASSES).eval()
    with torch.no_grad():
        for size in ((64, 64), (70, 101)):
            outputs = model(torch.randn(1, 3, *size))
            assert outputs.shape == (1, 3, *size) and outputs.isfinite().all()


def damage(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    target = json.loads((folder / "dense.json").read_text())
    if kind == "weights":
        data = bytearray((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        return
    if kind == "nan":
        save_file({k: torch.full_like(v, torch.nan) if v.is_floating_point() else v
                   for k, v in _tensors(folder).items()}, folder / "model.safetensors")  # fmt: skip
        return
    if kind == "other":
        save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
        return
    changes = {
        "class": ({"_model_class": "os.system"}, {}),
        "encoder": ({"encoder_name": "resnet18"}, {}),
        "unknown": ({"encoder_name": "tu-resnet181"}, {}),
        "download": ({"encoder_weights": "imagenet"}, {}),
        "option": ({"checkpoint_path": "/etc/passwd"}, {}),
        "huge": ({"decoder_pyramid_channels": 1 << 40}, {}),
        "large": ({"decoder_pyramid_channels": 32 * 1024}, {}),
        "classes": ({"classes": 5}, {}),
        "names": ({}, {"classes": "abc"}),
        "colours": ({}, {"colours": [[0, 0, 999]] * 3}),
        "count": ({}, {"colours": [[0, 0, 0]]}),
        "std": ({}, {"normalization": {"mean": [0, 0, 0], "std": [1, 0, 1]}}),
        "size": ({}, {"size": -1}),
        "key": ({}, {"surprise": 1}),
        "both": ({}, {"unit": "m"}),
    }[kind]
    (folder / "config.json").write_text(json.dumps({**config, **changes[0]}))
    (folder / "dense.json").write_text(json.dumps({**target, **changes[1]}))


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", "safetensors"), ("nan", "not finite"), ("other", "correct it"),
        ("class", "_model_class is 'os.system'"), ("encoder", "has to be tu-"), ("unknown", "unknown model"),
        ("download", "have to be null"), ("option", "checkpoint_path, an option of timm"), ("huge", "correct it"),
        ("large", "belongs to another model"), ("classes", "classes is 5"), ("names", "classes is 'abc'"),
        ("colours", "between 0 and 255"), ("count", "1 colours"), ("std", "above 0"), ("size", "size is -1"),
        ("key", "surprise"), ("both", "3 classes"),
    ],
)  # fmt: skip
def test_damaged_models_are_refused_in_one_line(finished, tmp_path, kind, message):
    folder = tmp_path / "model"
    shutil.copytree(finished[0].output / "best", folder)
    damage(folder, kind)
    with pytest.raises(UsageError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_nothing_is_downloaded_where_the_configuration_leaves_it_open(finished, tmp_path):
    folder = shutil.copytree(finished[0].output / "best", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["encoder_weights"]  # the constructor's default is ImageNet's
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).arguments["encoder_weights"] is None


def test_no_model():
    with pytest.raises(UsageError, match="gspn dense train"):
        load_model("nowhere")
    assert {"FPN", "Unet", "DPT"} <= decoders().keys()
    assert tiny_model().target is CLASSES


def test_presets_are_complete():
    pytest.importorskip("gspn.models")
    assert "earth_climate" in DenseConfig.preset_names()
    for name in DenseConfig.preset_names():
        config = DenseConfig.load(name)
        assert config.run.output.name == name
