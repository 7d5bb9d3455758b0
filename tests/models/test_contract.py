"""One contract over the whole registry: the promises of every model to the users of timm.

Shapes and parameter counts are those of the real models, on the meta device. Computations run in models with the same
segments and options, a few channels in each stage, and the same depths where these matter.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import FeatureGraphNet, FeatureHookNet, FeatureListNet, load_checkpoint, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gspn.models import GSPN
from gspn.nn import GSPN2d

NAMES = timm.list_models("gspn*", module="gspn")

# Parameters, and millions of multiply-adds at the default size of the architecture (weights may have another).
SIZES = {
    "gspn_pico": (1_025_938, 23),
    "gspn_nano": (3_673_661, 144),
    "gspn_tiny": (31_510_268, 5_214),
    "gspn_small": (50_773_346, 11_701),
    "gspn_base": (93_061_108, 15_641),
    "gspn2_tiny": (24_006_500, 4_020),
    "gspn2_small": (49_687_008, 9_187),
    "gspn2_base": (88_660_432, 13_798),
}


def on_meta(name: str, **options: Any) -> GSPN:
    return timm.create_model(name, device="meta", **options)


as_it_is = functools.cache(on_meta)  # for tests that do not change the model
STAGES = {name: len(as_it_is(name).stages) for name in NAMES}


def shallow(name: str) -> dict[str, Any]:
    """One block in each stage, for what would only repeat itself in deep stages."""
    return dict(depths=(1,) * STAGES[name], segment=(2, None, 3, None)[: STAGES[name]])


def slim(name: str, **options: Any) -> GSPN:
    """The model with its depths, segments and options, and few channels."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"dims": (8, 12, 16, 24)[: STAGES[name]], "num_classes": 7, **options})


def image(size: int | tuple[int, int] = 32, batch: int = 2, chans: int = 3) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, chans, height, width, generator=torch.Generator().manual_seed(1))


def test_every_model_is_here() -> None:
    assert set(NAMES) == set(timm.list_models(module="gspn")) == set(SIZES)
    assert all(timm.is_model(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_size_and_cost(name) -> None:
    model = on_meta(f"{name}.untrained")
    assert isinstance(model, GSPN)
    cfg = model.default_cfg
    x = torch.empty(1, *cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(x)
    assert logits.shape == (1, cfg["num_classes"])
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, round(counter.get_total_flops() / 2e6)) == SIZES[name]

    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert not list(model.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name) -> None:
    model = as_it_is(name)
    cfg = model.default_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert cfg["architecture"] == name
    for key in ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "license", "paper_ids"):
        assert cfg[key], key
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    assert timm.data.create_transform(**data) is not None


@pytest.mark.parametrize("name", ["gspn_pico", "gspn_nano"])
def test_the_small_ones_as_they_are(name) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    x = torch.randn(2, *model.default_cfg["input_size"])
    y = model(x)
    assert y.shape == (2, model.num_classes)
    assert y.isfinite().all()
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name) -> None:
    model = slim(name)
    y = model(image(64))  # at 32 the last maps are single pixels, where taps have nothing to do
    assert y.shape == (2, 7)
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.ne(0).any(), key


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name) -> None:
    x = image()
    results = []
    for enable in (False, True):
        model = slim(name).train()
        model.set_grad_checkpointing(enable)
        y = model(x)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("name", NAMES)
def test_classifier(name) -> None:
    model = slim(name, **shallow(name), dtype=torch.float64).eval()
    x = image().double()
    pooled = model.forward_features(x).mean((2, 3))
    width = model.num_features
    assert pooled.shape == (2, width)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    for classes in (0, 5, 5, 0, 3):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model(x).shape == (2, classes or width)
        assert model(x).dtype == torch.float64
    model.reset_classifier(4, "max")
    torch.testing.assert_close(model(x), model.get_classifier()(model.forward_features(x).amax((2, 3))))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))

    none = slim(name, **shallow(name), num_classes=0, dtype=torch.float64).eval()
    none.load_state_dict(model.state_dict())
    torch.testing.assert_close(none(x), pooled)
    assert slim(name, **shallow(name), num_classes=0, global_pool="")(image()).dim() == 4
    meta = on_meta(name)
    meta.reset_classifier(3)
    assert meta.get_classifier().weight.is_meta


@pytest.mark.parametrize("feature_cls", ["list", "getter", "dict", "hook", "fx"])
@pytest.mark.parametrize("name", NAMES)
def test_features(name, feature_cls) -> None:
    x = image((33, 50))
    model = slim(name, **shallow(name)).eval()
    _, expected = model.forward_intermediates(x)
    options = {} if feature_cls == "list" else {"feature_cls": feature_cls}
    for indices in (None, (0, 2), (1,)):
        chosen = {} if indices is None else {"out_indices": indices}
        backbone = slim(name, features_only=True, **shallow(name), **options, **chosen).eval()
        classes = {"list": FeatureListNet, "getter": FeatureGetterNet, "hook": FeatureHookNet, "fx": FeatureGraphNet}
        assert isinstance(backbone, classes.get(feature_cls, nn.Module))
        outputs = backbone(x)
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        assert len(outputs) == len(indices or range(STAGES[name]))
        for output, i, info in zip(
            outputs, indices or range(STAGES[name]), backbone.feature_info.get_dicts(), strict=True
        ):
            torch.testing.assert_close(output, expected[i])
            reduction = info["reduction"]
            assert output.shape == (2, info["num_chs"], -(-33 // reduction), -(-50 // reduction))


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name) -> None:
    model = slim(name, **shallow(name)).eval()
    x, count = image((37, 32)), STAGES[name]
    final, every = model.forward_intermediates(x)
    assert len(every) == count
    assert torch.equal(final, model.forward_features(x))
    final, normed = model.forward_intermediates(x, norm=True)
    assert torch.equal(normed[-1], final)
    for indices, taken in [(1, [count - 1]), (2, [count - 2, count - 1]), ([0, -1], [0, count - 1]), ([1], [1])]:
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices=indices, stop_early=stop_early, intermediates_only=True)
            assert len(some) == len(taken)
            assert all(torch.equal(one, every[i]) for one, i in zip(some, taken, strict=True))
    stopped, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(stopped, every[0])
    with pytest.raises(ValueError, match=r"output_fmt='NLC'.*'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises((AssertionError, ValueError)):  # timm's own check
        model.forward_intermediates(x, indices=[count])


@pytest.mark.parametrize("name", NAMES)
def test_prune_intermediate_layers(name) -> None:
    x = image()
    whole = slim(name, **shallow(name)).eval()
    _, every = whole.forward_intermediates(x)
    for indices in ([0], [0, 1], 1):
        model = copy.deepcopy(whole)
        taken = model.prune_intermediate_layers(indices)
        final, some = model.forward_intermediates(x, indices=taken)
        assert all(torch.equal(one, every[i]) for one, i in zip(some, taken, strict=True))
        assert len(model.stages) == max(taken) + 1
        assert model.num_features == final.shape[1] == every[max(taken)].shape[1]
        assert model.num_classes == 0
        assert torch.equal(model(x), final)  # neither pooled nor classified
        model.reset_classifier(3, "avg")
        assert model(x).shape == (2, 3)
    kept = copy.deepcopy(whole)
    kept.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
    assert torch.equal(kept(x), whole(x))


@pytest.mark.parametrize("name", NAMES)
def test_fx(name) -> None:
    model = slim(name, **shallow(name)).eval()
    x = image()
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert train_nodes == eval_nodes
    node = next(n for n in eval_nodes if n.startswith("stages.1") and n.endswith("mixer.gspn"))
    extractor = create_feature_extractor(model, [node, "norm", "head.fc"])
    result = extractor(x)
    torch.testing.assert_close(result["head.fc"], model(x))
    torch.testing.assert_close(result["norm"], model.forward_features(x))
    traced = torch.fx.symbolic_trace(model)
    for size in (32, 21):
        assert torch.equal(traced(image(size)), model(image(size)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 17), (65, 33)])
def test_any_size(name, size) -> None:
    model = slim(name, **shallow(name))
    y = model(image(size))
    assert y.shape == (2, 7)
    assert y.isfinite().all()
    assert model(image(size, batch=0)).shape == (0, 7)


@pytest.mark.parametrize("name", NAMES)
def test_channels_of_the_image(name) -> None:
    for chans in (1, 6):
        model = slim(name, **shallow(name), in_chans=chans)
        assert model.in_chans == chans
        assert model(image(24, chans=chans)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_a_image_does_not_depend_on_its_batch(name) -> None:
    model = slim(name, **shallow(name), dtype=torch.float64).eval()
    x = image(20, batch=3).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("name", NAMES)
def test_precision_and_layout(name) -> None:
    model, exact = slim(name, **shallow(name)).eval(), slim(name, **shallow(name), dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    x = image()
    expected = exact(x.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-3, atol=1e-4)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    # The exponent of bfloat16 is float32's, so what is lost is digits: two are left after this many layers.
    for result in (mixed, low):
        assert (result.double() - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay(name) -> None:
    model = slim(name)
    blocks = sum(len(stage.blocks) for stage in model.stages)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    ordered = [
        scale[id(names["stem.conv1.weight"])],
        *(
            scale[id(block.mixer.in_proj.weight)]
            for stage in model.stages
            for block in stage.blocks
        ),
        scale[id(names["head.fc.weight"])],
    ]  # fmt: skip
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == blocks + 2
    assert ordered[-1] == 1
    # A downsampling learns no slower than what comes before it.
    for i in range(1, len(model.stages)):
        down = scale[id(names[f"stages.{i}.downsample.conv.weight"])]
        before = scale[id(model.stages[i - 1].blocks[-1].mixer.in_proj.weight)]
        after = scale[id(model.stages[i].blocks[0].mixer.in_proj.weight)]
        assert before <= down <= after
    coarse = model.group_matcher(coarse=True)
    assert set(coarse) >= {"stem", "blocks"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    model(image(16)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay(name) -> None:
    model = slim(name)
    names = {id(p): key for key, p in model.named_parameters()}
    assert model.no_weight_decay() <= set(names.values())
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert free["weight_decay"] == 0
    free, decayed = ({names[id(p)] for p in group["params"]} for group in (free, decayed))
    assert all(key.endswith((".weight", "_proj")) for key in decayed)
    assert not any("norm" in key or key.endswith((".bias", ".merge")) for key in decayed)
    assert {key for key in free if key.endswith("_proj")} == set()


@pytest.mark.parametrize("name", NAMES)
def test_options_reach_the_scans(name) -> None:
    def scans(model: nn.Module) -> list[GSPN2d]:
        return [module for module in model.modules() if isinstance(module, GSPN2d)]

    changed = dict(proxy_dim=3, groups=2, skip=False, directions=("up", "left"), impl="reference")
    for options in (changed, dict(scan=changed), dict(scan={**changed, "groups": 1}, groups=2)):
        model = slim(name, **{**shallow(name), "segment": 3}, **copy.deepcopy(options))
        for scan in scans(model):
            assert (scan.proxy_dim, scan.groups, scan.segment) == (3, 2, 3)
            assert (scan.skip_proj, scan.directions, scan.impl) == (None, ("up", "left"), "reference")
        assert model(image(16)).shape == (2, 7)
    assert {scan.alignment for scan in scans(slim(name, **shallow(name), alignment="official"))} == {"official"}
    # timm drops options that are None, so this is how to get global scans and taps for each channel.
    model = slim(name, **{**shallow(name), "segment": (None,) * STAGES[name]}, scan=dict(groups=None))
    assert {(scan.segment, scan.groups == scan.dim) for scan in scans(model)} == {(None, True)}
    # What one call changes, the next does not see.
    assert {scan.proxy_dim for scan in scans(slim(name, **shallow(name)))} == {
        scan.proxy_dim for scan in scans(as_it_is(name))
    }

    model = slim(name, **shallow(name), layer_scale=0.5, lpu=True)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all((block.ls1.gamma == 0.5).all() and hasattr(block.lpu2, "conv_dw") for block in blocks)
    model = slim(name, drop_path_rate=0.3, drop_rate=0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, len(rates)))
    assert model.head.drop.p == 0.2
    model.eval()
    x = image(16)
    assert torch.equal(model(x), slim(name).eval()(x))


def test_segments_by_stage_and_block() -> None:
    model = timm.create_model("gspn_pico", dims=(8, 12, 16), segment=(2, None, (1, None, 3, 4)))
    assert [[block.mixer.gspn.segment for block in stage.blocks] for stage in model.stages] == [
        [2], [None], [1, None, 3, 4],
    ]  # fmt: skip


@pytest.mark.parametrize("together", [True, False])
def test_reference_lines_by_stage_and_block(together) -> None:
    lines = (14, None, [7, 7, None, 3])  # as a configuration file has them
    options = dict(scan=dict(reference_lines=lines)) if together else dict(reference_lines=lines)
    model = timm.create_model("gspn_pico", dims=(8, 12, 16), **options)
    assert [[block.mixer.gspn.reference_lines for block in stage.blocks] for stage in model.stages] == [
        [14], [None], [7, 7, None, 3],
    ]  # fmt: skip
    model = timm.create_model("gspn_pico", dims=(8, 12, 16), reference_lines=7)
    assert {block.mixer.gspn.reference_lines for stage in model.stages for block in stage.blocks} == {7}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(window=7), TypeError, "window"),
        (dict(scan=dict(window=7)), ValueError, r"unknown options \['window'\].*proxy_dim"),
        (dict(segment=(2, 2)), ValueError, r"2 entries for 3 stages; pass one for each, or one for all"),
        (dict(segment=(2, 2, (1, 2))), ValueError, r"2 entries for 4 blocks in stage 2"),
        (dict(segment=0), ValueError, "segment=0"),
        (dict(reference_lines=(7, 7)), ValueError, r"reference_lines=\(7, 7\) has 2 entries for 3 stages"),
        (dict(scan=dict(reference_lines=0)), ValueError, "reference_lines=0"),
        (dict(dims=(8, 16)), ValueError, r"dims=\(8, 16\) and depths=\(1, 1, 4\).*one width"),
        (dict(dims=(), depths=()), ValueError, r"dims=\(\)"),
        (dict(dims=(8, 8, 16)), ValueError, r"stages 0 and 1 have the same width"),
        (dict(stem_stride=3), ValueError, r"stride=3.*by 2 or by 4"),
        (dict(groups=5), ValueError, r"groups=5 does not divide"),
        (dict(alignment="theirs"), ValueError, r"alignment='theirs'"),
        (dict(output_stride=16), TypeError, "output_stride"),  # scans cannot be dilated
        (dict(pretrained=True, pretrained_cfg="untrained"), RuntimeError, "No pretrained weights"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, message) -> None:
    with pytest.raises(error, match=message):
        timm.create_model("gspn_pico", **options)


def test_compile_once_for_two_sizes() -> None:
    # Traced alone: that the backward of the scans compiles is shown with less around them in tests/nn.
    torch._dynamo.reset()
    model = slim("gspn_pico", dims=(8, 12), depths=(1, 1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((32, 28), (40, 36), (21, 64)):
            torch.testing.assert_close(compiled(image(size)), model(image(size)))


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_through_timm(name, tmp_path) -> None:
    x = image()
    options = dict(proxy_dim=3, groups=2, directions=("down", "right"), **shallow(name))
    model = slim(name, **options).eval()
    expected = model(x)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(loaded(x), expected)

    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    for file in (tmp_path / "checkpoint.pth", tmp_path / "saved" / "model.safetensors"):
        other = slim(name, **options).eval()
        nn.init.zeros_(other.get_classifier().weight)
        load_checkpoint(other, str(file))
        assert torch.equal(other(x), expected)
        again = slim(name, **options, checkpoint_path=str(file)).eval()
        assert torch.equal(again(x), expected)
    tuned = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert tuned(image(chans=1)).shape == (2, 3)
    torch.testing.assert_close(tuned.stem.conv1.weight[:, 0], model.stem.conv1.weight.sum(1))


def test_a_copy_and_a_pickle() -> None:
    model = slim("gspn2_tiny").eval()
    x = image()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    model.init_non_persistent_buffers()


def test_meta_to_weights() -> None:
    model = timm.create_model("gspn_pico", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    real = model.to_empty(device="cpu").float()
    real.load_state_dict(timm.create_model("gspn_pico").state_dict())
    assert real(image()).isfinite().all()


def test_init_weights_is_seeded_and_leaves_the_scans_theirs() -> None:
    one, other = (slim("gspn_tiny") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.get_parameter("stages.0.blocks.0.mixer.in_proj.weight").abs().max() < 0.1
    assert one.get_parameter("stages.0.blocks.0.mixer.gspn.proxy.weight").abs().max() > 0.1
    assert one.get_parameter("head.fc.bias").eq(0).all()
