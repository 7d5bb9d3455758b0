"""GSPN in the place of the attention of timm's vision transformers."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gspn._errors import UsageError
from gspn.nn import CompactGSPN2d, GSPN2d
from gspn.timm import GSPNAdapter, GSPNTokenMixer

SMALL = dict(embed_dim=32, depth=3, num_heads=2, num_classes=7)
MODELS = {
    "class token": ("vit_tiny_patch16_224", dict(img_size=64)),
    "no class token": ("vit_so400m_patch14_siglip_224", dict(img_size=56, mlp_ratio=2)),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=56)),
    "two class tokens": ("deit_tiny_distilled_patch16_224", dict(img_size=64)),
    "rotary": ("vit_small_patch16_dinov3", dict(img_size=64, init_values=1.0)),
    "values apart": ("vit_medium_patch16_rope_reg1_gap_256", dict(img_size=64, init_values=1.0)),
}


def make(kind: str = "class token", **options):
    name, own = MODELS[kind]
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **own, **options}).eval()


def perturbed(adapter: GSPNAdapter) -> GSPNAdapter:
    """All weights random, also those that start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return adapter


def images(model, height=None, width=None, batch=2):
    side = model.patch_embed.img_size
    return torch.randn(batch, 3, height or side[0], width or side[1], generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", MODELS)
def test_mounting_and_unmounting_is_exact(kind):
    model = make(kind)
    before, x = {name: value.clone() for name, value in model.state_dict().items()}, images(model)
    expected = model(x)
    adapter = perturbed(GSPNAdapter.from_model(model, keep_attention=[-1], latent_dim=8))
    with adapter.mounted(model):
        assert adapter.mounted_on is model
        mounted = model(x)
        assert not torch.allclose(mounted, expected)
        assert isinstance(model.blocks[0].attn, GSPNTokenMixer)
        assert not isinstance(model.blocks[2].attn, GSPNTokenMixer)
        # The adapter's weights have the names that they have in the model.
        assert adapter.state_dict().keys() <= model.state_dict().keys()
    assert adapter.mounted_on is None and not model.patch_embed._forward_hooks
    assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    with adapter.mounted(model):
        assert torch.equal(model(x), mounted)


@pytest.mark.parametrize("kind", ["registers", "no class token"])
@pytest.mark.parametrize("latent_dim", [None, 8])
def test_the_mixer_is_its_formula(kind, latent_dim):
    model = make(kind).double()
    adapter = perturbed(GSPNAdapter.from_model(model, latent_dim=latent_dim))
    mixer = adapter.mixers["blocks.1.attn"]
    count, height, width = model.num_prefix_tokens, 3, 5
    x = torch.randn(2, count + height * width, 32, dtype=torch.float64)
    values = x @ mixer.v.weight.T + mixer.v.bias
    prefix, patches = values[:, :count], values[:, count:]
    grid = patches.reshape(2, height, width, 32).permute(0, 3, 1, 2)
    propagated = mixer.scan(grid).permute(0, 2, 3, 1).reshape(2, height * width, 32)
    rows = []
    for sample in range(2):
        tokens = []
        for k in range(count):
            gates = torch.sigmoid(patches[sample] @ mixer.read.weight[k] + mixer.read.bias[k])
            mean = sum(gate * value for gate, value in zip(gates, patches[sample], strict=True)) / gates.sum()
            tokens.append(mixer.own[k] * prefix[sample, k] + mean)
        written = sum(mixer.write[k] * prefix[sample, k] for k in range(count))
        rows.append(torch.stack([*tokens, *(propagated[sample] + written)]))
    expected = torch.stack(rows) @ mixer.proj.weight.T + mixer.proj.bias
    # The pooling weights are rounded to float32, so that they are safe in half precision.
    torch.testing.assert_close(mixer(x, map_size=(height, width)), expected, rtol=1e-6, atol=1e-6)


def test_the_projections_are_those_of_the_attention():
    for kind in MODELS:
        model = make(kind)
        attention = model.blocks[1].attn
        mixer = GSPNAdapter.from_model(model).mixers["blocks.1.attn"]
        x, seen = torch.randn(1, 4, 32), {}
        attention.proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))  # noqa: B023
        out = attention(x[:, :1])  # attention of one token to itself is its value
        torch.testing.assert_close(mixer.v(x[:, :1]), seen["mixed"], msg=kind)
        torch.testing.assert_close(mixer.proj(seen["mixed"]), out, msg=kind)


@pytest.mark.parametrize("kind", ["class token", "rotary"])
def test_other_sizes(kind):
    model = make(kind, dynamic_img_size=True)
    adapter = perturbed(GSPNAdapter.from_model(model))
    assert adapter.config["reference_lines"] == 4
    with adapter.mounted(model), torch.no_grad():
        wide = images(model, 48, 96)
        features = model.forward_features(wide)
        assert features.shape == (2, model.num_prefix_tokens + 3 * 6, 32)
        last, maps = model.forward_intermediates(wide, indices=[0, 2])
        assert torch.equal(last, features) and [one.shape for one in maps] == [(2, 32, 3, 6)] * 2
        # The map is not its transpose: H and W arrive in the right order.
        tall = model.forward_features(wide.transpose(2, 3))
        assert not torch.allclose(tall[:, 0], features[:, 0], atol=1e-4)
        if kind == "class token":
            model.set_input_size((96, 48))
            assert model(images(model, 96, 48)).shape == (2, 7)


def test_features_only():
    model = make(dynamic_img_size=True)
    adapter = perturbed(GSPNAdapter.from_model(model))
    x = images(model, 64, 80)
    with adapter.mounted(model), torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, norm=False)
    extractor = timm.create_model(
        MODELS["class token"][0], **{**SMALL, "num_classes": 0}, img_size=64, dynamic_img_size=True, features_only=True,
        out_indices=(0, 1, 2),
    ).eval()  # fmt: skip
    with pytest.raises(TypeError, match=r"pass the model inside it, \.model"):
        adapter.mount(extractor)
    missing = extractor.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    with adapter.mounted(extractor.model), torch.no_grad():
        for actual, one in zip(extractor(x), expected, strict=False):
            torch.testing.assert_close(actual, one)


@pytest.mark.parametrize("kind", ["class token", "rotary"])
def test_gradient_checkpointing_at_several_sizes(kind):
    model = make(kind, dynamic_img_size=True)
    adapter = perturbed(GSPNAdapter.from_model(model)).mount(model)

    def gradients(checkpointing: bool):
        model.set_grad_checkpointing(checkpointing)
        adapter.zero_grad()
        # Two crops before the backward pass, as in DINO: the first one's blocks run again after the second.
        features = [model.forward_features(images(model, height, width)) for height, width in ((64, 64), (32, 48))]
        sum(one.square().sum() for one in features).backward()
        return {name: weight.grad.clone() for name, weight in adapter.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_copy_of_a_mounted_model():
    model = make(dynamic_img_size=True)
    adapter = perturbed(GSPNAdapter.from_model(model)).mount(model)
    x = images(model, 32, 64)
    expected = model(x)
    copied = copy.deepcopy(model)
    model(images(model))  # another size, of which the copy knows nothing
    assert torch.equal(copied(x), expected)
    another = copy.deepcopy(adapter)
    assert another.mounted_on is None and another.mixers["blocks.0.attn"] is not adapter.mixers["blocks.0.attn"]


def test_autocast_and_half_precision():
    model = make("registers")
    adapter = perturbed(GSPNAdapter.from_model(model)).mount(model)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.1 * expected.abs().max()
        model.bfloat16()
        assert model(x.bfloat16()).dtype == torch.bfloat16
    adapter.unmount()
    assert model.blocks[0].attn.proj.weight.dtype == torch.bfloat16  # attentions follow the model
    assert model(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_as_one_graph():
    model = make(dynamic_img_size=True, depth=2)
    perturbed(GSPNAdapter.from_model(model, latent_dim=8)).mount(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for height, width in ((48, 96), (80, 32)):  # timm's position embedding compiles again for each size
        x = images(model, height, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_no_other_file_is_lost_in_saving(tmp_path, monkeypatch):
    adapter = GSPNAdapter.from_model(make())
    adapter.save_pretrained(tmp_path / "own")
    adapter.save_pretrained(tmp_path / "own")  # its own files are replaced
    (tmp_path / "own" / "notes.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"holds other files, such as notes\.txt"):
        adapter.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "notes.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="not replaced as a whole"):
        adapter.save_pretrained(".")


def test_a_layer_beyond_the_number_of_tensors_is_loaded(tmp_path):
    adapter = GSPNAdapter.from_model(make(depth=30), keep_attention=range(29))
    assert len(adapter.state_dict()) < 29
    adapter.save_pretrained(tmp_path)
    assert list(GSPNAdapter.from_pretrained(tmp_path).mixers) == ["blocks.29.attn"]


def test_saved_and_loaded_alone(tmp_path):
    model = make()
    adapter = perturbed(GSPNAdapter.from_model(model, latent_dim=8, keep_attention=[1], groups=1))
    adapter.set_segment(2)
    x = images(model)
    with adapter.mounted(model):
        expected = model(x)
        adapter.save_pretrained(tmp_path / "adapter")
    loaded = GSPNAdapter.from_pretrained(tmp_path / "adapter")
    assert loaded.config == adapter.config
    with loaded.mounted(make()) as again:
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is not that of a"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "safetensors"),
        (lambda folder: _change(folder, layers=[0, 1, 2, 3]), "cannot be loaded"),
        (lambda folder: _change(folder, dim=10**6), "another model"),
        (lambda folder: _change(folder, colour="red"), "colour"),
        (lambda folder: _spoil(folder), "not finite"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    GSPNAdapter.from_model(make(), latent_dim=4).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=message):
        GSPNAdapter.from_pretrained(tmp_path)


def _change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _spoil(folder):
    weights = load_file(folder / "model.safetensors")
    weights["blocks.0.attn.proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: timm.create_model("test_convnext"), TypeError, "a ConvNeXt; pass a model"),
        (lambda: timm.create_model("samvit_base_patch16", embed_dim=32, depth=2, num_heads=2, img_size=64), TypeError,
         "windows or relative positions"),
        (lambda: timm.create_model("beit_base_patch16_224", **SMALL), TypeError, "windows or relative positions"),
        (lambda: make(patch_drop_rate=0.5), ValueError, "drops patches"),
        (lambda: None, TypeError, "a NoneType; pass a model"),
        (lambda: "vit_tiny_patch16_224", TypeError, "a str; pass a model"),
        (lambda: VisionTransformer, TypeError, "a type; pass a model"),
        (lambda: nn.Sequential(make()), TypeError, "a Sequential; pass a model"),
        (lambda: _wrapped("qkv"), ValueError, r"blocks\.1\.attn\.qkv is a .*Sequential and not PyTorch's Linear"),
        (lambda: _wrapped("proj"), ValueError, r"blocks\.1\.attn\.proj is a .*Sequential and not PyTorch's Linear"),
        (lambda: make("class token", scale_attn_norm=True), ValueError, "between mixing and projection"),
        (lambda: make("class token", attn_layer="diff", num_heads=2), ValueError, "DiffAttention"),
        (lambda: timm.create_model("vit_base_patch16_plus_240", **SMALL, block_fn=_parallel()), ValueError, "without"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced_is_named(build, error, message):
    model, adapter = build(), GSPNAdapter.from_model(make())
    with pytest.raises(error, match=message):
        GSPNAdapter.from_model(model)
    with pytest.raises(error, match=message):
        adapter.mount(model)
    assert adapter.mounted_on is None


def _wrapped(part):
    """A model whose second attention has a layer within another one, as a LoRA has."""
    model = make()
    attention = model.blocks[1].attn
    setattr(attention, part, nn.Sequential(getattr(attention, part)))
    return model


def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


def test_misuse():
    model = make()
    adapter = GSPNAdapter.from_model(model)
    with pytest.raises(RuntimeError, match="not mounted"):
        adapter.unmount()
    with pytest.raises(ValueError, match="keep_attention has 3"):
        GSPNAdapter.from_model(model, keep_attention=[3])
    with pytest.raises(ValueError, match="keeps all 3 blocks"):
        GSPNAdapter.from_model(model, keep_attention=[0, 1, 2])
    with pytest.raises(TypeError, match="keep_attention=2: has to be a list"):
        GSPNAdapter.from_model(model, keep_attention=2)
    with pytest.raises(TypeError, match="segment='4' is a str"):
        GSPNAdapter.from_model(model, segment="4")
    with pytest.raises(ValueError, match="latent_dim='8': has to be an integer"):
        GSPNAdapter.from_model(model, latent_dim="8")
    with pytest.raises(ValueError, match="layers="):
        GSPNAdapter(layers=[0, 0], dim=8)
    for wrong, message in (
        (make(depth=2), "has 2 blocks"),
        (make(embed_dim=64), "64 channels"),
        (make("registers"), "5"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.mount(wrong)
    with pytest.raises(NotImplementedError, match="mount"):
        adapter(images(model))
    adapter.mount(model)
    with pytest.raises(RuntimeError, match="mounted on a VisionTransformer"):
        adapter.mount(make())
    with pytest.raises(RuntimeError, match="adapter mounted already"):
        GSPNAdapter.from_model(make(), keep_attention=[]).mount(model)
    with pytest.raises(NotImplementedError, match="attn_mask of"):
        model(images(model), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="is_causal"):
        model(images(model), is_causal=True)
    with pytest.raises(ValueError, match="call the model with an image"):
        model.blocks[0](torch.randn(1, 8, 32))
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn is a Identity"):
        adapter.unmount()


def test_the_parameters_of_a_foundation_model():
    """ViT-SO/14: 427M with attention, 365M as C-GSPN (arXiv 2606.00746), with 3 of 27 attentions and 64 channels."""
    with torch.device("meta"):
        model = timm.create_model("vit_so400m_patch14_siglip_224", num_classes=0)

    def parameters(module):
        return sum(weight.numel() for weight in module.parameters())

    width, depth, latent, proxy = 1152, 27, 64, 8
    attention = 4 * width * width + 4 * width  # queries, keys, values and output
    assert parameters(model) == 427_680_704
    adapter = GSPNAdapter.from_model(model, keep_attention=[8, 17, 26], latent_dim=latent)
    # Values and output stay; queries and keys go. The rest is small: down and up, the proxy, and the maps from it,
    # three taps, lam, u and skip in each direction, and the merge.
    maps = 4 * latent * proxy * (3 + 3) + 4
    mixer = 2 * width * width + 2 * width + 2 * width * latent + latent * proxy + proxy + maps
    with adapter.mounted(model):
        assert parameters(model) == 427_680_704 - 24 * (attention - mixer) == 367_770_848
    whole = GSPNAdapter.from_model(model)  # the original block, with a proxy of an eighth in all 27 layers
    with whole.mounted(model):
        assert parameters(model) == 467_933_276
    assert parameters(model) == 427_680_704
    assert abs(367.77 / 365 - 1) < 0.01 and abs(467.93 / 477 - 1) < 0.02
    with pytest.raises(RuntimeError, match="the model is on the meta device"):
        GSPNAdapter(layers=[0], dim=1152, latent_dim=4).mount(model)
    assert depth == len(model.blocks)


def test_the_latent_space_is_a_narrower_scan():
    torch.manual_seed(0)
    layer = CompactGSPN2d(12, 4, proxy_dim=2, segment=3).double()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    inner = GSPN2d(4, proxy_dim=2, segment=3).double()
    inner.load_state_dict(layer.gspn.state_dict())
    down, up = (one.weight[:, :, 0, 0] for one in (layer.down, layer.up))
    expected = torch.einsum("ol,blhw->bohw", up, inner(torch.einsum("lc,bchw->blhw", down, x)))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="latent_dim=0"):
        CompactGSPN2d(12, 0)
