"""A mounted model inside a whole pipeline, with LoRAs made for its attentions."""

import logging
import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers.models")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_support import TEXT, make_unet
from gspn.diffusers import ClassConditionalPipeline, GSPNAdapter, GSPNDenoiser2DModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture
def pipeline():
    """Stable Diffusion with random weights, whose tokens are letters."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[], model_max_length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=make_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt="a cat"):
    generator = torch.Generator().manual_seed(0)
    options = {"height": 16, "width": 24, "num_inference_steps": 2, "output_type": "np"}
    return torch.tensor(pipeline(prompt, generator=generator, **options).images)


def make_lora(unet, layout, parts=("attn1", "attn2"), rank=2, alpha=1.0):
    """A LoRA of the projections of all attentions as files of LoRAs have them, and what it adds to each weight."""
    torch.manual_seed(2)
    state, added = {}, {}
    for name, layer in unet.named_modules():
        part, _, projection = name.partition("transformer_blocks.0.")[2].partition(".")
        if part not in parts or projection not in ("to_q", "to_k", "to_v", "to_out.0"):
            continue
        down = torch.randn(rank, layer.in_features) / 4
        up = torch.randn(layer.out_features, rank) / 4
        if layout == "peft":
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            added[name] = up @ down
        else:
            flat = "lora_unet_" + name.replace(".", "_")
            state |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(alpha),
            }
            added[name] = up @ down * alpha / rank
    return state, added


def test_mounted_in_a_pipeline(pipeline, tmp_path):
    before = draw(pipeline)
    adapter = GSPNAdapter.from_model(pipeline.unet)
    with adapter.mounted(pipeline.unet):
        mounted = draw(pipeline)
        assert mounted.shape == (1, 16, 24, 3)
        assert not torch.equal(mounted, before)
        assert not torch.equal(draw(pipeline, "a dog"), mounted)
        with pytest.warns(UserWarning, match=r"without the 4 mixers.*adapter\.save_pretrained"):
            pipeline.save_pretrained(tmp_path / "mounted", safe_serialization=True)
    assert torch.equal(draw(pipeline), before)
    pipeline.save_pretrained(tmp_path / "pipeline")
    adapter.save_pretrained(tmp_path / "adapter")
    for saved in ("mounted", "pipeline"):
        again = StableDiffusionPipeline.from_pretrained(tmp_path / saved)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), before)
    GSPNAdapter.from_pretrained(tmp_path / "adapter").mount(again.unet)
    assert torch.equal(draw(again), mounted)


def test_a_pipeline_can_hold_an_adapter(tmp_path):
    adapter = GSPNAdapter.from_model(make_unet(), layers=["mid"])
    ClassConditionalPipeline(adapter, DDIMScheduler()).save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path).transformer
    assert isinstance(again, GSPNAdapter)
    for name, value in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_lora_of_the_attentions(pipeline, layout, tmp_path, caplog):
    unet = pipeline.unet
    state, added = make_lora(unet, layout)
    save_file(state, tmp_path / "lora.safetensors")
    adapter = GSPNAdapter.from_model(unet).mount(unet)
    before, weights = draw(pipeline), {name: value.clone() for name, value in unet.state_dict().items()}

    log = logging.getLogger("diffusers")
    log.addHandler(caplog.handler)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    log.removeHandler(caplog.handler)
    # What has no counterpart is said once, and no more than that.
    said = [record.getMessage() for record in caplog.records if "attn1" in record.getMessage()]
    assert len(said) == 1
    for name in added:
        assert (name + "." in said[0]) == name.endswith(("attn1.to_q", "attn1.to_k"))

    loaded = draw(pipeline)
    assert not torch.allclose(loaded, before)
    with pytest.raises(RuntimeError, match=r"cannot be unmounted while it holds .*lora.*unload_lora_weights"):
        adapter.unmount()
    with pytest.raises(RuntimeError, match="cannot be saved while it holds"):
        adapter.save_pretrained(tmp_path / "adapter")

    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)
    unet.load_state_dict({name: value + added.get(name.removesuffix(".weight"), 0) for name, value in weights.items()})
    torch.testing.assert_close(draw(pipeline), loaded)
    adapter.unmount()


def test_a_lora_loaded_before(pipeline):
    unet = pipeline.unet
    adapter = GSPNAdapter.from_model(unet)
    pipeline.load_lora_weights(make_lora(unet, "peft")[0])
    for do in (adapter.mount, GSPNAdapter.from_model):
        with pytest.raises(RuntimeError, match=r"attn1\.to_q is a peft.*mount, and load it again"):
            do(unet)
    pipeline.unload_lora_weights()
    # One that leaves the first attentions alone may be there.
    before = draw(pipeline)
    pipeline.load_lora_weights(make_lora(unet, "peft", parts=("attn2",))[0])
    with adapter.mounted(unet):
        draw(pipeline)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)


@pytest.fixture
def of_classes():
    torch.manual_seed(0)
    model = GSPNDenoiser2DModel(in_channels=1, dim=8, num_layers=2, num_class_embeds=3, sample_size=4)
    torch.nn.init.normal_(model.out_proj.weight)
    pipeline = ClassConditionalPipeline(model.eval(), DDIMScheduler(), id2label={0: "cat", 1: "dog", 2: "dog"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0], [1, 0]), ([[1], [1]], [1, 1]), ((2,), [2]), (range(3), [0, 1, 2]), (1, [1]), ("cat", [0]),
        (["cat", 2, ["cat"]], [0, 2, 0]), (torch.tensor([1, 0]), [1, 0]), (torch.tensor([[1], [0]]), [1, 0]),
        (torch.tensor(1), [1]), ([torch.tensor(1), torch.tensor([2])], [1, 2]), (np.array([1, 2]), [1, 2]),
        ([np.int64(1), np.uint8(2)], [1, 2]),
    ],
)  # fmt: skip
def test_classes_in_every_form(of_classes, labels, expected):
    assert of_classes.label_ids(labels) == expected


@pytest.mark.parametrize(
    "labels",
    [
        [], [[]], torch.tensor([]), [True], torch.tensor([True]), [np.True_], [1.0], torch.tensor([1.0]), [[1, 2]], [3],
        [-1], [10**30], None, [None], {1: 2}, {1}, ["bird"], ["dog"], ["\x1b[31m"], b"cat",
    ],
)  # fmt: skip
def test_classes_that_are_none(of_classes, labels):
    with pytest.raises(ValueError, match=r"^class") as caught:
        of_classes(labels)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"num_inference_steps": steps} for steps in (0, 1001, True, 2.0)]
    + [{side: value} for side in ("height", "width") for value in (0, -2, 3, 4.0, "4")]
    + [{"guidance_scale": math.nan}, {"output_type": "png"}, {"generator": [torch.Generator()] * 3},
       {"latents": torch.zeros(1, 1, 4, 4)}],
)  # fmt: skip
def test_arguments_that_do_not_fit(of_classes, options):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(options.values())))[:4]) + "|generators|latents"):
        of_classes([0, 1], **options)


def test_a_generator_for_all_or_for_each(of_classes):
    def draw(generator):
        options = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
        return torch.tensor(of_classes([[0], ["cat"]], **options).images)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(seeded(0)), draw([seeded(0)]))
    pair = draw([seeded(0), seeded(0)])
    assert torch.equal(pair[0], pair[1])


@pytest.mark.parametrize(
    "options",
    [{"id2label": names} for names in ([], "cat", {"x": "cat"}, {-1: "cat"}, {0: 1}, {0: None}, {"9" * 99: "cat"})]
    + [{"latent_scale": scale} for scale in (0, -1, math.inf, math.nan, "1", True, None)],
)
def test_a_damaged_index(of_classes, options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
        ClassConditionalPipeline(of_classes.transformer, of_classes.scheduler, **options)
