"""Finding the self-attentions of timm's vision transformers, replacing them, and restoring them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .token_mixer import GSPNTokenMixer, MapSize

MODELS = (VisionTransformer, Eva)
"""The models that an adapter can be mounted on. DeiT, DINOv2, SigLIP are of the first, PE and DINOv3 of the second."""

_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is one of :data:`MODELS` whose tokens form a map.

    Raises:
        TypeError: it is of another class.
        ValueError: it drops patches, or its patch embedding does not know the size of its map.
    """
    kind = type(model).__name__
    if not isinstance(model, MODELS):
        inner = next(
            (one for one in ("model", "_orig_mod", "module") if isinstance(getattr(model, one, None), MODELS)), None
        )
        names = " or ".join(one.__name__ for one in MODELS)
        remedy = f"pass the model inside it, .{inner}" if inner else f"pass a model whose class is timm's {names}"
        why = ""
        parts = model.modules() if isinstance(model, nn.Module) else ()
        if any(hasattr(module, "window_size") for module in parts):
            why = ", whose windows or relative positions are part of its attention"
        raise TypeError(f"an adapter cannot be mounted on a {kind}{why}; {remedy}.")
    options: Any = model
    rate = getattr(options.patch_drop, "prob", 0.0)
    if rate:
        raise ValueError(
            f"this {kind} drops patches in training (patch_drop_rate={rate:g}), and the rest is not a map; build it "
            "with patch_drop_rate=0."
        )
    if not hasattr(options.patch_embed, "dynamic_feat_size"):
        raise ValueError(
            f"the patch embedding of this {kind}, a {type(options.patch_embed).__name__}, does not say how large its "
            "map is (dynamic_feat_size); use a model with timm's PatchEmbed."
        )


def check_attention(name: str, block: nn.Module) -> Any:
    """The attention of a block, if a mixer can take its place.

    Raises:
        RuntimeError: it has been replaced already.
        ValueError: it has a part that GSPN does not support.
    """
    attention: Any = getattr(block, "attn", None)
    if isinstance(attention, GSPNTokenMixer):
        raise RuntimeError(f"{name} has been replaced already: unmount that adapter first.")
    if not isinstance(attention, _ATTENTIONS):
        kind = f"a {type(block).__name__} without one" if attention is None else f"a {type(attention).__name__}"
        known = ", ".join(one.__name__ for one in _ATTENTIONS)
        raise ValueError(f"{name} is {kind}; GSPN replaces {known}. Keep this layer (keep_attention).")
    for part in ("norm", "gate"):
        module = getattr(attention, part, None)
        if module is not None and not isinstance(module, nn.Identity):
            raise ValueError(
                f"{name} has a {type(module).__name__} .{part} between mixing and projection, which GSPN does not "
                "have; keep this layer (keep_attention)."
            )
    for part in ("qkv", "v_proj", "proj"):
        linear = getattr(attention, part, None)
        if linear is not None and not isinstance(linear, nn.Linear):
            kind = f"{type(linear).__module__}.{type(linear).__name__}"
            raise ValueError(
                f"{name}.{part} is a {kind} and not PyTorch's Linear: what it "
                "adds to the weights would be lost. Merge or remove it first, or keep this layer (keep_attention)."
            )
    value, proj = value_projection(attention)[0], attention.proj
    widths = {*value.shape, proj.in_features, proj.out_features}
    if len(widths) > 1:
        raise ValueError(
            f"{name} maps between the widths {sorted(widths)}; a mixer has one. Keep this layer (keep_attention)."
        )
    return attention


def value_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projection to the values of an attention, which may be part of a fused one."""
    if attention.qkv is None:
        return attention.v_proj.weight, attention.v_proj.bias
    weight, bias = attention.qkv.weight, attention.qkv.bias
    third = weight.shape[0] // 3
    if getattr(attention, "v_bias", None) is not None:
        return weight[-third:], attention.v_bias
    return weight[-third:], None if bias is None else bias[-third:]


@dataclass
class Mount:
    """The mixers mounted on a model, and the state that unmounting restores."""

    model: Any
    blocks: dict[int, Any]
    attentions: dict[int, nn.Module]
    mixers: dict[int, Any]
    handle: RemovableHandle
    dtype: torch.dtype

    @classmethod
    def make(cls, model: Any, mixers: Mapping[int, Any]) -> Mount:
        """Replace the attentions of these blocks, in the dtype and on the device of the model.

        Raises:
            RuntimeError: an attention has been replaced already, or weights are missing.
            TypeError: the model is not one of :data:`MODELS`.
            ValueError: the model has other blocks or dimensions.
        """
        check_model(model)
        if any(isinstance(module, GSPNTokenMixer) for module in model.modules()):
            raise RuntimeError(f"this {type(model).__name__} has an adapter mounted already: unmount that one first.")
        if max(mixers) >= len(model.blocks):
            raise ValueError(
                f"the adapter replaces blocks.{max(mixers)}.attn and this {type(model).__name__} has "
                f"{len(model.blocks)} blocks: the adapter was made for another model."
            )
        blocks = {index: model.blocks[index] for index in mixers}
        attentions = {index: check_attention(f"blocks.{index}.attn", block) for index, block in blocks.items()}
        for index, mixer in mixers.items():
            for what, own, theirs in (
                ("channels", mixer.dim, attentions[index].proj.in_features),
                ("class and register tokens", mixer.prefix_tokens, model.num_prefix_tokens),
            ):
                if own != theirs:
                    raise ValueError(
                        f"this {type(model).__name__} has {theirs} {what} and the adapter {own}: the adapter was made "
                        "for another model."
                    )
            weights = {"adapter": mixer.proj.weight, "model": attentions[index].proj.weight}
            without = [name for name, weight in weights.items() if weight.is_meta]
            if len(without) == 1:
                raise RuntimeError(
                    f"the {without[0]} is on the meta device and has no weights for blocks.{index}.attn: load them "
                    f"first (to_empty and load_state_dict), or build both there."
                )
        map_size = MapSize()
        for index, mixer in mixers.items():
            weight = attentions[index].proj.weight
            mixer.to(weight.device, weight.dtype).train(attentions[index].training)
            mixer.map_size = map_size
            blocks[index].attn = mixer
        handle = model.patch_embed.register_forward_hook(map_size.record)
        dtype = next(iter(attentions.values())).proj.weight.dtype
        return cls(model, blocks, attentions, dict(mixers), handle, dtype)

    def undo(self) -> None:
        """Restore the attentions, in the dtype and on the devices that the model has now.

        Raises:
            RuntimeError: something else has replaced a mixer.
        """
        for index, block in self.blocks.items():
            if block.attn is not self.mixers[index]:
                raise RuntimeError(
                    f"blocks.{index}.attn is a {type(block.attn).__name__}, no longer the adapter's mixer: what "
                    "replaced it would be lost. Undo that first."
                )
        for index, block in self.blocks.items():
            weight = self.mixers[index].proj.weight
            attention: Any = self.attentions[index]
            attention.to(weight.device)
            if weight.dtype != self.dtype:
                attention.to(weight.dtype)
            block.attn = attention.train(self.mixers[index].training)
            self.mixers[index].map_size = None
        self.handle.remove()
