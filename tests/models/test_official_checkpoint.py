"""The authors' official checkpoints: the same arithmetic, read by timm's own loaders."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint

from gspn._errors import UsageError
from gspn.models import GSPN
from gspn.models.official_checkpoint import checkpoint_filter_fn, official_model, read_official
from gspn.models.saved import load_saved
from official_support import official_logits, official_shapes, random_official_state

DIMS, DEPTHS, STATE, CLASSES = (8, 16), (1, 2), 3, 5
SHAPES = official_shapes(DIMS, DEPTHS, state=STATE, classes=CLASSES)

# The options that make gspn_tiny the small model of these tests.
SMALL = dict(dims=DIMS, depths=DEPTHS, segment=2, proxy_dim=STATE, num_classes=CLASSES, alignment="official")


def small(segment: Any = None, alignment: str = "official", **options: Any) -> GSPN:
    scan = dict(proxy_dim=STATE, alignment=alignment)
    options = dict(dims=DIMS, depths=DEPTHS, num_classes=CLASSES, dtype=torch.float64) | options
    return GSPN(segment=segment, scan=scan, **options).eval()


@pytest.mark.parametrize("size", [32, 25, 4])
@pytest.mark.parametrize("segment", [None, 2, 3, (2, (None, 1))], ids=str)
def test_the_arithmetic_is_the_official_one(segment, size) -> None:
    state = random_official_state(SHAPES)
    model = small(segment)
    model.load_state_dict(checkpoint_filter_fn(state, model))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    chunks = [[segment], [segment] * 2] if segment is None or isinstance(segment, int) else [[2], [None, 1]]
    expected = official_logits(state, x, chunks)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.1  # or the tolerance would say nothing


def test_the_directions_differ_in_the_weights_of_these_tests() -> None:
    # Each direction's maps matter: the same weights in another order of directions give other logits.
    state = random_official_state(SHAPES)
    model = small()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    for name in ("tap_proj", "lam_proj", "u_proj", "skip_proj", "merge"):
        other = small()
        other.load_state_dict(checkpoint_filter_fn(state, other))
        with torch.no_grad():
            parameter = other.get_parameter(f"stages.1.blocks.0.mixer.gspn.{name}")
            parameter.copy_(parameter[[1, 0, 2, 3]])
        assert (other(x) - before).abs().max() > 1e-5, name


@pytest.mark.parametrize("wrapper", ["model", "model_ema", "state_dict", "state_dict_ema"])
def test_wrapped_state_dicts(wrapper) -> None:
    state = random_official_state(SHAPES)
    model = small()
    plain = checkpoint_filter_fn(state, model)
    wrapped = checkpoint_filter_fn({wrapper: state, "epoch": 3}, model)
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_the_averaged_weights_go_first() -> None:
    first, second = random_official_state(SHAPES, seed=1), random_official_state(SHAPES, seed=2)
    result = checkpoint_filter_fn({"model": first, "model_ema": second}, small())
    assert torch.equal(result["head.fc.weight"], second["classifier.head.weight"])


def test_our_own_state_dicts_stay_as_they_are() -> None:
    model = small(alignment="image")
    state = model.state_dict()
    result = checkpoint_filter_fn(state, model)
    assert result.keys() == state.keys()
    assert all(result[name] is value for name, value in state.items())


def test_nothing_given_is_written_to() -> None:
    state = random_official_state(SHAPES)
    before = {name: value.clone() for name, value in state.items()}
    model = small()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    torch.nn.init.zeros_(model.get_parameter("stages.0.blocks.0.mixer.gspn.tap_proj"))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_linear_weights_may_come_as_convolutions() -> None:
    state = random_official_state(SHAPES)
    model = small()
    plain = checkpoint_filter_fn(state, model)
    for name, value in state.items():
        if name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            state[name] = value[:, :, None, None]
    other = checkpoint_filter_fn(state, model)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_model_of_the_papers_alignment_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"alignment='image'; create the model with alignment='official'"):
        checkpoint_filter_fn(random_official_state(SHAPES), small(alignment="image"))


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.blocks.0.op.dt_projs.weight", "layers.0.blocks.0.op.conv2d.scale.weight", "pos_embed", "head.weight",
        "layers.0.downsample.2.weight", "layers.0.blocks.0.ls.gamma",
    ],
)  # fmt: skip
def test_an_unknown_parameter_is_named(name) -> None:
    state = random_official_state(SHAPES) | {name: torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=rf"unknown parameter '{name}' \(3, 4\)"):
        checkpoint_filter_fn(state, small())


def test_weights_of_another_size_do_not_load() -> None:
    state = random_official_state(official_shapes(DIMS, DEPTHS, state=STATE, ratio=1.25, classes=CLASSES))
    model = small()
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.blocks\.0\.mixer\.in_proj\.weight"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_it_needs_squares() -> None:
    with pytest.raises(ValueError, match=r"needs H == W; use square inputs"):
        small()(torch.randn(1, 3, 32, 40, dtype=torch.float64))


FULL = {
    "gspn_tiny": ((96, 192, 384, 768), (2, 2, 7, 2), 8, 31_510_268),
    "gspn_small": ((108, 216, 432, 864), (5, 5, 10, 2), 16, 50_773_346),
    "gspn_base": ((120, 240, 480, 960), (4, 4, 15, 4), 8, 93_061_108),
}


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_of_the_full_sizes_has_its_place(name) -> None:
    dims, depths, state_dim, parameters = FULL[name]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in official_shapes(dims, depths, state=state_dim).items()}
        model = timm.create_model(name, alignment="official")
    assert sum(value.numel() for value in state.values()) == parameters
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True, assign=True)


# Which blocks are global in the authors' configurations, where a scan runs as many columns as the stage has at 224.
SEGMENTS = {
    "gspn_tiny": [[2] * 2, [2] * 2, [None] * 7, [None] * 2],
    "gspn_small": [[2] * 5, [2] * 5, [2] * 10, [None] * 2],
    "gspn_base": [[2] * 4, [2] * 4, [None] * 7 + [2] * 6 + [None, 2], [None] * 4],
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_segments_of_the_full_sizes(name) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [[block.mixer.gspn.segment for block in stage.blocks] for stage in model.stages] == SEGMENTS[name]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def averaged() -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in random_official_state(SHAPES, seed=2).items()}


@pytest.fixture
def training_file(tmp_path, averaged, monkeypatch) -> Path:
    """A file as the authors' training writes it: both sets of weights, and the configuration as an object of yacs."""
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values: Mapping[str, Any]) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package.config, module.CfgNode = module, CfgNode  # type: ignore[attr-defined]
    path = tmp_path / "ckpt_epoch_3.pth"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        config = CfgNode({"MODEL": CfgNode({"NAME": "gspn_tiny", "DEPTHS": list(DEPTHS)}), "TAG": "default"})
        raw = {name: value.float() for name, value in random_official_state(SHAPES, seed=1).items()}
        torch.save({"model": raw, "model_ema": averaged, "config": config, "epoch": 3, "max_accuracy": 8.25}, path)
    assert "yacs" not in sys.modules
    return path


def test_a_training_file_through_timm(training_file, averaged, images) -> None:
    model = timm.create_model(
        "gspn_tiny", pretrained=True,
        pretrained_cfg_overlay=dict(file=str(training_file), num_classes=CLASSES), **SMALL,
    )  # fmt: skip
    expected = official_logits({k: v.double() for k, v in averaged.items()}, images.double(), [[2], [2, 2]])
    torch.testing.assert_close(model.eval()(images), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["pth", "safetensors", "url", "url of a training file", "load_checkpoint"])
def test_other_sources(how, tmp_path, training_file, averaged, images) -> None:
    model = timm.create_model("gspn_tiny", **SMALL)
    model.load_state_dict(checkpoint_filter_fn(averaged, model))
    expected = model.eval()(images)
    cfg: dict[str, Any] = dict(num_classes=CLASSES)
    cache = tmp_path / "cache"
    if how == "safetensors":
        safetensors.torch.save_file(averaged, tmp_path / "weights.safetensors")
        cfg["file"] = str(tmp_path / "weights.safetensors")
    elif how == "url of a training file":
        cfg["url"] = training_file.as_uri()
    else:
        torch.save(averaged, tmp_path / "weights.pth")
        cfg["url" if how == "url" else "file"] = (
            (tmp_path / "weights.pth").as_uri() if how == "url" else str(tmp_path / "weights.pth")
        )
    if how == "load_checkpoint":
        loaded = timm.create_model("gspn_tiny", **SMALL)
        load_checkpoint(loaded, cfg["file"], filter_fn=checkpoint_filter_fn)
    else:
        loaded = timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay=cfg, cache_dir=cache, **SMALL)
    assert torch.equal(loaded.eval()(images), expected)


def test_fine_tuning_from_an_official_checkpoint(training_file, averaged) -> None:
    options = {**SMALL, "num_classes": 3}
    cfg = dict(file=str(training_file), num_classes=CLASSES)
    model = timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay=cfg, in_chans=1, **options)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    torch.testing.assert_close(model.get_parameter("stem.conv1.weight")[:, 0], averaged["patch_embed.0.weight"].sum(1))
    assert torch.equal(model.get_parameter("stem.conv2.weight"), averaged["patch_embed.5.weight"])
    features = timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay=cfg, features_only=True, **{
        k: v for k, v in SMALL.items() if k != "num_classes"
    })  # fmt: skip
    assert [f.shape for f in features(torch.randn(1, 3, 16, 16))] == [(1, 8, 4, 4), (1, 16, 2, 2)]


def test_it_does_not_load_into_the_default_alignment(training_file) -> None:
    options = {name: value for name, value in SMALL.items() if name != "alignment"}
    with pytest.raises(ValueError, match="create the model with alignment='official'"):
        timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(training_file)), **options)


@pytest.mark.parametrize("content", [{"model": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}}, {"epoch": 3}])
def test_a_checkpoint_without_weights_is_named(content):
    with pytest.raises(ValueError, match="named tensors"):
        checkpoint_filter_fn(content, torch.nn.Identity())


def test_a_training_file_is_read_with_what_it_has(training_file, averaged) -> None:
    checkpoint = read_official(training_file)
    assert checkpoint.wrapper == "model_ema"
    assert checkpoint.weights.keys() == averaged.keys()
    assert checkpoint.num_classes == CLASSES
    assert checkpoint.facts == {"epoch": "3", "max_accuracy": "8.25"}
    assert checkpoint.left_out == ("model", "config")


def test_a_converted_model_is_saved_and_loaded_by_timm(training_file, averaged, images, tmp_path) -> None:
    options = {name: value for name, value in SMALL.items() if name not in ("num_classes", "alignment")}
    converted = official_model("gspn_tiny", read_official(training_file), **options)
    timm.models.save_for_hf(converted, tmp_path / "saved", safe_serialization=True)
    loaded = load_saved(tmp_path / "saved")
    assert torch.equal(loaded(images), converted(images))
    expected = official_logits({k: v.double() for k, v in averaged.items()}, images.double(), [[2], [2, 2]])
    torch.testing.assert_close(loaded(images), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.0.blocks.0.op.out_proj.weight"), r"mixer\.out_proj\.weight is missing"),
        (lambda w: w.update({"extra.weight": torch.ones(2)}), r"unknown parameter 'extra\.weight' \(2,\)"),
        (lambda w: w.update({"classifier.head.bias": torch.ones(7)}), r"bias is \(7,\), and has to be \(5,\)"),
        (lambda w: w["classifier.head.bias"].fill_(torch.nan), r"head\.fc\.bias are not finite"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, message, averaged, tmp_path) -> None:
    change(averaged)
    torch.save(averaged, tmp_path / "weights.pth")
    options = {name: value for name, value in SMALL.items() if name not in ("num_classes", "alignment")}
    with pytest.raises(UsageError, match=message):
        official_model("gspn_tiny", read_official(tmp_path / "weights.pth"), **options)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a checkpoint", pickle.dumps(Path("x")), pickle.dumps([1])], ids=range(5)
)
def test_a_damaged_file_is_refused(content, tmp_path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UsageError, match=r"weights\.pth' (cannot be read|has)"):
        read_official(tmp_path / "weights.pth")


def test_weights_of_gspn_are_refused(tmp_path) -> None:
    torch.save(small().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"load with timm\.create_model"):
        read_official(tmp_path / "weights.pth")
