"""Models of timm side by side in one run: images a second, memory, and ratios to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gspn.models  # noqa: F401  (registers the models of gspn with timm)
from gspn._errors import UsageError
from gspn.analysis.cost import count_cost

from .accuracy_check import CheckFailedError
from .attention import attention_backend
from .environment import free_memory
from .report import Result
from .timing import Candidate, peak_memory, time_interleaved

CPU = torch.device("cpu")
MODELS = ("gspn_tiny", "gspn2_tiny", "swin_tiny_patch4_window7_224", "vit_small_patch16_224")
MODES = ("inference", "train")
SIZES = (224, 512, 1024)


@dataclass(frozen=True)
class ModelsProblem:
    """How models are compared: everything but their names and the size of the images.

    ``mode`` is ``"inference"``, or ``"train"`` for forward and backward to every parameter. Weights and images have the
    same dtype and memory format.
    """

    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    mode: str = "inference"
    memory_format: torch.memory_format = torch.channels_last

    def model(self, name: str, size: int) -> nn.Module:
        """A model with seeded random weights, built for images of ``size`` where it has an ``img_size``.

        Raises:
            UsageError: the model is unknown to timm, or cannot be built for this size.
        """
        if not timm.is_model(name):
            raise UsageError(f"{name!r} is not a model that timm knows; see gspn models, or timm.list_models().")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, img_size=size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                model = timm.create_model(name)
            except (AssertionError, RuntimeError) as error:  # timm's own checks of the size
                raise UsageError(f"{name} cannot be built for {size} x {size}: {error}") from error
        model = model.to(device=self.device, dtype=self.dtype).to(memory_format=self.memory_format)
        return model.train() if self.mode == "train" else model.eval()

    def images(self, size: int) -> Tensor:
        """Random images, ``[B, 3, size, size]``."""
        x = torch.randn(self.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype, memory_format=self.memory_format)

    def call(self, model: nn.Module, x: Tensor) -> Callable[[], object]:
        """One forward, or one forward and backward to every parameter."""
        if self.mode == "inference":
            return torch.inference_mode()(lambda: model(x))
        leaves = [p for p in model.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(model(x).float().square().mean(), leaves)


def why_not(call: Callable[[], object], mode: str = "inference") -> str | None:
    """The reason why a call must not be timed: its results are not finite, or two calls differ; None if it may.

    Random numbers, such as those of stochastic depth, start from the same seed both times. Gradients may differ by a
    thousandth of the largest: on CUDA, PyTorch adds some of them in no fixed order.
    """
    first, second = _seeded(call), _seeded(call)
    if not all(tensor.isfinite().all() for tensor in first):
        return "its results are not finite"
    slack = 1e-3 if mode == "train" else 0.0
    if not all((a - b).abs().max() <= slack * a.abs().max() for a, b in zip(first, second, strict=True) if a.numel()):
        return "two calls differ"
    return None


def _seeded(call: Callable[[], object]) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = call()
    return [results] if isinstance(results, Tensor) else [r for r in results if isinstance(r, Tensor)]  # type: ignore[union-attr]


def measure_models(
    problem: ModelsProblem,
    names: Sequence[str] = MODELS,
    sizes: Sequence[int] = SIZES,
    *,
    baseline: str | None = None,
    repeats: int = 5,
    min_time: float = 0.5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Time models side by side at each size of image.

    Each model is first checked with :func:`why_not`. A model is skipped, with the reason, where its memory at a smaller
    size, grown with the pixels, is more than the free memory.

    Args:
        problem: how to compare them.
        names: models of timm, those of gspn included.
        sizes: H = W of the images.
        baseline: the model that ratios are to; None for the first.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`.
        min_time: see :func:`~gspn.bench.timing.time_interleaved`.
        progress: called with a line about the current step.

    Returns:
        A result for each size and model, in this order.

    Raises:
        UsageError: an unknown model or baseline.
        CheckFailedError: a model did not pass its check; nothing is reported then.
    """
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise UsageError(f"{baseline=} is not among the models: {', '.join(names)}.")
    peaks: dict[str, tuple[int, int]] = {}  # the size and bytes of the largest call of each model
    results: list[Result] = []
    for size in sorted(set(sizes)):
        x = problem.images(size)
        calls: dict[str, Callable[[], object]] = {}
        cases: dict[str, dict[str, Any]] = {}
        for name in names:
            progress(f"checking {name} at {size}")
            model = problem.model(name, size)
            params = sum(p.numel() for p in model.parameters())
            details = {"bench": "models", "params": params, "macs": _macs(model, size), "attention": ""}
            case = cases[name] = {"details": details, "skipped": _too_large(peaks.get(name), size, problem.device)}
            if case["skipped"]:
                continue
            try:
                call = problem.call(model, x)
                wrong = why_not(call, problem.mode)
                if wrong is not None:
                    raise CheckFailedError(f"{name} at {size} x {size}: {wrong}.")
                peak = case["peak_bytes"] = peak_memory(call, problem.device)
                if peak is not None:
                    peaks[name] = (size, peak)
                details["attention"] = attention_backend(call)
                calls[name] = call
            except torch.OutOfMemoryError:
                case["skipped"] = "out of memory"
        progress(f"timing at {size}")
        candidates = [Candidate(name, call) for name, call in calls.items()]
        timings = time_interleaved(candidates, problem.device, repeats=repeats, min_time=min_time)
        base = timings.get(baseline)
        results += [
            Result(
                name=name, mode=problem.mode, batch=problem.batch, height=size, width=size, dtype=problem.dtype,
                timing=timings.get(name), baseline=baseline, baseline_ms=None if base is None else base.p50, **case,
            )
            for name, case in cases.items()
        ]  # fmt: skip
    return results


def _macs(model: nn.Module, size: int) -> int | None:
    try:
        return count_cost(model, (3, size, size)).macs
    except (NotImplementedError, RuntimeError):  # a model that does not run without numbers
        return None


def _too_large(before: tuple[int, int] | None, size: int, device: torch.device) -> str:
    """The reason why a model is not tried at a size, from the memory that it took at a smaller one; empty if it is."""
    free = free_memory(device)
    if before is None or free is None:
        return ""
    needed = before[1] * (size / before[0]) ** 2
    if needed <= free:
        return ""
    return f"about {needed / 2**30:.1f} GiB needed, going by {before[0]} x {before[0]}; {free / 2**30:.1f} GiB free"
