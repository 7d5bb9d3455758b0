"""Pipelines and models of diffusers from directories that somebody else wrote, or from the hub.

Nothing in a directory is trusted: its JSON is read within bounds, classes come from diffusers, transformers and gspn
alone, weights are read from safetensors alone, and a model is not built before its size is compared with that of its
weights. Whatever does not fit is one line, a ``UsageError``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gspn.models.saved import (
    CONSTRUCTOR,
    Header,
    check_numbers,
    check_size,
    check_weights,
    hub_or_cache,
    read_header,
    refusing,
)  # fmt: skip

from ..._errors import UsageError, nearest, require
from ..._files import parse_json, printable, read_json, read_text, short

CONFIG, INDEX = "config.json", "model_index.json"
_NOT_MODELS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def locate(
    source: str | Path, index: str, known: Mapping[str, Path], kind: str, command: str,
    inside: Sequence[str] = ("", "last"),
) -> Path | str:  # fmt: skip
    """The directory that holds the file ``index``, or the source itself if it may be a hub id.

    The source is a directory, which may hold the file itself or in one of the directories ``inside``, a name in
    ``known``, or a hub id. The error names its kind and the command that writes it.

    Raises:
        UsageError: It is none of these.
    """
    name = str(source)
    for path in (*(Path(source, folder) for folder in inside), *([known[name]] if name in known else [])):
        if is_file(path / index):
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
    """Load a pipeline of one of some classes from a location of :func:`locate`, with all weights in ``dtype``.

    ``cls`` is its class, or ``DiffusionPipeline``. ``values`` are components, or None for those that are not loaded,
    and further arguments of the pipeline.

    Raises:
        UsageError: It is of another class, incomplete or damaged.
    """
    if isinstance(location, str):
        with refusing(location, CONSTRUCTOR), quiet(), hub_or_cache():
            _check_class(location, dict(cls.load_config(location)), classes)
            location = Path(cls.download(location, use_safetensors=True))
    index = read_object(location / INDEX)
    _check_class(location, index, classes)
    kind = cls if cls.__name__ in classes else _class("diffusers", index["_class_name"])
    parameters = inspect.signature(kind.__init__).parameters
    for name in kind._get_signature_keys(kind)[0]:  # the components
        if not isinstance(index.get(name, []), list):
            raise UsageError(
                f"'{printable(location / INDEX)}': {name} is {short(index[name])}, not a list of a library and a class."
            )
    values = {name: value for name, value in values.items() if name in parameters}
    missing = [name for name in parameters if isinstance(index.get(name), list) and name not in values]
    # The files of all are checked before the first is read, which may take minutes.
    optional = {"text_encoder", "tokenizer", *kind._optional_components}  # the first two may be passed later
    loaders = {name: _component(location, name, index[name], dtype, name in optional) for name in missing}
    values |= {name: load() for name, load in loaders.items()}
    with refusing(location, _errors(kind)), quiet():
        pipeline = kind.from_pretrained(location, use_safetensors=True, local_files_only=True, **values)
    vae: Any = getattr(pipeline, "vae", None)
    denoiser: Any = getattr(pipeline, "unet", getattr(pipeline, "transformer", None))
    if vae is not None and vae.config["latent_channels"] != denoiser.config["in_channels"]:
        raise UsageError(
            f"'{printable(location)}': its autoencoder has {vae.config['latent_channels']} channels and its denoiser "
            f"{denoiser.config['in_channels']}; the two do not belong together."
        )
    return pipeline


def load_model(cls: Any, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model of diffusers or transformers from a directory, or from the hub, from safetensors alone.

    Raises:
        UsageError: Its configuration or its weights are incomplete, damaged, not finite, or do not fit each other.
    """
    folder = downloaded(folder) if isinstance(folder, str) else folder
    return _load(cls, folder, *_checked(cls, folder), dtype)


def _checked(cls: Any, folder: Path) -> tuple[dict[str, Any], Header]:
    """The configuration of a model and the headers of its weights, checked."""
    if hasattr(cls, "from_config"):
        _check_class(folder, read_object(folder / CONFIG), [cls.__name__])
    elif exists(folder / "adapter_config.json"):  # of transformers
        raise UsageError(f"'{printable(folder)}' has an adapter_config.json, which names another model; remove it.")
    header = {name: one for file in _weight_files(folder) for name, one in read_header(file).items()}
    return read_config(folder / CONFIG, len(header)), header


def _load(cls: Any, folder: Path, config: dict[str, Any], header: Header, dtype: torch.dtype) -> Any:
    is_diffusers = hasattr(cls, "from_config")  # transformers itself builds on the meta device
    if is_diffusers:
        with refusing(folder, _errors(cls)), quiet(), torch.device("meta"):
            built = cls.from_config(config)
        check_size(built, header, folder)
    # Weights of other shapes are an error of either library, whatever the class.
    with refusing(folder, (OSError, RuntimeError, ValueError) if is_diffusers else CONSTRUCTOR), quiet():
        model, report = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    # diffusers and transformers initialise missing weights at random, and only log it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(f"'{printable(folder)}' has no weights for {printable(', '.join(missing[:3]))}.")
    # Older versions saved positions, which are computed.
    over = sorted(one for one in report["unexpected_keys"] if not one.endswith(("pos_embed", "position_ids")))
    if over and is_diffusers:
        raise UsageError(
            f"'{printable(folder)}' has weights that its config.json has no place for: "
            f"{printable(', '.join(over[:3]))}; one of the two files belongs to another model."
        )
    check_weights(model, header, folder)
    return model


def downloaded(name: str) -> Path:
    """The directory of a model that was downloaded from the hub, or of a pipeline's autoencoder below it.

    Raises:
        UsageError: There is none, or the hub cannot be reached.
    """
    files = [CONFIG, _WEIGHTS, f"{_WEIGHTS}.index.json", _WEIGHTS.replace(".", "-*.")]
    with refusing(name, (OSError, ValueError)), hub_or_cache():
        hub = require("huggingface_hub", extra="diffusers")
        return Path(hub.snapshot_download(name, allow_patterns=[*files, *(f"vae/{file}" for file in files)]))


def exists(path: Path) -> bool:
    """Whether a path exists; a name that no file can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_file(path: Path) -> bool:
    """Whether a path is a file; a name that no file can have is not."""
    return exists(path) and path.is_file()


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


def _component(location: Path, name: str, entry: list[Any], dtype: torch.dtype, optional: bool) -> Callable[[], Any]:
    """The function that loads a component of a pipeline from the directory of its name, which is checked."""
    if optional and entry == [None, None]:
        return lambda: None
    where = f"'{printable(location / INDEX)}'"
    if len(entry) != 2 or not all(isinstance(part, str) and part.replace(".", "_").isidentifier() for part in entry):
        raise UsageError(f"{where} has {name} = {short(entry)}; it has to be a library and a class.")
    folder, cls = location / name, _class(*entry)
    is_model = torch.nn.Module in getattr(cls, "__mro__", ())
    if cls is None or is_model == (name in _NOT_MODELS) or (name == "scheduler" and entry[0] != "diffusers"):
        raise UsageError(f"{where} names {name} {'.'.join(entry)[:80]}, which gspn does not load from files.")
    if not folder.is_dir():
        raise UsageError(f"'{printable(location)}' has no directory {name}; it is incomplete.")
    if is_model:
        return partial(_load, cls, folder, *_checked(cls, folder), dtype)
    if name == "scheduler":
        scheduler = _scheduler(cls, folder)
        return lambda: scheduler
    for file in folder.iterdir():
        if not file.is_file():
            raise UsageError(f"'{printable(file)}' is not a file; remove it.")

    def load() -> Any:
        with refusing(folder, CONSTRUCTOR), quiet():
            return cls.from_pretrained(folder, local_files_only=True)

    return load


def _scheduler(cls: Any, folder: Path) -> Any:
    file = folder / "scheduler_config.json"
    config = read_config(file, math.inf)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        kind, value = type(parameter.default), config.get(name)
        # A text such as "no" would count as true; null means the same as leaving a value out to some schedulers.
        if kind in (bool, int, float, str) and value is not None and not isinstance(value, _JSON_TYPES[kind]):
            raise UsageError(f"'{printable(file)}' has {name} = {short(value)}; it has to be a {kind.__name__}.")
    with refusing(folder, CONSTRUCTOR), quiet():
        scheduler = cls.from_config(config)
    kept, count = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("num_train_timesteps")
    if kept is not None and (len(kept) != count or not bool(((kept >= 0) & (kept <= 1)).all())):
        raise UsageError(f"'{printable(file)}' has not {count} levels of noise from 0 to 1; correct its betas.")
    return scheduler


_JSON_TYPES: dict[type, Any] = {bool: bool, int: int, float: int | float, str: str}


def _class(library: str, name: str) -> Any:
    """The class of a component or pipeline: one of diffusers, transformers or gspn; else None.

    Any other module would be imported by its name, and the Auto classes of transformers may run code of a file.
    """
    if library.split(".")[0] == "gspn":
        module: Any = importlib.import_module("gspn.diffusers")
    elif library in ("diffusers", "transformers"):
        module = require(library, extra="diffusers" if library == "diffusers" else "text")
    else:
        return None
    hidden = name.startswith("_") or (library == "transformers" and name.startswith("Auto"))
    cls = None if hidden else getattr(module, name, None)
    is_there = library in (module.__name__, getattr(cls, "__module__", None))  # where diffusers will look for it
    return cls if isinstance(cls, type) and hasattr(cls, "from_pretrained") and is_there else None


def _errors(cls: Any) -> tuple[type[Exception], ...]:
    """The errors of a class's constructor about values of a file; anything else that ours raise is a bug."""
    return (TypeError, ValueError) if cls.__module__.startswith("gspn.") else CONSTRUCTOR


def _check_class(location: Path | str, index: Mapping[str, Any], classes: Sequence[str]) -> None:
    kind = index.get("_class_name")
    if kind not in classes:
        raise UsageError(f"'{printable(location)}' is a {short(kind)}; supported are {' and '.join(classes)}.")


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; an index may name several, none of them elsewhere."""
    files = [folder / name for name in (_WEIGHTS, "model.safetensors") if is_file(folder / name)]
    for index in folder.glob("*.safetensors.index.json"):
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(one, str) and one.endswith(".safetensors") and is_file(folder / one) and Path(one).name == one
            for one in names.values()
        ):
            raise UsageError(f"'{printable(index)}' does not name files of safetensors beside it; replace it.")
        files += [folder / one for one in sorted(set(names.values()))]
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        remedy = f" ({printable(others)[:80]} may execute code: save with safe_serialization=True)" if others else ""
        raise UsageError(f"'{printable(folder)}' has no weights in safetensors{remedy}; it is incomplete.")
    return files


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in sides)


def _is_list_of_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))


# Values that constructors take as they are, and that would fail, or change an image without a word, long after.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "scaling_factor": (lambda one: _is_number(one) and one > 0, "a number above 0"),
    "shift_factor": (lambda one: one is None or _is_number(one), "a number or null"),
    "latents_mean": (_is_list_of_numbers, "a list of numbers or null"),
    "latents_std": (_is_list_of_numbers, "a list of numbers or null"),
    "sample_size": (lambda one: one is None or _is_size(one), "a number of pixels, or two"),
    # These name code, or a way to read the weights that is not safetensors.
    "quantization_config": (lambda one: one is None, "left out"),
    "attn_implementation": (lambda one: one in (None, "eager", "sdpa"), "left out"),
    "_attn_implementation": (lambda one: one in (None, "eager", "sdpa"), "left out"),
}


def read_config(file: Path, tensors: float) -> dict[str, Any]:
    """The configuration of a model of so many tensors, or of a scheduler.

    Raises:
        UsageError: It is missing or damaged, or one of its values is absurd.
    """
    config = read_object(file)
    check_numbers(config, f"'{printable(file)}'", tensors)
    for name, (fits, what) in _VALUES.items():
        if name in config and not fits(config[name]):
            raise UsageError(f"'{printable(file)}' has {name} = {short(config[name])}; it has to be {what}.")
    return config


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that has to be there.

    Raises:
        UsageError: It is missing, or holds something else.
    """
    if not is_file(file):
        raise UsageError(f"'{printable(file)}' is missing; the directory is incomplete.")
    content = parse_json(read_text(file), f"'{printable(file)}' cannot be loaded: it")
    if not isinstance(content, dict):
        raise UsageError(f"'{printable(file)}' cannot be loaded: it holds a {type(content).__name__}, not an object.")
    return content
