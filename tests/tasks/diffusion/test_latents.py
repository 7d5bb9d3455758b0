"""Cached latents: what is written, written again after a kill, and refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.data import CorruptImageWarning, open_dataset
from gspn.tasks.class_conditional import open_latents
from gspn.tasks.diffusion.autoencoder import load_autoencoder
from gspn.tasks.diffusion.digests import weights_digest
from gspn.tasks.diffusion.latent_cache import _names_of
from gspn.tasks.diffusion.transforms import image_transform
from tasks.class_conditional.latent_runs import autoencoder, cached, files, start_caching


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "vae"
    autoencoder().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae):
    """The training digits and their mirror images, in five files."""
    torch.set_num_threads(1)
    return cached(vae, tmp_path_factory.mktemp("latents") / "train", hflip=True)


def test_they_are_the_posteriors_of_the_images(vae, whole):
    latents = open_latents(whole.directory, verify=True)
    images = open_dataset("digits", "train", transform=image_transform(8))
    assert len(latents) == len(images) == whole.index.images and not whole.broken
    assert whole.index.shape == (4, 4, 4) and whole.index.data.classes == [str(i) for i in range(10)]
    assert [shard.dtype for shard in whole.index.shards] == ["float16"] * len(whole.index.shards)
    model = load_autoencoder(vae)
    for i in (0, 249, 250, len(images) - 1):
        image, label = images[i]
        for hflip, view in ((0.0, image), (1.0, image.flip(-1))):
            latents.hflip = hflip
            posterior = model.encode(view[None]).latent_dist
            stored, own = latents[i]
            assert own == label and stored.dtype == torch.float32
            expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
            torch.testing.assert_close(stored, expected, rtol=2**-10, atol=2**-14)


def test_the_mirror_image_is_sampled_by_pythons_generator(whole):
    latents = open_latents(whole.directory)
    latents.hflip = 0.5
    plain, mirrored = (load_file(whole.directory / "latents-00000.safetensors")["mean"][3, view] for view in (0, 1))
    seen = []
    for seed in range(40):
        random.seed(seed)
        mean = latents[3][0][:4]
        seen.append(torch.equal(mean, mirrored.float()))
        assert seen[-1] or torch.equal(mean, plain.float())
        assert seen[-1] == (random.Random(seed).random() < 0.5)
    assert 10 < sum(seen) < 30


def test_killed_and_started_again_has_the_same_bytes(vae, whole, tmp_path):
    output = tmp_path / "killed"
    process = start_caching(vae, output, {"hflip": True}, die_at=4)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"not complete.*again"):
        open_latents(output)
    again = cached(vae, output, hflip=True)
    assert again.made == len(whole.index.shards) - 3
    assert files(output) == files(whole.directory)


def test_those_of_version_0_1_are_opened(vae, whole, copy):
    """With the digest that their runs compare; nothing is encoded or written again."""
    index = copy / "index.json"
    values = json.loads(index.read_text())
    values["data"]["images"] = values.pop("rows")
    shards = [{"pictures" if key == "rows" else key: one[key] for key in one} for one in values["shards"]]
    values |= {"format": 1, "complete": True, "pictures": len(open_latents(copy)), "shards": shards}
    index.write_text(json.dumps(values, indent=1) + "\n")
    before = files(copy)
    found = open_latents(copy, verify=True)
    assert found.digest == hashlib.sha256(index.read_bytes()).hexdigest()
    assert torch.equal(found[5][0], open_latents(whole.directory)[5][0])
    assert cached(vae, copy, hflip=True).made == 0
    assert files(copy) == before


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.directory, tmp_path / "copy")


def test_damaged_labels_are_named_and_encoded_again(vae, whole, copy):
    path = copy / "latents-00001.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "label": tensors["label"] + 10}, path)
    with pytest.raises(UsageError, match=r"latents-00001\.safetensors.*not what index\.json says.*again"):
        open_latents(copy)
    with pytest.raises(UsageError, match=r"latents-00001\.safetensors"):
        open_latents(copy, verify=True)
    assert cached(vae, copy, hflip=True).made == 1
    assert files(copy) == files(whole.directory)


def test_a_damaged_autoencoder_is_named_and_copied_again(vae, whole, copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    with pytest.raises(UsageError, match="weights that encoded"):
        open_latents(copy).autoencoder()
    cached(vae, copy, hflip=True)
    assert files(copy) == files(whole.directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": False}, "hflip is False.*begun with True"),
        ({"size": 16}, r"data\.size is 16.*begun with 8"),
        ({"split": "val"}, r"data\.names is"),
        ({"shard_size": 100}, "shard_size is 100.*begun with 250"),
        ({"precision": "bf16"}, "precision is 'bf16'.*'fp32'"),
        ({"data": "mnist5k"}, r"data\.name is 'mnist5k'"),
    ],
)
def test_other_arguments_are_refused(vae, whole, options, message):
    with pytest.raises(UsageError, match=message):
        cached(vae, whole.directory, **{"hflip": True, **options})


def test_another_autoencoder_is_refused_and_the_same_elsewhere_is_not(vae, whole, tmp_path):
    shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    before = files(whole.directory)
    assert cached(tmp_path / "pipeline", whole.directory, hflip=True).made == 0
    assert files(whole.directory) == before
    autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"vae\.config\.scaling_factor is 0\.7.*0\.5"):
        cached(tmp_path / "other", whole.directory, hflip=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "not a multiple of 2"),
        ({"size": 0}, "at least 1"),
        ({"data": "nothing"}, "nothing"),
        ({"precision": "fp64"}, "fp64"),
    ],
)
def test_what_cannot_be_met(vae, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        cached(vae, tmp_path / "out", **options)


def test_what_is_no_autoencoder(vae, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load_autoencoder(tmp_path)
    with pytest.raises(UsageError, match=r"none' holds no config\.json"):
        load_autoencoder(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UsageError, match="UNet2DModel"):
        load_autoencoder(tmp_path)
    broken = shutil.copytree(vae, tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("encoder.conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(UsageError, match=r"encoder\.conv_in\.weight"):
        load_autoencoder(broken)
    weights.unlink()
    torch.save(tensors, broken / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="may execute code"):
        load_autoencoder(broken)


def test_every_name_counts_and_old_caches_stay(vae, tmp_path):
    """One name of 200 that changes; caches of version 0.1.0 have a digest of 64 of them."""
    images = tmp_path / "images" / "train" / "red"
    images.mkdir(parents=True)
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(images / f"{i:03}.png")
    options = {"data": "folder", "root": tmp_path / "images", "workers": 0}
    found = cached(vae, tmp_path / "out", **options)
    assert len(found.index.data.names) > 16
    old = shutil.copytree(tmp_path / "out", tmp_path / "old")
    names = [f"red/{i * 200 // 64:03}.png" for i in range(64)]
    values = json.loads((old / "index.json").read_text())
    values["data"]["names"] = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    (old / "index.json").write_text(json.dumps(values))
    assert cached(vae, old, **options).made == 0
    (images / "001.png").rename(images / "001a.png")
    with pytest.raises(UsageError, match=r"data\.names"):
        cached(vae, tmp_path / "out", **options)
    assert cached(vae, old, **options).made == 0


def test_latents_that_are_not_finite_are_not_learnt(copy):
    path = copy / "latents-00001.safetensors"
    tensors = load_file(path)
    tensors["mean"][7, 0, 0, 0, 0] = float("inf")
    save_file(tensors, path)
    latents = open_latents(copy)  # without a look at the checksums
    with pytest.raises(UsageError, match=r"latents-00001\.safetensors.*not finite.*again"):
        latents[250 + 7]


@pytest.fixture
def folder(tmp_path):
    """Nine coloured images in three classes, two of them no images."""
    for name in ("blue", "green", "red"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (10 + i, 8), name).save(tmp_path / "images" / "train" / name / f"{i}.png")
    for name in ("blue/1.png", "red/2.png"):
        (tmp_path / "images" / "train" / name).write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_and_left_out(vae, folder, tmp_path, workers):
    options = {"data": "folder", "root": folder, "shard_size": 2, "workers": workers}
    with pytest.warns(CorruptImageWarning, match=r"2 of 9 images of 'folder', 'train', .*: blue/1\.png; red/2\.png"):
        found = cached(vae, tmp_path / "out", **options)
    assert found.broken == ("blue/1.png", "red/2.png") and found.index.images == 7
    latents = open_latents(tmp_path / "out", verify=True)
    assert [latents[i][1] for i in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    # The last file has no image at all.
    assert [shard.rows for shard in found.index.shards] == [1, 2, 2, 2, 0]
    (folder / "train" / "blue" / "0.png").rename(folder / "train" / "blue" / "00.png")
    with pytest.raises(UsageError, match=r"data\.names"):
        cached(vae, tmp_path / "out", **options)


def test_every_name_of_an_image_counts(vae, tmp_path):
    for i in range(130):  # of which version 0.1.0 compared 64
        (tmp_path / "images" / "red").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "red" / f"{i:03}.png")
    options = {"data": "folder", "root": tmp_path / "images", "shard_size": 200}
    index = tmp_path / "out" / "index.json"
    cached(vae, tmp_path / "out", **options)
    (tmp_path / "images" / "red" / "001.png").rename(tmp_path / "images" / "red" / "001a.png")
    with pytest.raises(UsageError, match=r"data\.names"):
        cached(vae, tmp_path / "out", **options)
    # A directory of version 0.1.0 is compared by its own digest.
    values = json.loads(index.read_text())
    values["data"]["names"] = _names_of(open_dataset("folder", "train", root=tmp_path / "images"), old=True)
    index.write_text(json.dumps(values))
    assert cached(vae, tmp_path / "out", **options).made == 0
    (tmp_path / "images" / "red" / "000.png").rename(tmp_path / "images" / "red" / "000a.png")
    with pytest.raises(UsageError, match=r"data\.names"):
        cached(vae, tmp_path / "out", **options)


def test_no_image_at_all(vae, folder, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UsageError, match="all 9 images are corrupt"):
        cached(vae, tmp_path / "out", data="folder", root=folder)


def test_numbers_beyond_half_precision_are_kept(tmp_path):
    large = autoencoder()
    with torch.no_grad():
        large.quant_conv.bias[0] = 1e5
    large.save_pretrained(tmp_path / "vae")
    found = cached(tmp_path / "vae", tmp_path / "out", split="val")
    assert {shard.dtype for shard in found.index.shards} == {"float32"}
    assert open_latents(tmp_path / "out")[0][0][0].mean() == pytest.approx(1e5, rel=1e-3)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    broken = autoencoder()
    with torch.no_grad():
        broken.quant_conv.weight[0] = broken.quant_conv.bias[0] = torch.finfo(torch.float32).max
    broken.save_pretrained(tmp_path / "vae")
    with pytest.raises(UsageError, match=r"digits/.*not finite in fp32"):
        cached(tmp_path / "vae", tmp_path / "out")


def test_grey_autoencoders_take_grey_images(tmp_path):
    autoencoder(in_channels=1, out_channels=1, latent_channels=2).save_pretrained(tmp_path / "vae")
    assert cached(tmp_path / "vae", tmp_path / "out", split="val").index.shape == (2, 4, 4)


def test_a_digest_is_of_names_and_numbers(vae):
    model = load_autoencoder(vae)
    digest = weights_digest(model)
    assert digest == weights_digest(autoencoder())
    with torch.no_grad():
        model.encoder.conv_in.bias[0] += 1e-6
    assert weights_digest(model) != digest


def test_the_command(vae, tmp_path):
    run, output = CliRunner().invoke, str(tmp_path / "out")
    arguments = [
        "class-conditional",
        "latents",
        "--vae",
        str(vae),
        "--data",
        "digits",
        "--split",
        "val",
        "--output",
        output,
    ]
    further = ["--size", "8", "--shard-size", "200", "--workers", "0", "--device", "cpu"]
    result = run(app, [*arguments, *further])
    assert result.exit_code == 0, result.output
    assert "latents of 4 x 4 x 4" in result.output and "(2 of 2 files" in result.output
    result = run(app, [*arguments, *further])
    assert result.exit_code == 0 and "(0 of 2 files" in result.output
    result = run(app, [*arguments, *further, "--hflip"])
    assert result.exit_code == 2 and "hflip" in result.output
    assert json.loads((tmp_path / "out" / "index.json").read_text())["data"]["split"] == "val"
