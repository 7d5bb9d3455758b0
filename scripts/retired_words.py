"""Find words that this project no longer uses, and say which to use instead: ``python scripts/retired_words.py``.

With ``--count`` it prints how many there are in each folder. ``make lint`` runs it, and so does a test.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WALKED = (
    "src", "tests", "docs", "examples", "scripts", "benchmarks", "README.md", "CONTRIBUTING.md", "SECURITY.md",
    "Makefile", "pyproject.toml",
)  # fmt: skip
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".h", ".cpp", ".sh", ".html"}


@dataclass(frozen=True)
class Rule:
    """One retired word."""

    pattern: re.Pattern[str]
    instead: str
    names_only: bool = False
    """Whether it is looked for among the names in Python code alone, not in prose."""
    folder: str = ""
    """Where it is looked for: everywhere, or below this folder."""


def _text(pattern: str, instead: str) -> Rule:
    return Rule(re.compile(pattern), instead)


def _name(pattern: str, instead: str, folder: str = "") -> Rule:
    return Rule(re.compile(pattern), instead, names_only=True, folder=folder)


RULES = (
    # Words, in prose and in names.
    _text(r"(?i:picture)", "image"),
    _text(r"(?i:recipe)", "config preset"),
    # The Samplers of torch.utils.data keep their name.
    _text(
        r"(?<!batch_)(?<!Batch)(?<!Random)(?<!Distributed)(?<!Sequential)(?<!data\.)([Ss]ampler|SAMPLER)", "scheduler"
    ),
    _text(r"(?i:ladder)", "progressive upscaling, or stages"),
    _text(r"[\"']released[\"']|\breleased_|_released\b", "official"),
    _text(r"\breleased (checkpoint|weight|classifier|model|file)s?\b", "official"),
    # Names in code.
    _name(r"(?!FeaturePyramidNetwork$)(?i:\w*network(s|_\w*)?)", "model"),  # torchvision's class keeps its name
    _name(r"_LATER|_LAZY", "gspn._lazy.lazy_exports"),
    _name(r"by_states|towards|turn_in|turn_out", "dispatch_on_proxy_channels, directions, transpose_in, transpose_out"),
    # Vague names in the library.
    _name(r"apart|aim|wanted|given", "separate, target, requested, value or arguments", "src"),
    _name(r"found|settle|bring", "result or what it is, flush, load_or_view", "src"),
    # Turns of phrase.
    _text(r"\bLikewise\b", "a full sentence"),
    _text(r"\banew\b", "again, or recomputed"),
    _text(r"\b(held|holds?) (\w+ )?against\b", "compared with, or checked against"),
    _text(r"(\"\"\"|// )What\b", "a sentence that begins with the noun"),
    _text(r"\bgoes on\b", "continues"),
    _text(r"\bcomes to\b", "amounts to"),
    _text(r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b|such\b|other\b)\w+", "not a, or unknown"),
    _text(r"\bneither[.;:,)\"']", "no, or without"),
    _text(r"(\"|\. )Of the [^.\"]*\.", "a full sentence"),
)

ALLOWED: dict[str, dict[str, str]] = {
    # file: {what a finding in it may be, as a pattern: the reason}
    "scripts/retired_words.py": {".*": "lists the words"},
    "src/gspn/tasks/class_conditional/config.py": {"sampler": "a key of version 0.1's configuration"},
    "src/gspn/tasks/text_to_image/caption_trainer.py": {"picture": "a seed of version 0.1, which keeps its numbers"},
    "src/gspn/tasks/text_to_image/distill/config.py": {"picture": "a key of version 0.1's configuration"},
    "src/gspn/tasks/text_to_image/train/config.py": {"picture": "a key of version 0.1's configuration"},
    "tests/tasks/core/test_config.py": {"picture|sampler": "keys of version 0.1's configuration"},
    "src/gspn/tasks/diffusion/latents.py": {"picture": "a key of version 0.1's index of latents"},
    "tests/tasks/diffusion/test_latents.py": {"picture": "a key of version 0.1's index of latents"},
    "tests/test_retired_words.py": {".*": "tries the words"},
}


@dataclass(frozen=True)
class Finding:
    """A retired word where it stands."""

    path: Path
    line: int
    text: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text!r}; say {self.instead}."


def _files() -> Iterator[Path]:
    for name in WALKED:
        path = ROOT / name
        if path.is_file():
            yield path
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            if file.suffix in SUFFIXES and "results" not in file.parts:
                yield file


def findings(source: str, path: Path) -> Iterator[Finding]:
    """Each retired word in ``source``, the text of ``path``; names are looked for in Python files."""
    rules = [rule for rule in RULES if path.as_posix().startswith(rule.folder)]
    words = [rule for rule in rules if not rule.names_only]
    for number, line in enumerate(source.splitlines(), 1):
        for rule in words:
            for match in rule.pattern.finditer(line):
                yield Finding(path, number, match.group(), rule.instead)
    if path.suffix != ".py":
        return
    names = [rule for rule in rules if rule.names_only]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            for rule in names:
                if rule.pattern.fullmatch(token.string):
                    yield Finding(path, token.start[0], token.string, rule.instead)


def all_findings() -> list[Finding]:
    """Every retired word of the project that no exception allows."""
    return [
        finding
        for file in _files()
        for finding in findings(file.read_text(encoding="utf-8"), file.relative_to(ROOT))
        if not any(re.fullmatch(p, finding.text) for p in ALLOWED.get(finding.path.as_posix(), ()))
    ]


def main() -> int:
    """Print the findings, or their number in each folder; the exit status is 1 where there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="Print the number of findings in each folder.")
    arguments = parser.parse_args()
    results = all_findings()
    if arguments.count:
        for folder, count in Counter("/".join(f.path.parts[:-1][:4]) or f.path.name for f in results).most_common():
            print(f"{count:5} {folder}")
        print(f"{len(results):5} in all")
    else:
        print("\n".join(map(str, results)) or "No retired words.")
    return bool(results)


if __name__ == "__main__":
    sys.exit(main())
