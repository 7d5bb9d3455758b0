"""Damaged files of every kind that a person or a run brings, through the functions that read them."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save
from timm.models import save_for_hf

import gspn.diffusers
from gspn._errors import UsageError
from gspn.data import CorruptImageError, open_captions, open_dataset, open_maps
from gspn.tasks.autoencode import AutoencodeConfig
from gspn.tasks.class_conditional import ClassConditionalConfig, load_pipeline, open_latents
from gspn.tasks.class_conditional.sampling import SampleRecord
from gspn.tasks.classify import TrainConfig
from gspn.tasks.classify.model import load_model
from gspn.tasks.core.checkpoints import CheckpointStore, Training
from gspn.tasks.core.sections import Configuration
from gspn.tasks.dense import DenseConfig
from gspn.tasks.dense.config import ModelConfig
from gspn.tasks.dense.model import Target as MapTarget
from gspn.tasks.dense.model import build_model, save_model
from gspn.tasks.dense.model import load_model as load_dense
from gspn.tasks.dense.transforms import Normalization
from gspn.tasks.diffusion.images import open_images, read_record, save_png
from gspn.tasks.diffusion.latents import ImagesRecord, LatentIndex, VaeRecord
from gspn.tasks.diffusion.shard_cache import Shard, write_json
from gspn.tasks.distill import DistillConfig as VitDistillConfig
from gspn.tasks.text_to_image.distill.config import DistillConfig
from gspn.tasks.text_to_image.pipelines import load_adapter
from gspn.tasks.text_to_image.sample.stage_runner import read_settings
from gspn.tasks.text_to_image.train.config import TextToImageConfig
from gspn.timm import GSPNAdapter

from .mutate import damaged_file
from .runner import Input, Target

Files = dict[str, Any]
"""Names and bytes; a kind of special file in place of bytes."""

SPECIAL = ("pipe", "folder", "link to nothing", "link to itself", "link to /dev/zero", "empty")
CONFIGURATIONS: dict[str, type[Configuration]] = {
    "TrainConfig": TrainConfig, "ClassConditionalConfig": ClassConditionalConfig, "AutoencodeConfig": AutoencodeConfig,
    "DistillConfig": DistillConfig, "TextToImageConfig": TextToImageConfig, "DenseConfig": DenseConfig,
    "VitDistillConfig": VitDistillConfig,
}  # fmt: skip


def file_target(
    name: str, sound: Callable[[], Files], read: Callable[[Path], object], quick: int, *, library: bool = False,
    alone: bool = False,
) -> Target:  # fmt: skip
    """A target whose inputs are the files of ``sound`` with damage to one of them, which is ``alone`` or not.

    ``read`` has a result, or raises ``UsageError`` or ``OSError``; with ``library`` also ``ValueError`` itself.
    """
    sound = functools.cache(sound)

    def make(rng: Random) -> Input:
        files = dict(sound())
        chosen = rng.choice(list(files))
        if alone:
            files = {chosen: files[chosen]}
        if rng.random() < 0.06:
            files[chosen] = {"special": rng.choice(SPECIAL)}
        else:
            files[chosen] = damaged_file(rng, chosen, files[chosen])
        return files

    def check(files: Input) -> None:
        with written(files) as folder, contextlib.chdir(folder):
            with refusals(library=library):
                read(folder)
            assert not Path("executed").exists(), "a file of the input was executed"

    return Target(name, make, check, quick)


@contextlib.contextmanager
def refusals(*, library: bool) -> Iterator[None]:
    """Let the errors pass that a user may see."""
    try:
        yield
    except (UsageError, CorruptImageError, OSError):
        pass
    except ValueError as error:
        if not library or type(error) is not ValueError:
            raise


@contextlib.contextmanager
def written(files: Files) -> Iterator[Path]:
    """The files in a folder, for a while."""
    with tempfile.TemporaryDirectory(prefix="gspn-fuzz-") as name:
        folder = Path(name)
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                _make_special(path, content["special"])
        yield folder


def _make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    else:
        path.symlink_to({"link to nothing": "nothing", "link to itself": path.name}.get(kind, "/dev/zero"))


def _content(folder: Path) -> Files:
    """The files below a folder that are read, with the numbers of their tensors left out: a case is to be small."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                header = 8 + int.from_bytes(data[:8], "little")
                data = data[:header] + bytes(len(data) - header)
            files[path.relative_to(folder).as_posix()] = data
    return files


# --- Configurations ---------------------------------------------------------------------------------------------------


def _presets() -> Files:
    return {
        f"{kind_name}-{name}.yaml": yaml.safe_dump(yaml.safe_load(kind.preset_text(name))).encode()
        for kind_name, kind in CONFIGURATIONS.items()
        for name in kind.preset_names()
    }


def _read_presets(folder: Path) -> None:
    for path in folder.iterdir():
        kind = CONFIGURATIONS[path.name.partition("-")[0]]
        assert kind.load(path).changed() == kind.load(path)


# --- Models -----------------------------------------------------------------------------------------------------------


def classifier() -> Files:
    """A classifier of three classes, as timm saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model("test_vit", num_classes=3)
        save_for_hf(model, folder, model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
        return _content(Path(folder))


def _read_classifier(folder: Path) -> None:
    with torch.inference_mode():
        assert load_model(folder)(torch.zeros(1, 3, 160, 160)).ndim == 2


def _read_pipeline(folder: Path) -> None:
    pipeline = load_pipeline(folder)
    assert pipeline.num_classes >= 0


def _read_adapter(folder: Path) -> None:
    assert load_adapter(folder).config is not None


def _vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def _vit_adapter() -> Files:
    with tempfile.TemporaryDirectory() as name:
        GSPNAdapter.from_model(_vit(), latent_dim=8).save_pretrained(Path(name) / "adapter")
        return _content(Path(name) / "adapter")


def _read_vit_adapter(folder: Path) -> None:
    adapter, vit = GSPNAdapter.from_pretrained(folder), _vit()
    with contextlib.suppress(ValueError), adapter.mounted(vit), torch.inference_mode():  # it may be of another model
        assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def _dense_model() -> Files:
    with tempfile.TemporaryDirectory() as name:
        half = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        target = MapTarget(["a", "b"], [(0, 0, 0), (255, 0, 0)], None, 0.0, 1.0, half, 64)
        decoder: dict[str, Any] = {"decoder_channels": [16, 8, 8, 8, 4]}
        config = ModelConfig(name="test_resnet", decoder="Unet", decoder_kwargs=decoder)
        model = build_model(config, target)
        save_model(Path(name), model, model.state_dict(), {})
        return _content(Path(name))


def _read_dense_model(folder: Path) -> None:
    assert load_dense(folder).target.outputs >= 1


# --- What runs write --------------------------------------------------------------------------------------------------


def _latents() -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = []
        for number, rows in enumerate((4, 2)):
            tensors = {part: torch.zeros(rows, 1, 4, 2, 2).half() for part in ("mean", "std")}
            data = save(tensors | {"label": torch.zeros(rows).long(), "index": torch.arange(rows)})
            (folder / f"latents-{number:05d}.safetensors").write_bytes(data)
            shards.append(Shard(f"latents-{number:05d}.safetensors", rows, "0" * 64, len(data), "float16"))
        index = LatentIndex(
            rows=6, shard_size=4, shards=shards, vae=VaeRecord("vae", "0" * 64, {"latent_channels": 4}), hflip=False,
            data=ImagesRecord("digits", "train", {}, "0" * 64, ["a", "b"], 16), precision="fp32", shape=(4, 2, 2),
        )  # fmt: skip
        write_json(folder / "index.json", index)
        return _content(folder)


def _read_latents(folder: Path) -> None:
    latents = open_latents(folder)
    for i in range(len(latents)):
        posterior, label = latents[i]
        assert posterior.shape == (8, 2, 2) or posterior.ndim == 3
        assert latents.filename(i) and label >= 0


def _records() -> Files:
    with tempfile.TemporaryDirectory() as name:
        record = SampleRecord(
            index=0,
            seed=1,
            height=5,
            width=6,
            steps=2,
            guidance=3.0,
            scheduler="DDIMScheduler",
            label=1,
            class_name="one",
            model="m",
        )
        save_png(record.path(Path(name)), Image.new("RGB", (6, 5), "red"), record)
        return {"00000.png": record.path(Path(name)).read_bytes()}


def _read_records(folder: Path) -> None:
    assert isinstance(read_record(folder / "00000.png"), dict)
    assert len(open_images(folder).labels) == 1


def _archive() -> Files:
    file = io.BytesIO()
    np.savez(file, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.arange(2))
    return {"images.npz": file.getvalue()}


def _read_archive(folder: Path) -> None:
    images = open_images(folder / "images.npz")
    assert images.pixels.dtype == torch.uint8 and len(images.labels) == len(images)


@functools.cache
def _training() -> Training:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Training(accelerator, model, optimizer)


def _checkpoint() -> Files:
    with tempfile.TemporaryDirectory() as name:
        CheckpointStore(Path(name)).save(_training(), 9, {"epoch": 1, "step": 9})
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in Path(name).rglob("*.*")}


def _old_checkpoint() -> Files:
    """As accelerate writes it, with the sizes that version 0.1.0 added."""
    with tempfile.TemporaryDirectory() as name:
        training, folder = _training(), Path(name) / "step-000000009"
        training.accelerator.save_state(str(folder))
        torch.save({"average": torch.zeros(2)}, folder / "custom_checkpoint_0.pkl")
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "state.json").write_text(json.dumps({"state": {"step": 9}, "sizes": sizes}))
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in folder.iterdir()}


def _read_checkpoint(folder: Path) -> None:
    state, lines = CheckpointStore(folder).load_newest(_training())
    assert isinstance(state, dict) and not lines


def _settings() -> Files:
    return {"stages/settings.json": json.dumps({"prompts": ["a"], "seed": 0, "size": [8, 8]}).encode()}


def _read_settings(folder: Path) -> None:
    assert isinstance(read_settings(folder), dict | None)


# --- Data sets --------------------------------------------------------------------------------------------------------


def png(colour: str = "red") -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), colour).save(file, "PNG")
    return file.getvalue()


def _lines() -> Files:
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": "x/1.png", "text": ["b", "c"]}]
    return {"0.png": png(), "x/1.png": png("blue"), "metadata.jsonl": b"\n".join(json.dumps(r).encode() for r in rows)}


def _table() -> Files:
    text = io.StringIO()
    csv.writer(text).writerows([["file_name", "text"], ["0.png", "a, b"], ["x/1.png", 'a "c"']])
    return {"0.png": png(), "x/1.png": png("blue"), "metadata.csv": text.getvalue().encode()}


def _beside() -> Files:
    return {"0.png": png(), "0.txt": "a\n\né".encode(), "x/1.png": png("blue"), "x/1.txt": b"b"}


def _shards() -> Files:
    files: Files = {}
    for number in range(2):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number]) as archive:
            record = json.dumps({"text": "a"}).encode()
            for name, content in (
                ("a.png", png()),
                ("a.txt", b"a"),
                ("é" * 60 + ".png", png()),
                ("é" * 60 + ".json", record),
            ):
                info = tarfile.TarInfo(f"x/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        files[f"{number}.tar"] = data.getvalue()
    return files


def _captions(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        images = open_captions(name, "all", folder)
        for i in range(len(images)):
            assert images.captions(i) and images.filename(i)
            with contextlib.suppress(CorruptImageError):
                assert images[i][0].mode == "RGB"

    return read


def _classes() -> Files:
    return {"a/0.png": png(), "b/1.png": png("blue"), "packed.tar": _packed()}


def _packed() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in ("a/0.png", "b/1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
    return data.getvalue()


def _read_classes(folder: Path) -> None:
    for root in (folder, folder / "packed.tar"):
        images = open_dataset("folder", "all", root, search_split=False)
        for i in range(len(images)):
            assert images.target(i) in range(len(images.classes)) and images.filename(i)
            with contextlib.suppress(CorruptImageError):
                assert images[i][0].mode == "RGB"


def _maps() -> Files:
    """Maps in each format, with values that are right as classes and as numbers."""
    values = np.arange(30, dtype=np.uint8).reshape(5, 6) % 3
    files: Files = {"classes.txt": b"a #ff0000\nb #00ff00\nc #0000ff\n"}
    for number, (ending, form, kind) in enumerate((
        ("png", "PNG", np.uint8), ("png", "PNG", np.uint16), ("tif", "TIFF", np.float32), ("tif", "TIFF", np.int32),
        ("bmp", "BMP", np.uint8), ("pgm", "PPM", np.uint8), ("npy", "", np.int64), ("npy", "", np.float16),
    )):  # fmt: skip
        file = io.BytesIO()
        if form:
            Image.fromarray(values.astype(kind)).save(file, form)
        else:
            np.save(file, np.asfortranarray(values.astype(kind)))
        files[f"labels/{number}.{ending}"] = file.getvalue()
        files[f"images/{number}.png"] = png()
    return files


def _read_maps(folder: Path) -> None:
    for options in ({}, {"unit": "m", "scale": 0.5}):
        images = open_maps("folder", "all", folder, **options)
        for i in range(len(images)):
            with contextlib.suppress(CorruptImageError):
                image, values = images.sample(i)
                assert image.mode == "RGB" and values.dtype == np.float32 and values.shape == image.size[::-1]
                assert not np.isinf(values).any() and (options or not (values[~np.isnan(values)] % 1).any())
            images.filename(i)


_WEIGHTS = Path(gspn.diffusers.__file__).parent / "weights"
SOUND: dict[str, tuple[Callable[[], Files], Callable[[Path], object], int, bool]] = {
    "classifier": (classifier, _read_classifier, 10, False),
    "pipeline": (lambda: _content(_WEIGHTS / "gspn_denoiser.mnist5k"), _read_pipeline, 3, False),
    "adapter": (lambda: _content(_WEIGHTS / "gspn_adapter.emoji"), _read_adapter, 3, False),
    "vit-adapter": (_vit_adapter, _read_vit_adapter, 20, False),
    "dense-model": (_dense_model, _read_dense_model, 5, False),
    "latents": (_latents, _read_latents, 40, False),
    "records": (_records, _read_records, 60, False),
    "archive": (_archive, _read_archive, 60, False),
    "checkpoint": (_checkpoint, _read_checkpoint, 60, False),
    "old-checkpoint": (_old_checkpoint, _read_checkpoint, 60, False),
    "settings": (_settings, _read_settings, 30, False),
    "metadata-lines": (_lines, _captions("folder"), 60, True),
    "metadata-table": (_table, _captions("folder"), 60, True),
    "captions-beside": (_beside, _captions("folder"), 40, True),
    "shards": (_shards, _captions("wds"), 60, True),
    "classes": (_classes, _read_classes, 30, True),
    "maps": (_maps, _read_maps, 60, True),
}
TARGETS = [
    file_target("presets", _presets, _read_presets, 40, alone=True),
    *(file_target(name, sound, read, quick, library=library) for name, (sound, read, quick, library) in SOUND.items()),
]
