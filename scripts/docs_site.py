"""The parts of the documentation's site that mkdocs cannot know: hooks of ``mkdocs.yml``, which names this file.

The site has the folders of the repository, so one relative link is right on the site, in a checkout and where the
repository is browsed. The pages of the commands are made from the commands themselves.
"""

from __future__ import annotations

import html
import posixpath
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gspn.cli import app

ROOT = Path(__file__).resolve().parents[1]

SHELL = ("sh", "bash")
"""The languages of blocks with commands."""

_FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    """The line of the page that its code begins in."""
    not_run: str | None
    """Why it is not run, by the comment ``<!-- not run: reason -->`` in the line above it."""


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page of Markdown."""
    for match in _FENCE.finditer(page):
        line = page.count("\n", 0, match.start("code")) + 1
        yield Block(match["language"], match["code"], line, match["reason"])


def pages() -> list[Path]:
    """The pages of documentation, relative to the repository."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    return sorted(path.relative_to(ROOT) for path in found)


# --- Every command


@dataclass(frozen=True)
class Command:
    """A command that does something, so not a group of commands."""

    path: str
    """As one types it: ``gspn t2i sample``."""
    command: Any
    context: Any

    @property
    def page(self) -> str:
        """The page that it is on."""
        words = self.path.split()
        return words[1] if len(words) > 2 else "gspn"

    @property
    def anchor(self) -> str:
        """The anchor of its heading."""
        return self.path.replace(" ", "-")

    @property
    def summary(self) -> str:
        """The first sentence of its help."""
        return " ".join(self.command.help.split("\n\n")[0].split())


def commands() -> list[Command]:
    """Every command of ``gspn``."""

    def walk(command: Any, context: Any) -> Iterator[Command]:
        if not hasattr(command, "commands"):
            yield Command(context.command_path, command, context)
            return
        for name, child in command.commands.items():
            yield from walk(child, child.context_class(child, info_name=name, parent=context))

    root = typer.main.get_command(app)
    return list(walk(root, root.context_class(root, info_name="gspn")))


def command_lines(page: str) -> Iterator[tuple[int, list[str], str]]:
    """The calls of ``gspn`` in a page's shell blocks: the line, the words from ``gspn`` on, and all of them as text."""
    for block in blocks(page):
        line = block.line
        for text in re.findall(r"(?:.*\\\n)*.*\n", block.code) if block.language in SHELL else ():
            for part in re.split(r"(?:^|\s+)#", text)[0].split(";"):
                call = " ".join(part.replace("\\\n", " ").split())
                words = shlex.split(call)
                if "gspn" in words:
                    yield line, words[words.index("gspn") :], call
            line += text.count("\n")


def _examples() -> dict[str, list[tuple[Path, str]]]:
    """For each command the lines of the guides that call it."""
    paths = sorted((command.path for command in commands()), key=len, reverse=True)
    result: dict[str, list[tuple[Path, str]]] = {}
    for page in pages():
        for _, words, text in command_lines((ROOT / page).read_text(encoding="utf-8")):
            call = " ".join(words)
            for path in paths:
                if f"{call} ".startswith(f"{path} "):
                    lines = result.setdefault(path, [])
                    if text not in [line for _, line in lines]:
                        lines.append((page, text))
                    break
    return result


def _folded(line: str) -> str:
    """A call on several lines where it is long, each new one beginning with an option."""
    result, *rest = re.split(r" (?=-)", line)
    for word in rest:
        long = len(result.rsplit("\n", 1)[-1]) + len(word) > 88
        result += f" \\\n    {word}" if long else f" {word}"
    return result


def _escaped(text: str) -> str:
    return re.sub(r"([*_|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _argument(parameter: Any, context: Any) -> str:
    return parameter.get_help_record(context)[0].split(" <")[0]  # without its type


def _parameter(parameter: Any, context: Any) -> str:
    names, text = parameter.get_help_record(context)
    if parameter.param_type_name == "argument":
        names = _argument(parameter, context)
    extra = re.search(r"\s*\[([^\[\]]*)\]$", text)
    notes = [note for note in (extra[1] if extra else "").split("; ") if note]
    text = _escaped(text[: extra.start()] if extra else text)
    required = ["**Required.**"] if "required" in notes else []
    rest = " ".join(_note(note) for note in notes if note != "required")
    return f"`{names}`\n:   " + " ".join([text, *required, *([f"<small>{rest}</small>"] if rest else [])]) + "\n"


def _note(note: str) -> str:
    """A default or a range of numbers, as the command's help writes it, in words."""
    if note.startswith("default: "):
        return f"Default: `{note.removeprefix('default: ').strip('()')}`."
    span = re.fullmatch(r"(?:([\d.]+)<=)?x([<>])=([\d.]+)", note)
    if span is None:
        return f"`{note}`"
    return f"From {span[1]} to {span[3]}." if span[1] else f"At {'least' if span[2] == '>' else 'most'} {span[3]}."


def _section(one: Command, examples: Iterable[tuple[Path, str]]) -> str:
    arguments = [parameter for parameter in one.command.params if parameter.param_type_name == "argument"]
    options = ["[OPTIONS]"] if len(arguments) < len(one.command.params) else []
    usage = " ".join([one.path, *options, *(_argument(argument, one.context) for argument in arguments)])
    text = [
        f"## {one.path} {{ #{one.anchor} }}",
        re.sub(r"(?<!\n)\n(?!\n)", " ", one.command.help),
        f"```\n{usage}\n```",
    ]
    if examples := [(page, line) for page, line in examples if line != usage]:
        links = [f"[{_title(page)}](../{page})" for page in sorted({page for page, _ in examples})]
        text += [f"Examples, from {', '.join(links)}:"]
        text += ["```sh\n" + "\n".join(_folded(line) for _, line in examples) + "\n```"]
    parameters = [_parameter(one_of_them, one.context) for one_of_them in one.command.params]
    return "\n\n".join(text + parameters) + "\n"


def _title(page: Path) -> str:
    """The title of a page, which begins it."""
    return next(line[2:] for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("# "))


def command_pages() -> dict[str, str]:
    """The text of each page of commands, by its path in the site: one for each group, and one for all of them."""
    everything, examples = commands(), _examples()
    result = {}
    for name in dict.fromkeys(one.page for one in everything):
        members = [one for one in everything if one.page == name]
        parent = members[0].context.parent
        title = f"# {parent.command_path}\n\n{parent.command.help}\n\n"
        result[f"commands/{name}.md"] = title + "\n".join(_section(one, examples.get(one.path, ())) for one in members)
    rows = "\n".join(f"| [`{one.path}`]({one.page}.md#{one.anchor}) | {_escaped(one.summary)} |" for one in everything)
    result["commands/README.md"] = (
        "# The command\n\nEvery command prints this help with `--help`. These pages are made from it. Their examples "
        f"are those of the guides.\n\n| command | |\n|---|---|\n{rows}\n"
    )
    return result


# --- The files of the site


def _destination(path: str) -> str:
    """The path of a file in the site: pages of docs/ at its root, and other texts as ``.txt``, which browsers show."""
    page = path.endswith(".md")
    if page:
        folder, name = posixpath.split(path[:-3])
        path = posixpath.join(folder, "index" if name == "README" else name.lower()) + ".html"
    elif Path(path).suffix in ("", ".py", ".txt") and not path.startswith("docs/"):
        path = path.removesuffix(".txt") + ".txt"
    return path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give every file its path in the repository, and add the pages and files outside docs/ that pages link to."""
    paths = {f"docs/{file.src_uri}" for file in files if file.src_dir == config.docs_dir}
    result = [file for file in files if file.src_dir != config.docs_dir]  # those of the theme
    pending = sorted(paths | {page.as_posix() for page in pages()})
    paths |= set(pending)
    for path in pending:
        if path.endswith(".md"):
            for link in _LINK.findall((ROOT / path).read_text(encoding="utf-8")):
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
                if target not in paths and not target.startswith("..") and (ROOT / target).is_file():
                    paths.add(target)
                    pending.append(target)
        file = File(path, str(ROOT), config.site_dir, use_directory_urls=False, dest_uri=_destination(path))
        result.append(file)
    for path, text in command_pages().items():
        file = File.generated(config, path, content=text)
        file.dest_uri = _destination(path)
        result.append(file)
    return Files(result)


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""Take the backslash from ``\|`` in the code of a table, which GitHub needs and this Markdown would show."""
    row = re.compile(r"^\|.*", re.M)
    return row.sub(lambda line: re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line[0]), markdown)


class MarkdownDocstrings(griffe.Extension):
    """Docstrings as Markdown: roles such as ``:func:`` and examples become code, literal blocks get one colon."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = re.sub(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"::(?=\n\s*\n)", ":", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
