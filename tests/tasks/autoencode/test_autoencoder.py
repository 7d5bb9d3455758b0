"""Training an autoencoder: it learns, its latents have the scale that it says, and it ends the same when resumed."""

from __future__ import annotations

import pytest
import torch

from gspn._errors import UsageError
from gspn.tasks.autoencode import AutoencodeConfig, train
from gspn.tasks.diffusion.autoencoder import load_autoencoder
from tasks.runs import assert_same, newest_state, rows, stopped_before

TINY = {
    "data": {"name": "digits", "size": 8, "channels": 1, "batch_size": 64, "workers": 0, "eval_split": "val"},
    "model": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
        "attention": False,
    },
    "optim": {"lr": 5e-3, "lr_base_batch": None},
    "schedule": {"epochs": 4},
    "ema": {"decay": 0.9},
    "run": {"trackers": [], "device": "cpu", "eval_every": 2},
}  # fmt: skip


def tiny(output, *overrides, **values):
    return AutoencodeConfig.from_values(TINY).changed(*overrides, **{"run.output": output}, **values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tiny(tmp_path_factory.mktemp("vae") / "run"))


def test_it_learns_and_writes(trained):
    table = rows(trained.output)
    assert float(table[-1]["train_loss"]) < 0.6 * float(table[0]["train_loss"])
    assert table[0]["eval_psnr"] == "" and float(table[3]["eval_psnr"]) > float(table[1]["eval_psnr"]) > 5
    assert [path.name for path in sorted((trained.output / "samples").iterdir())] == [
        "epoch-00002.png",
        "epoch-00004.png",
    ]
    vae = load_autoencoder(trained.output / "last")
    state = newest_state(trained.output)
    assert_same(vae.state_dict(), {k.removeprefix("ema.module."): v for k, v in state.items() if k.startswith("ema.")})


def test_scaled_latents_have_a_deviation_of_one(trained):
    from gspn.data import Digits

    vae = load_autoencoder(trained.output / "last")
    images = Digits("train")
    from gspn.tasks.diffusion.transforms import image_transform

    transform = image_transform(8, 1)
    batch = torch.stack([transform(images.image(i)) for i in range(512)])
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = vae.encode(batch).latent_dist.sample() * vae.config.scaling_factor
    assert drawn.std().item() == pytest.approx(1, abs=0.02)


def test_the_loss_is_the_error_and_the_divergence(tmp_path):
    """With a weight that dwarfs the error, the posterior becomes the unit Gaussian."""
    train(tiny(tmp_path / "run", "loss.kl=100", "schedule.epochs=8", "data.eval_split=null"))
    vae = load_autoencoder(tmp_path / "run" / "last")
    with torch.no_grad():
        posterior = vae.encode(torch.rand(16, 1, 8, 8) * 2 - 1).latent_dist
    assert posterior.mean.abs().mean() < 0.1 and (posterior.std - 1).abs().mean() < 0.1


def test_without_a_convolution_of_the_moments(tmp_path):
    options = "model.options={use_quant_conv: false, use_post_quant_conv: false}"
    result = train(tiny(tmp_path / "run", options, "schedule.epochs=1", "data.sizes=[8, 12]"))
    assert 0 < result.last.train_loss < 2


def test_stopped_and_resumed_is_the_same_run(tmp_path):
    settings = ["data.crop=4", "data.hflip=0.5", "schedule.epochs=2"]
    train(tiny(tmp_path / "whole", *settings))
    with stopped_before(24):
        train(tiny(tmp_path / "stopped", *settings))
    train(tiny(tmp_path / "stopped", *settings), resume=True)
    assert_same(newest_state(tmp_path / "stopped"), newest_state(tmp_path / "whole"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.size=9", "multiples of 2"),
        ("data.crop=16", "cannot exceed its image"),
        ("data={sizes: [8, 12], size: 8, crop: 4}", "gives all images one size; leave one out"),
        ("data.sizes=[8, 13]", r"data\.sizes is 13, and 2 levels need multiples of 2"),
        ("model.block_out_channels=[]", "width of each level"),
        ("model.norm_num_groups=3", "model"),
        ("loss.kl=-1", r"loss\.kl"),
        ("loss.error=huber", "huber"),
        ("run.fsdp=true", r"FSDP is not supported for autoencoders.*run\.fsdp=false"),
    ],
)
def test_what_cannot_be_met(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(tmp_path / "run", override))


def test_a_decoder_is_trained_further_for_the_same_latents(trained, tmp_path):
    source = tmp_path / "source"
    before = load_autoencoder(trained.output / "last")
    before.register_to_config(scaling_factor=0.5)
    before.save_pretrained(source)
    result = train(tiny(tmp_path / "run", "schedule.epochs=2", "optim.lr=1e-3", **{"model.decoder_of": str(source)}))
    after = load_autoencoder(result.output / "last")
    assert_same(after.encoder.state_dict(), before.encoder.state_dict())
    assert_same(after.quant_conv.state_dict(), before.quant_conv.state_dict())
    assert after.config.scaling_factor == 0.5
    assert float(rows(result.output)[-1]["eval_psnr"]) > float(rows(trained.output)[-1]["eval_psnr"])


def test_a_decoder_of_another_architecture_is_refused(trained, tmp_path):
    source = {"model.decoder_of": str(trained.output / "last")}
    with pytest.raises(UsageError, match=r"model\.decoder_of is .* another architecture; .*\[8, 8\]"):
        train(tiny(tmp_path / "run", "model.block_out_channels=[8, 16]", **source))
