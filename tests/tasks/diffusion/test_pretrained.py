"""Damaged and foreign directories of weights: each is refused in one line, and nothing of it is built or executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
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
    make_sd(root, factor=4).save_pretrained(root / "text")
    GSPNAdapter.from_model(make_pixart(num_layers=1)).save_pretrained(root / "adapter")
    vae.save_pretrained(root / "vae")
    return root


LOADERS = {"classes": load_pipeline, "text": load_text_to_image, "adapter": load_adapter, "vae": load_autoencoder}
MODELS = {"classes": ["transformer", "vae"], "text": ["unet", "vae", "text_encoder"], "adapter": [""], "vae": [""]}


def replace(folder, file, content):
    """Replace a file, or remove it; a dictionary changes values of the JSON in it."""
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / file).read_text()), **content}).encode()
    (folder / file).unlink(missing_ok=True)  # the copy has links to the files
    if content is not None:
        (folder / file).write_bytes(content)


def refused(saved, tmp_path, kind, *changes):
    """The one line that a loader says about a copy in which some files are replaced, or removed."""
    folder = tmp_path / kind
    shutil.copytree(saved / kind, folder, copy_function=os.link)
    for file, content in changes:
        replace(folder, file, content)
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
    refused(saved, tmp_path, kind, (file, BYTES[damage]))


DAMAGES = {
    "missing": "no weights in safetensors", "empty": "", "cut": "", "noise": "", "pickle": "", "other shapes": "",
    "fewer": "has no weights for", "not finite": "are not finite", "integers": "are I32, not torch.float32",
    "only pickle": "may execute code",
}  # fmt: skip
PARTS = [(kind, part) for kind, parts in MODELS.items() for part in parts]


def weights_of(part):
    return f"{part}/model.safetensors" if part == "text_encoder" else str(Path(part, WEIGHTS))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_damaged_weights(saved, tmp_path, kind, part, damage):
    file, ran = weights_of(part), tmp_path / "ran"
    whole, pickled = (saved / kind / file).read_bytes(), pickle.dumps(_Touch(ran))
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff" * 100, "pickle": pickled}.get(damage)
    if damage in ("other shapes", "fewer", "not finite", "integers"):
        tensors = load_file(saved / kind / file)
        name, tensor = next((name, one) for name, one in tensors.items() if one.ndim > 1)
        changed = {"other shapes": torch.zeros(3, 5), "not finite": tensor * float("nan"), "integers": tensor.int()}
        tensors |= {name: changed.get(damage, tensor)}
        if damage == "fewer":
            del tensors[name]
        save_file(tensors, tmp_path / "changed", {"format": "pt"})
        content = (tmp_path / "changed").read_bytes()
    others = ("diffusion_pytorch_model.bin", "pytorch_model.bin") if damage == "only pickle" else ()
    changes = [(str(Path(part, name)), pickled) for name in others]
    assert DAMAGES[damage] in refused(saved, tmp_path, kind, (file, content), *changes)
    assert not ran.exists()


@pytest.mark.parametrize(
    "names",
    ["../outside.safetensors", "{tmp}/outside.safetensors", "nothing.safetensors", "x.bin", ".", "a\0b", "\x1b[31m", 1],
    ids=repr,
)
@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_weights_that_an_index_names_elsewhere(saved, tmp_path, kind, part, names):
    file = weights_of(part)
    for outside in (tmp_path / kind / Path(part).parent, tmp_path):  # where "../" and an absolute name lead
        outside.mkdir(exist_ok=True, parents=True)
        shutil.copy(saved / kind / file, outside / "outside.safetensors")
    names = names.format(tmp=tmp_path) if isinstance(names, str) else names
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(saved / kind / file), names)}
    shutil.rmtree(tmp_path / kind)
    changes = [(f"{file}.index.json", json.dumps(index).encode()), (str(Path(part, "x.bin")), b"")]
    assert "does not name files of safetensors beside it" in refused(saved, tmp_path, kind, *changes)


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_weights_in_several_files(saved, tmp_path, kind, part):
    folder, file = tmp_path / kind, weights_of(part)
    shutil.copytree(saved / kind, folder)
    tensors = load_file(folder / file)
    (folder / file).unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        own = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        save_file(own, folder / part / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    assert LOADERS[kind](folder) is not None


@pytest.mark.parametrize(
    ("kind", "file"),
    [(kind, file) for kind, part in PARTS for file in (weights_of(part), str(Path(part, "config.json")))]
    + [
        ("classes", "model_index.json"),
        ("classes", "scheduler/scheduler_config.json"),
        ("text", "tokenizer/vocab.json"),
    ],
)
def test_pipes_hang_nothing(saved, tmp_path, kind, file):
    shutil.copytree(saved / kind, tmp_path / kind)
    (tmp_path / kind / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / kind / file)
    with pytest.raises(UsageError):
        LOADERS[kind](tmp_path / kind)


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
    refused(saved, tmp_path, kind, (file, {key: value}))


@pytest.mark.parametrize(
    ("kind", "file", "key", "value"),
    [("classes", "scheduler/scheduler_config.json", key, value) for key, value in (
        ("beta_start", -1.0), ("beta_end", 5.0), ("beta_start", float("nan")), ("beta_start", "0.1"),
        ("trained_betas", [2.0] * 10), ("trained_betas", []),
        ("num_train_timesteps", "1000"), ("num_train_timesteps", 10**12),
        ("set_alpha_to_one", "no"), ("clip_sample_range", "x"), ("thresholding", 1), ("prediction_type", 3),
    )]
    + [(kind, file, key, value) for kind, file in (("classes", "vae/config.json"), ("vae", "config.json"))
       for key, value in (("scaling_factor", 0), ("scaling_factor", float("inf")), ("scaling_factor", "x"),
                          ("shift_factor", "x"), ("latents_mean", ["x"]), ("quantization_config", {}))]
    + [("adapter", "config.json", "_class_name", "AutoencoderKL"), ("vae", "config.json", "_class_name", ["evil", "x"])]
    + [("text", "unet/config.json", "sample_size", value) for value in ("x", 0, [1, 2, 3])]
    + [("text", "text_encoder/config.json", "_attn_implementation", "evil/kernels"),
       ("text", "text_encoder/config.json", "attn_implementation", "evil/kernels"),
       ("classes", "model_index.json", "transformer", [None, None]),
       ("classes", "model_index.json", "scheduler", [None, None]), ("text", "model_index.json", "vae", [None, None])],
)  # fmt: skip
def test_values_that_would_fail_or_spoil_images_later(saved, tmp_path, kind, file, key, value):
    message = refused(saved, tmp_path, kind, (file, {key: value}))
    assert key in message or "levels of noise" in message or "supported are" in message


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_every_scheduler_that_diffusers_saves_is_read(saved, tmp_path, scheduler):
    shutil.copytree(saved / "classes", tmp_path / "classes")
    getattr(diffusers, scheduler)().save_pretrained(tmp_path / "classes" / "scheduler")  # with a limit at -Infinity
    replace(tmp_path / "classes", "model_index.json", {"scheduler": ["diffusers", scheduler]})
    assert type(load_pipeline(tmp_path / "classes").scheduler).__name__ == scheduler


def test_a_text_encoder_that_is_an_adapter_for_another(saved, tmp_path):
    config = b'{"base_model_name_or_path": "evil/base", "peft_type": "LORA", "target_modules": ["q_proj"]}'
    file = "text_encoder/adapter_config.json"
    assert "names another model" in refused(saved, tmp_path, "text", (file, config))


@pytest.mark.parametrize("error", [AttributeError, KeyError, RuntimeError, AssertionError])
@pytest.mark.parametrize(("kind", "cls"), [("classes", GSPNDenoiser2DModel), ("adapter", GSPNAdapter)])
def test_a_bug_in_a_model_of_ours_keeps_its_traceback(saved, monkeypatch, kind, cls, error):
    def fail(self, **options):
        raise error("a bug")

    monkeypatch.setattr(cls, "__init__", fail)
    with pytest.raises(error, match="a bug"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("name", ["attn1", "__class__.x", "a.\x1b[31m", "transformer_blocks.0.attn1.scan", "mixers"])
def test_layers_of_an_adapter_that_are_none(saved, tmp_path, name):
    layers = json.loads((saved / "adapter" / "config.json").read_text())["layers"]
    refused(saved, tmp_path, "adapter", ("config.json", {"layers": {**layers, name: {"dim": 10**9}}}))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, {part: entry})
        for kind, part in (("classes", "transformer"), ("classes", "scheduler"), ("text", "unet"),
                           ("text", "text_encoder"))
        for entry in (
            ["evil", "Model"], ["os", "system"], ["transformers", "AutoModel"], ["diffusers", "NoSuchModel"],
            ["..", "x"], ["gspn", "GSPNAdapter"], ["transformers", "CLIPTokenizer"],
            ["diffusers", "__init__"], ["diffusers"], [1, 2], [["diffusers"], "x"], ["\x1b[31m", "x"],
        )
    ]
    + [("classes", {"_class_name": ["evil", "Pipeline"]}), ("classes", {"_class_name": "FluxPipeline"}),
       ("classes", {"id2label": []}), ("classes", {"id2label": {"0": "a", "00": "b"}}),
       ("classes", {"latent_scale": "x"}), ("text", {"_class_name": {}})],
)  # fmt: skip
def test_classes_from_elsewhere(saved, tmp_path, monkeypatch, kind, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    code = (tmp_path / "evil.py").read_bytes()  # which diffusers takes for a component's own
    own = [(f"{part}/evil.py", code) for part in MODELS[kind]]
    refused(saved, tmp_path, kind, ("model_index.json", change), *own)
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


@pytest.mark.parametrize("kind", LOADERS)
def test_a_hub_that_cannot_be_reached_is_not_tried_for_half_a_minute(monkeypatch, capfd, kind):
    def fail(*address, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.create_connection", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match=r"'nobody/nothing' cannot be loaded: .*; check its name and the connection"):
        LOADERS[kind]("nobody/nothing")
    assert "Retrying" not in capfd.readouterr().err
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
