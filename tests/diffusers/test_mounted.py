"""The computation of a model with an adapter mounted: the right map at every layer, however the model is run."""

import logging
import math

import pytest
import torch

pytest.importorskip("diffusers.models")

from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import ControlNetModel
from diffusers.models.attention import GatedSelfAttentionDense

import gspn
from diffusers_support import TEXT, inputs, make_dit, make_pixart, make_unet, run
from gspn.diffusers import GSPNAdapter

diffusers_log = logging.getLogger("diffusers")


def map_at(name, height, width, levels):
    """Height and width of the map of a UNet's layer, from its name alone: each level halves, rounding up."""
    part, index = name.split(".")[:2]
    depth = {"down_blocks": int(index) if index.isdigit() else 0, "mid_block": levels - 1}.get(part)
    if depth is None:
        depth = levels - 1 - int(index)
    return math.ceil(height / 2**depth), math.ceil(width / 2**depth)


def by_hand(mixer, tokens, height, width):
    """A mixer's result from its weights and the specification."""
    x = (tokens @ mixer.to_v.weight.T).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    if mixer.to_v.bias is not None:
        x = x + mixer.to_v.bias[:, None, None]
    scan = mixer.scan
    proxy = torch.einsum("sc,bchw->bshw", scan.proxy.weight[:, :, 0, 0], x)
    y = gspn.propagate(
        x, proxy, scan.tap_proj, scan.lam_proj, scan.u_proj, scan.skip_proj, scan.merge, segment=scan.segment,
        impl="reference",
    )  # fmt: skip
    return y.permute(0, 2, 3, 1).flatten(1, 2) @ mixer.to_out[0].weight.T + mixer.to_out[0].bias


def check_every_layer(model, adapter, map_of, **shape):
    """Each mixer against ``by_hand`` on the tokens that the norm before it gave."""
    tokens, results, handles = {}, {}, []
    for name, mixer in adapter.mixers.items():
        # The tokens are what the norm before it gave, or what it was called with where they are modulated in between.
        block = model.get_submodule(name.rpartition(".")[0])
        first = block.norm1 if block.norm_type == "layer_norm" else None
        if first is not None:
            handles.append(first.register_forward_hook(lambda m, a, out, n=name: tokens.__setitem__(n, out)))
        else:
            handles.append(mixer.register_forward_pre_hook(lambda m, a, n=name: tokens.__setitem__(n, a[0])))
        handles.append(mixer.register_forward_hook(lambda m, a, out, n=name: results.__setitem__(n, out)))
    run(model, **shape)
    for handle in handles:
        handle.remove()
    assert set(results) == set(adapter.mixers)
    for name, mixer in adapter.mixers.items():
        with torch.no_grad():
            expected = by_hand(mixer, tokens[name], *map_of(name))
        torch.testing.assert_close(results[name], expected, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("architecture", "shape", "options"),
    [
        ("sd15", (64, 96), {}), ("sd15", (96, 64), {}), ("sd15", (40, 72), {"use_linear_projection": True}),
        ("sd15", (36, 44), {}), ("sd21", (40, 72), {}), ("sdxl", (64, 96), {}), ("sdxl", (96, 64), {}),
        ("sdxl", (40, 72), {"use_linear_projection": False}), ("tiny", (2, 7), {}), ("tiny", (2, 2), {}),
    ],
)  # fmt: skip
def test_every_layer_scans_the_true_map(architecture, shape, options):
    unet = make_unet(architecture, **options).double()
    adapter = GSPNAdapter.from_model(unet, segment={"down": 8})
    height, width = shape
    levels = len(unet.config.block_out_channels)
    count = {"sd15": 16, "sd21": 16, "sdxl": 28, "tiny": 4}[architecture]
    assert len(adapter.mixers) == count
    with adapter.mounted(unet):
        check_every_layer(unet, adapter, lambda name: map_at(name, *shape, levels), height=height, width=width, batch=1)


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (20, 12)])
def test_every_layer_of_pixart(shape):
    model = make_pixart().double()
    adapter = GSPNAdapter.from_model(model)
    height, width = shape
    with adapter.mounted(model):
        check_every_layer(model, adapter, lambda name: (height // 2, width // 2), height=height, width=width)


def test_every_layer_of_dit():
    model = make_dit().double()
    adapter = GSPNAdapter.from_model(model)
    with adapter.mounted(model):
        check_every_layer(model, adapter, lambda name: (4, 4), height=8, width=8)


def test_arguments_by_position():
    model = make_pixart()
    arguments = inputs(model)
    with GSPNAdapter.from_model(model).mounted(model), torch.no_grad():
        expected = model(**arguments).sample
        assert torch.equal(
            model(arguments["hidden_states"], arguments["encoder_hidden_states"], arguments["timestep"])[0], expected
        )


@pytest.mark.parametrize("make", [make_unet, make_pixart])
def test_a_image_does_not_depend_on_its_batch(make):
    model = make()
    arguments = inputs(model, batch=1)
    with GSPNAdapter.from_model(model).mounted(model), torch.no_grad():
        one = model(**arguments).sample
        # Classifier-free guidance doubles the batch: the same noise, with and without the text.
        noise = "sample" if "sample" in arguments else "hidden_states"
        text = arguments["encoder_hidden_states"]
        doubled = {noise: arguments[noise].repeat(2, 1, 1, 1), "encoder_hidden_states": torch.cat([text * 0, text])}
        both = model(**arguments | doubled | {"timestep": arguments["timestep"].repeat(2)}).sample
    torch.testing.assert_close(both[1:], one)
    assert not torch.allclose(both[:1], one)


@pytest.mark.parametrize("make", [make_unet, make_pixart])
def test_one_corner_reaches_the_other(make):
    model = make()
    arguments = inputs(model, batch=1)
    noise = "sample" if "sample" in arguments else "hidden_states"
    moved = arguments | {noise: arguments[noise].clone()}
    moved[noise][..., 0, 0] += 1
    with GSPNAdapter.from_model(model).mounted(model), torch.no_grad():
        assert not torch.equal(model(**arguments).sample[..., -1, -1], model(**moved).sample[..., -1, -1])


def gradients(model, adapter, shapes=((12, 20),)):
    """Gradients after forwards at all of ``shapes`` and then one backward."""
    adapter.zero_grad()
    losses = [model(**inputs(model, height=h, width=w)).sample.square().mean() for h, w in shapes]
    sum(losses).backward()
    return [loss.item() for loss in losses], {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("make", [make_unet, make_pixart, lambda: make_unet("sdxl", layers_per_block=1)])
def test_gradient_checkpointing(make):
    model = make()
    adapter = GSPNAdapter.from_model(model).mount(model)
    adapter.freeze_model()
    model.train()
    # Two sizes before one backward: what was stored by the second would be wrong for the first.
    shapes = ((12, 20), (8, 16))
    plain = gradients(model, adapter, shapes)
    model.enable_gradient_checkpointing()
    again = gradients(model, adapter, shapes)
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, again[1][name]), name


ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # diffusers' own
def test_training_compiles_as_one_graph():
    model = make_unet(**ONE_LEVEL)
    adapter = GSPNAdapter.from_model(model, layers=["down.0", "up.0.attentions.0"]).mount(model)
    adapter.freeze_model()
    model.enable_gradient_checkpointing()
    plain = gradients(model, adapter)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    adapter.zero_grad()
    loss = compiled(**inputs(model)).sample.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(plain[0][0], rel=1e-5)
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[1][name])


def test_compiles_once_for_all_sizes_mounted_and_once_without():
    model = make_unet(**ONE_LEVEL)
    before = run(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(run(compiled), before)
    adapter = GSPNAdapter.from_model(model)
    with adapter.mounted(model):
        for height, width in ((12, 20), (20, 12), (16, 24)):
            arguments = {"height": height, "width": width}
            torch.testing.assert_close(run(compiled, **arguments), run(model, **arguments))
    torch.testing.assert_close(run(compiled), before)
    assert len(graphs) == 2


def test_regional_compilation():
    model = make_unet()
    adapter = GSPNAdapter.from_model(model).mount(model)
    before = run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model), before)
    adapter.unmount()


def test_half_precision_and_autocast():
    model = make_unet()
    adapter = GSPNAdapter.from_model(model)
    with adapter.mounted(model):
        exact = run(model)
        with torch.autocast("cpu", torch.bfloat16):
            rough = {"autocast": run(model)}
    for dtype in (torch.bfloat16, torch.float16):
        with adapter.mounted(make_unet().to(dtype)) as half:
            rough[dtype] = run(half)
        assert rough[dtype].dtype == adapter.dtype == dtype
    for result in rough.values():
        assert 0 < (result.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_an_adapter_in_float32_on_a_model_in_bfloat16():
    model = make_unet().to(torch.bfloat16)
    adapter = GSPNAdapter.from_model(model).mount(model).float()
    parameters = adapter.freeze_model()
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs(model)).sample.float().square().mean().backward()
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    assert all(p.grad.abs().max() > 0 for p in parameters)


def test_arguments_meant_for_attention_alone():
    model = make_unet()
    adapter = GSPNAdapter.from_model(model).mount(model)
    arguments = inputs(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        assert torch.equal(model(**arguments, cross_attention_kwargs={"ip_adapter_masks": []}).sample, expected)
        with pytest.raises(NotImplementedError, match="attention_mask"):
            model(**arguments, attention_mask=torch.ones(2, 240))
    mixer = next(iter(adapter.mixers.values()))
    with pytest.raises(ValueError, match="map_size=None"):
        mixer(torch.randn(1, 6, 16))
    with pytest.raises(ValueError, match=r"map_size=\(2, 4\)"):
        mixer(torch.randn(1, 6, 16), map_size=(2, 4))
    with pytest.raises(NotImplementedError, match="replaces self-attention only"):
        mixer(torch.randn(1, 6, 16), torch.randn(1, 3, 16), map_size=(2, 3))


@pytest.mark.parametrize("first", ["adapter", "hooks"])
def test_hooks_of_accelerate(first):
    """Offloading replaces the forward of modules; it may come before the adapter or after it."""
    model, calls = make_unet(), []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    def add_hooks():
        for module in model.modules():
            if type(module).__name__ in ("Transformer2DModel", "BasicTransformerBlock", "Attention"):
                add_hook_to_module(module, Count())

    before, adapter = run(model), GSPNAdapter.from_model(model)
    with adapter.mounted(model):
        expected = run(model)
    for step in (add_hooks, lambda: adapter.mount(model))[:: 1 if first == "hooks" else -1]:
        step()
    assert torch.equal(run(model), expected)
    assert calls.count("BasicTransformerBlock") == len(adapter.mixers)
    adapter.unmount()
    assert torch.equal(run(model), before)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), before)


def test_gligen_and_controlnet():
    model = make_unet(attention_type="gated")
    for block in model.modules():
        if isinstance(block, GatedSelfAttentionDense):
            block.alpha_attn.data.fill_(1.0)
    control = ControlNetModel.from_unet(make_unet())
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    arguments = inputs(model)
    boxes = {
        "boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, TEXT), "masks": torch.ones(2, 3),
    }  # fmt: skip
    with GSPNAdapter.from_model(model).mounted(model), torch.no_grad():
        plain = model(**arguments).sample
        assert not torch.equal(model(**arguments, cross_attention_kwargs={"gligen": boxes}).sample, plain)
        down, mid = control(**arguments, controlnet_cond=torch.randn(2, 3, 96, 160), return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        assert not torch.equal(model(**arguments, **added).sample, plain)


def test_the_other_attentions_meet_no_unknown_argument(caplog):
    model = make_unet("sdxl")
    # A host with a block of each kind.
    adapter = GSPNAdapter.from_model(model, layers=["mid_block.attentions.0.transformer_blocks.1"]).mount(model)
    assert len(adapter.mixers) == 1
    diffusers_log.addHandler(caplog.handler)
    run(model)
    diffusers_log.removeHandler(caplog.handler)
    assert not caplog.records
