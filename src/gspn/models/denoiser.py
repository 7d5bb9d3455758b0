"""``GSPNDenoiser2DModel``: the denoiser of GSPN's class-conditional diffusion, as a diffusers model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from .._files import printable
from ..nn import GSPN2d, SelfAttention2d
from ..nn.options import check_options

MixerKind = Literal["gspn", "attention"]

SIZES: dict[str, dict[str, int]] = {
    "T": {"dim": 128, "num_layers": 8},
    "S": {"dim": 368, "num_layers": 24},
    "B": {"dim": 900, "num_layers": 30},
    "L": {"dim": 1200, "num_layers": 56},
    "XL": {"dim": 1500, "num_layers": 56},
}
"""Widths and depths: S to XL are the published ones, and T is for images of 32 to 64 pixels."""

_FREQUENCIES = 256
_SCAN_OPTIONS = set(inspect.signature(GSPN2d).parameters) - {"dim", "device", "dtype"}


class GSPNDenoiserBlock(nn.Module):
    """A block of the denoiser: one residual branch, without a separate MLP::

        x + W3 ρ( D3 W2 mix( D7 W1 LN(x) ) )        ρ(v) = v max(v, 0)

    with 1x1 convolutions W, and depthwise convolutions D7 and D3 of 7x7 and 3x3. ``mix`` is the propagation, or
    self-attention in the model to compare with.

    Args:
        dim: channels.
        mixer: ``"gspn"`` or ``"attention"``.
        drop_path: probability of skipping the branch in training.
        ada_norm: whether the embedding of time and class scales, shifts and gates the branch (adaLN-Zero).
        **scan: options of :class:`gspn.nn.GSPN2d`; ignored by attention.

    Shape:
        ``[B, dim, H, W]`` and the embedding ``[B, dim]`` to ``[B, dim, H, W]``.
    """

    def __init__(
        self, dim: int, *, mixer: MixerKind = "gspn", drop_path: float = 0.0, ada_norm: bool = False, **scan: Any
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.in_proj = nn.Conv2d(dim, dim, 1)
        self.conv_in = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.mixer = GSPN2d(dim, **scan) if mixer == "gspn" else SelfAttention2d(dim)
        self.mid_proj = nn.Conv2d(dim, dim, 1)
        self.conv_out = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out_proj = nn.Conv2d(dim, dim, 1)
        self.modulation = nn.Linear(dim, 3 * dim) if ada_norm else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``."""
        y = self.norm(x)
        gate = None
        if self.modulation is not None:
            shift, scale, gate = self.modulation(F.silu(embedding))[:, :, None, None].chunk(3, dim=1)  # [B, dim, 1, 1]
            y = y * (1 + scale) + shift
        y = self.mixer(self.conv_in(self.in_proj(y)))
        y = self.conv_out(self.mid_proj(y))
        y = self.out_proj(y * F.relu(y))
        return x + self.drop_path(y if gate is None else gate * y)


class GSPNDenoiser2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""A denoiser without attention and without positional embedding (GSPN, arXiv 2501.12381, section 4.2).

    Patches of the noisy image or latent become pixels of a map, and the embedding of time and class is added to each of
    them. ``2 (num_layers // 2) + 1`` blocks follow, with long skips as in U-ViT: each block of the second half projects
    the concatenation of its input and the output of the mirrored block of the first half. Only the last norm is
    modulated by the embedding unless ``ada_norm`` is set. The model is called as
    :class:`diffusers.DiTTransformer2DModel` is, so that :class:`diffusers.DiTPipeline` runs it. It takes any height and
    width that the patch divides.

    LoRAs of peft are added, saved and loaded as with the models of diffusers (``add_adapter``, ``save_lora_adapter``,
    ``load_lora_adapter``). They fit the projections of the blocks, ``in_proj``, ``mid_proj`` and ``out_proj``, the
    proxy of the scans, ``mixer.proxy``, and the long skips, ``skips.0`` and on. The maps from the proxy to taps and
    gates (``tap_proj``, ``lam_proj``, ``u_proj``, ``skip_proj``, ``merge``) are parameters without a module, which a
    LoRA does not reach.

    Args:
        sample_size: default height and width of the samples that pipelines draw; the model does not depend on it.
        in_channels: channels of the image or latent.
        out_channels: channels of the output; None for ``in_channels``. Twice as many also predict a variance.
        patch_size: side of a patch in pixels.
        dim: channels of the map.
        num_layers: depth N as published; the model has ``2 (N // 2) + 1`` blocks.
        proxy_dim: channels of the propagation's proxy; None for ``dim // 16``.
        num_class_embeds: number of classes K, or None for a model without classes. Labels of K and above mean "no
            class", for which ``DiTPipeline`` passes 1000.
        class_dropout_prob: probability of replacing a label by "no class" in training, for classifier-free guidance.
        drop_path: probability of skipping the last branch in training; probabilities grow linearly from 0.
        ada_norm: whether the embedding modulates every block (adaLN-Zero), as in DiT.
        mixer: ``"gspn"``, or ``"attention"`` for self-attention in place of the propagation.
        scan: further options of :class:`gspn.nn.GSPN2d`: ``groups``, ``segment``, ``skip`` (default here: False, as
            published), ``directions``, ``reference_lines`` (the maps have ``sample_size // patch_size`` lines),
            ``alignment``, ``impl``.

    Raises:
        ValueError: an option does not fit.

    Example:
        >>> import torch
        >>> from gspn.models import GSPNDenoiser2DModel
        >>> model = GSPNDenoiser2DModel.from_size("T/2", in_channels=1, num_class_embeds=10)
        >>> noisy, t, label = torch.randn(2, 1, 28, 36), torch.tensor([999, 5]), torch.tensor([3, 10])
        >>> model(noisy, timestep=t, class_labels=label).sample.shape
        torch.Size([2, 1, 28, 36])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GSPNDenoiserBlock"]  # noqa: RUF012  (as diffusers declares them)
    _repeated_blocks = ["GSPNDenoiserBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "embedding"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,  # diffusers' from_config forgets what was passed by position
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: int = 2,
        dim: int = 128,
        num_layers: int = 8,
        proxy_dim: int | None = None,
        num_class_embeds: int | None = 1000,
        class_dropout_prob: float = 0.1,
        drop_path: float = 0.0,
        ada_norm: bool = False,
        mixer: MixerKind = "gspn",
        scan: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_options(
            "count", sample_size=sample_size, in_channels=in_channels, out_channels=out_channels, patch_size=patch_size,
            dim=dim, num_layers=num_layers, num_class_embeds=1 if num_class_embeds is None else num_class_embeds,
            proxy_dim=1 if proxy_dim is None else proxy_dim,
        )  # fmt: skip
        check_options("fraction", class_dropout_prob=class_dropout_prob, drop_path=drop_path)
        check_options("flag", ada_norm=ada_norm)
        if mixer not in get_args(MixerKind):
            raise ValueError(f"{mixer=}: use one of {get_args(MixerKind)}.")
        if scan is not None and not isinstance(scan, Mapping):
            raise ValueError(f"{scan=}: has to be a dictionary of options of GSPN2d, or None.")
        unknown = sorted(set(scan or {}) - _SCAN_OPTIONS)
        if unknown:
            raise ValueError(f"scan={printable(unknown[0])[:80]!r} is unknown; use {', '.join(sorted(_SCAN_OPTIONS))}.")
        # Pipelines read out_channels from the configuration.
        self.register_to_config(out_channels=out_channels)
        self.gradient_checkpointing = False
        self.patch_size = patch_size
        self.num_classes = num_class_embeds
        self.class_dropout_prob = class_dropout_prob
        options = {"skip": False, "proxy_dim": proxy_dim or max(dim // 16, 1), **(scan or {})}

        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.time_frequencies = Timesteps(_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_FREQUENCIES, dim)
        self.class_embedding = None
        if num_class_embeds is not None:
            # There is an embedding of "no class" only if labels may be dropped.
            self.class_embedding = LabelEmbedding(num_class_embeds, dim, class_dropout_prob)
        half = num_layers // 2
        depth = 2 * half + 1
        self.blocks = nn.ModuleList(
            GSPNDenoiserBlock(
                dim, mixer=mixer, drop_path=drop_path * i / max(depth - 1, 1), ada_norm=ada_norm, **options
            )
            for i in range(depth)
        )
        self.skips = nn.ModuleList(nn.Conv2d(2 * dim, dim, 1) for _ in range(half))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm_modulation = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, patch_size * patch_size * out_channels)
        self._initialize()

    @classmethod
    def from_size(cls, size: str, **options: Any) -> GSPNDenoiser2DModel:
        """Create a model from the name of its size (``T``, ``S``, ``B``, ``L``, ``XL``) and patch, such as ``"B/2"``.

        ``options`` are arguments of the constructor and take precedence over the size. An unknown size is a ValueError.

        Example:
            >>> import torch
            >>> from gspn.models import GSPNDenoiser2DModel
            >>> with torch.device("meta"):
            ...     model = GSPNDenoiser2DModel.from_size("XL/2", out_channels=8)
            >>> round(model.num_parameters() / 1e6)  # 1.5 of these embed the classes
            692
        """
        name, _, patch = size.partition("/")
        if name not in SIZES or not patch.isdecimal() or int(patch) < 1:
            raise ValueError(f"{size=}: use one of {', '.join(SIZES)}, a slash and the side of a patch, such as 'B/2'.")
        return cls(**{**SIZES[name], "patch_size": int(patch), **options})

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict what the scheduler asks for, such as the noise, from a noisy image or latent.

        Args:
            hidden_states: the noisy input, ``[B, in_channels, H, W]``; H and W are multiples of ``patch_size``.
            timestep: ``[B]`` or a scalar, in the scheduler's units.
            class_labels: ``[B]``, integers; None for "no class".
            return_dict: whether to return an object with ``sample`` instead of a tuple.

        Returns:
            ``sample``: ``[B, out_channels, H, W]``.

        Raises:
            ValueError: the patch does not divide H or W, labels are passed to a model without classes, or none to one
                without "no class".
        """
        batch, _, height, width = hidden_states.shape
        patch = self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"{hidden_states.shape=}: H and W must be multiples of {patch=}.")
        embedding = self._embedding(timestep, class_labels, batch, hidden_states)  # [B, dim]
        x = self.patch_embed(hidden_states) + embedding[:, :, None, None]  # [B, dim, H/p, W/p]

        half = len(self.skips)
        outputs = []
        for i, block in enumerate(self.blocks):
            if i > half:
                x = self.skips[i - half - 1](torch.cat([x, outputs.pop()], dim=1))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, embedding)  # type: ignore[reportOptionalCall]
            else:
                x = block(x, embedding)
            if i < half:
                outputs.append(x)

        x = self.norm(x.permute(0, 2, 3, 1))  # [B, H/p, W/p, dim]
        shift, scale = self.norm_modulation(F.silu(embedding))[:, None, None].chunk(2, dim=-1)
        x = self.out_proj(x * (1 + scale) + shift)  # [B, H/p, W/p, out_channels p p]
        sample = F.pixel_shuffle(x.permute(0, 3, 1, 2), patch)  # [B, out_channels, H, W]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embedding(self, timestep: Tensor, labels: Tensor | None, batch: int, like: Tensor) -> Tensor:
        timestep = torch.as_tensor(timestep, device=like.device).expand(batch)
        embedding = self.time_embedding(self.time_frequencies(timestep).to(like.dtype))  # [B, dim]
        if self.class_embedding is None or self.num_classes is None:
            if labels is not None:
                raise ValueError("class_labels: this model has no classes; pass num_class_embeds to create one with.")
            return embedding
        if labels is None:
            if not self.class_dropout_prob:
                raise ValueError("class_labels=None: a model with class_dropout_prob=0 has no 'no class'; pass labels.")
            labels = torch.full((batch,), self.num_classes, device=like.device)
        labels = labels.clamp(max=self.num_classes)  # labels beyond the classes mean "no class"
        return embedding + self.class_embedding(labels).to(like.dtype)

    def _initialize(self) -> None:
        """As in DiT: linear maps uniform, embeddings normal, modulations and the last maps of branches and model 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.time_embedding.linear_1, self.time_embedding.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.embedding_table.weight, std=0.02)
        # Every block starts as the identity: its gate is zero if it has one, else its last map. Both at zero would get
        # no gradient.
        blocks = [block for block in self.modules() if isinstance(block, GSPNDenoiserBlock)]
        ends = [block.out_proj if block.modulation is None else block.modulation for block in blocks]
        for end in (*ends, self.norm_modulation, self.out_proj):
            nn.init.zeros_(end.weight)
            if end.bias is not None:
                nn.init.zeros_(end.bias)
