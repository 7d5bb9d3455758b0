"""Finding the self-attentions of a diffusers model, replacing them, and restoring them.

A mixer needs the height and width of the map that its tokens were flattened from. A hook before each host, the module
that flattens a map and runs its blocks, adds them to the ``cross_attention_kwargs`` that the blocks pass to their
attentions; hooks before the attentions that were not replaced remove them again. Nothing is stored: a block that is
recomputed under gradient checkpointing gets the same arguments, and a compiled model sees nothing but arguments.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
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
"""The models that an adapter can be mounted on."""

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
    raise TypeError(f"an adapter cannot be mounted on a {type(model).__name__}; {remedy}.")


def self_attention_blocks(model: nn.Module) -> dict[str, BasicTransformerBlock]:
    """The blocks whose ``attn1`` is self-attention over a map, by the name of that ``attn1``.

    With ``only_cross_attention``, ``attn1`` is a second cross-attention, and the block is left out.
    """
    blocks = {}
    for prefix, host in _hosts(model):
        for index, block in host.transformer_blocks.named_children():  # type: ignore[reportCallIssue]
            if not block.only_cross_attention:
                blocks[".".join(filter(None, (prefix, "transformer_blocks", index, _ATTENTION)))] = block
    return blocks


def check_attention(name: str, block: BasicTransformerBlock) -> Any:
    """A block's ``attn1``, checked to be an ``Attention`` that a mixer can replace.

    Raises:
        RuntimeError: It has been replaced already, or a LoRA was loaded into it.
        ValueError: It has an option that a mixer does not have.
    """
    attention: Any = block.attn1
    if isinstance(attention, GSPNTokenMixer):
        raise RuntimeError(f"{name} is a {type(attention).__name__} already: unmount the adapter that put it there.")
    if not isinstance(attention, Attention):
        raise RuntimeError(f"{name} is a {type(attention).__name__}, not diffusers' Attention: undo what replaced it.")
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        linear = attention.get_submodule(layer)
        if not isinstance(linear, nn.Linear):
            raise RuntimeError(
                f"{name}.{layer} is a {type(linear).__module__}.{type(linear).__name__}: a LoRA would have no effect "
                "on the mixer. Unload it (pipeline.unload_lora_weights()), mount, and load it again."
            )
    # Attention has further options, but none that a transformer block uses for its first attention.
    unsupported = {
        "group_norm": attention.group_norm is not None, "spatial_norm": attention.spatial_norm is not None,
        "norm_q": attention.norm_q is not None, "norm_k": attention.norm_k is not None,
        "residual_connection": attention.residual_connection,
        "rescale_output_factor": attention.rescale_output_factor != 1,
        "added_kv_proj_dim": attention.added_kv_proj_dim is not None, "is_causal": attention.is_causal,
    }  # fmt: skip
    values = {option: getattr(attention, option) for option, is_set in unsupported.items() if is_set}
    if values:
        raise ValueError(f"{name} has {values}, which GSPN does not support; leave this layer out.")
    widths = {attention.query_dim, attention.inner_dim, attention.inner_kv_dim, attention.out_dim}
    if len(widths) > 1:
        raise ValueError(f"{name} maps between the widths {sorted(widths)}; a mixer has one. Leave this layer out.")
    return attention


@dataclass
class Mount:
    """The mixers mounted on a model, and the state that unmounting restores."""

    model: ModelMixin
    blocks: dict[str, BasicTransformerBlock]
    attentions: dict[str, Attention]
    mixers: dict[str, GSPNTokenMixer]
    handles: list[RemovableHandle]
    dtype: torch.dtype
    devices: dict[str, torch.device]
    overridden: dict[str, Any]

    @classmethod
    def make(cls, model: ModelMixin, mixers: Mapping[str, GSPNTokenMixer]) -> Mount:
        """Replace the attentions with the ``mixers`` of the same names, in the dtype and on the devices of the model.

        Raises:
            RuntimeError: An attention has been replaced already, or weights are offloaded or missing.
            TypeError: The model is not one of :data:`MODELS`.
            ValueError: Layers are missing or have other dimensions.
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
        replaced = {name: blocks[name] for name in mixers}
        mount = cls(model, replaced, attentions, dict(mixers), _add_hooks(model), dtype, devices, {})
        # Bound methods: a copy of the model gets those of a copy of the mount.
        for name, method in (("save_pretrained", mount.save_pretrained), ("add_adapter", mount.add_adapter)):
            if hasattr(model, name):
                mount.overridden[name] = vars(model).get(name)
                setattr(model, name, method)
        return mount

    def undo(self) -> None:
        """Restore the attentions, in the dtype and on the devices that the model has now.

        Raises:
            RuntimeError: Something else has replaced a mixer, or weights are offloaded.
        """
        replaced = [name for name, block in self.blocks.items() if block.attn1 is not self.mixers[name]]
        if replaced:
            kind = type(self.blocks[replaced[0]].attn1).__name__
            raise RuntimeError(
                f"{replaced[0]} (and {len(replaced) - 1} more) is a {kind}, no longer the adapter's mixer: what "
                "replaced it would be lost. Undo that first."
            )
        self._put_attentions_back()
        for handle in self.handles:
            handle.remove()
        for name, own in self.overridden.items():
            delattr(self.model, name)
            if own is not None:
                setattr(self.model, name, own)

    def _put_attentions_back(self) -> None:
        devices = {name: _device(name, block) for name, block in self.blocks.items()}
        dtype = self.model.dtype
        for name, block in self.blocks.items():
            attention = self.attentions[name]
            if devices[name] != self.devices[name]:
                attention.to(devices[name])
            if dtype != self.dtype:
                attention.to(dtype)
            block.attn1 = attention.train(self.mixers[name].training)
        self.devices, self.dtype = devices, dtype

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as its class is: with the attentions, not the mixers, whose names that class does not have.

        What was trained beside the mixers is saved; the adapter saves the mixers. Both loaded and mounted again compute
        the same.
        """
        kind = type(self.model).__name__
        added = next((name for name in self.model.state_dict() if ".base_layer." in name), None)
        if added is not None:
            raise RuntimeError(
                f"this {kind} cannot be saved while it holds a LoRA, at {added.partition('.base_layer')[0]}: unload "
                "the LoRA first (pipeline.unload_lora_weights())."
            )
        own = self.overridden["save_pretrained"] or functools.partial(type(self.model).save_pretrained, self.model)
        self._put_attentions_back()
        try:
            own(*args, **kwargs)
        finally:
            for name, block in self.blocks.items():
                block.attn1 = self.mixers[name]  # type: ignore[reportAttributeAccessIssue]
        warnings.warn(
            f"the {kind} was saved with its attentions, without the {len(self.mixers)} mixers mounted in their place: "
            "save those with adapter.save_pretrained, and mount the adapter on the loaded model.",
            stacklevel=2,
        )

    @functools.wraps(PeftAdapterMixin.add_adapter)
    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add a LoRA, and say which of its layers mean nothing without the mixers."""
        model: Any = self.model
        own = self.overridden["add_adapter"] or functools.partial(type(model).add_adapter, model)
        own(*args, **kwargs)
        layers = [
            f"{name}.{part}"
            for name, mixer in self.mixers.items()
            for part, module in mixer.named_modules()
            if hasattr(module, "lora_A")
        ]
        if layers:
            warnings.warn(
                f"{len(layers)} layers of this LoRA are in GSPN's mixers, such as {layers[0]}. An attention has layers "
                "of the same names and would take them without a word: load the LoRA only after mounting the adapter.",
                stacklevel=2,
            )


def _hosts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, _HOSTS):
            yield name, module


def _add_hooks(model: nn.Module) -> list[RemovableHandle]:
    handles = []
    for _, host in _hosts(model):
        attentions = [attention for block in host.transformer_blocks for attention in (block.attn1, block.attn2)]
        if not any(isinstance(one, GSPNTokenMixer) for one in attentions):
            continue
        names = tuple(inspect.signature(type(host).forward).parameters)[1:]
        add = functools.partial(_add_map_size, names, host.config.get("patch_size") or 1)
        handles.append(host.register_forward_pre_hook(add, with_kwargs=True))
        others = [one for one in attentions if isinstance(one, Attention)]
        handles += [one.register_forward_pre_hook(_remove_map_size, with_kwargs=True) for one in others]
    return handles


def _add_map_size(
    names: tuple[str, ...], patch: int, _host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    height, width = arguments["hidden_states"].shape[-2:]
    size = (height // patch, width // patch)
    arguments["cross_attention_kwargs"] = {**(arguments.get("cross_attention_kwargs") or {}), _MAP_SIZE: size}
    return (), arguments


def _remove_map_size(
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
