"""The operators as PyTorch knows them: one module an operator; importing this package registers all of them.

What is here imports torch alone and is imported with ``gspn``, so that everything a tracer needs exists before anything
is traced. The backend is chosen inside the operator when it runs (:func:`gspn.ops.implementations.resolve`): tracers
see one opaque node, never a kernel launch, a loop over lines or a look for a compiler.
"""

from .line_scan import apply_line_scan, apply_line_scan_backward
from .propagate import apply_propagate, composed_propagate

__all__ = ["apply_line_scan", "apply_line_scan_backward", "apply_propagate", "composed_propagate"]
