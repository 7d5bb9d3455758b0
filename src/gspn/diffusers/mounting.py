"""Where a model of diffusers has self-attention over maps, and how something else takes its place and gives it back.

Tokens do not say what map they were flattened from. A hook before each host, the module that flattens a map and runs
its blocks, adds the map's height and width to the ``cross_attention_kwargs`` that the blocks hand to their attentions,
and hooks before the attentions that were not replaced take them out again. Nothing is stored: under gradient
checkpointing a block that runs again gets the same arguments again, and a compiled model sees arguments alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from .token_mixer import GSPNTokenMixer

MODELS = (UNet2DConditionModel, PixArtTransformer2DModel, DiTTransformer2DModel)
"""What can be mounted on."""

_HOSTS = (Transformer2DModel, PixArtTransformer2DModel, DiTTransformer2DModel)
_ATTENTION = "attn1"
_MAP_SIZE = "map_size"


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is one of :data:`MODELS`."""
    if isinstance(model, MODELS):
        return
    names = ", ".join(one.__name__ for one in MODELS)
    wrapped = next((name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), MODELS)), None)
    remedy = f"pass the model inside it, .{wrapped}" if wrapped else f"pass a {names}"
    raise TypeError(f"a {type(model).__name__} cannot be mounted on; {remedy}.")


def self_attention_blocks(model: nn.Module) -> dict[str, BasicTransformerBlock]:
    """The blocks whose ``attn1`` is self-attention over a map, by the name of that ``attn1``.

    Where ``only_cross_attention`` makes ``attn1`` a second cross-attention there is none.
    """
    blocks = {}
    for prefix, host in _hosts(model):
        for index, block in host.transformer_blocks.named_children():  # type: ignore[reportCallIssue]
            if not block.only_cross_attention:
                blocks[".".join(filter(None, (prefix, "transformer_blocks", index, _ATTENTION)))] = block
    return blocks


def check_attention(name: str, block: BasicTransformerBlock) -> Any:
    """A block's ``attn1``, an ``Attention`` with all its projections, where a mixer can stand for it.

    Raises:
        RuntimeError: it has been replaced already, or a LoRA was loaded into it.
        ValueError: it does what a mixer does not.
    """
    attention: Any = block.attn1
    if isinstance(attention, GSPNTokenMixer):
        raise RuntimeError(f"{name} is a {type(attention).__name__} already: unmount the adapter that put it there.")
    if not isinstance(attention, Attention):
        raise RuntimeError(f"{name} is a {type(attention).__name__}, not diffusers' Attention: undo what replaced it.")
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        found = attention.get_submodule(layer)
        if not isinstance(found, nn.Linear):
            raise RuntimeError(
                f"{name}.{layer} is a {type(found).__module__}.{type(found).__name__}: a LoRA would be set aside with "
                "the attention. Unload it (pipeline.unload_lora_weights()), mount, and load it again."
            )
    # What else Attention can do is for other places than a transformer block's first attention.
    inexpressible = {
        "group_norm": attention.group_norm is not None,
        "spatial_norm": attention.spatial_norm is not None,
        "norm_q": attention.norm_q is not None,
        "norm_k": attention.norm_k is not None,
        "residual_connection": attention.residual_connection,
        "rescale_output_factor": attention.rescale_output_factor != 1,
        "added_kv_proj_dim": attention.added_kv_proj_dim is not None,
        "is_causal": attention.is_causal,
    }
    given = {option: getattr(attention, option) for option, is_set in inexpressible.items() if is_set}
    if given:
        raise ValueError(f"{name} has {given}, which GSPN does not express; leave this layer out.")
    widths = {attention.query_dim, attention.inner_dim, attention.inner_kv_dim, attention.out_dim}
    if len(widths) > 1:
        raise ValueError(f"{name} maps between the widths {sorted(widths)}; a mixer has one. Leave this layer out.")
    return attention


@dataclass
class Mount:
    """Mixers in the place of attentions, and what it takes to undo it."""

    model: ModelMixin
    blocks: dict[str, BasicTransformerBlock]
    attentions: dict[str, Attention]
    mixers: dict[str, GSPNTokenMixer]
    handles: list[RemovableHandle]
    dtype: torch.dtype
    devices: dict[str, torch.device]
    saver: Any

    @classmethod
    def make(cls, model: ModelMixin, mixers: Mapping[str, GSPNTokenMixer]) -> Mount:
        """Put ``mixers`` in the place of the attentions of their names, with the dtype and devices of the model.

        Raises:
            RuntimeError: something else has replaced an attention, weights are offloaded, or the mixers' are missing.
            TypeError: the model is none of :data:`MODELS`.
            ValueError: layers are missing or have other dimensions.
        """
        check_model(model)
        if any(isinstance(module, GSPNTokenMixer) for module in model.modules()):
            raise RuntimeError(f"this {type(model).__name__} has an adapter mounted already: unmount that one first.")
        blocks = self_attention_blocks(model)
        missing = [name for name in mixers if name not in blocks]
        if missing:
            raise ValueError(
                f"this {type(model).__name__} has no self-attention {missing[0]} ({len(missing)} of the adapter's "
                f"{len(mixers)} layers are missing): the adapter was made for another model."
            )
        attentions = {name: check_attention(name, blocks[name]) for name in mixers}
        for name, attention in attentions.items():
            if attention.query_dim != mixers[name].dim:
                raise ValueError(
                    f"{name} has {attention.query_dim} channels and the adapter's mixer {mixers[name].dim}: the "
                    "adapter was made for another model."
                )
        devices = {name: _device(name, blocks[name]) for name in mixers}
        empty = [name for name, mixer in mixers.items() if any(p.is_meta for p in mixer.parameters())]
        if empty:
            raise RuntimeError(
                f"the adapter has no weights for {empty[0]}: the file that it was loaded from lacks them."
            )

        dtype = model.dtype
        for name, mixer in mixers.items():
            mixer.to(devices[name], dtype).train(attentions[name].training)
            blocks[name].attn1 = mixer  # type: ignore[reportAttributeAccessIssue]
        saver = vars(model).get("save_pretrained")
        model.save_pretrained = functools.partial(_refuse_to_save, type(model).__name__, len(mixers))  # type: ignore[reportAttributeAccessIssue]
        return cls(
            model,
            {name: blocks[name] for name in mixers},
            attentions,
            dict(mixers),
            _add_hooks(model),
            dtype,
            devices,
            saver,
        )

    def undo(self) -> None:
        """Put the attentions back.

        They follow where the model's other weights went in between: another device, another dtype.

        Raises:
            RuntimeError: something else has replaced a mixer, or weights are offloaded.
        """
        replaced = [name for name, block in self.blocks.items() if block.attn1 is not self.mixers[name]]
        if replaced:
            found = type(self.blocks[replaced[0]].attn1).__name__
            raise RuntimeError(
                f"{replaced[0]} (and {len(replaced) - 1} more) is a {found}, no longer the adapter's mixer: what "
                "replaced it would be lost. Undo that first."
            )
        devices = {name: _device(name, block) for name, block in self.blocks.items()}
        dtype = self.model.dtype
        for name, block in self.blocks.items():
            attention = self.attentions[name]
            if devices[name] != self.devices[name]:
                attention.to(devices[name])
            if dtype != self.dtype:
                attention.to(dtype)
            block.attn1 = attention.train(self.mixers[name].training)
        for handle in self.handles:
            handle.remove()
        del self.model.save_pretrained
        if self.saver is not None:
            self.model.save_pretrained = self.saver


def _hosts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, _HOSTS):
            yield name, module


def _add_hooks(model: nn.Module) -> list[RemovableHandle]:
    handles = []
    for _, host in _hosts(model):
        found = [attention for block in host.transformer_blocks for attention in (block.attn1, block.attn2)]
        if not any(isinstance(one, GSPNTokenMixer) for one in found):
            continue
        names = tuple(inspect.signature(type(host).forward).parameters)[1:]
        give = functools.partial(_give_map_size, names, host.config.get("patch_size") or 1)
        handles.append(host.register_forward_pre_hook(give, with_kwargs=True))
        others = [one for one in found if isinstance(one, Attention)]
        handles += [one.register_forward_pre_hook(_take_map_size, with_kwargs=True) for one in others]
    return handles


def _give_map_size(
    names: tuple[str, ...], patch: int, _host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    height, width = given["hidden_states"].shape[-2:]
    further = given.get("cross_attention_kwargs") or {}
    given["cross_attention_kwargs"] = {**further, _MAP_SIZE: (height // patch, width // patch)}
    return (), given


def _take_map_size(
    _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != _MAP_SIZE}


def _device(name: str, block: BasicTransformerBlock) -> torch.device:
    device = next(block.ff.parameters()).device
    if device.type == "meta":
        raise RuntimeError(
            f"the weights beside {name} are on the meta device: mount and unmount before offloading is enabled, or "
            "after its hooks are removed (pipeline.remove_all_hooks())."
        )
    return device


def _refuse_to_save(model: str, count: int, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"this {model} has GSPN in the place of {count} self-attentions. Saved so, the stock class would find no "
        "queries and keys and leave them uninitialised. Save the adapter (adapter.save_pretrained), and the model "
        "after adapter.unmount()."
    )
