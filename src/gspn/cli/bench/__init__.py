"""``gspn bench``: times, refused where the check before them fails; and what GPU kernels execute, counted."""

from __future__ import annotations

from ..app import App
from .gpu_counts import bench_gpu_counts
from .line_scan import bench_line_scan
from .mixer import bench_mixer
from .models import bench_models
from .propagate import bench_propagate, bench_scaling
from .unet import bench_unet

app = App(help="Time operators, mixers and models side by side with their baselines.")
app.command("propagate")(bench_propagate)
app.command("scaling")(bench_scaling)
app.command("line-scan")(bench_line_scan)
app.command("mixer")(bench_mixer)
app.command("models")(bench_models)
app.command("unet")(bench_unet)
app.command("gpu-counts")(bench_gpu_counts)
