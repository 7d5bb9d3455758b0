"""The adapter as a thing of its own: which layers it takes, mounting and giving back, saving, and the traps."""

import copy
import json
import warnings

import pytest
import torch

pytest.importorskip("diffusers.models")

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import EMAModel

from diffusers_support import inputs, make_dit, make_pixart, make_unet, run
from gspn.diffusers import GSPNAdapter, GSPNTokenMixer

# More than ten blocks: their names, sorted as text, are not in order.
LONG = {
    "unet": lambda: make_unet(layers_per_block=11),
    "sdxl": lambda: make_unet("sdxl", layers_per_block=1, transformer_layers_per_block=(1, 1, 11)),
    "pixart": lambda: make_pixart(num_layers=12),
    "dit": lambda: make_dit(num_layers=12),
}
MAKERS = {"unet": make_unet, "sdxl": lambda: make_unet("sdxl"), "pixart": make_pixart, "dit": make_dit}


def state_of(model):
    """The parts of a model, hooks and own attributes included, in a form that compares."""
    return [
        (name, id(module), type(module), {k: v for k, v in vars(module).items() if not k.startswith("_")},
         list(module._forward_pre_hooks), list(module._modules), module.training)
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_unmounting_restores_the_model_bit_for_bit(kind):
    model = MAKERS[kind]()
    size = {"height": 8, "width": 8} if kind == "dit" else {}
    state, weights = state_of(model), list(model.state_dict())
    before = run(model, **size)
    adapter = GSPNAdapter.from_model(model)
    assert state_of(model) == state
    adapter.mount(model)
    assert adapter.mounted_on is model
    assert not torch.allclose(run(model, **size), before)
    adapter.unmount()
    assert adapter.mounted_on is None
    assert state_of(model) == state
    assert list(model.state_dict()) == weights
    assert torch.equal(run(model, **size), before)


def test_a_context_unmounts_whatever_happens():
    unet = make_unet()
    before, adapter = run(unet), GSPNAdapter.from_model(unet)
    with adapter.mounted(unet) as model:
        assert model is unet
        first = run(unet)
    with pytest.raises(KeyError, match="on the way"), adapter.mounted(unet):
        raise KeyError("on the way")
    assert torch.equal(run(unet), before)
    with adapter.mounted(unet):
        assert torch.equal(run(unet), first)


def test_it_takes_the_models_dtype_device_and_mode():
    unet = make_unet().to(torch.bfloat16).train()
    adapter = GSPNAdapter.from_model(unet).eval()
    assert adapter.dtype == torch.float32
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with adapter.mounted(unet):
        assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
        assert all(mixer.training for mixer in adapter.mixers.values())
        unet.float().eval()
    # What the attentions missed in between reaches them as they come back.
    assert attention.to_v.weight.dtype == torch.float32
    assert not attention.training
    assert run(unet).dtype == torch.float32


def test_names_are_those_of_the_mounted_model():
    unet = make_unet("sdxl")
    adapter = GSPNAdapter.from_model(unet).mount(unet)
    mounted = {name for name in unet.state_dict() if ".attn1." in name}
    assert set(adapter.state_dict()) == mounted
    assert {name.partition(".attn1.")[2] for name in mounted} == {
        "to_v.weight", "to_out.0.weight", "to_out.0.bias", "scan.proxy.weight", "scan.tap_proj", "scan.lam_proj",
        "scan.u_proj", "scan.skip_proj", "scan.merge",
    }  # fmt: skip
    shared = {id(p) for p in unet.parameters()}
    assert all(id(p) in shared for p in adapter.parameters())


@pytest.mark.parametrize("kind", LONG)
def test_parameters_keep_the_order_of_the_model(kind, tmp_path):
    with torch.device("meta"):
        model = LONG[kind]()
    adapter = GSPNAdapter.from_model(model, copy_projections=False).to_empty(device="cpu")
    attentions = [name for name, module in model.named_modules() if name in adapter.mixers]
    order = [name for name, _ in adapter.named_parameters()]
    assert [name for name in order if name.endswith("to_v.weight")] == [f"{name}.to_v.weight" for name in attentions]
    adapter.save_pretrained(tmp_path)
    layers = adapter.config["layers"]
    mixed = [layers, dict(sorted(layers.items())), dict(reversed(layers.items())), json.loads(json.dumps(layers))]
    with torch.device("meta"):
        again = [GSPNAdapter(layers=one) for one in mixed]
    for one in (*again, GSPNAdapter.from_pretrained(tmp_path), copy.deepcopy(adapter)):
        assert [name for name, _ in one.named_parameters()] == list(one.state_dict()) == order


def test_an_average_saved_and_loaded_is_of_the_same_parameters(tmp_path):
    adapter = GSPNAdapter.from_model(make_pixart(num_layers=11))
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    EMAModel(adapter.parameters(), model_cls=GSPNAdapter, model_config=adapter.config).save_pretrained(tmp_path)
    EMAModel.from_pretrained(tmp_path, GSPNAdapter).copy_to(adapter.parameters())
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", "a..b", "__class__.x", "a.__dict__.b", "mixers", "config", "a.forward", "train.attn1", "a b", "²",
     "a\x1b[", "a" * 501, 3, None, "a.attn1.scan"],
)  # fmt: skip
def test_names_that_are_none_of_a_layer(name):
    with pytest.raises(ValueError, match=r"^layer ") as caught:
        GSPNAdapter(layers={"a.attn1": {"dim": 8}, name: {"dim": 8}})
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "options",
    [{"dim": "8"}, {"dim": 8.0}, {"dim": True}, {"dim": 0}, {"dim": None}, {"bias": "false"}, {"dropout": 2},
     {"dropout": "x"}, {"skip": 1}, {"proxy_dim": 0}, [], None, "dim"],
)  # fmt: skip
def test_options_of_a_damaged_configuration(options):
    with pytest.raises(ValueError, match=r"has to be|at least 1|a dictionary"):
        GSPNAdapter(layers={"a.attn1": {"dim": 8, **options} if isinstance(options, dict) else options})


def test_projections_are_the_attentions():
    for model in (make_unet(), make_pixart()):
        adapter = GSPNAdapter.from_model(model)
        for name, mixer in adapter.mixers.items():
            attention = model.get_submodule(name)
            assert torch.equal(mixer.to_v.weight, attention.to_v.weight)
            assert torch.equal(mixer.to_out[0].bias, attention.to_out[0].bias)
            assert (mixer.to_v.bias is None) == (attention.to_v.bias is None)
            assert mixer.to_v.weight.data_ptr() != attention.to_v.weight.data_ptr()
    other = GSPNAdapter.from_model(model, copy_projections=False)
    assert not torch.equal(next(iter(other.mixers.values())).to_v.weight, model.transformer_blocks[0].attn1.to_v.weight)


@pytest.mark.parametrize(
    ("architecture", "count", "millions"), [("sd15", 16, 63.5), ("sd21", 16, 63.5), ("sdxl", 70, 524.9)]
)
def test_the_real_widths(architecture, count, millions):
    widths = (320, 640, 1280, 1280)
    options = {
        "sd15": {"block_out_channels": widths},
        "sd21": {"block_out_channels": widths, "attention_head_dim": (5, 10, 20, 20)},
        "sdxl": {"block_out_channels": widths[:3], "attention_head_dim": (5, 10, 20),
                 "transformer_layers_per_block": (1, 2, 10)},
    }  # fmt: skip
    with torch.device("meta"):
        unet = make_unet(architecture, **options[architecture])
        adapter = GSPNAdapter.from_model(unet, copy_projections=False)
    assert len(adapter.mixers) == count
    assert adapter.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        (None, 16), (["mid"], 1), (["down"], 6), (["down.0"], 2), (["up.1", "mid"], 4), (["up.1.attentions.2"], 1),
        (["mid_block.attentions.0.transformer_blocks.0.attn1"], 1), (["down_blocks.2", "down.2", "down"], 6),
    ],
)  # fmt: skip
def test_levels_and_names(layers, count):
    unet = make_unet("sd15")
    adapter = GSPNAdapter.from_model(unet, layers=layers)
    assert len(adapter.mixers) == count
    with adapter.mounted(unet):
        for name, block in unet.named_modules():
            if name.endswith(".attn1"):
                assert isinstance(block, GSPNTokenMixer if name in adapter.mixers else Attention)
        run(unet)


@pytest.mark.parametrize("level", ["down.3", "up.0", "middle", "mid_bloc", "mid.attention", "down.0.attentions.2", ""])
def test_levels_without_self_attention(level):
    known = (
        r"has no self-attention to replace; the model has some in down\.0, down\.1, down\.2, mid, up\.1, up\.2, up\.3"
    )
    with pytest.raises(ValueError, match=f"^'{level}' {known}"):
        GSPNAdapter.from_model(make_unet("sd15"), layers=["down.0", level])


def test_lists_of_levels():
    model = make_pixart()
    with pytest.raises(ValueError, match=r"in transformer_blocks\.0, transformer_blocks\.1"):
        GSPNAdapter.from_model(model, layers=["down.0"])
    with pytest.raises(TypeError, match="one name"):
        GSPNAdapter.from_model(model, layers="transformer_blocks.0")
    for layers in (5, [5], [None]):
        with pytest.raises(TypeError, match=r"names of levels|not the name of a level"):
            GSPNAdapter.from_model(model, layers=layers)
    with pytest.raises(TypeError, match="5 is not the name of a level"):
        GSPNAdapter.from_model(model, segment={5: 4})
    with pytest.raises(ValueError, match="at least one layer"):
        GSPNAdapter.from_model(model, layers=[])


def test_segments_by_level():
    unet = make_unet("sd15")
    adapter = GSPNAdapter.from_model(unet, segment={"down": 4, "down.1": None, "down.2.attentions.0": 3, "up.3": 8})
    segments = {name: mixer.scan.segment for name, mixer in adapter.mixers.items()}
    expected = {"down_blocks.0": 4, "down_blocks.1": None, "down_blocks.2.attentions.0": 3,
                "down_blocks.2.attentions.1": 4, "mid_block": None, "up_blocks.1": None, "up_blocks.3": 8}  # fmt: skip
    for prefix, segment in expected.items():
        assert {s for name, s in segments.items() if name.startswith(prefix)} == {segment}
    assert {m.scan.segment for m in GSPNAdapter.from_model(unet, segment=5).mixers.values()} == {5}
    with pytest.raises(ValueError, match=r"'down\.3' has no self-attention"):
        GSPNAdapter.from_model(unet, segment={"down.3": 4})
    with pytest.raises(ValueError, match=r"segment=0"):
        GSPNAdapter.from_model(unet, segment={"down.0": 0})


def test_options_reach_the_scans():
    unet = make_unet()
    by_default = GSPNAdapter.from_model(unet)
    assert {m.scan.proxy_dim * 8 == m.dim == m.scan.groups for m in by_default.mixers.values()} == {True}
    mixer = GSPNAdapter.from_model(unet, proxy_dim=3, groups=1, skip=False).mixers[
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    assert (mixer.scan.proxy_dim, mixer.scan.groups, mixer.scan.skip_proj) == (3, 1, None)
    with pytest.raises(ValueError, match="groups=5"):
        GSPNAdapter.from_model(unet, groups=5)


def test_only_the_adapter_is_trained():
    unet = make_unet()
    adapter = GSPNAdapter.from_model(unet)
    with pytest.raises(RuntimeError, match="not mounted"):
        adapter.freeze_model()
    adapter.mount(unet)
    optimizer = torch.optim.AdamW(adapter.freeze_model(), lr=0.01, weight_decay=0)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    target = torch.zeros(2, 4, 12, 20)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.mse_loss(unet(**inputs(unet)).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in adapter.state_dict()), name


def test_saved_and_loaded(tmp_path):
    for kind, segment in (("unet", {"mid": 3}), ("pixart", 3)):
        model = MAKERS[kind]()
        adapter = GSPNAdapter.from_model(model, groups=1, segment=segment, copy_projections=False)
        model.save_pretrained(tmp_path / kind)
        with adapter.mounted(model):
            expected = run(model)
            adapter.save_pretrained(tmp_path / "adapters" / kind)  # mounted or not
        files = sorted(path.name for path in (tmp_path / "adapters" / kind).iterdir())
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
        again = type(model).from_pretrained(tmp_path / kind)
        loaded = GSPNAdapter.from_pretrained(tmp_path / "adapters", subfolder=kind)
        with loaded.mounted(again):
            assert torch.equal(run(again), expected)


def test_loaded_in_half_precision(tmp_path):
    unet = make_unet()
    GSPNAdapter.from_model(unet).save_pretrained(tmp_path, variant="fp16")
    adapter = GSPNAdapter.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert adapter.dtype == torch.float16
    assert adapter.mount(unet).dtype == torch.float32


@pytest.mark.parametrize("kind", MAKERS)
def test_a_mounted_model_that_was_trained_is_saved_as_its_class(kind, tmp_path):
    model = MAKERS[kind]()
    size = {"height": 8, "width": 8} if kind == "dit" else {}
    adapter = GSPNAdapter.from_model(model)
    state = state_of(model)
    with adapter.mounted(model):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)
        expected, copied = run(model, **size), copy.deepcopy(model)
        for number, one in enumerate((model, torch.compile(model), copied)):
            with pytest.warns(UserWarning, match=rf"without the {len(adapter.mixers)} mixers.*adapter.save_pretrained"):
                one.save_pretrained(tmp_path / str(number), safe_serialization=True)
        adapter.save_pretrained(tmp_path / "adapter")
        assert torch.equal(run(model, **size), expected)  # the mixers are where they were
    assert state_of(model) == state
    plain = run(model, **size)
    for number in range(3):
        again = type(model).from_pretrained(tmp_path / str(number))
        assert torch.equal(run(again, **size), plain)
        with GSPNAdapter.from_pretrained(tmp_path / "adapter").mounted(again):
            assert torch.equal(run(again, **size), expected)


def test_a_mounted_model_saves_in_the_dtype_that_it_has(tmp_path):
    unet = make_unet()
    with GSPNAdapter.from_model(unet).mounted(unet):
        unet.to(torch.bfloat16)
        with pytest.warns(UserWarning, match="without the 4 mixers"):
            unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())


def test_a_lora_of_mixers_is_said_as_it_is_made(tmp_path):
    peft = pytest.importorskip("peft")
    unet = make_unet()
    adapter = GSPNAdapter.from_model(unet).mount(unet)
    for targets, layers in ((["attn2.to_q"], 0), (["to_q", "to_k", "to_v", "to_out.0"], 8)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets))
        said = [str(one.message) for one in said if "GSPN" in str(one.message)]
        assert [one.split()[0] for one in said] == ([str(layers)] if layers else [])
        with pytest.raises(RuntimeError, match="cannot be saved while it holds a LoRA"):
            unet.save_pretrained(tmp_path)
        unet.delete_adapters("default")
        unet.unload_lora()
    adapter.unmount()
    assert "add_adapter" not in vars(unet)


def test_mounting_twice():
    unet, other = make_unet(), make_unet()
    adapter = GSPNAdapter.from_model(unet, layers=["mid"]).mount(unet)
    for model in (unet, other):
        with pytest.raises(RuntimeError, match=r"mounted on a UNet2DConditionModel: unmount\(\) it first"):
            adapter.mount(model)
    with pytest.raises(RuntimeError, match="has an adapter mounted already"):
        GSPNAdapter.from_model(other, layers=["down"]).mount(unet)
    with pytest.raises(RuntimeError, match="GSPNTokenMixer already"):
        GSPNAdapter.from_model(unet)
    adapter.unmount()
    with pytest.raises(RuntimeError, match="not mounted"):
        adapter.unmount()
    with pytest.raises(NotImplementedError, match="call the model"):
        adapter(torch.zeros(1))


def test_models_it_was_not_made_for():
    adapter = GSPNAdapter.from_model(make_unet("sd15"))
    for other in (make_unet("sdxl"), make_pixart()):
        state = state_of(other)
        with pytest.raises(
            ValueError, match=r"no self-attention down_blocks\.0.*of the adapter's 16 layers are missing"
        ):
            adapter.mount(other)
        assert state_of(other) == state
    wider = make_unet("sd15", block_out_channels=(16, 32, 64, 128))
    with pytest.raises(ValueError, match="has 128 channels and the adapter's mixer 64"):
        adapter.mount(wider)
    unconditional = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    for other in (UNet2DModel(block_out_channels=(32,), **unconditional), torch.nn.Linear(2, 2)):
        for do in (GSPNAdapter.from_model, adapter.mount):
            with pytest.raises(TypeError, match=r"adapter cannot be mounted on a .*; pass a UNet2DConditionModel"):
                do(other)
    with pytest.raises(TypeError, match=r"pass the model inside it, \._orig_mod"):
        adapter.mount(torch.compile(make_unet("sd15")))
    with torch.device("meta"):
        elsewhere = make_unet("sd15")
    with pytest.raises(RuntimeError, match="before offloading"):
        adapter.mount(elsewhere)
    with torch.device("meta"):
        empty = GSPNAdapter.from_config(adapter.config)
    with pytest.raises(RuntimeError, match=r"has no weights for down_blocks.*was loaded from lacks them"):
        empty.mount(make_unet("sd15"))
    assert adapter.mounted_on is None


def test_something_else_in_the_place_of_attention():
    unet = make_unet()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    adapter, attention = GSPNAdapter.from_model(unet), block.attn1
    block.attn1 = torch.nn.Identity()
    for do in (GSPNAdapter.from_model, adapter.mount):
        with pytest.raises(RuntimeError, match="attn1 is a Identity, not diffusers' Attention"):
            do(unet)
    block.attn1 = attention
    mixer = adapter.mount(unet).mixers["mid_block.attentions.0.transformer_blocks.0.attn1"]
    block.attn1 = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="is a Identity, no longer the adapter's mixer"):
        adapter.unmount()
    block.attn1 = mixer
    adapter.unmount()
    assert block.attn1 is attention


@pytest.mark.parametrize(
    ("option", "value"),
    [("residual_connection", True), ("rescale_output_factor", 2.0), ("group_norm", torch.nn.GroupNorm(4, 32)),
     ("norm_q", torch.nn.LayerNorm(4)), ("is_causal", True), ("inner_dim", 64)],
)  # fmt: skip
def test_attentions_that_do_what_gspn_does_not(option, value):
    unet = make_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    setattr(attention, option, value)
    with pytest.raises(ValueError, match=rf"mid_block.*attn1 (has .*{option}|maps between).*[Ll]eave this"):
        GSPNAdapter.from_model(unet)
    assert len(GSPNAdapter.from_model(unet, layers=["down", "up"]).mixers) == 3


def test_a_second_cross_attention_is_left_alone():
    unet = make_unet(only_cross_attention=(True, False))
    adapter = GSPNAdapter.from_model(unet)
    assert list(adapter.mixers) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    with adapter.mounted(unet):
        run(unet)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = make_unet(mid_block_type="UNetMidBlock2D", **blocks)
    with pytest.raises(ValueError, match="no self-attention"):
        GSPNAdapter.from_model(unet)


def test_dropout_is_the_attentions():
    model = make_pixart(dropout=0.5)
    adapter = GSPNAdapter.from_model(model).mount(model)
    assert {mixer.to_out[1].p for mixer in adapter.mixers.values()} == {0.5}
    model.train()
    assert not torch.equal(run(model), run(model))


def test_a_copy_of_a_mounted_model_works_alone():
    unet = make_unet()
    with GSPNAdapter.from_model(unet).mounted(unet):
        again = copy.deepcopy(unet)
        expected = run(unet)
        for p in unet.parameters():
            p.data.zero_()
    assert torch.equal(run(again), expected)


def test_a_copy_of_a_mounted_adapter_is_not_mounted():
    unet, other = make_unet(), make_unet()
    adapter = GSPNAdapter.from_model(unet).mount(unet)
    again = copy.deepcopy(adapter)
    assert again.mounted_on is None
    with again.mounted(other):
        assert torch.equal(run(other), run(unet))
    for p in again.parameters():
        p.data.zero_()
    assert adapter.num_parameters() == again.num_parameters()
    assert all(p.abs().max() > 0 for p in adapter.parameters())


def test_constructed_from_its_configuration():
    with pytest.raises(ValueError, match="at least one layer"):
        GSPNAdapter(layers={})
    with pytest.raises(TypeError, match="width"):
        GSPNAdapter(layers={"mid_block": {"width": 3}})
    adapter = GSPNAdapter(layers={"a.0.attn1": {"dim": 16}, "a.1.attn1": {"dim": 8, "segment": 2}})
    again = GSPNAdapter.from_config(adapter.config)
    assert [(n, m.dim, m.scan.segment) for n, m in again.mixers.items()] == [
        ("a.0.attn1", 16, None), ("a.1.attn1", 8, 2),
    ]  # fmt: skip


def test_scans_over_a_normalized_axis(tmp_path):
    """At any size by itself, as with lam scaled by hand."""
    unet = make_unet("tiny").double()
    by_level = {"down": 8, "mid": 4, "up": 8}
    adapter = GSPNAdapter.from_model(unet, reference_lines=by_level)
    assert {one["reference_lines"] for one in adapter.config["layers"].values()} == {8, 4}
    plain = GSPNAdapter.from_model(unet)
    plain.load_state_dict(adapter.state_dict())
    with adapter.mounted(unet):
        at_size, beyond = (run(unet, height=side, width=2 * side) for side in (8, 16))
    # The first level has the side of the latents, the middle half of it; columns are twice as many as rows.
    for factors, side, expected in (([1, 1, 0.5, 0.5], 8, at_size), ([0.5, 0.5, 0.25, 0.25], 16, beyond)):
        one = copy.deepcopy(plain)
        for mixer in one.mixers.values():
            mixer.scan.lam_proj.data *= torch.tensor(factors, dtype=torch.float64).view(4, 1, 1)
        with one.mounted(unet):
            torch.testing.assert_close(run(unet, height=side, width=2 * side), expected)

    adapter.save_pretrained(tmp_path / "adapter")
    plain.set_reference_lines(by_level)
    for same in (plain, GSPNAdapter.from_pretrained(tmp_path / "adapter")):
        assert dict(same.config["layers"]) == dict(adapter.config["layers"])
        with same.double().mounted(unet):
            torch.testing.assert_close(run(unet, height=16, width=32), beyond)
    # Restarts after as many lines as those of the reference leave lam as it is.
    adapter.set_segment(by_level)
    plain.set_reference_lines(None)
    plain.set_segment(by_level)
    with adapter.mounted(unet):
        restarted = run(unet, height=16, width=32)
    with plain.mounted(unet):
        torch.testing.assert_close(run(unet, height=16, width=32), restarted)
    with pytest.raises(ValueError, match="reference_lines=0"):
        adapter.set_reference_lines({"down.0": 0})


def test_an_adapter_of_before_reference_lines_loads_as_it_was(tmp_path):
    unet = make_unet("tiny")
    adapter = GSPNAdapter.from_model(unet)
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for options in config["layers"].values():
        del options["reference_lines"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = GSPNAdapter.from_pretrained(tmp_path)
    with adapter.mounted(unet):
        expected = run(unet)
    with old.mounted(unet):
        assert torch.equal(run(unet), expected)
    old.set_reference_lines(4)
    assert {mixer.scan.reference_lines for mixer in old.mixers.values()} == {4}


def test_scans_restart_elsewhere_afterwards(tmp_path):
    unet = make_unet("sd15")
    adapter = GSPNAdapter.from_model(unet, segment=7)
    other = GSPNAdapter.from_model(unet, segment={"down": 2, "mid": 3})
    other.load_state_dict(adapter.state_dict())
    adapter.set_segment({"down": 2, "mid": 3})
    segments = {name: mixer.scan.segment for name, mixer in adapter.mixers.items()}
    assert segments == {name: mixer.scan.segment for name, mixer in other.mixers.items()}
    assert {segments[name] for name in segments if name.startswith("up")} == {None}
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = GSPNAdapter.from_pretrained(tmp_path / "adapter")
    assert segments == {name: mixer.scan.segment for name, mixer in loaded.mixers.items()}
    outputs = []
    for one in (adapter, other, loaded):
        with one.mounted(unet):
            outputs.append(run(unet))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    adapter.set_segment(None)
    with adapter.mounted(unet):
        assert not torch.allclose(run(unet), outputs[0])
    for wrong, error in ((0, ValueError), (True, TypeError), (2.0, TypeError), ({"sideways": 2}, ValueError)):
        with pytest.raises(error):
            adapter.set_segment(wrong)
