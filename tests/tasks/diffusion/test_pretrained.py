"""Damaged and foreign directories of weights: each is refused in one line, and nothing of it is built or executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_support import make_pixart
from gspn._errors import UsageError
from gspn.diffusers import ClassConditionalPipeline, GSPNAdapter, GSPNDenoiser2DModel
from gspn.tasks.class_conditional.model import load_pipeline
from gspn.tasks.diffusion.autoencoder import load_autoencoder
from gspn.tasks.text_to_image.pipelines import load_adapter
from gspn.tasks.text_to_image.pipelines import load_pipeline as load_text_to_image
from tasks.text_to_image.t2i_support import make_sd

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of each kind."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = GSPNDenoiser2DModel(in_channels=4, dim=8, num_layers=2, num_class_embeds=2, sample_size=4)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    ClassConditionalPipeline(model, DDIMScheduler(), vae, {0: "cat", 1: "dog"}).save_pretrained(root / "classes")
    make_sd(root).save_pretrained(root / "text")
    GSPNAdapter.from_model(make_pixart(num_layers=1)).save_pretrained(root / "adapter")
    vae.save_pretrained(root / "vae")
    return root


LOADERS = {"classes": load_pipeline, "text": load_text_to_image, "adapter": load_adapter, "vae": load_autoencoder}
MODELS = {"classes": ["transformer", "vae"], "text": ["unet", "vae", "text_encoder"], "adapter": [""], "vae": [""]}


def refused(saved, tmp_path, kind, file, content):
    """The one line that a loader says about a copy in which one file is replaced, or removed."""
    folder = tmp_path / kind
    shutil.copytree(saved / kind, folder)
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, dict):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **content}))
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        LOADERS[kind](folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and "\x1b" not in message
    return message


@pytest.mark.parametrize("kind", LOADERS)
def test_whole_directories_load(saved, kind):
    assert LOADERS[kind](saved / kind) is not None


BYTES = {
    "missing": None, "empty": b"", "list": b"[]", "text": b'"x"', "null": b"null", "cut": b'{"_class_name": "',
    "latin-1": b'"\xe9"', "deep": b"[" * 100_000, "digits": b'{"layers": ' + b"9" * 9000 + b"}", "no class": b"{}",
    "escape": b'{"_class_name": "\\u001b[31m"}',
}  # fmt: skip


@pytest.mark.parametrize("damage", BYTES)
@pytest.mark.parametrize(
    ("kind", "file"),
    [("classes", "model_index.json"), ("text", "model_index.json"), ("classes", "scheduler/scheduler_config.json"),
     ("classes", "transformer/config.json"), ("text", "unet/config.json"), ("adapter", "config.json"),
     ("vae", "config.json")],
)  # fmt: skip
def test_damaged_json(saved, tmp_path, kind, file, damage):
    if damage in ("no class", "escape") and file == "scheduler/scheduler_config.json":
        pytest.skip("a scheduler has a default for everything")
    refused(saved, tmp_path, kind, file, BYTES[damage])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "other shapes", "fewer", "pickle"])
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in MODELS.items() for part in parts])
def test_damaged_weights(saved, tmp_path, kind, part, damage):
    name = "model.safetensors" if part == "text_encoder" else WEIGHTS
    file = str(Path(part, name))
    whole = (saved / kind / file).read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff" * 100}.get(damage)
    if damage in ("other shapes", "fewer"):
        tensors = load_file(saved / kind / file)
        name = next(name for name, one in tensors.items() if one.ndim > 1)
        changed = {name: torch.zeros(3, 5)} if damage == "other shapes" else {}
        tensors = {key: one for key, one in tensors.items() if key != name} | changed
        save_file(tensors, tmp_path / "changed", {"format": "pt"})
        content = (tmp_path / "changed").read_bytes()
    if damage == "pickle":
        shutil.copytree(saved / kind, tmp_path / "pickled")
        (tmp_path / "pickled" / file).unlink()
        ran = tmp_path / "ran"
        for pickled in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            (tmp_path / "pickled" / part / pickled).write_bytes(pickle.dumps(_Touch(ran)))
        with pytest.raises(UsageError, match="may execute code"):
            LOADERS[kind](tmp_path / "pickled")
        assert not ran.exists()
        return
    message = refused(saved, tmp_path, kind, file, content)
    if damage == "fewer":
        assert "has no weights for" in message


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("value", [10**9, -1, "16", 1.5, [], float("nan"), 10**400])
@pytest.mark.parametrize(
    ("kind", "file", "key"),
    [("classes", "transformer/config.json", key) for key in ("dim", "num_layers", "in_channels", "patch_size")]
    + [("text", "unet/config.json", "layers_per_block")]
    + [("vae", "config.json", "layers_per_block"), ("vae", "config.json", "block_out_channels")],
)  # fmt: skip
def test_values_that_no_model_has(saved, tmp_path, kind, file, key, value):
    refused(saved, tmp_path, kind, file, {key: value})


@pytest.mark.parametrize("name", ["attn1", "__class__.x", "a.\x1b[31m", "transformer_blocks.0.attn1.scan", "mixers"])
def test_layers_of_an_adapter_that_are_none(saved, tmp_path, name):
    layers = json.loads((saved / "adapter" / "config.json").read_text())["layers"]
    refused(saved, tmp_path, "adapter", "config.json", {"layers": {**layers, name: {"dim": 10**9}}})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, {part: entry})
        for kind, part in (("classes", "transformer"), ("classes", "scheduler"), ("text", "unet"),
                           ("text", "text_encoder"))
        for entry in (
            ["evil", "Model"], ["os", "system"], ["transformers", "AutoModel"], ["diffusers", "NoSuchModel"],
            ["..", "x"], ["diffusers", "__init__"], ["diffusers"], [1, 2], [["diffusers"], "x"], ["\x1b[31m", "x"],
        )
    ]
    + [("classes", {"_class_name": ["evil", "Pipeline"]}), ("classes", {"_class_name": "FluxPipeline"}),
       ("classes", {"id2label": []}), ("classes", {"latent_scale": "x"}), ("text", {"_class_name": {}})],
)  # fmt: skip
def test_classes_from_elsewhere(saved, tmp_path, monkeypatch, kind, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    for part in MODELS[kind]:  # what diffusers takes for code of a component's own
        shutil.copy(tmp_path / "evil.py", saved / kind / part / "evil.py")
    refused(saved, tmp_path, kind, "model_index.json", change)
    assert not (tmp_path / "ran").exists()


def test_a_component_of_another_model(saved, tmp_path):
    AutoencoderKL(block_out_channels=(8,), latent_channels=16, norm_num_groups=4).save_pretrained(tmp_path / "vae")
    shutil.copytree(saved / "classes", tmp_path / "classes")
    shutil.rmtree(tmp_path / "classes" / "vae")
    with pytest.raises(UsageError, match="has no directory vae"):
        load_pipeline(tmp_path / "classes")
    shutil.copytree(tmp_path / "vae", tmp_path / "classes" / "vae")
    with pytest.raises(UsageError, match="autoencoder has 16 channels and its denoiser 4"):
        load_pipeline(tmp_path / "classes")


def test_a_pipeline_of_diffusers(tmp_path):
    options = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "num_embeds_ada_norm": 3}
    model = DiTTransformer2DModel(in_channels=4, sample_size=8, **options)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).num_classes == 3


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", "owner/name/more", "\x1b[31m", "./nothing"])
@pytest.mark.parametrize("kind", LOADERS)
def test_names_of_nothing(kind, name):
    with pytest.raises(UsageError) as caught:
        LOADERS[kind](name)
    assert "\x1b" not in str(caught.value)
