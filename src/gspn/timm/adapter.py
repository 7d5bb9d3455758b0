"""``GSPNAdapter``: GSPN mixers that replace the self-attentions of a vision transformer, as a separate component."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._errors import UsageError, require
from .._files import printable, read_json, read_tensors, replaced_directory, short
from ..models.saved import CONFIG, CONSTRUCTOR, WEIGHTS, check_numbers, check_size, check_weights, read_header, refusing
from ..ops.validation import check_reference_lines, check_segment
from .mounting import Mount, check_attention, check_model, value_projection
from .token_mixer import GSPNTokenMixer

Model = TypeVar("Model", bound=nn.Module)

_KIND = "gspn.timm.GSPNAdapter"


class GSPNAdapter(nn.Module):
    r"""GSPN mixers for the self-attentions of a vision transformer, separate from the model.

    :meth:`from_model` makes an adapter for timm's ``VisionTransformer`` (ViT, DeiT, DINOv2, SigLIP, CLIP) or ``Eva``
    (EVA, PE, DINOv3). :meth:`mount` puts its mixers in the place of ``blocks.N.attn``, and :meth:`unmount` restores the
    attentions. A mounted model keeps timm's interface: ``forward_features``, ``forward_intermediates``,
    ``set_input_size``, ``dynamic_img_size``, gradient checkpointing. The adapter is saved and loaded separately, with
    the names that its weights have in the mounted model.

    Args:
        layers: the indices of the blocks whose attention is replaced.
        dim: channels of a token.
        **options: further options of :class:`GSPNTokenMixer`, the same for all layers.

    Raises:
        TypeError: an option is unknown or of another type.
        ValueError: an option is out of range, or there are no layers.

    Example:
        >>> import timm, torch
        >>> from gspn.timm import GSPNAdapter
        >>> vit = timm.create_model("test_vit", dynamic_img_size=True).eval()
        >>> adapter = GSPNAdapter.from_model(vit, latent_dim=8, keep_attention=[0])
        >>> with adapter.mounted(vit), torch.no_grad():
        ...     vit.forward_features(torch.randn(1, 3, 64, 96)).shape  # a class token and 4 x 6 patches
        torch.Size([1, 25, 64])
    """

    def __init__(self, *, layers: Sequence[int], dim: int, **options: Any) -> None:
        super().__init__()
        valid = isinstance(layers, Sequence) and all(type(one) is int and one >= 0 for one in layers)
        if not valid or not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers={short(layers)}: has to be a list of different indices of blocks, at least one.")
        self.config: dict[str, Any] = {"layers": sorted(layers), "dim": dim, **_as_json(options)}
        # Weights are named as in the mounted model: blocks.3.attn.v.weight.
        self.blocks = nn.ModuleDict(
            {str(index): nn.ModuleDict({"attn": GSPNTokenMixer(dim, **options)}) for index in sorted(layers)}
        )
        self._mount: Mount | None = None

    @classmethod
    def from_model(
        cls, model: nn.Module, *, keep_attention: Sequence[int] = (), latent_dim: int | None = None,
        proxy_dim: int | None = None, groups: int | None = None, segment: int | None = None, skip: bool = True,
        proxy_bias: bool = True, normalize_scans: bool = True, copy_projections: bool = True,
    ) -> GSPNAdapter:  # fmt: skip
        """Make an adapter for a model. The model is not changed, and no reference to it is kept.

        Args:
            model: a ``VisionTransformer`` or ``Eva``.
            keep_attention: indices of blocks that keep their attention; negative ones count from the end. C-GSPN keeps
                3 of 27.
            latent_dim: channels that are scanned; None for all.
            proxy_dim: channels of the proxy; None for an eighth of those scanned.
            groups: sets of taps; None for a set for each channel, 1 for taps that all channels share.
            segment: lines after which the scans restart; None for global scans.
            skip: whether to add the input-dependent skip.
            proxy_bias: whether the proxies have a bias, so that taps and gates can have a constant part.
                ``gspn distill`` needs it to fit them to the attention before training.
            normalize_scans: whether to record the lines of the model's map as ``reference_lines``, so that the states
                are as large at any other size; False is the paper's operator.
            copy_projections: whether to start from the attentions' projections to values and to the output.

        Raises:
            RuntimeError: an attention has been replaced already.
            TypeError: the model is of another class, ``keep_attention`` is not a list, or a number of lines is not an
                integer.
            ValueError: an option is out of range, or an attention has a part that GSPN does not support, such as a
                LoRA.

        Example:
            >>> import timm
            >>> from gspn.timm import GSPNAdapter
            >>> adapter = GSPNAdapter.from_model(timm.create_model("test_vit"), keep_attention=[-1], groups=1)
            >>> list(adapter.mixers)
            ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn', 'blocks.3.attn', 'blocks.4.attn']
        """
        check_model(model)
        vit: Any = model
        depth = len(vit.blocks)
        if not isinstance(keep_attention, Sequence):
            raise TypeError(f"keep_attention={short(keep_attention)}: has to be a list of indices of blocks.")
        check_segment(segment)
        wrong = [one for one in keep_attention if type(one) is not int or not -depth <= one < depth]
        if wrong:
            raise ValueError(f"keep_attention has {wrong[0]!r}; the model has blocks 0 to {depth - 1}.")
        kept = {one % depth for one in keep_attention}
        layers = [index for index in range(depth) if index not in kept]
        if not layers:
            raise ValueError(f"keep_attention={list(keep_attention)} keeps all {depth} blocks; leave at least one out.")
        attentions = {index: check_attention(f"blocks.{index}.attn", vit.blocks[index]) for index in layers}
        first = attentions[layers[0]]
        height, width = vit.patch_embed.grid_size
        lines = min(max(height, width), segment or max(height, width))
        adapter = cls(
            layers=layers, dim=first.proj.in_features, prefix_tokens=vit.num_prefix_tokens, latent_dim=latent_dim,
            proxy_dim=proxy_dim, groups=groups, segment=segment, reference_lines=lines if normalize_scans else None,
            skip=skip, proxy_bias=proxy_bias, bias=value_projection(first)[1] is not None,
            out_bias=first.proj.bias is not None, dropout=first.proj_drop.p, device=first.proj.weight.device,
            dtype=first.proj.weight.dtype,
        )  # fmt: skip
        if copy_projections:
            with torch.no_grad():
                for index, mixer in adapter._by_index.items():
                    mixer.proj.load_state_dict(attentions[index].proj.state_dict())
                    weight, bias = value_projection(attentions[index])
                    mixer.v.weight.copy_(weight)
                    if bias is not None and mixer.v.bias is not None:
                        mixer.v.bias.copy_(bias)
        return adapter

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mount": None}  # a copy, such as an EMA, is not mounted and does not copy the model

    @property
    def _by_index(self) -> dict[int, Any]:  # the mixers' decorator hides what they have
        blocks: Any = self.blocks
        return {int(index): block["attn"] for index, block in blocks.items()}

    @property
    def mixers(self) -> dict[str, Any]:
        """The :class:`GSPNTokenMixer` of each layer, by the name of the attention that it replaces."""
        return {f"blocks.{index}.attn": mixer for index, mixer in self._by_index.items()}

    @property
    def mounted_on(self) -> nn.Module | None:
        """The model that the adapter is mounted on, or None."""
        return None if self._mount is None else self._mount.model

    def mount(self, model: nn.Module) -> GSPNAdapter:
        """Replace the model's self-attentions with the mixers, which take its dtype and device.

        Args:
            model: a model of the architecture that the adapter was made for.

        Returns:
            The adapter.

        Raises:
            RuntimeError: the adapter is mounted already, the model has another one, or weights are missing.
            TypeError: the model is of another class.
            ValueError: the model lacks blocks, has other dimensions, or an attention has a part that GSPN does not
                support, such as a LoRA.
        """
        if self._mount is not None:
            raise RuntimeError(f"the adapter is mounted on a {type(self._mount.model).__name__}: unmount() it first.")
        self._mount = Mount.make(model, self._by_index)
        return self

    def unmount(self) -> None:
        """Restore the model's attentions; it then computes the same as before, bit for bit.

        Raises:
            RuntimeError: the adapter is not mounted, or something else has replaced a mixer.
        """
        if self._mount is None:
            raise RuntimeError("the adapter is not mounted; mount(model) it first.")
        self._mount.undo()
        self._mount = None

    @contextmanager
    def mounted(self, model: Model) -> Iterator[Model]:
        """Mount the adapter on ``model`` within the block; raises as :meth:`mount` and :meth:`unmount` do."""
        self.mount(model)
        try:
            yield model
        finally:
            self.unmount()

    def set_segment(self, segment: int | None) -> None:
        """Set the number of lines after which the scans restart; no weight depends on it, and it is saved.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is below 1.
        """
        check_segment(segment)
        self._set("segment", segment)

    def set_reference_lines(self, lines: int | None) -> None:
        """Set the number of lines at which lam is as it is; no weight depends on it, and it is saved.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is below 1.

        Example:
            >>> import timm
            >>> from gspn.timm import GSPNAdapter
            >>> adapter = GSPNAdapter.from_model(timm.create_model("test_vit", img_size=64))
            >>> adapter.config["reference_lines"]
            4
            >>> adapter.set_reference_lines(8)
        """
        check_reference_lines(lines)
        self._set("reference_lines", lines)

    def _set(self, option: str, lines: int | None) -> None:
        for mixer in self._by_index.values():
            setattr(mixer.gspn, option, lines)
        self.config[option] = lines

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, mounted or not; a directory is replaced as a whole.

        Raises:
            UsageError: the directory holds other files, which would be lost.
        """
        folder = Path(directory)
        others = sorted({one.name for one in folder.iterdir()} - {CONFIG, WEIGHTS}) if folder.is_dir() else []
        if others:
            raise UsageError(
                f"{printable(folder)} holds other files, such as {printable(others[0])}, and is replaced as a whole; "
                "name a new directory."
            )
        tensors: dict[str, Tensor] = {name: one.detach().cpu().contiguous() for name, one in self.state_dict().items()}
        with replaced_directory(folder) as part:
            (part / CONFIG).write_text(json.dumps({"class": _KIND, **self.config}, indent=2), encoding="utf-8")
            require("safetensors.torch").save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GSPNAdapter:
        """Load an adapter from a directory that :meth:`save_pretrained` wrote, on the CPU and not mounted.

        Raises:
            UsageError: a file is missing, damaged or of something else, or the two do not fit each other.
        """
        folder = Path(directory)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"{printable(folder)} has no {missing[0]}; name a directory that an adapter was saved to.")
        config, header = read_json(folder / CONFIG), read_header(folder / WEIGHTS)
        if not isinstance(config, dict) or config.pop("class", None) != _KIND:
            raise UsageError(f"{printable(folder / CONFIG)} is not that of a {_KIND}; name a directory that one wrote.")
        # The numbers of layers are their places, which may be beyond the number of tensors.
        sizes = {key: len(value) if key == "layers" and isinstance(value, list) else value
                 for key, value in config.items()}  # fmt: skip
        check_numbers(sizes, printable(folder / CONFIG), len(header))
        with refusing(folder, CONSTRUCTOR):
            adapter = cls(**config, device="meta")
            check_size(adapter, header, folder)
            adapter.to_empty(device="cpu").load_state_dict(read_tensors(folder / WEIGHTS))
        check_weights(adapter, header, folder)
        return adapter.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not supported: an adapter computes nothing by itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an adapter is not called: mount(model) it, and call the model.")


def is_adapter(folder: Path) -> bool:
    """Whether a directory is one that an adapter was saved to."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return False
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and config.get("class") == _KIND


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("device", "dtype")}
