"""Render emoji in six drawing styles, with captions, into a folder that ``open_captions("folder", ...)`` opens.

    python scripts/build_emoji_styles.py runs/emoji_styles [--size 128] [--style noto]

This needs network access, and ``pip install resvg_py``. The folder receives ``train/STYLE/CODE.png`` and
``val/STYLE/CODE.png``, square on white, the captions in ``train/metadata.jsonl`` and ``val/metadata.jsonl``, and a
NOTICE with the sources and their licences. A stopped call continues where it was. The drawings come from the npm
packages below, pinned by their hashes; with the versions of ``constraints.txt`` the files are the same byte for byte.

A drawing belongs to an emoji of ``gspn.data.Emoji``, by its code points or by its name, and is on the side of that
emoji: what is held out there is held out in every style. Drawings that belong to none, such as those of skin tones, are
left out. The package of the style ``noto`` has no flags; they come from ``gspn.data.Emoji``, enlarged from 64 pixels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import sys
import tarfile
import unicodedata
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from gspn._files import replaced
from gspn.data import EmojiCaptions, EmojiRecord

SPLITS = ("train", "val")
DEFAULT_STYLE = "noto"
MOST = 4
"""Captions without a style that are used: the name, and the name with three keywords each."""


@dataclass(frozen=True)
class Source:
    """An npm package of drawings, one style."""

    package: str
    version: str
    sha512: str
    """Digest of the archive, in base64, as npm states it."""
    title: str
    author: str
    licence: str
    home: str

    @property
    def url(self) -> str:
        """Where the archive is."""
        return f"https://registry.npmjs.org/{self.package}/-/{self.package.split('/')[1]}-{self.version}.tgz"


SOURCES = {
    "noto": Source(
        "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Noto Emoji", "Google Inc", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
    ),
    "blob": Source(
        "@iconify-json/noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Noto Emoji (v1)", "Google Inc", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
    ),
    "fluent": Source(
        "@iconify-json/fluent-emoji", "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "Fluent Emoji", "Microsoft Corporation", "MIT", "https://github.com/microsoft/fluentui-emoji",
    ),
    "flat": Source(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "Fluent Emoji Flat", "Microsoft Corporation", "MIT", "https://github.com/microsoft/fluentui-emoji",
    ),
    "twemoji": Source(
        "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "Twitter Emoji (Twemoji)", "Twitter, Inc and other contributors", "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    "outlined": Source(
        "@iconify-json/streamline-emojis", "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "Streamline Emojis", "Streamline", "CC-BY-4.0", "https://github.com/webalys-hq/streamline-vectors",
    ),
}  # fmt: skip
"""The styles, by the word that names them in captions."""


@dataclass(frozen=True)
class IconSet:
    """The drawings of a package."""

    icons: Mapping[str, Mapping[str, Any]]
    """SVG elements and what differs from ``sides``, by name."""
    codes: Mapping[str, str]
    """Code points by name, as far as the package knows them."""
    aliases: Mapping[str, list[str]]
    """Further names of a drawing."""
    sides: tuple[float, float]
    """Width and height."""


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels; default: 128")
    parser.add_argument("--style", choices=SOURCES, action="append", help="repeatable; default: all of them")
    parser.add_argument("--packages", type=Path, help="folder of the packages; default: OUTPUT.packages")
    arguments = parser.parse_args()
    try:
        import resvg_py  # noqa: F401  # before anything is downloaded
    except ImportError:
        sys.exit("resvg_py is not installed; pip install resvg_py")
    output: Path = arguments.output
    packages = arguments.packages or output.with_name(output.name + ".packages")
    sets = {style: read(fetch(source, packages)) for style, source in SOURCES.items()}
    build(output, sets, arguments.style or list(sets), arguments.size)
    return 0


def build(output: Path, sets: Mapping[str, IconSet], styles: Iterable[str], size: int) -> None:
    """Write the images of some styles that are missing, then the captions and the NOTICE."""
    every = EmojiCaptions("all")
    records = every.emoji.records
    held_out = {record.unified for record in EmojiCaptions("val").emoji.records}
    rows: dict[str, list[str]] = {split: [] for split in SPLITS}
    for style in styles:
        icons = sets[style]
        drawings = match(icons, records, sets.values())
        for i, record in track(list(enumerate(records)), f"{style:10}"):
            split = "val" if record.unified in held_out else "train"
            names: list[str | None] = [*drawings.get(record.unified, [])]
            if not names and style == DEFAULT_STYLE and not record.misdrawn:
                names = [None]
            for number, name in enumerate(names):
                file = f"{style}/{record.unified.lower()}{f'_{number + 1}' if number else ''}.png"
                path = output / split / file
                if not path.is_file():
                    image = every.image(i) if name is None else render(icons, name, size)
                    save(image.resize((size, size), Image.Resampling.LANCZOS), path)
                row = {"file_name": file, "text": captions(style, record.name, every.captions(i))}
                rows[split].append(json.dumps(row, ensure_ascii=False))
    for split, lines in rows.items():
        with replaced(output / split / "metadata.jsonl") as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replaced(output / "NOTICE") as part:
        part.write_text(notice(), encoding="utf-8")
    sys.stdout.write(f"{output}: {', '.join(f'{len(lines):,} images in {split}' for split, lines in rows.items())}\n")


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG that is complete where it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    image.save(part, "PNG")
    part.replace(path)


# ----------------------------------------------------------------------------------------------------------------------
# The packages.


def fetch(source: Source, folder: Path) -> bytes:
    """The archive of a package, from the folder or from the registry; ends the program if it is not to be had."""
    file = folder / source.url.rsplit("/", 1)[1]
    if not file.is_file():
        try:
            with urllib.request.urlopen(source.url, timeout=60) as response:  # noqa: S310  # https, from above
                data = response.read()
        except (urllib.error.URLError, OSError) as error:
            sys.exit(f"{source.url} cannot be read ({error}); get it where there is a network, and put it at {file}")
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(file) as part:
            part.write_bytes(data)
    data = file.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != source.sha512:
        sys.exit(f"{file} is not {source.package} {source.version}: its SHA-512 differs; remove it and run again")
    return data


def read(archive: bytes) -> IconSet:
    """The drawings of a package's archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        icons, codes = (json.loads(_file(tar, f"package/{name}.json")) for name in ("icons", "chars"))
    aliases: dict[str, list[str]] = defaultdict(list)
    for name, alias in icons.get("aliases", {}).items():
        if alias.keys() == {"parent"}:  # others turn or mirror the drawing
            aliases[alias["parent"]].append(name)
    return IconSet(
        icons={name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")},
        codes={name: code for code, name in codes.items()},
        aliases=aliases,
        sides=(icons["width"], icons["height"]),
    )


def _file(tar: tarfile.TarFile, name: str) -> bytes:
    opened = tar.extractfile(name)
    if opened is None:
        raise RuntimeError(f"{name} is not a file of the package.")
    return opened.read()


def render(icons: IconSet, name: str, size: int) -> Image.Image:
    """A drawing in the middle of a white square, RGB."""
    import resvg_py

    icon = icons.icons[name]
    left, top, width, height = (
        icon.get(key, default)
        for key, default in zip(("left", "top", "width", "height"), (0, 0, *icons.sides), strict=True)
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


# ----------------------------------------------------------------------------------------------------------------------
# Which emoji a drawing is.


def match(icons: IconSet, records: Sequence[EmojiRecord], sets: Iterable[IconSet]) -> dict[str, list[str]]:
    """The names of the drawings of each emoji, by the emoji's code points.

    Code points that the package states decide. Otherwise a name does: that of the emoji, or one that another package of
    ``sets`` has for its code points.
    """
    by_code = {plain(record.unified): record.unified for record in records}
    by_name: dict[str, str] = {}
    for one in sets:
        for name, code in one.codes.items():
            if plain(code) in by_code:
                by_name[name] = by_code[plain(code)]
    slugs = [slug(record.name) for record in records]
    by_name |= {name: record.unified for name, record in zip(slugs, records, strict=True) if slugs.count(name) == 1}
    matched: dict[str, list[str]] = defaultdict(list)
    for name in icons.icons:
        if name in icons.codes:
            found = by_code.get(plain(icons.codes[name]))
        else:
            names = (key for one in (name, *icons.aliases.get(name, ())) for key in spellings(one, icons.icons))
            known = (by_name.get(key) for key in names)
            found = next(filter(None, known), None)
        if found is not None:
            matched[found].append(name)
    return {code: sorted(names) for code, names in matched.items()}


def plain(code: str) -> str:
    """Code points in lower case and without variation selectors, which sources leave out in different places."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def slug(name: str) -> str:
    """A name as the packages write it: ``"piñata"`` is ``"pinata"``, ``"Mrs. Claus"`` is ``"mrs-claus"``."""
    ascii_only = unicodedata.normalize("NFKD", name.replace("’", "")).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_only.replace("&", "and")))


def spellings(name: str, others: Container[str]) -> list[str]:
    """A name, then without the number of a second drawing, and without the word face: ``bear-face-2``, ``bear``.

    Where ``others``, the names of the package, have both ``dizzy-face`` and ``dizzy``, the word makes a difference.
    """
    unnumbered = re.sub(r"-\d$", "", name)
    faceless = unnumbered.removesuffix("-face")
    return [name, unnumbered, *([] if faceless in others else [faceless])]


# ----------------------------------------------------------------------------------------------------------------------


def captions(style: str, name: str, plain_captions: Sequence[str]) -> list[str]:
    """The captions of a drawing, from the captions of its emoji, of which the first is the name.

    Those without a style belong to Noto alone: so a name without a style has one answer. The style is named early, as
    text encoders cut long captions.
    """
    named = f"{name}, {style} style"
    drawn = f"{'an' if style[0] in 'aeiou' else 'a'} {style} drawing of {name}"
    if style == DEFAULT_STYLE:
        return [*plain_captions[:MOST], drawn, named]
    return [drawn, named, *(named + text.removeprefix(name) for text in plain_captions[1:MOST])]


def notice() -> str:
    """The sources and their licences."""
    sources = (
        f"{style}: {source.title}, {source.author}, {source.licence}\n  {source.home}\n"
        f"  npm {source.package} {source.version}\n"
        for style, source in SOURCES.items()
    )
    return (
        "The drawings of each style, rendered on white. CC-BY-4.0 is https://creativecommons.org/licenses/by/4.0/.\n\n"
        + "".join(sources)
        + "\nNames and keywords: Unicode CLDR, Unicode-3.0. Flags of the style noto: Noto Emoji, Apache-2.0.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
