"""Training a UNet: from nothing and further, and the pipeline that comes of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gspn._errors import UsageError
from gspn.tasks.text_to_image.pipelines import load_pipeline
from gspn.tasks.text_to_image.sample import sample
from gspn.tasks.text_to_image.train import TextToImageConfig, train, training
from gspn.tasks.text_to_image.train.training import UNetTraining
from tasks.runs import assert_same, newest_state, rows, stopped_before
from tasks.text_to_image.t2i_runs import make_folder, tiny_train
from tasks.text_to_image.t2i_support import make_sd, make_vae


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An autoencoder, text encoders and a data set."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("unet")
    make_folder(place / "images")
    make_vae(4).save_pretrained(place / "vae")
    make_sd(place, factor=4).save_pretrained(place / "text")
    return place


@pytest.fixture(scope="module")
def trained(place):
    settings = ["schedule.epochs=30", "samples.every=30", "noise.objective=v_prediction"]
    return train(tiny_train(place / "vae", place / "text", place / "images", place / "run", *settings))


def test_it_learns_and_writes_a_pipeline(trained, place, tmp_path):
    table = rows(trained.output)
    assert float(table[-1]["train_loss"]) < 0.8 * float(table[0]["train_loss"])
    assert [path.name for path in (trained.output / "samples").iterdir()] == ["epoch-00030.png"]
    pipeline = load_pipeline(trained.output)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    state = newest_state(trained.output)
    average = {key.removeprefix("ema.module."): value for key, value in state.items() if key.startswith("ema.")}
    assert_same(pipeline.unet.state_dict(), average)
    assert sample(str(trained.output), ["red", "blue"], output=tmp_path / "drawn", steps=2, device="cpu").drawn == 2


def test_further_training_resumes_and_keeps_the_rest(trained, place, tmp_path):
    config = TextToImageConfig.from_values(
        {
            "data": {"name": "folder", "root": str(place / "images"), "size": 32, "batch_size": 4, "workers": 0},
            "model": {"pipeline": str(trained.output)},
            "noise": {"objective": "v_prediction"},
            "samples": {"every": 0},
            "schedule": {"epochs": 2},
            "ema": {"decay": None},
            "run": {"trackers": [], "device": "cpu", "output": str(tmp_path / "further")},
        }
    )
    first = train(config)
    assert first.last.train_loss < float(rows(trained.output)[0]["train_loss"])
    vae = "last/vae/diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / "further" / vae), load_file(trained.output / vae))
    again = train(config, resume=True)
    assert again.last == first.last
    with pytest.raises(UsageError, match=r"noise\.objective"):
        train(config.changed("noise.objective=epsilon", **{"run.output": tmp_path / "other"}))


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_training_in_bfloat16_on_a_cpu_attends_plainly(precision, fused, place, tmp_path, monkeypatch):
    """The backward pass of fused attention is slow there. The UNet also pools its text by itself."""
    trained_with, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attend(query, *args, **options):
        if query.requires_grad:
            trained_with.append(query.dtype)
        return plain(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    settings = [f"run.precision={precision}", "schedule.epochs=1"]
    text = ["model.options.addition_embed_type=text", "model.options.addition_embed_type_num_heads=2"]
    output = train(
        tiny_train(place / "vae", place / "text", place / "images", tmp_path / "run", *settings, *text)
    ).output
    assert bool(trained_with) == fused
    pipeline = load_pipeline(output)
    assert "AttnProcessor2_0" in {type(one).__name__ for one in pipeline.unet.attn_processors.values()}
    assert sample(pipeline, ["red"], output=tmp_path / "drawn", steps=2, device="cpu").drawn == 1


def test_several_sizes(place, tmp_path, monkeypatch):
    """Each size has latents of its own, and a run that is stopped within an epoch draws the same sizes again."""
    settings = ["run.checkpoint_every_s=0", "samples.every=2", "data.hflip=0.5", f"data.cache={tmp_path / 'cache'}"]
    sources, sizes = (place / "vae", place / "text", place / "images"), "data.sizes=[32, 48, 64]"
    train(tiny_train(*sources, tmp_path / "one", *settings, "schedule.epochs=1"))
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    seen, sides, plain = [], [], UNetTraining.losses

    def losses(self, model, start, text, *, epoch=None):
        sides[:] = start.shape[2:]
        if epoch is not None:
            seen.append((len(start), *sides))
        return plain(self, model, start, text, epoch=epoch)

    def unet_arguments(unet, text, height, width):
        assert [height, width] == [4 * side for side in sides]
        return plain_arguments(unet, text, height, width)

    plain_arguments = training.unet_arguments
    monkeypatch.setattr(UNetTraining, "losses", losses)
    monkeypatch.setattr(training, "unet_arguments", unet_arguments)
    whole = train(tiny_train(*sources, tmp_path / "whole", *settings, sizes)).output
    assert len(seen) == 8 and set(seen) == {(4, 8, 8), (1, 12, 12), (1, 16, 16)}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {path.name for path in (tmp_path / "cache" / "train").iterdir()} == {
        "latents", "latents-48", "latents-64", "text",
    }  # fmt: skip

    config = tiny_train(*sources, tmp_path / "stopped", *settings, sizes)
    with stopped_before(7):
        train(config)
    train(config, resume=True)
    assert seen[8:] == seen[:8]
    assert_same(newest_state(config.run.output), newest_state(whole))
    assert rows(config.run.output) == rows(whole)
    with pytest.raises(UsageError, match=r"data\.sizes\[2\] is 40, and the run .* has 64"):
        train(config.changed("data.sizes=[32, 48, 40]"), resume=True)
    with pytest.raises(UsageError, match=r"data\.sizes has 50, which is not a multiple of 4, .*; use 48"):
        train(tiny_train(*sources, tmp_path / "other", *settings, "data.sizes=[32, 50]"))


@pytest.mark.parametrize("kind", ["shift_factor", "latents_mean"])
def test_what_is_learnt_is_what_is_decoded(kind, place, tmp_path, request):
    """Latents as the UNet learns them, through the pipeline's own way back, are the images."""
    from gspn.tasks.text_to_image.config import DataConfig
    from gspn.tasks.text_to_image.data import encode_data
    from gspn.tasks.text_to_image.decoding import to_latents

    pipeline = request.getfixturevalue("sd" if kind == "shift_factor" else "sdxl")
    told = {
        "shift_factor": {"shift_factor": 0.5},
        "latents_mean": {"latents_mean": [1.0] * 4, "latents_std": [3.0] * 4},
    }
    before = {key: pipeline.vae.config.get(key) for key in told[kind]}
    pipeline.vae.register_to_config(**told[kind])
    try:
        data = DataConfig(name="folder", root=place / "images", size=32, batch_size=4, workers=0)
        found = encode_data(data, pipeline, tmp_path / "cache", device="cpu")
        mean = found.train.latents[3][0].chunk(2)[0][None]
        start = found.start(torch.cat([mean, torch.zeros_like(mean)], dim=1))
        from gspn.data import open_captions
        from gspn.tasks.diffusion.transforms import image_transform

        image = open_captions("folder", "train", root=place / "images").image(3)
        pixels = image_transform(32)(image)[None]
        assert torch.allclose(start, to_latents(pipeline, pixels), atol=5e-3)
    finally:
        pipeline.vae.register_to_config(**before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vae=null", "gspn autoencode train"),
        ("model.options.colour=red", "colour"),
        ("model.pipeline=x", "leave model.vae"),
        ("noise.beta_end=0.0001", "have to rise"),
        ("noise.caption_dropout=2", "noise.caption_dropout"),
        ("samples.steps=0", "samples.steps"),
        ("optim.label_smoothing=0.1", "no labels"),
    ],
)
def test_what_cannot_be_met(place, tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        train(tiny_train(place / "vae", place / "text", place / "images", tmp_path / "run", override))


def test_presets():
    for name in TextToImageConfig.preset_names():
        assert isinstance(TextToImageConfig.load(name), TextToImageConfig) and TextToImageConfig.preset_title(name)
