from __future__ import annotations

import pytest

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")
pytest.importorskip("diffusers", reason="needs gspn[diffusers]")
