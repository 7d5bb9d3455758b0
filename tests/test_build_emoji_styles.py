"""Emoji in several styles: which emoji a drawing is, its captions, and the split."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from gspn.data import Emoji, open_captions, open_dataset
from support import ROOT

_SPEC = importlib.util.spec_from_file_location("build_emoji_styles", ROOT / "scripts" / "build_emoji_styles.py")
styles = importlib.util.module_from_spec(_SPEC)
sys.modules["build_emoji_styles"] = styles  # dataclasses look their module up
_SPEC.loader.exec_module(styles)

SQUARE = {"body": '<path fill="#f00" d="M0 0h8v8H0z"/>'}
RECORDS = {record.name: record for record in Emoji("all").records}


def icon_set(*names: str, codes: dict[str, str] | None = None, **aliases: list[str]) -> Any:
    return styles.IconSet(dict.fromkeys(names, SQUARE), codes or {}, aliases, (8, 8))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grinning face", "grinning-face"),
        ("piñata", "pinata"),
        ("Mrs. Claus", "mrs-claus"),
        ("man’s shoe", "mans-shoe"),
        ("flag: Antigua & Barbuda", "flag-antigua-and-barbuda"),
    ],
)
def test_slugs_are_names_as_packages_write_them(name: str, expected: str) -> None:
    assert styles.slug(name) == expected


def test_a_name_that_two_emoji_share_matches_neither() -> None:
    assert styles.slug("keycap: #") == styles.slug("keycap: *") == "keycap"
    icons = icon_set("keycap")
    assert not styles.match(icons, list(RECORDS.values()), [icons])


def test_the_word_face_makes_a_difference_where_a_package_has_both() -> None:
    icons = icon_set("dizzy", "dizzy-face")
    assert styles.match(icons, list(RECORDS.values()), [icons]) == {"1F4AB": ["dizzy"]}


def test_code_points_decide_before_names() -> None:
    icons = icon_set("bear", "red-heart", "odd", codes={"bear": "1f98a", "red-heart": "2764"})
    found = styles.match(icons, list(RECORDS.values()), [icons])
    assert found == {"1F98A": ["bear"], "2764-FE0F": ["red-heart"]}


def test_names_match_by_other_packages_by_alias_and_with_a_number() -> None:
    icons = icon_set("bear-face-2", "bear-face", "vulpine", "ruddy", "bear-dark-skin-tone", ruddy=["red-heart"])
    other = icon_set("vulpine", codes={"vulpine": "1f98a"})
    found = styles.match(icons, list(RECORDS.values()), [icons, other])
    assert found == {"1F43B": ["bear-face", "bear-face-2"], "1F98A": ["vulpine"], "2764-FE0F": ["ruddy"]}


def test_a_name_without_a_style_is_noto_alone() -> None:
    plain = ("bear", "bear, animal, face, grizzly")
    assert styles.captions("noto", "bear", plain) == [*plain, "a noto drawing of bear", "bear, noto style"]
    assert styles.captions("flat", "bear", plain) == [
        "a flat drawing of bear", "bear, flat style", "bear, flat style, animal, face, grizzly",
    ]  # fmt: skip
    assert styles.captions("outlined", "bear", plain)[0] == "an outlined drawing of bear"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """The folder of four emoji in two styles, two of them held out, and its packages. Nothing is rendered."""
    known = [record for split in ("val", "train") for record in Emoji(split).records if record.category != "Flags"]
    known = [*known[:2], *known[-2:]]
    names = [styles.slug(record.name) for record in known]
    monkeypatch.setattr(styles, "EmojiCaptions", lambda split: _first(split, known))
    monkeypatch.setattr(styles, "render", lambda icons, name, size: styles.Image.new("RGB", (size, size), "red"))
    sets = {"noto": icon_set(*names[1:]), "flat": icon_set(*names, f"{names[0]}-2", "unknown")}
    styles.build(tmp_path / "out", sets, sets, 32)
    return tmp_path / "out", sets


def _first(split: str, known: list[Any]) -> Any:
    """The captions of a few emoji alone."""
    from gspn.data import EmojiCaptions

    captions = EmojiCaptions(split)
    kept = [i for i, record in enumerate(captions.emoji.records) if record in known]
    texts = [captions.captions(i) for i in kept]
    captions.emoji.records = [captions.emoji.records[i] for i in kept]
    captions.emoji._files = [captions.emoji._files[i] for i in kept]
    captions.captions = lambda i: texts[i]  # type: ignore[method-assign]
    return captions


def test_what_is_held_out_is_held_out_in_every_style(made: Any) -> None:
    folder, _ = made
    names = {split: {record.name for record in Emoji(split).records} for split in styles.SPLITS}
    for split, other in (("train", "val"), ("val", "train")):
        images = open_captions("folder", split, root=folder)
        drawn = {name for name in RECORDS for i in range(len(images)) for text in images.captions(i)
                 if text.startswith(f"{name}, ") or text == f"a flat drawing of {name}" or text == name}  # fmt: skip
        assert drawn
        assert drawn <= names[split]
        assert not drawn & names[other]
        assert {image.size for image, _ in (images[i] for i in range(len(images)))} == {(32, 32)}


def test_the_folder_has_both_styles_every_drawing_and_the_licences(made: Any) -> None:
    folder, _ = made
    images = [open_captions("folder", split, root=folder) for split in styles.SPLITS]
    # Four emoji in two styles, one of them from gspn's own images, and a second drawing of one.
    assert sum(map(len, images)) == 9
    assert open_dataset("folder", "train", root=folder).classes == ["flat", "noto"]
    notice = (folder / "NOTICE").read_text()
    for source in styles.SOURCES.values():
        assert all(part in notice for part in (source.package, source.version, source.licence, source.author))


def test_a_second_call_renders_what_is_missing(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, sets = made
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    missing = max(path for path in before if path.suffix == ".png" and path.parent.name == "flat")
    missing.unlink()
    rendered: list[str] = []
    render = styles.render
    monkeypatch.setattr(styles, "render", lambda icons, name, size: rendered.append(name) or render(icons, name, size))
    styles.build(folder, sets, sets, 32)
    assert len(rendered) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def package(**files: Any) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return data.getvalue()


def test_hidden_drawings_and_turned_aliases_are_left_out() -> None:
    icons = {
        "width": 8, "height": 8,
        "icons": {"bear": SQUARE, "old": {**SQUARE, "hidden": True}},
        "aliases": {"grizzly": {"parent": "bear"}, "raeb": {"parent": "bear", "hFlip": True}},
    }  # fmt: skip
    found = styles.read(package(icons=icons, chars={"1f43b": "bear"}))
    assert list(found.icons) == ["bear"]
    assert dict(found.aliases) == {"bear": ["grizzly"]}
    assert found.codes == {"bear": "1f43b"}


def test_a_package_is_read_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = package(icons={}, chars={})
    source = dataclasses.replace(
        styles.SOURCES["noto"], sha512=base64.b64encode(hashlib.sha512(data).digest()).decode()
    )
    answers = [io.BytesIO(data)]
    monkeypatch.setattr(styles.urllib.request, "urlopen", lambda *_args, **_options: answers.pop())
    assert styles.fetch(source, tmp_path) == data
    assert styles.fetch(source, tmp_path) == data
    (file,) = tmp_path.iterdir()
    file.write_bytes(data + b"x")
    with pytest.raises(SystemExit, match=r"noto-1\.2\.9\.tgz is not @iconify-json/noto 1\.2\.9"):
        styles.fetch(source, tmp_path)


def test_without_a_connection_it_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(styles.urllib.request, "urlopen", refuse)
    with pytest.raises(SystemExit, match=r"registry\.npmjs\.org.*no network") as raised:
        styles.fetch(styles.SOURCES["noto"], tmp_path / "packages")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "packages").exists()


def test_drawings_are_centred_on_white() -> None:
    pytest.importorskip("resvg_py")
    wide = {**SQUARE, "width": 8, "height": 16}  # its lower half is empty
    image = styles.render(styles.IconSet({"wide": wide}, {}, {}, (8, 8)), "wide", 128)
    assert image.size == (128, 128)
    assert image.mode == "RGB"
    assert [image.getpixel(at) for at in ((16, 64), (64, 32), (64, 96))] == [
        (255, 255, 255), (255, 0, 0), (255, 255, 255),
    ]  # fmt: skip
