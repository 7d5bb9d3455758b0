from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="needs gspn[train]")
pytest.importorskip("diffusers", reason="needs gspn[diffusers]")
pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory):
    from tasks.text_to_image.t2i_support import make_sd

    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory):
    from tasks.text_to_image.t2i_support import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("sdxl"))
