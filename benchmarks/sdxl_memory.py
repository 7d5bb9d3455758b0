"""The memory of SDXL's UNet and VAE by size and options, from allocations followed on fake tensors.

    python benchmarks/sdxl_memory.py [--output CSV]

The figures are those of the estimate of ``gspn t2i sample``: results that are alive at once in one call without
guidance, beside the weights, without the memory that kernels take while they run.
"""

from __future__ import annotations

from typing import Any

import torch
import typer
from common import Csv, print_table, write_csv
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from gspn.bench.attention import SELF_ATTENTION
from gspn.bench.unet import GSPN, LOCAL, SHARED, UNetSweep
from gspn.bench.unet_layers import OnMap, empty_mixer, empty_unet
from gspn.diffusers.mounting import self_attention_blocks
from gspn.tasks.text_to_image.sample.estimate import call_cost, decoder_cost, model_bytes

SIZES = (1024, 4096, 16384)
CPU = torch.device("cpu")


def unet(candidate: str, size: int, dtype: torch.dtype) -> dict[str, object]:
    """The memory of a call of the UNet."""
    sweep = UNetSweep(arch="sdxl", dtype=dtype)
    model = empty_unet(sweep)
    for name, block in self_attention_blocks(model).items() if candidate != SELF_ATTENTION else ():
        model.set_submodule(name, OnMap(empty_mixer(candidate, block.attn1, sweep.segment)))
    peak = call_cost(model, lambda call: call(**sweep.inputs(size)), CPU, dtype=dtype).peak_bytes
    weights = model_bytes(model) * dtype.itemsize // 4
    return row("UNet", candidate, size, dtype, weights, peak)


def decoder(tiled: bool, size: int, dtype: torch.dtype) -> dict[str, object]:
    """The memory of decoding one image with SDXL's VAE."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config({
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "force_upcast": False,
        })  # fmt: skip
    nn.Module.to(vae, dtype)  # that of diffusers warns
    peak = decoder_cost(vae, height=size, width=size, tiled=tiled, device=CPU).peak_bytes
    return row("VAE", "tiles" if tiled else "whole", size, dtype, model_bytes(vae), peak)


def row(part: str, option: str, size: int, dtype: torch.dtype, weights: int, peak: int) -> dict[str, object]:
    """A row of the table."""
    return {
        "part": part, "option": option, "size": size, "dtype": str(dtype).removeprefix("torch."),
        "weights_gb": f"{weights / 1e9:.4g}", "peak_gb": f"{peak / 1e9:.4g}",
    }  # fmt: skip


def main(output: Csv = None) -> None:
    """Print the memory by size and options."""
    rows = []
    for size in SIZES:
        rows += [unet(name, size, torch.bfloat16) for name in (SELF_ATTENTION, GSPN, SHARED, LOCAL)]
        rows += [unet(GSPN, size, torch.float32)]
        rows += [decoder(tiled, size, torch.bfloat16) for tiled in (False, True)]
    print_table("SDXL, one image", list(rows[0]), [list(one.values()) for one in rows])
    write_csv(output, rows)


if __name__ == "__main__":
    typer.run(main)
