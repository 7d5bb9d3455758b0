"""``GSPNAdapter``: GSPN mixers that replace the self-attentions of a text-to-image model, as a separate component."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .._files import printable
from ..ops.validation import check_reference_lines, check_segment
from .mounting import Mount, check_attention, check_model, self_attention_blocks
from .token_mixer import GSPNTokenMixer

__all__ = ["GSPNAdapter", "ModelMixin"]

Model = TypeVar("Model", bound=ModelMixin)

Lines = int | None | Mapping[str, int | None]
"""A number of lines for all layers, or numbers by level or name."""

_NAME = re.compile(r"[a-z][a-z0-9_]*(\.([a-z][a-z0-9_]*|[0-9]+))*", re.ASCII)
_LONGEST_NAME = 500

_LEVELS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


class GSPNAdapter(ModelMixin, ConfigMixin):
    r"""GSPN mixers for the self-attentions of a model, separate from the model.

    :meth:`from_model` makes an adapter for a :class:`diffusers.UNet2DConditionModel` (Stable Diffusion 1.5, 2.1, XL and
    smaller ones), a :class:`diffusers.PixArtTransformer2DModel` or a :class:`diffusers.DiTTransformer2DModel`.
    :meth:`mount` replaces the ``attn1`` of the blocks with its mixers, and :meth:`unmount` restores the attentions. A
    mounted model works in every pipeline and at any height and width; each mixer gets those of its map. The adapter is
    saved and loaded separately; its weights have the same names and the same order as in the mounted model.

    Args:
        layers: The options of each :class:`GSPNTokenMixer`, by the name of the attention that it replaces. Their order
            has no meaning: diffusers sorts the keys of the configurations that it writes.

    Raises:
        TypeError: An option is unknown or of another type.
        ValueError: An option is out of range, a name is none of a module, or there are no layers.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DConditionModel
        >>> from gspn.diffusers import GSPNAdapter
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ... )
        >>> adapter = GSPNAdapter.from_model(unet, segment={"down.0": 4})
        >>> noisy, text = torch.randn(1, 4, 16, 24), torch.randn(1, 5, 8)
        >>> with adapter.mounted(unet):
        ...     unet(noisy, 10, text).sample.shape
        torch.Size([1, 4, 16, 24])
    """

    _no_split_modules = ["GSPNTokenMixer"]  # noqa: RUF012  (as diffusers declares them)

    @register_to_config
    def __init__(self, *, layers: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not layers or not isinstance(layers, Mapping):
            raise ValueError(
                f"layers={printable(repr(layers))[:80]}: an adapter needs at least one layer, with its name and its "
                "options; use GSPNAdapter.from_model."
            )
        self._mount: Mount | None = None
        for name in sorted(layers, key=_place):
            _add_mixer(self, name, layers[name])
        self._weights = frozenset(self.state_dict())

    @classmethod
    def from_model(
        cls, model: ModelMixin, *, layers: Sequence[str] | None = None, proxy_dim: int | None = None,
        groups: int | None = None, segment: Lines = None, reference_lines: Lines = None, skip: bool = True,
        proxy_bias: bool = False, copy_projections: bool = True,
    ) -> GSPNAdapter:  # fmt: skip
        """Make an adapter for a model. The model is not changed, and no reference to it is kept.

        Args:
            model: A ``UNet2DConditionModel``, ``PixArtTransformer2DModel`` or ``DiTTransformer2DModel``.
            layers: The self-attentions to replace, None for all: levels such as ``"down.0"``, ``"mid"``, ``"up.1"``, or
                ``"down"`` for all down levels; or names of modules that contain them, such as
                ``"mid_block.attentions.0"`` or ``"transformer_blocks.3"``.
            proxy_dim: Channels of the proxy; None for an eighth of each layer's.
            groups: Sets of taps; None for a set for each channel, 1 for taps that all channels share.
            segment: Lines after which the scans restart: one number for all layers, None for global scans, or numbers
                by level or name. The most specific name counts for a layer; layers without one have global scans.
            reference_lines: Lines at which lam is as it is, usually those of each layer's map in training, given as
                ``segment`` is: see :meth:`set_reference_lines`. None for the paper's operator.
            skip: Whether to add the input-dependent skip.
            proxy_bias: Whether the proxies have a bias, so that taps and gates can have a constant part.
                ``gspn t2i distill`` needs it to fit them to the attention before training.
            copy_projections: Whether to start from the attentions' ``to_v`` and ``to_out``.

        Raises:
            RuntimeError: An attention has been replaced already.
            TypeError: The model is of another class, ``layers`` is not a list of names, or a number of lines is not an
                integer.
            ValueError: A level or name has no self-attention, an option is out of range, or an attention has an option
                that GSPN does not support.

        Example:
            >>> from diffusers import PixArtTransformer2DModel
            >>> from gspn.diffusers import GSPNAdapter
            >>> model = PixArtTransformer2DModel(2, 8, num_layers=2, cross_attention_dim=16, sample_size=16)
            >>> list(GSPNAdapter.from_model(model, layers=["transformer_blocks.1"], groups=1).mixers)
            ['transformer_blocks.1.attn1']
        """
        check_model(model)
        blocks = self_attention_blocks(model)
        if not blocks:
            raise ValueError(f"this {type(model).__name__} has no self-attention in a transformer block to replace.")
        chosen = list(blocks)
        if layers is not None:
            if isinstance(layers, str):
                raise TypeError(f"{layers=} is one name; pass a list of them, [{layers!r}].")
            if not isinstance(layers, Sequence):
                raise TypeError(f"{layers=}: has to be a list of names of levels or modules.")
            requested = {name for one in layers for name in _within(one, chosen)}
            chosen = [name for name in chosen if name in requested]
        segments, references = _lines_of_layers(segment, chosen), _lines_of_layers(reference_lines, chosen)
        attentions = {name: check_attention(name, blocks[name]) for name in chosen}
        options = {
            name: {
                "dim": one.query_dim, "proxy_dim": proxy_dim, "groups": groups, "segment": segments[name],
                "reference_lines": references[name], "skip": skip, "proxy_bias": proxy_bias,
                "bias": one.to_v.bias is not None, "out_bias": one.to_out[0].bias is not None, "dropout": one.dropout,
            }
            for name, one in attentions.items()
        }  # fmt: skip
        adapter = cls(layers=options)
        if copy_projections:
            for name, mixer in adapter.mixers.items():
                mixer.to_v.load_state_dict(attentions[name].to_v.state_dict())
                mixer.to_out[0].load_state_dict(attentions[name].to_out[0].state_dict())
        return adapter

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mount": None}  # a copy, such as an EMA, is not mounted and does not copy the model

    @property
    def mixers(self) -> dict[str, GSPNTokenMixer]:
        """The mixers, by the name of the attention that each replaces."""
        return {name: module for name, module in self.named_modules() if isinstance(module, GSPNTokenMixer)}

    @property
    def mounted_on(self) -> ModelMixin | None:
        """The model that the adapter is mounted on, or None."""
        return None if self._mount is None else self._mount.model

    def mount(self, model: ModelMixin) -> GSPNAdapter:
        """Replace the model's self-attentions with the mixers.

        The mixers take the model's dtype and devices. Until :meth:`unmount`, the model's ``save_pretrained`` writes
        what its class needs, its other weights as they are now and the attentions that the mixers replaced, and warns
        that the mixers are the adapter's to save. Its ``add_adapter`` warns where a LoRA adapts mixers: in a model
        without them, such a LoRA changes attentions of the same names.

        Args:
            model: A model of the architecture that the adapter was made for.

        Returns:
            The adapter.

        Raises:
            RuntimeError: The adapter is mounted already, the model has another adapter, an attention has been replaced
                or has a LoRA, or weights are offloaded.
            TypeError: The model is of another class.
            ValueError: The model lacks layers or has other dimensions.
        """
        if self._mount is not None:
            raise RuntimeError(f"the adapter is mounted on a {type(self._mount.model).__name__}: unmount() it first.")
        self._mount = Mount.make(model, self.mixers)
        return self

    def unmount(self) -> None:
        """Restore the model's attentions; it then computes the same as before, bit for bit.

        Raises:
            RuntimeError: The adapter is not mounted, a LoRA is loaded, or something else has replaced a mixer.
        """
        mount = self._mounted_or_raise()
        self._check_weights("unmounted")
        mount.undo()
        self._mount = None

    @contextmanager
    def mounted(self, model: Model) -> Iterator[Model]:
        """Mount the adapter on ``model`` within the block; raises as :meth:`mount` and :meth:`unmount` do."""
        self.mount(model)
        try:
            yield model
        finally:
            self.unmount()

    def set_segment(self, segment: Lines) -> None:
        """Set the number of lines after which the scans restart; no weight depends on it, and it is saved.

        A scan accumulates its input along the lines. Over maps larger than in training its states grow larger than in
        training, unless it restarts after as many lines as the maps in training had, or has ``reference_lines``.

        Args:
            segment: As for :meth:`from_model`.

        Raises:
            TypeError: A number of lines is not an integer.
            ValueError: A number is below 1, or a level or name has no layer.

        Example:
            >>> from diffusers import PixArtTransformer2DModel
            >>> from gspn.diffusers import GSPNAdapter
            >>> model = PixArtTransformer2DModel(2, 8, num_layers=2, cross_attention_dim=16, sample_size=16)
            >>> adapter = GSPNAdapter.from_model(model)
            >>> adapter.set_segment({"transformer_blocks.1": 8})
            >>> [mixer.scan.segment for mixer in adapter.mixers.values()]
            [None, 8]
        """
        self._set_lines("segment", segment, check_segment)

    def set_reference_lines(self, lines: Lines) -> None:
        """Set the number of lines at which lam is as it is; no weight depends on it, and it is saved.

        Over L lines lam is multiplied by ``lines / L`` (L: those of the segment where that is shorter), so that at any
        size the states are as large as over ``lines`` lines. ``gspn t2i distill`` sets the lines of each layer's map in
        training, so that the adapter works beyond that size without restarts.

        Args:
            lines: As ``reference_lines`` of :meth:`from_model`.

        Raises:
            TypeError: A number of lines is not an integer.
            ValueError: A number is below 1, or a level or name has no layer.

        Example:
            >>> from diffusers import PixArtTransformer2DModel
            >>> from gspn.diffusers import GSPNAdapter
            >>> model = PixArtTransformer2DModel(2, 8, num_layers=2, cross_attention_dim=16, sample_size=16)
            >>> adapter = GSPNAdapter.from_model(model)
            >>> adapter.set_reference_lines(model.config.sample_size // model.config.patch_size)
            >>> [mixer.scan.reference_lines for mixer in adapter.mixers.values()]
            [8, 8]
        """
        self._set_lines("reference_lines", lines, check_reference_lines)

    def _set_lines(self, option: str, lines: Lines, check: Callable[[Any], None]) -> None:
        mixers = self.mixers
        by_name = _lines_of_layers(lines, list(mixers))
        for one in by_name.values():
            check(one)
        for name, mixer in mixers.items():
            setattr(mixer.scan, option, by_name[name])
        layers = {name: {**options, option: by_name[name]} for name, options in self.config["layers"].items()}
        self.register_to_config(layers=layers)

    def freeze_model(self, layers: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Freeze the mounted model's parameters, except the adapter's.

        Args:
            layers: The levels or names of the mixers that are not frozen, as for :meth:`from_model`; None for all.

        Returns:
            The parameters that are not frozen, for an optimiser.

        Raises:
            RuntimeError: The adapter is not mounted.
            TypeError: ``layers`` holds something that is not a name.
            ValueError: A level or name has no mixer.
        """
        mixers = self.mixers
        free = list(mixers) if layers is None else [name for one in layers for name in _within(one, list(mixers))]
        self._mounted_or_raise().model.requires_grad_(False)
        for name in free:
            mixers[name].requires_grad_(True)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the adapter, mounted or not, as :meth:`diffusers.ModelMixin.save_pretrained` does.

        Raises:
            RuntimeError: A LoRA is loaded.
        """
        self._check_weights("saved")
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Not supported: an adapter computes nothing by itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("an adapter is not called: mount(model) it, and call the model.")

    def _mounted_or_raise(self) -> Mount:
        if self._mount is None:
            raise RuntimeError("the adapter is not mounted; mount(model) it first.")
        return self._mount

    def _check_weights(self, done: str) -> None:
        # A LoRA also renames the weights that it adds to; its own are named first, because they are clearer.
        foreign = sorted(set(self.state_dict()) - self._weights, key=lambda name: (".base_layer." in name, name))
        if foreign:
            raise RuntimeError(
                f"the adapter cannot be {done} while it holds {foreign[0]} (and {len(foreign) - 1} more): unload the "
                "LoRA first (pipeline.unload_lora_weights())."
            )


def _add_mixer(root: nn.Module, name: str, options: Any) -> None:
    """Add a mixer as the submodule ``name`` of ``root``, so that its weights are named as in the mounted model."""
    shown = printable(name)[:80]
    if not isinstance(options, Mapping) or not _NAME.fullmatch(str(name)) or len(name) > _LONGEST_NAME:
        raise ValueError(f"layer {shown!r}: its name has to be that of an attention, and its options a dictionary.")
    *path, last = name.split(".")
    for part in path:
        _check_attribute(root, part, shown, new=part not in root._modules)
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    _check_attribute(root, last, shown, new=True)
    root.add_module(last, GSPNTokenMixer(**options))


def _check_attribute(module: nn.Module, name: str, layer: str, *, new: bool) -> None:
    if isinstance(module, GSPNTokenMixer) or (new and hasattr(module, name)):
        raise ValueError(f"layer {layer!r}: {name!r} is something else already; name a layer as the model does.")


def _place(name: str) -> list[tuple[bool, int, bool, str]]:
    """The key that sorts names as a model has its modules: numbers by value, and the middle of a UNet last."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part == "mid_block", part)
        for part in str(name)[:_LONGEST_NAME].split(".")
    ]


def _prefix(level: str) -> str:
    if not isinstance(level, str):
        raise TypeError(f"{level!r} is not the name of a level or of a module, such as 'down.0'.")
    first, dot, rest = level.partition(".")
    return _LEVELS.get(first, first) + dot + rest


def _within(level: str, names: Sequence[str]) -> list[str]:
    prefix = _prefix(level)
    within = [name for name in names if name == prefix or name.startswith(prefix + ".")]
    if not within:
        known = sorted({_level(name) for name in names})
        raise ValueError(f"{level!r} has no self-attention to replace; the model has some in {', '.join(known)}.")
    return within


def _level(name: str) -> str:
    parts = name.split(".")
    short = {long: level for level, long in _LEVELS.items()}.get(parts[0])
    if short is None:
        return ".".join(parts[:2])
    return short if short == "mid" else f"{short}.{parts[1]}"


def _lines_of_layers(lines: Lines, names: Sequence[str]) -> dict[str, int | None]:
    if not isinstance(lines, Mapping):
        return dict.fromkeys(names, lines)
    by_name: dict[str, int | None] = dict.fromkeys(names)
    for level in sorted(lines, key=lambda level: len(_prefix(level))):
        by_name.update(dict.fromkeys(_within(level, names), lines[level]))
    return by_name
