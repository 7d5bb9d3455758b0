"""``gspn bench unet``: the UNet of a text-to-image model with self-attention, with GSPN, and with no token mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from gspn._errors import require

from .common import Run, Sizes, Slowest, bench_command, choice, count, run_sweep

if TYPE_CHECKING:
    from gspn.bench.report import Result

_BACKENDS = ("auto", "flash", "efficient", "cudnn", "math")


@bench_command(repeats=3)
def bench_unet(
    run: Run,
    arch: Annotated[str, choice("--arch", "NAME", ("sd15", "sdxl"), "Stable Diffusion 1.5 or XL.")] = "sd15",
    size: Sizes = None,
    width: Annotated[int, count("Number that divides the widths of the published UNet, for small machines.")] = 1,
    backend: Annotated[
        str,
        choice(
            "--backend", "NAME", _BACKENDS,
            "Backend of scaled_dot_product_attention; auto leaves the choice to PyTorch.",
        ),
    ] = "auto",
    segment: Annotated[int, count("Number of lines after which local scans restart.")] = 8,
    slowest: Slowest = 60.0,
) -> None:  # fmt: skip
    """Time a denoising call with self-attention, with GSPN (global, shared taps, segments), and with no token mixer.

    Weights are random, which has no effect on time. The UNet with no token mixer is a lower bound on the time of any
    token mixer. Sizes are multiples of 64; by default 256, 512 and 1024.

    Each mixer is first compared with its float64 specification. Where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    require("diffusers", extra="diffusers")
    from gspn.bench.unet import UNetSweep, over_lower_bound

    def over_bound(results: Sequence[Result]) -> dict[str, Callable[[Result], str]]:
        ratios = over_lower_bound(results)
        return {"over the bound": lambda r: f"{ratios[r.name, r.height]:.2f}x" if (r.name, r.height) in ratios else ""}

    run_sweep(
        run, UNetSweep(arch=arch, width=width, backend=backend, segment=segment, **run.problem()),
        size or (256, 512, 1024),
        f"UNet of {arch}, width 1/{width}, B{run.batch} {run.dtype}, attention {backend}",
        plot_title="A denoising call of a UNet", slowest=slowest, columns=over_bound,
        notes=lambda _: ["the bound: the time with no self-attention; backends include those of cross-attention"],
    )  # fmt: skip
