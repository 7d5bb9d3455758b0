"""Distilling a vision transformer of timm into GSPN, in two stages, with images that need no labels.

Example:
    A classifier's attention replaced, here for one epoch of each stage::

        from gspn.tasks.distill import DistillConfig, distill, load_student

        config = DistillConfig.load("emoji_vit").changed("distillation.block_epochs=1", "schedule.epochs=2")
        distill(config)
        model = load_student("runs/distill_emoji_vit")
"""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import AdapterConfig, DataConfig, DistillationConfig, DistillConfig

if TYPE_CHECKING:
    from .student import load_student
    from .training import distill

__all__ = ["AdapterConfig", "DataConfig", "DistillConfig", "DistillationConfig", "distill", "load_student"]

# They need timm and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"distill": ".training", "load_student": ".student"}, eager=__all__)
