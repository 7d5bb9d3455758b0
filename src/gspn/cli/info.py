"""``gspn info``: versions, hardware, and which implementations can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

import gspn
from gspn._console import Console
from gspn.ops.implementations import OPS

from .messages import facts_table, titled_table

if TYPE_CHECKING:
    import torch

    from gspn.bench.environment import Environment

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def info() -> None:
    """Show versions, hardware, and which implementations can run here, with the reason why others cannot."""
    import torch

    from gspn.bench import environment

    console = Console()
    cpu = torch.device("cpu")
    console.print(_facts(environment.describe(cpu)))
    for device in [cpu, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        for op in OPS:
            console.print()
            console.print(_implementations(device, op))


def _facts(here: Environment) -> Table:
    import torch

    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts = {
        "gspn": here.gspn + (f"  ({here.commit})" if here.commit else ""),
        "python": here.python,
        "torch": here.torch,
        "triton": here.triton or "not installed",
        "system": here.os,
        "cpu": f"{here.device}, {here.threads} threads used by PyTorch",
        "cpu kernels": f"compiled, run with {here.isa}" if here.isa else "not compiled",
    } | {
        f"cuda:{i}": f"{one.name}, sm_{one.major}{one.minor}, {one.total_memory / 2**30:.0f} GiB"
        for i, one in enumerate(cuda)
    }
    return facts_table(facts if cuda else facts | {"cuda": "no device"})


def _implementations(device: torch.device, op: str) -> Table:
    import torch

    from gspn.bench.environment import device_name

    table = titled_table(f"{op} on {device} ({device_name(device)})", ["impl"])
    for dtype in _DTYPES:
        table.add_column(dtype, justify="center", no_wrap=True)
    table.add_column("why it cannot run")
    answers = {
        dtype: gspn.available_impls(torch.empty(0, device=device, dtype=getattr(torch, dtype)), op=op)
        for dtype in _DTYPES
    }
    auto = {dtype: next(name for name, reason in answers[dtype].items() if reason is None) for dtype in _DTYPES}
    for impl in answers[_DTYPES[0]]:
        reasons = {dtype: answers[dtype][impl] for dtype in _DTYPES}
        cells = [
            "[dim]no[/]" if reasons[dtype] else "[bold green]auto[/]" if auto[dtype] == impl else "yes"
            for dtype in _DTYPES
        ]
        # Most reasons hold for every dtype: each is printed once.
        table.add_row(impl, *cells, escape("\n".join(dict.fromkeys(r for r in reasons.values() if r))))
    table.caption = 'yes: can run. auto: what impl="auto" takes.'
    return table
