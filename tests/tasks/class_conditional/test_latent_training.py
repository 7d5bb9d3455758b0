"""Training on cached latents: the way there and back, whole runs, and what is refused."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.tasks.class_conditional import sample, train
from gspn.tasks.class_conditional.data import open_data_of
from gspn.tasks.class_conditional.model import load_pipeline
from gspn.tasks.core.config import read_yaml
from gspn.tasks.core.devices import make_accelerator
from gspn.tasks.core.progress import Reporter
from gspn.tasks.core.task import Context
from gspn.tasks.diffusion.latents import open_latents
from tasks.class_conditional.latent_runs import autoencoder, cached, latent_run
from tasks.runs import assert_same, newest_state, rows, stopped_before


def opened(config):
    return open_data_of(config, Context(config, make_accelerator(device="cpu"), Reporter(Console(), 1)))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """``train`` with mirror images, ``val`` without."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("latents")
    autoencoder().save_pretrained(root / "vae")
    cached(root / "vae", root / "train", hflip=True)
    cached(root / "vae", root / "train-12", hflip=True, size=12)
    cached(root / "vae", root / "val", split="val")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, latents):
    settings = ["schedule.epochs=4", "samples.every=4", f"data.eval_split={latents / 'val'}", "diffusion.scaling=1.7"]
    return train(latent_run(tmp_path_factory.mktemp("run") / "run", latents / "train", *settings))


def test_to_the_denoiser_and_back(latents, trained):
    settings = ["diffusion.scaling=1.7", f"data.eval_split={latents / 'val'}"]
    data = opened(latent_run(latents / "unused", latents / "train", *settings))
    assert (data.channels, data.sample_size, data.classes[3]) == (4, 4, "3")
    pipeline = load_pipeline(trained.output)
    for posterior, _ in (next(data.train.batches(0)), next(iter(data.held_out))):
        torch.manual_seed(5)
        learnt = data.prepared(posterior)
        torch.manual_seed(5)
        mean, std = posterior.chunk(2, dim=1)
        drawn = mean + std * torch.randn_like(mean)
        torch.testing.assert_close(learnt, (drawn - 0.3) * 0.5 * 1.7)
        # The pipeline, with the autoencoder of the cache, undoes exactly that.
        expected = (data.vae.decode(drawn).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pipeline._decode(learnt, "pt"), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(data.prepared(posterior), learnt)  # another sample each time


def test_it_learns_and_its_pipeline_decodes(latents, trained, tmp_path):
    table = rows(trained.output)
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert float(table[-1]["eval_loss"]) < float(table[0]["eval_loss"])
    resolved = read_yaml((trained.output / "config.yaml").read_text(), "it")["resolved"]
    assert (resolved["in_channels"], resolved["out_channels"], resolved["sample_size"]) == (4, 8, 4)
    with Image.open(trained.output / "samples" / "epoch-00004.png") as grid:
        assert grid.width > 2 * 48
    pipeline = load_pipeline(trained.output)
    assert_same(pipeline.vae.state_dict(), autoencoder().state_dict())
    assert pipeline.latent_scale == 1.7 and pipeline.default_size == 8
    assert pipeline.scheduler.config.clip_sample is False
    sample(trained.output, output=tmp_path, classes=["3"], number=2, steps=2, device="cpu")
    assert Image.open(tmp_path / "00001.png").size == (8, 8)


@pytest.mark.parametrize(
    "settings", [["diffusion.objective=flow", "diffusion.learned_sigma=false"], ["data.size=8", "data.sizes=[8, 12]"]]
)
def test_stopped_and_resumed_is_the_same_run(latents, tmp_path, settings):
    settings = [*settings, "data.hflip=0.5", "run.checkpoint_every_s=0", f"data.eval_split={latents / 'val'}"]
    settings += ["data.workers=0", "model.options.drop_path=0.2"]
    train(latent_run(tmp_path / "whole", latents / "train", *settings))

    with stopped_before(random.Random().randint(2, 40)):
        train(latent_run(tmp_path / "stopped", latents / "train", *settings))
    # The latents may have been moved in the meantime, but not changed.
    moved = shutil.copytree(latents / "train", tmp_path / "moved")
    shutil.copytree(latents / "train-12", tmp_path / "moved-12")
    train(latent_run(tmp_path / "stopped", moved, *settings), resume=True)
    assert_same(newest_state(tmp_path / "stopped"), newest_state(tmp_path / "whole"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    name = "last/transformer/diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / "stopped" / name), load_file(tmp_path / "whole" / name))
    # Of one size, or of the last of several.
    other, size, key = ("moved-12", 12, "latents_12") if "data.size=8" in settings else ("moved", 8, "latents")
    shutil.rmtree(tmp_path / other)
    cached(latents / "vae", tmp_path / other, hflip=True, shard_size=300, size=size)
    with pytest.raises(UsageError, match=rf"resolved\.{key} is"):
        train(latent_run(tmp_path / "stopped", moved, *settings), resume=True)


def test_workers_load_the_same(latents, tmp_path):
    found = []
    for workers in (0, 2):
        settings = ["data.hflip=0.5", f"data.workers={workers}", "data.size=8", "data.sizes=[12, 8]"]
        config = latent_run(tmp_path, latents / "train", *settings)
        found.append([posterior for posterior, _ in opened(config).train.batches(epoch=1)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert {tuple(posterior.shape) for posterior in found[0]} == {(64, 8, 4, 4), (28, 8, 6, 6)}


def test_each_size_has_the_latents_of_the_same_images(latents, tmp_path):
    train = open_latents(latents / "train")
    other = open_latents(latents / "train-12")
    train.add_sizes(other)
    plain = open_latents(latents / "train")
    for i in (3, 700):
        train.set_size(12)
        assert torch.equal(train[i][0], other[i][0]) and train[i][1] == plain[i][1]
        train.set_size(8)
        assert torch.equal(train[i][0], plain[i][0])
    assert train.digests == {"latents": plain.digest, "latents_12": other.digest}
    cached(latents / "vae", tmp_path / "val-12", split="val", size=12, hflip=True)
    with pytest.raises(UsageError, match=r"val-12' does not have the images of .*train'; encode both alike"):
        plain.add_sizes(open_latents(tmp_path / "val-12"))
    shutil.copytree(latents / "train", tmp_path / "train")
    shutil.copytree(latents / "train", tmp_path / "train-12")
    with pytest.raises(UsageError, match=r"train-12' has latents of images of 8 pixels.*--size 12"):
        opened(latent_run(tmp_path, tmp_path / "train", "data.size=8", "data.sizes=[8, 12]"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.latents=nowhere"], r"no index\.json"),
        (["data.eval_split=val"], r"'val' has no index\.json"),
        (["data.name=emoji"], r"data\.name is 'emoji'.*'digits'"),
        (["data.train_split=val"], r"data\.train_split is 'val'.*'train'"),
        (["data.size=64"], r"data\.size is 64.*8"),
        (["data.sizes=[32, 64]"], r"data\.size is 32.*8"),
        (["data.size=8", "data.sizes=[8, 16]"], r"data\.sizes has 16, .*train-16'.*latents --size 16"),
        (["data.channels=1"], r"data\.channels is 1"),
        (["data.root=images"], r"data\.root is 'images'"),
        (["data.options={download: true}"], r"data\.options"),
        (["diffusion.scaling=0"], "diffusion.scaling is 0; it has to be above 0"),
        (["model.size=T/3"], "do not divide the side 4"),
        (["data.latents=null", "diffusion.scaling=2", "data.name=digits"], "only latents are scaled"),
    ],
)
def test_what_cannot_be_met(latents, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        train(latent_run(tmp_path / "run", latents / "train", *overrides))


def test_keys_that_say_the_same_pass(latents, tmp_path):
    config = latent_run(tmp_path, latents / "train", "data.name=digits", "data.size=8", "data.train_split=train")
    assert opened(config).name == "digits train"


def test_mirrored_images_have_to_be_there(latents, tmp_path):
    with pytest.raises(UsageError, match=r"has no mirrored images.*--hflip"):
        train(latent_run(tmp_path / "run", latents / "val", "data.train_split=val", "data.hflip=0.5"))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"scaling_factor": 0.6}, {}, "another autoencoder's configuration"),
        ({"latent_channels": 2}, {}, "another autoencoder than"),
        ({}, {"size": 12}, "another shape"),
        ({}, {"data": "emoji"}, "another classes"),
    ],
)
def test_held_out_latents_have_to_be_alike(latents, tmp_path, settings, options, message):
    autoencoder(**settings).save_pretrained(tmp_path / "vae")
    cached(tmp_path / "vae", tmp_path / "other", split="val", **options)
    with pytest.raises(UsageError, match=message):
        train(latent_run(tmp_path / "run", latents / "train", f"data.eval_split={tmp_path / 'other'}"))


def test_the_command(latents, tmp_path):
    settings = ["model.options={dim: 8, num_layers: 2}", "samples.steps=2", "samples.columns=1", "run.trackers=[]"]
    options = ["--epochs", "1", "--batch-size", "256", "--workers", "0", "--set", "run.device=cpu"]
    given = ["class-conditional", "train", "--latents", str(latents / "train"), "-o", str(tmp_path / "run"), *options]
    result = CliRunner().invoke(app, [*given, *(f"--set={one}" for one in settings)])
    assert result.exit_code == 0, result.output
    assert "4 x 4 x 4 latents" in result.output
    assert (tmp_path / "run" / "last" / "vae" / "config.json").is_file()
    result = CliRunner().invoke(
        app, ["class-conditional", "train", "--config", "imagenet256", "--model-size", "XL/2", "--dry-run"]
    )
    assert result.exit_code == 0 and "size: XL/2" in result.output and "data/imagenet256/train" in result.output
