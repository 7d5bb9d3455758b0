"""Print what gspn and each of its extras add to an environment: MB of installed files, as a table for docs/install.md.

Reads the packages that are installed here with all extras (``make install``): of each the files that its RECORD names,
compiled bytecode left out.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = 5  # packages named in the table


def closure(name: str, extra: str = "", seen: set[tuple[str, str]] | None = None) -> set[str]:
    """The packages that installing ``name[extra]`` brings, itself included."""
    seen = set() if seen is None else seen
    name = str(canonicalize_name(name))
    if (name, extra) in seen:
        return set()
    seen.add((name, extra))
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:  # for another platform or Python
        return set()
    packages = {name}
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for inner in {"", *requirement.extras}:
                packages |= closure(requirement.name, inner, seen)
    return packages


def megabytes(package: str) -> float:
    """The size of a package's files."""
    paths = (Path(str(file.locate())) for file in distribution(package).files or [] if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def main() -> None:
    """Print the table."""
    base = closure("gspn")
    extras = distribution("gspn").metadata.get_all("Provides-Extra") or []
    print("| | adds, MB | packages | the largest |\n|---|---|---|---|")
    for extra in ("", *extras):
        packages = (closure("gspn", extra) - base if extra else base) - {"gspn"}
        sizes = sorted(((megabytes(package), package) for package in packages), reverse=True)
        largest = ", ".join(f"{package} {size:.0f}" for size, package in sizes[:HEAVY] if size >= 1)
        title = f"`gspn[{extra}]`" if extra else "`gspn`"
        print(f"| {title} | {sum(size for size, _ in sizes):,.0f} | {len(sizes)} | {largest} |")


if __name__ == "__main__":
    main()
