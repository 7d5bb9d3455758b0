"""Evaluating images at their own sizes, in padded batches."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import gspn.models  # noqa: F401  (registers its models with timm)
from gspn._errors import UsageError
from gspn.cli import app
from gspn.data import load_image
from gspn.tasks.classify import evaluate
from gspn.tasks.classify.model import resolve_preprocessing

SIZES = [(20, 33), (48, 31), (29, 30), (64, 17), (33, 33)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    generator = torch.Generator().manual_seed(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        file = root / "val" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
    (root / "val" / "a" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("gspn_pico.untrained", num_classes=2).eval()


@torch.inference_mode()
def losses(model, folder, fit: str) -> float:
    transform = resolve_preprocessing(model).transform(fit)
    total = 0.0
    for i in range(len(SIZES)):
        image = transform(load_image(folder / "val" / "ab"[i % 2] / f"{i}.png"))
        total += F.cross_entropy(model(image[None]), torch.tensor([i % 2])).item()
    return total / len(SIZES)


@pytest.mark.parametrize("fit", ["native", "whole", "crop"])
def test_a_padded_batch_gives_what_each_image_gives_alone(model, folder, fit) -> None:
    for batch_size in (1, 4):
        found = evaluate(model, data="folder", root=folder, batch_size=batch_size, fit=fit)
        assert (found.images, found.fit, len(found.broken)) == (len(SIZES), fit, 1)
        assert found.loss == pytest.approx(losses(model, folder, fit), rel=1e-5)


def test_what_each_fit_does_with_an_image(model) -> None:
    preprocessing = resolve_preprocessing(model)
    image = Image.new("RGB", (60, 40))
    shapes = {fit: tuple(preprocessing.transform(fit)(image).shape) for fit in ("crop", "whole", "native")}
    assert shapes == {"crop": (3, 28, 28), "whole": (3, 28, 42), "native": (3, 40, 60)}
    # Not gigabytes: of what is far longer than wide, the middle.
    image = Image.new("RGB", (2, 60_000))
    shapes = {fit: tuple(preprocessing.transform(fit)(image).shape) for fit in ("whole", "native")}
    assert shapes == {"whole": (3, 448, 28), "native": (3, 32, 2)}


def test_other_models_are_refused(folder) -> None:
    with pytest.raises(UsageError, match="fit='native' pads images of several sizes, which VisionTransformer does not"):
        evaluate(timm.create_model("test_vit", num_classes=2), data="folder", root=folder, fit="native")


def test_the_command(folder, tmp_path) -> None:
    root = tmp_path / "digits"
    for i, (width, height) in enumerate(SIZES):
        (root / "val" / str(i)).mkdir(parents=True)
        Image.new("RGB", (width, height), (i * 50,) * 3).save(root / "val" / str(i) / "one.png")
    arguments = ["classify", "evaluate", "gspn_pico.mnist5k", "--data", "folder", "--root", str(root)]
    done = CliRunner().invoke(app, [*arguments, "--fit", "native", "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    assert "native, padded to the largest of a batch" in done.output
