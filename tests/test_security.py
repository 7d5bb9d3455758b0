"""No source file makes a call that could execute, overwrite or hang on what a user's file holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support import ROOT

SOURCES = sorted((ROOT / "src/gspn").rglob("*.py"))

# By file and rule: why it is right there.
ALLOWED = {
    ("_files.py", "json"): "the one place that parses JSON, with a limit of bytes and of depth",
    ("data/emoji.py", "json"): "the index of an archive of the package",
    ("data/earth/sources.py", "Image.open"): "files of installed packages, of one format, with a limit of pixels",
    ("data/maps/decoding.py", "Image.open"): "the one place that opens maps, with limits of formats, pixels and values",
    ("data/images.py", "Image.open"): "the one place that opens images, with limits of formats and pixels",
    (
        "tasks/class_conditional/sampling.py",
        "Image.open",
    ): "an image that the run has drawn and compared with a record",
    ("tasks/diffusion/images.py", "Image.open"): "the text of a PNG; whatever is wrong with it counts as no record",
    ("tasks/diffusion/images.py", "json"): "a record of limited length; whatever is wrong with it counts as none",
    ("tasks/diffusion/pretrained.py", "from_pretrained"): "a tokenizer or a scheduler, which have no weights",
    ("tasks/distill/student.py", "from_pretrained"): "gspn.timm's adapter, which reads safetensors and JSON alone",
    ("tasks/text_to_image/pipelines.py", "from_pretrained"): "a tokenizer, which has no weights",
}

_PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
_NEVER = {
    r"(builtins\.)?(eval|exec|compile|__import__)": "it executes text",
    r"os\.(system|popen|exec\w+|spawn\w+)": "it executes text",
    r"(torch\.)?hub\.load.*": "it executes a repository",
    r"yaml\.(unsafe_load|full_load)(_all)?": "it makes any object; use yaml.safe_load",
    r"(pd|pandas)\.read_pickle": "it unpickles",
    r".*\.(extract|extractall)": "an archive names files outside its folder; read its members",
    r"shutil\.unpack_archive": "an archive names files outside its folder; read its members",
}


def broken_rules(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """The rule, the line and the reason of everything that is forbidden."""
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("SafeLoader" in ast.unparse(base) for base in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = {alias.name for alias in node.names}
            errors = names <= {"pickle", "UnpicklingError"}  # the module, of which only its error is used; see below
            if _PICKLES & {module.partition(".")[0] for module in modules} and not errors:
                yield "pickle", node.lineno, "what it reads may execute; use safetensors or JSON"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            yield "pickle", node.lineno, "what it reads may execute; use safetensors or JSON"
        elif isinstance(node, ast.Call):
            yield from ((rule, node.lineno, reason) for rule, reason in _wrong_call(node, safe_loaders))


def _wrong_call(node: ast.Call, safe_loaders: set[str]) -> Iterator[tuple[str, str]]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    given = {one.arg: ast.unparse(one.value) for one in node.keywords}
    for pattern, reason in _NEVER.items():
        if re.fullmatch(pattern, name):
            yield last, reason
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load", "write weights_only=True"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
        yield "np.load", "write allow_pickle=False"
    if re.fullmatch(r"yaml\.load(_all)?", name):
        loader = given.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        if loader.rpartition(".")[2] not in safe_loaders | {"SafeLoader", "CSafeLoader"}:
            yield "yaml.load", "pass a loader that derives from yaml.SafeLoader"
    if given.get("shell", "False") != "False":
        yield "shell", "a shell executes text; pass a list of words"
    if given.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code", "it executes the files of a repository"
    # **options may hold it, and is not seen through.
    if last == "from_pretrained" and given.get("use_safetensors") != "True":
        yield "from_pretrained", "write use_safetensors=True: other files of weights are pickles"
    if name in ("Image.open", "PIL.Image.open"):
        yield "Image.open", "use gspn.data.load_image, which has limits"
    if name in ("json.load", "json.loads") and not ast.unparse(node.args[0]).startswith("json.dumps("):
        yield "json", "use gspn._files.read_json or parse_json, which have limits and name the file"


def test_no_source_makes_a_forbidden_call() -> None:
    found, used = [], set()
    for path in SOURCES:
        name = path.relative_to(ROOT / "src/gspn").as_posix()
        for rule, line, reason in broken_rules(ast.parse(path.read_text(encoding="utf-8"))):
            used.add((name, rule))
            if (name, rule) not in ALLOWED:
                found.append(f"{path}:{line}: {rule}: {reason}.")
    assert not found, "\n".join(found)
    assert not ALLOWED.keys() - used, "these are allowed and no longer there"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(file)", "from pickle import loads", "from cloudpickle import loads", "import dill",
        "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "yaml.load(text, yaml.Loader)", "yaml.load(text, L)",
        "class Loader(yaml.Loader): pass\nyaml.load(text, Loader=Loader)", "yaml.unsafe_load(text)", "eval(text)",
        "exec(text)", "__import__(name)", "os.system(line)", "subprocess.run(line, shell=True)", "tar.extractall(to)",
        "tar.extract(member)", "shutil.unpack_archive(path)", "Model.from_pretrained(path)", "torch.hub.load(name)",
        "Model.from_pretrained(path, use_safetensors=False)", "AutoModel.from_config(c, trust_remote_code=True)",
        "Image.open(path)", "json.loads(text)", "json.load(file)", "pd.read_pickle(path)",
    ],
)  # fmt: skip
def test_it_is_seen(source) -> None:
    assert list(broken_rules(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; raise pickle.UnpicklingError", "model.eval()",
        "re.compile(text)", "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)",
        "class Loader(yaml.SafeLoader): pass\nyaml.load(text, Loader=Loader)", "json.loads(json.dumps(value))",
        "Model.from_pretrained(path, use_safetensors=True)", "subprocess.run(['ls'])", "open_regular(path)",
    ],
)  # fmt: skip
def test_what_is_right_is_let_through(source) -> None:
    assert not list(broken_rules(ast.parse(source)))
