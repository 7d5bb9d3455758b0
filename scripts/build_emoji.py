"""Pack the Noto emoji into one file: src/gspn/data/emoji.zip.

    python scripts/build_emoji.py            # writes the file
    python scripts/build_emoji.py --check    # builds it again and compares

This needs npm and Pillow. The result is the same byte for byte with the npm versions below and the Pillow of
constraints.txt. Another Pillow may compress differently; --check then compares pixels and records instead.

The zip is stored, not compressed, as WebP already is. ``index.json`` lists the emoji in the order of Unicode. Each has
a lossless 64 x 64 WebP of at most 256 colours on white. Reducing to 256 colours saves a third of the size, at a PSNR of
51 dB, and 39 dB for the worst image.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

from PIL import Image

PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",  # names of sequences: flags, keycaps, professions
}
EXPECTED = 1911
SIZE = 64
COLOURS = 256
OUTPUT = Path(__file__).resolve().parent.parent / "src" / "gspn" / "data" / "emoji.zip"
# The oldest date that a zip can hold: a build date would make every build differ.
DATE = (1980, 1, 1, 0, 0, 0)
# The source draws these as another emoji, so name and image disagree. They are packed and marked, so that a data set
# of captions can leave them out.
MISDRAWN = {"1F1E8-1F1F6": "drawn as the flag of Saudi Arabia"}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        records, images = read(Path(folder) / "node_modules")
    data = pack(records, [shrink(image) for image in images])
    if arguments.check:
        return check(data, arguments.output.read_bytes())
    arguments.output.write_bytes(data)
    sys.stdout.write(f"{arguments.output}: {len(records)} emoji, {len(data) / 1e6:.2f} MB\n")
    return 0


def install(folder: Path) -> None:
    """Install the npm packages without running their scripts."""
    names = [f"{name}@{version}" for name, version in PACKAGES.items()]
    # Without a package.json here npm would install into a parent folder that has one.
    (folder / "package.json").write_text("{}")
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *names], cwd=folder, check=True
    )


def read(modules: Path) -> tuple[list[dict], list[Image.Image]]:
    """The records in the order of Unicode, and their images on white."""
    source = modules / "emoji-datasource-google"
    names = annotations(modules)
    records, images = [], []
    for entry in sorted(json.loads((source / "emoji.json").read_text()), key=lambda entry: entry["sort_order"]):
        character = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        # CLDR omits the variation selector.
        annotation = names.get(character) or names[character.replace("\ufe0f", "")]
        record = {
            "file": entry["image"].replace(".png", ".webp"),
            "name": annotation["tts"][0],
            "keywords": annotation["default"],
            "category": entry["category"],
            "subcategory": entry["subcategory"],
            "unified": entry["unified"],
            "short_names": entry["short_names"],
        }
        if entry["unified"] in MISDRAWN:
            record["misdrawn"] = MISDRAWN[entry["unified"]]
        records.append(record)
        with Image.open(source / "img" / "google" / "64" / entry["image"]) as image:
            images.append(on_white(image))
    if len(records) != EXPECTED or len({record["name"] for record in records}) != EXPECTED:
        raise RuntimeError(f"{len(records)} emoji, not {EXPECTED} with a name each: the packages have changed.")
    for record, group in zip(records, groups(records, images), strict=True):
        record["group"] = group
    return records, images


def annotations(modules: Path) -> dict[str, dict]:
    """Name (tts) and keywords (default) of each character or sequence."""
    plain = modules / "cldr-annotations-full" / "annotations" / "en" / "annotations.json"
    derived = modules / "cldr-annotations-derived-full" / "annotationsDerived" / "en" / "annotations.json"
    return (
        json.loads(derived.read_text())["annotationsDerived"]["annotations"]
        | json.loads(plain.read_text())["annotations"]["annotations"]
    )


def on_white(image: Image.Image) -> Image.Image:
    """A grey, palette or colour image with alpha as RGB on white."""
    colour = image.convert("RGBA")
    if colour.size != (SIZE, SIZE):
        raise RuntimeError(f"{colour.size=} is not {SIZE} x {SIZE}")
    white = Image.new("RGBA", colour.size, "white")
    white.alpha_composite(colour)
    return white.convert("RGB")


# ----------------------------------------------------------------------------------------------------------------------
# Emoji that are variants of one drawing. A split must not separate them: "man astronaut" in training would give away
# "woman astronaut" in validation.

PEOPLE = "man men woman women person people boy girl child adult"
COLOURS_AND_SIZES = (
    "red orange yellow green blue purple brown black white grey pink light dark small medium medium-small large"
)
DIRECTIONS = (
    "left right up down leftwards rightwards upwards downwards left-facing right-facing facing up-left up-right "
    "down-left down-right left-right up-down clockwise counterclockwise oncoming lowered raised"
)
DROPPED = frozenset(f"{PEOPLE} {COLOURS_AND_SIZES} {DIRECTIONS}".split())
# Groups that the words do not show. The first pattern that matches names the group.
FAMILIES = [
    (r"^(family|couple with heart|kiss$|kiss: |.*holding hands)", "families and couples"),
    (r"^(boy|girl|child|man|woman|person|adult)$", "person"),
    (r"^(old|older) (man|woman|person)$", "old person"),
    (r"^(man|woman|person): ", "person with hair"),
    (r"^(mermaid|merman|merperson)$", "merperson"),
    (r"^(prince|princess|person with crown)$", "crowned person"),
    (r"^(Santa Claus|Mrs\. Claus|Mx Claus)$", "Claus"),
    (r"^(breast-feeding|(man|woman|person) feeding baby)$", "feeding baby"),
    (r"^busts? in silhouette$", "bust in silhouette"),
    (r"^keycap: ", "keycap"),
    (r"(o’clock|-thirty)$", "clock face"),
    (
        r"^(Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus)$",
        "zodiac",
    ),
    (r"^Japanese “.*” button$", "Japanese button"),
    (r"^((new|full|waxing|waning|first|last)\b.*\bmoon( face)?|crescent moon)$", "moon"),
    (r"^globe showing ", "globe showing"),
    (r"^(1st|2nd|3rd) place medal$", "place medal"),
    (r"^speaker (low|medium|high) volume$|^muted speaker$", "speaker"),
    (r"^(open|closed) mailbox ", "mailbox"),
    (r"^sun behind ", "sun behind cloud"),
    (r"^hourglass ", "hourglass"),
    (r" banknote$", "banknote"),
    (r"^[A-Z!]+ button", "word button"),
    (r"^input ", "input"),
    (r"^(star of David|dotted six-pointed star)$", "six-pointed star"),
    (r"^(un)?locked", "locked"),
    (r"-no-evil monkey$", "no-evil monkey"),
    (r"^cloud with ", "cloud with weather"),
]


def groups(records: list[dict], images: list[Image.Image]) -> list[str]:
    """Name each emoji's group: variants by name, joined where two images are equal."""
    keys = [variant(record["name"]) for record in records]
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    equal: dict[bytes, list[str]] = defaultdict(list)
    for key, image in zip(keys, images, strict=True):
        equal[image.tobytes()].append(key)
    for same in equal.values():
        for key in same[1:]:
            first, second = sorted((root(same[0]), root(key)))
            parent[second] = first
    return [root(key) for key in keys]


def variant(name: str) -> str:
    """Reduce a name by gender, colour, size, direction, and the word face at its end."""
    for pattern, family in FAMILIES:
        if re.search(pattern, name):
            return family
    words = name.removesuffix(" face").replace(":", "").split()
    kept = [word for word in words if word.casefold() not in DROPPED]
    return " ".join(kept).casefold() or name.casefold()


# ----------------------------------------------------------------------------------------------------------------------


def shrink(image: Image.Image) -> bytes:
    """A lossless WebP of at most 256 colours, white kept white."""
    if image.getcolors(COLOURS) is None:
        # Median cut loses small patches of a colour, octree bands gradients, and this method errs least. One colour is
        # left for white.
        reduced = image.quantize(COLOURS - 1, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        reduced = reduced.convert("RGB")
        white = Image.new("RGB", image.size, "white")
        background = image.convert("L").point(lambda value: 255 if value == 255 else 0)
        reduced.paste(white, mask=background)
        image = reduced
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, method=6, quality=80, exact=True)
    return file.getvalue()


def pack(records: list[dict], files: list[bytes]) -> bytes:
    """The zip: index.json, then the images, all stored with one date."""
    index = {
        "sources": PACKAGES,
        "size": SIZE,
        "licences": "images Apache-2.0; names and keywords Unicode-3.0; categories and short names MIT; see NOTICE",
        "emoji": records,
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        # Only the index gets smaller by compression.
        write(archive, "index.json", text, zipfile.ZIP_DEFLATED)
        for record, data in zip(records, files, strict=True):
            write(archive, record["file"], data, zipfile.ZIP_STORED)
    return result.getvalue()


def write(archive: zipfile.ZipFile, name: str, data: bytes, compression: int) -> None:
    """Add a file whose header does not depend on the machine or the time."""
    info = zipfile.ZipInfo(name, DATE)
    info.compress_type = compression
    info.create_system = 3
    info.external_attr = 0o644 << 16
    archive.writestr(info, data, compresslevel=9)


def check(built: bytes, present: bytes) -> int:
    """Return 0 if both have the same content; the bytes may differ between versions of Pillow."""
    if built == present:
        sys.stdout.write("the same byte for byte\n")
        return 0
    with zipfile.ZipFile(io.BytesIO(built)) as new, zipfile.ZipFile(io.BytesIO(present)) as old:
        if new.namelist() != old.namelist():
            sys.stdout.write("the names of the files differ\n")
            return 1
        differing = [name for name in new.namelist() if content(name, new.read(name)) != content(name, old.read(name))]
    sys.stdout.write(f"different bytes; {len(differing)} files with different content {differing[:5]}\n")
    return bool(differing)


def content(name: str, data: bytes) -> bytes:
    """The pixels of an image, the text of the index."""
    return data if name.endswith(".json") else Image.open(io.BytesIO(data)).convert("RGB").tobytes()


if __name__ == "__main__":
    sys.exit(main())
