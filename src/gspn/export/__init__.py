"""Models out of PyTorch: files of ONNX, verified in ONNX Runtime, and ``.pt2`` files of ``torch.export``.

Where onnxscript is installed, importing this package makes gspn's operators known to every ``torch.onnx.export``.
"""

from importlib.util import find_spec as _find_spec

from .onnx_file import to_onnx
from .program import to_pt2

if _find_spec("onnxscript") is not None:
    from . import translations as _translations  # noqa: F401  (registers them)

__all__ = ["to_onnx", "to_pt2"]
