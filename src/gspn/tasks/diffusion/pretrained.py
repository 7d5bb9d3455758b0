"""Pipelines and models of diffusers from directories that somebody else wrote.

Nothing in a directory is trusted: its JSON is read within bounds, classes come from diffusers, transformers and gspn
alone, weights are read from safetensors alone, and a model is not built before its size is compared with that of its
weights. Whatever does not fit is one line, a ``UsageError``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..._errors import MissingExtraError, UsageError, nearest, require
from ..._files import open_regular, parse_json, printable, read_json, read_text

_MOST = 1 << 20  # of any integer in a configuration: beyond all channels, tokens and timesteps
_MOST_SIDE = 1 << 11  # pixels of a latent: position embeddings are computed for all of them
_FREE = 1 << 20  # numbers that a model may have beyond its weights' before it counts as absurd


def weights_directory() -> Path:
    """The directory of the pipelines and adapters that are shipped with the package."""
    spec = importlib.util.find_spec("gspn.diffusers")  # does not import it, which would need diffusers
    if spec is None or spec.origin is None:
        return Path("no such directory")
    return Path(spec.origin).parent / "weights"


def shipped(index: str, classes: Collection[str]) -> dict[str, Path]:
    """The shipped directories whose file ``index`` names one of ``classes``, by name."""
    files = sorted(weights_directory().glob(f"*/{index}"))
    kinds = {file.parent: read_json(file).get("_class_name") for file in files}
    return {path.name: path for path, kind in kinds.items() if kind in classes}


def locate(source: str | Path, index: str, known: Mapping[str, Path], kind: str, command: str) -> Path | str:
    """The directory that holds the file ``index``, or the source itself if it may be a hub id.

    Args:
        source: The directory of a run or of ``save_pretrained``, a shipped name, or a hub id.
        index: The file.
        known: The shipped directories, by name.
        kind: What is looked for, for the error.
        command: The command that writes it, for the error.

    Raises:
        UsageError: It is none of these.
    """
    name = str(source)
    for path in (Path(source), Path(source) / "last", *([known[name]] if name in known else [])):
        if _is_file(path / index):
            return path
    # A hub id has an owner, and does not exist as a path.
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not exists(Path(source)):
        return name
    others = f", or one of {', '.join(known)}{nearest(name, known)}" if known else ""
    raise UsageError(
        f"'{printable(name)}' holds no {index}; give the directory of the {kind} or of a run of `{command}`, a hub "
        f"id{others}."
    )


def load_pipeline(cls: Any, location: Path | str, *, classes: Sequence[str], dtype: torch.dtype, **values: Any) -> Any:
    """Load a pipeline from a directory or the hub.

    Args:
        cls: Its class, or ``DiffusionPipeline``.
        location: From :func:`locate`.
        classes: The names of pipelines that are allowed.
        dtype: Of all weights.
        **values: Components, or None for those that are not loaded, and further arguments of the pipeline.

    Raises:
        UsageError: It is of another class, incomplete or damaged.
    """
    with reading(location):
        if isinstance(location, str):
            _check_class(location, dict(cls.load_config(location)), classes)
            location = Path(cls.download(location, use_safetensors=True))
        index = _object(location / "model_index.json")
        _check_class(location, index, classes)
        kind = cls if cls.__name__ == index["_class_name"] or cls.__name__ in classes else _class("diffusers", index)
        parameters = inspect.signature(kind.__init__).parameters
        values = {name: value for name, value in values.items() if name in parameters}
        for name in parameters:
            if isinstance(index.get(name), list) and name not in values:
                values[name] = _component(location, name, index[name], dtype)
        pipeline = kind.from_pretrained(location, use_safetensors=True, **values)
    vae: Any = getattr(pipeline, "vae", None)
    denoiser: Any = getattr(pipeline, "unet", getattr(pipeline, "transformer", None))
    if vae is not None and vae.config["latent_channels"] != denoiser.config["in_channels"]:
        raise UsageError(
            f"'{printable(location)}': its autoencoder has {vae.config['latent_channels']} channels and its denoiser "
            f"{denoiser.config['in_channels']}; the two do not belong together."
        )
    return pipeline


def load_model(cls: Any, location: Path | str, **options: Any) -> Any:
    """Load a model of diffusers from a directory or the hub, from safetensors alone.

    Raises:
        UsageError: Its configuration or its weights are incomplete or damaged.
    """
    folder = Path(location, options.get("subfolder") or "")
    with reading(folder if exists(folder) else location):
        if exists(folder):
            _check_size(cls, folder)
        model, report = cls.from_pretrained(location, use_safetensors=True, output_loading_info=True, **options)
        # diffusers and transformers initialise missing weights at random, and only log it.
        missing = sorted(report["missing_keys"])
        if missing:
            raise UsageError(f"'{printable(folder)}' has no weights for {printable(', '.join(missing[:3]))}.")
        # Older versions saved positions, which are computed.
        over = sorted(one for one in report["unexpected_keys"] if not one.endswith(("pos_embed", "position_ids")))
        if over and hasattr(cls, "from_config"):
            raise UsageError(
                f"'{printable(folder)}' has weights that its config.json has no place for: "
                f"{printable(', '.join(over[:3]))}; one of the two files belongs to another model."
            )
    return model


def exists(path: Path) -> bool:
    """Whether a path exists; a name that no file can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


@contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Report what diffusers and transformers raise about the files of ``source`` as one line, and silence their logs.

    Raises:
        UsageError: Something was raised in the block.
    """
    safetensors = require("safetensors", extra="diffusers")
    # What the constructors of other libraries raise where a value of a file is of another type or out of range.
    raised = (
        OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
        ImportError, MemoryError, safetensors.SafetensorError,
    )  # fmt: skip
    try:
        with quiet():
            yield
    except (UsageError, MissingExtraError):
        raise
    except raised as error:
        reason = printable(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UsageError(
            f"'{printable(source)}' cannot be loaded: {reason}; replace the damaged file, or name another directory."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars and warnings of diffusers and transformers, such as about a text encoder other than CLIP."""
    libraries = [require("diffusers", extra="diffusers").utils.logging]
    if importlib.util.find_spec("transformers") is not None:
        libraries.append(require("transformers", extra="text").utils.logging)
    before = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
    for one in libraries:
        one.set_verbosity_error()
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one, verbosity, bars in before:
            one.set_verbosity(verbosity)
            if bars:
                one.enable_progress_bar()


def _component(location: Path, name: str, entry: list[Any], dtype: torch.dtype) -> Any:
    """A component of a pipeline, from the directory of its name."""
    if entry == [None, None]:
        return None
    where = f"'{printable(location / 'model_index.json')}'"
    if len(entry) != 2 or not all(isinstance(part, str) and part.replace(".", "_").isidentifier() for part in entry):
        raise UsageError(f"{where} has {name} = {printable(repr(entry))[:80]}; it has to be a library and a class.")
    folder, cls = location / name, _class(entry[0], {"_class_name": entry[1]})
    if cls is None:
        raise UsageError(f"{where} names {name} {'.'.join(entry)[:80]}, which gspn does not load from files.")
    if not folder.is_dir():
        raise UsageError(f"'{printable(location)}' has no directory {name}; it is incomplete.")
    if issubclass(cls, torch.nn.Module):
        return load_model(cls, folder, dtype=dtype)
    if entry[0] == "diffusers":
        _check_numbers(folder / "scheduler_config.json", math.inf)
    return cls.from_pretrained(folder)


def _class(library: str, index: Mapping[str, Any]) -> Any:
    """The class of a component or pipeline: one of diffusers, transformers or gspn; else None.

    Any other module would be imported by its name, and the Auto classes of transformers may run code of a file.
    """
    name = index["_class_name"]
    if library.split(".")[0] == "gspn":
        module: Any = importlib.import_module("gspn.diffusers")
    elif library in ("diffusers", "transformers"):
        module = require(library, extra="diffusers" if library == "diffusers" else "text")
    else:
        return None
    hidden = name.startswith("_") or (library == "transformers" and name.startswith("Auto"))
    cls = None if hidden else getattr(module, name, None)
    return cls if isinstance(cls, type) and hasattr(cls, "from_pretrained") else None


def _check_class(location: Path | str, index: Mapping[str, Any], classes: Sequence[str]) -> None:
    kind = index.get("_class_name")
    if kind not in classes:
        raise UsageError(f"'{printable(location)}' is a {printable(kind)[:80]}; supported are {' and '.join(classes)}.")


def _check_size(cls: Any, folder: Path) -> None:
    """Refuse a configuration whose model is much larger than the weights beside it, before it is built."""
    safe_open = require("safetensors", extra="diffusers").safe_open
    present, tensors = 0, 0
    for file in folder.glob("*.safetensors"):
        open_regular(file).close()  # safetensors would wait for somebody who writes to a pipe
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (not a dictionary)
                present, tensors = present + math.prod(weights.get_slice(key).get_shape()), tensors + 1
    if not tensors:
        others = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        remedy = f" ({printable(others)[:80]} may execute code: save with safe_serialization=True)" if others else ""
        raise UsageError(f"'{printable(folder)}' has no weights in safetensors{remedy}; it is incomplete.")
    config = _check_numbers(folder / "config.json", tensors)
    if not hasattr(cls, "from_config"):
        return  # transformers builds on the meta device
    with torch.device("meta"):
        built = cls.from_config(config)
    described = sum(tensor.numel() for tensor in built.state_dict().values())
    if described > 2 * present + _FREE:
        raise UsageError(
            f"'{printable(folder)}': config.json describes {described:,} weights, and {present:,} are there; one of "
            "the two files belongs to another model."
        )


def _check_numbers(file: Path, tensors: float) -> dict[str, Any]:
    """A configuration, none of whose numbers makes a constructor run for ever: a layer has at least one tensor."""
    config = _object(file)
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        key, value = pending.pop()
        most = _MOST_SIDE if key == "sample_size" else min(_MOST, tensors) if "layers" in key else _MOST
        if isinstance(value, int | float) and not abs(value) <= most:
            raise UsageError(f"'{printable(file)}' has {printable(key)[:80]} = {value:.6g}; correct it.")
        if isinstance(value, list | dict):
            if len(value) > tensors + 100:
                raise UsageError(
                    f"'{printable(file)}' has {len(value):,} entries in {printable(key)[:80]}; correct it."
                )
            pending += value.items() if isinstance(value, dict) else ((key, one) for one in value)
    return config


def _object(file: Path) -> dict[str, Any]:
    if not _is_file(file):
        raise UsageError(f"'{printable(file)}' is missing; the directory is incomplete.")
    content = parse_json(read_text(file), f"'{printable(file)}' cannot be loaded: it")
    if not isinstance(content, dict):
        raise UsageError(f"'{printable(file)}' cannot be loaded: it holds a {type(content).__name__}, not an object.")
    return content


def _is_file(path: Path) -> bool:
    return exists(path) and path.is_file()
