"""Networks of timm side by side in one run: images a second, memory, and ratios to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import gspn.models  # noqa: F401  (registers the networks of gspn with timm)
from gspn.analysis.cost import count_cost

from .comparison import Result, attention_backend, peak_memory, with_ratios
from .environment import free_memory
from .timing import Candidate, time_interleaved

CPU = torch.device("cpu")
MODELS = ("gspn_tiny", "gspn2_tiny", "swin_tiny_patch4_window7_224", "vit_small_patch16_224")
MODES = ("inference", "train")
SIZES = (224, 512, 1024)


@dataclass(frozen=True)
class ModelsProblem:
    """How networks are compared: everything but which, and the size of the images."""

    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    mode: str = "inference"
    memory_format: torch.memory_format = torch.channels_last

    def model(self, name: str, size: int) -> nn.Module:
        """A network with seeded random weights, made for images of ``size`` where it has to be (``img_size``).

        Raises:
            ValueError: timm knows no such network, or it cannot be made for this size.
        """
        if not timm.is_model(name):
            raise ValueError(f"{name!r} is not a network that timm knows; see gspn models, or timm.list_models().")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, img_size=size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                model = timm.create_model(name)
            except (AssertionError, RuntimeError) as error:  # timm's own checks of the size
                raise ValueError(f"{name} cannot be made for {size} x {size}: {error}") from error
        model = model.to(device=self.device, dtype=self.dtype).to(memory_format=self.memory_format)
        return model.train() if self.mode == "train" else model.eval()

    def images(self, size: int) -> Tensor:
        """Random images, ``[B, 3, size, size]``."""
        x = torch.randn(self.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype, memory_format=self.memory_format)

    def call(self, model: nn.Module, x: Tensor) -> Callable[[], object]:
        """One forward, or one forward and backward to every parameter."""
        if self.mode == "inference":

            def forward() -> Tensor:
                with torch.inference_mode():
                    return model(x)

            return forward
        leaves = [p for p in model.parameters() if p.requires_grad]

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(x).float().square().mean(), leaves)

        return step


class CheckFailedError(RuntimeError):
    """A candidate's results are not finite or not the same twice: its time means nothing."""


def why_not(call: Callable[[], object], mode: str = "inference") -> str | None:
    """What is wrong with a candidate: its results must be finite, and the same twice; None if they are.

    The call's random numbers, as those of stochastic depth, start from the same seed both times. Gradients may differ
    by a thousandth of the largest: some of PyTorch's own are sums in no fixed order on CUDA.
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
    progress: Callable[[str], None] | None = None,
) -> list[Result]:
    """Time networks side by side at each size of image.

    Each is first checked with :func:`why_not`. What it takes in memory is measured, and where that of the size before,
    grown with the pixels, is more than is free, it is left out with the reason.

    Args:
        problem: how to compare them.
        names: of timm's networks, those of gspn included.
        sizes: H = W of the images.
        baseline: the network that ratios are to; None for the first.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`.
        min_time: likewise.
        progress: called with what is being done.

    Returns:
        A result for each size and network, in this order.

    Raises:
        ValueError: an unknown network or baseline.
        CheckFailedError: a network did not pass its check; nothing is reported then.
    """
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"{baseline=} is not among the networks: {', '.join(names)}.")
    say = progress or (lambda _: None)
    peaks: dict[str, tuple[int, int]] = {}  # size and bytes of the largest that ran
    results: list[Result] = []
    for size in sorted(sizes):
        x = problem.images(size)
        skipped: dict[str, str] = {}
        calls: dict[str, Callable[[], object]] = {}
        facts: dict[str, tuple[int, int | None]] = {}
        measured: dict[str, tuple[int | None, str]] = {}
        for name in names:
            say(f"checking {name} at {size}")
            model = problem.model(name, size)
            facts[name] = (sum(p.numel() for p in model.parameters()), _macs(model, size))
            reason = _too_large(peaks.get(name), size, problem.device)
            if reason is None:
                try:
                    calls[name] = problem.call(model, x)
                    wrong = why_not(calls[name], problem.mode)
                    if wrong is not None:
                        raise CheckFailedError(f"{name} at {size} x {size}: {wrong}.")
                    bytes_ = peak_memory(calls[name], problem.device)
                    if bytes_ is not None:
                        peaks[name] = (size, bytes_)
                    measured[name] = (bytes_, attention_backend(calls[name]))
                except torch.OutOfMemoryError:
                    reason = "out of memory"
                    calls.pop(name, None)
            if reason is not None:
                skipped[name] = reason
        say(f"timing at {size}")
        timings = time_interleaved(
            [Candidate(name, call) for name, call in calls.items()],
            problem.device,
            repeats=repeats,
            min_time=min_time,
        )
        for name, (timing, ratio) in with_ratios(names, baseline, timings).items():
            params, macs = facts[name]
            bytes_, attention = measured.get(name, (None, ""))
            results.append(
                Result(
                    bench="models",
                    name=name,
                    mode=problem.mode,
                    batch=problem.batch,
                    height=size,
                    width=size,
                    dtype=str(problem.dtype).removeprefix("torch."),
                    params=params,
                    macs=macs,
                    attention=attention,
                    baseline=baseline,
                    timing=timing,
                    peak_bytes=bytes_,
                    ratio=ratio,
                    skipped=skipped.get(name, ""),
                )
            )
    return results


def _macs(model: nn.Module, size: int) -> int | None:
    try:
        return count_cost(model, (3, size, size)).macs
    except (NotImplementedError, RuntimeError):  # a network that does not run without numbers
        return None


def _too_large(before: tuple[int, int] | None, size: int, device: torch.device) -> str | None:
    """Why a network is not tried at a size, from what it took at a smaller one."""
    free = free_memory(device)
    if before is None or free is None:
        return None
    needed = before[1] * (size / before[0]) ** 2
    if needed <= free:
        return None
    return f"about {needed / 2**30:.1f} GiB needed, going by {before[0]} x {before[0]}; {free / 2**30:.1f} GiB free"
