"""The distinct layers of a text-to-image UNet at one size of image, and how often each occurs.

diffusers' own UNet runs on fake tensors, which have shapes and strides but no data. Hooks record the call of every
layer, and a dispatch mode every operation between layers that makes a new map. Nothing has to fit into memory, so the
layers of a 16K image are found in seconds. A layer is then built alone, with random weights, and called with random
inputs of the recorded shapes and memory order, whole or as a strip of rows.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gspn.diffusers import GSPNTokenMixer

from .unet import GSPN, LOCAL, SHARED, UNetSweep

CONVOLUTION, CROSS_ATTENTION, FEED_FORWARD = "convolution", "cross-attention", "feed-forward"
NORMS, ELEMENTWISE, MIXER = "norms", "elementwise", "self-attention"
COMMON = (CONVOLUTION, CROSS_ATTENTION, FEED_FORWARD, NORMS, ELEMENTWISE)
"""The kinds of layers that a UNet has whatever its token mixer. A ``Linear`` outside of transformer blocks counts as a
1x1 convolution, which Stable Diffusion 1.5 has in its place."""

_KINDS: dict[type[nn.Module], str] = {
    Upsample2D: CONVOLUTION, nn.Conv2d: CONVOLUTION, nn.Linear: CONVOLUTION, nn.GroupNorm: NORMS, nn.LayerNorm: NORMS,
    FeedForward: FEED_FORWARD, Attention: CROSS_ATTENTION,
}  # fmt: skip
_ROWS = {4: 2, 3: 1}  # the dimension of a [B, C, H, W] map, or of [B, N, D] tokens, that strips divide
_MULTIPLE = 8  # of rows: strips halve without a rest
_SCANNED = 32  # of rows: strips of scans have many lines, and whole segments
_STD = 0.02


@dataclass(frozen=True)
class Spec:
    """The shape of a tensor and its dimensions from the slowest to the fastest in memory."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """The spec of a dense tensor; the place of a dimension of length 1 does not count."""
        strides = tensor.stride()
        real = sorted((i for i in range(tensor.ndim) if tensor.shape[i] > 1), key=lambda i: -strides[i])
        return cls(tuple(tensor.shape), (*(i for i in range(tensor.ndim) if tensor.shape[i] == 1), *real))

    @property
    def rows(self) -> int:
        """The length of the dimension that strips divide; 1 if there is none."""
        return self.shape[_ROWS[len(self.shape)]] if len(self.shape) in _ROWS else 1

    def random(self, device: torch.device, dtype: torch.dtype, rows: Mapping[int, int]) -> Tensor:
        """A random tensor; ``rows`` maps the length of a dimension of rows to that of the strip."""
        shape = list(self.shape)
        if len(shape) in _ROWS:
            shape[_ROWS[len(shape)]] = rows.get(self.rows, self.rows)
        tensor = torch.randn([shape[i] for i in self.order], device=device, dtype=dtype)
        return tensor.permute([self.order.index(i) for i in range(len(shape))])

    def __str__(self) -> str:
        """Such as ``1x320x64x64``; with the order where it is not that of the dimensions."""
        moved = [i for i in self.order if self.shape[i] > 1]
        order = (
            ""
            if moved == sorted(moved)
            else " " + "".join("BCHW"[i] if len(self.shape) == 4 else "BND"[i] for i in moved)
        )
        return "x".join(map(str, self.shape)) + order


@dataclass(frozen=True)
class Layer:
    """A layer of a UNet with the shapes that it is called with. Two layers are equal if both are called alike."""

    kind: str
    name: str
    inputs: tuple[Spec, ...]
    multiple: int = field(default=_MULTIPLE, compare=False)
    """The rows of a strip are a multiple of this."""
    function: nn.Module | Callable[..., Any] = field(default=F.relu, compare=False, repr=False)
    """A module without weights, or an operator."""
    arguments: Any = field(default=(), compare=False, repr=False)
    """The positional and named arguments, with a :class:`Spec` in the place of each tensor."""

    @property
    def shapes(self) -> str:
        """All inputs in a few words."""
        return ", ".join(map(str, self.inputs))

    @property
    def rows(self) -> int:
        """The rows, or tokens, of the whole."""
        return max((spec.rows for spec in self.inputs[:1]), default=1)

    @property
    def row_elements(self) -> int:
        """The elements of the first input in a row."""
        return math.prod(self.inputs[0].shape) // self.rows

    def strip(self, rows: int) -> int:
        """The number of rows that a strip of about ``rows`` has: a multiple of :attr:`multiple`, or all."""
        return min(max(rows // self.multiple, 1) * self.multiple, self.rows) if rows < self.rows else self.rows

    def built(self, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """The function of the layer, with random weights if it is a module."""
        return built(self.function, device, dtype) if isinstance(self.function, nn.Module) else self.function

    def call(
        self, function: Callable[..., Any], rows: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[[], object]:
        """The call of a strip of ``rows``, with random inputs."""
        lengths = {self.rows: rows} if self.rows > 1 else {}
        args, kwargs = tree_map_only(Spec, lambda spec: spec.random(device, dtype, lengths), self.arguments)
        return torch.no_grad()(lambda: function(*args, **kwargs))


def built(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a module without weights, with random ones: channels_last, and in evaluation mode."""
    module = copy.deepcopy(module).to_empty(device=device).to(dtype).to(memory_format=torch.channels_last).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=_STD, generator=generator)
    return module


def empty_unet(sweep: UNetSweep) -> UNet2DConditionModel:
    """The UNet of a sweep without weights, on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**sweep.config()).eval()


def layer_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers of a UNet by name: modules of the known types that are not inside of another."""
    layers: dict[str, nn.Module] = {}
    for name, module in unet.named_modules():
        if isinstance(module, tuple(_KINDS)) and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = module
    return layers


def module_name(module: nn.Module) -> str:
    """A module's type and configuration, which its time depends on."""
    if isinstance(module, Attention):
        return f"Attention({module.query_dim}, {module.cross_attention_dim}, heads={module.heads})"
    if isinstance(module, FeedForward):
        return f"FeedForward({next(module.parameters()).shape[-1]})"
    return f"Upsample2D({module.channels})" if isinstance(module, Upsample2D) else repr(module)


def unet_layers(sweep: UNetSweep, size: int) -> Counter[Layer]:
    """The distinct layers of one call on images of ``size``, each with the number of its calls.

    Every operation of the call is in one of them, but for those on tensors without rows, such as the timestep's.
    """
    unet = empty_unet(sweep)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {
            name: torch.empty(p.shape, dtype=sweep.dtype, device=sweep.device) for name, p in unet.named_parameters()
        }
        for name, weight in weights.items():
            if weight.ndim == 4:
                weights[name] = weight.to(memory_format=torch.channels_last)
        recorder, inputs = _Recorder(unet), sweep.inputs(size)
        with recorder, torch.no_grad():
            torch.func.functional_call(unet, weights, (), inputs)
    return recorder.layers


class _Recorder(TorchDispatchMode):
    """Counts the layers that are called while it is active."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.layers: Counter[Layer] = Counter()
        self._inside = False
        self._unet = unet
        self._mixers = {id(m.attn1) for m in unet.modules() if isinstance(m, BasicTransformerBlock)}
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        for module in layer_modules(self._unet).values():
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        kind = next(kind for type_, kind in _KINDS.items() if isinstance(module, type_))
        self._add(MIXER if id(module) in self._mixers else kind, module_name(module), module, args, kwargs)

    def _after(self, *_: Any) -> None:
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            storages = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.ndim in _ROWS]
            if any(one.untyped_storage()._cdata not in storages for one in made):
                self._add(ELEMENTWISE, func.name().removeprefix("aten::"), func, args, kwargs or {})
        return result

    def _add(self, kind: str, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = tree_map_only(Tensor, Spec.of, (args, kwargs))
        inputs = tuple(one for one in tree_leaves(arguments) if isinstance(one, Spec))
        if inputs:
            self.layers[Layer(kind, name, inputs, function=function, arguments=arguments)] += 1


# --- Token mixers -----------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """The part of a self-attention that treats tokens one by one: queries, keys, values, projection out, and scale."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]
        self.scale = attention.rescale_output_factor

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        _query, _key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return self.to_out(value) / self.scale


def attention_core(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The part of a self-attention between tokens, computed as in diffusers: ``[B, N, D]`` to ``[B, N, D]``."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class OnMap(nn.Module):
    """A GSPN mixer on a channels_last map ``[B, D, H, W]``, whose tokens are a view, or on the tokens of a square."""

    def __init__(self, mixer: GSPNTokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        """The mixed tokens ``[B, H W, D]``."""
        if hidden_states.ndim == 3:
            side = math.isqrt(hidden_states.shape[1])
            return self.mixer(hidden_states, map_size=(side, side))
        return self.mixer(hidden_states.flatten(2).transpose(1, 2), map_size=tuple(hidden_states.shape[2:]))


def empty_mixer(candidate: str, attention: Any, segment: int) -> GSPNTokenMixer:
    """The mixer that an adapter puts in the place of an attention, without weights."""
    options: dict[str, Any] = {SHARED: {"groups": 1}, LOCAL: {"segment": segment}}.get(candidate, {})
    biases = {"bias": attention.to_v.bias is not None, "out_bias": attention.to_out[0].bias is not None}
    with torch.device("meta"):
        return GSPNTokenMixer(attention.query_dim, **biases, **options)


def mixer_layers(attention: Layer, segment: int) -> list[Layer]:
    """The layers that stand for a self-attention of a UNet: its projections, and GSPN's mixers in its place."""
    tokens, module = attention.inputs[0], cast("Any", attention.function)
    (batch, count, dim), side = tokens.shape, math.isqrt(tokens.rows)
    if side * side != count:
        raise ValueError(f"{tokens.shape=} are not the tokens of a square map.")
    square = Spec((batch, dim, side, side), (0, 2, 3, 1))
    layers = [Layer(MIXER, f"Projections({dim})", (tokens,), function=Projections(module), arguments=((tokens,), {}))]
    for candidate in (GSPN, SHARED, LOCAL):
        mixer = OnMap(empty_mixer(candidate, module, segment))
        name = f"GSPNTokenMixer({dim}{f', segment={segment}' if candidate == LOCAL else ''})"
        rows = math.lcm(_SCANNED, segment)
        layers.append(Layer(candidate, name, (square,), rows, function=mixer, arguments=((square,), {})))
    return layers
