"""``gspn models``: the models of this package."""

from __future__ import annotations

from rich.markup import escape

from gspn._console import Console
from gspn._errors import require

from .messages import titled_table


def models() -> None:
    """List the models of gspn: parameters, multiply-adds at their own input size, and weights."""
    require("timm")
    import timm
    import torch

    import gspn.models  # noqa: F401  (registers the models)
    from gspn.analysis.cost import count_cost

    table = titled_table("timm.create_model(NAME)", ["name"], ["M params", "GMACs", "input"])
    table.add_column("weights")
    for name in timm.list_models(module="gspn"):
        with torch.device("meta"):  # counts need no values
            model = timm.create_model(name)
        cost = count_cost(model)
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
        size = " x ".join(str(n) for n in cfg.input_size) if cfg is not None else ""
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        weights = escape(", ".join(tags)) or "[dim]none[/]"
        table.add_row(name, f"{cost.params / 1e6:.1f}", f"{cost.macs / 1e9:.2f}", size, weights)
    Console().print(table)
