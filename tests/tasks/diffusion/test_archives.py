"""Archives of arrays that are damaged, or claim what they do not hold."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from gspn._errors import UsageError
from gspn.tasks.diffusion.archives import read_npz
from gspn.tasks.diffusion.images import open_images


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archive(path, content, name="arr_0.npy", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, content)
    return path


def stored(value, **options):
    np.save(out := io.BytesIO(), value, **options)
    return out.getvalue()


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"
CONTENTS = {
    "empty array": b"",
    "no array": b"hello",
    "truncated": npy(HEADER % "(4, 8, 8, 3)", bytes(10)),
    "3 TB": npy(HEADER % "(10**6, 1000, 1000, 3)".replace("10**6", "1000000"), bytes(10)),
    "negative": npy(HEADER % "(-1, 8, 8, 3)", bytes(10)),
    "overflow": npy(HEADER % f"({2**62}, 8, 8, 3)", bytes(10)),
    "code": npy("{'descr': __import__('os'), 'shape': (1,)}"),
    "objects": stored(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "floats": stored(np.zeros((2, 8, 8, 3))),
    "one axis": stored(np.zeros(8, np.uint8)),
    "no images": stored(np.zeros((0, 8, 8, 3), np.uint8)),
    "structured": stored(np.zeros((2, 8, 8, 3), [("a", "u1")])),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_arrays_are_refused_in_one_line(tmp_path, name):
    path = archive(tmp_path / "x.npz", CONTENTS[name])
    with pytest.raises(UsageError) as error:
        open_images(path)
    assert "\n" not in str(error.value) and "x.npz" in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 20, -1, -30])
def test_archives_are_refused_in_one_line(tmp_path, cut):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"x\.npz"):
        open_images(path)


def test_wrong_checksums_and_other_names_are_refused(tmp_path):
    path = archive(tmp_path / "x.npz", stored(np.zeros((2, 8, 8, 3), np.uint8)), method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read"):
        open_images(path)
    with pytest.raises(UsageError, match="has no arr_0"):
        open_images(archive(tmp_path / "y.npz", stored(np.zeros(3)), "other.npy"))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    import psutil

    path = archive(tmp_path / "x.npz", stored(np.zeros((64, 64, 64, 3), np.uint8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(UsageError, match="GB are free"):
        open_images(path)


def test_whole_ones_are_read(tmp_path):
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", arr_0=pixels, arr_1=np.array([1, 0]))
        found, labels = read_npz(tmp_path / "x.npz", "arr_0", "arr_1")
        assert (found == pixels).all() and labels.tolist() == [1, 0]
        assert open_images(tmp_path / "x.npz").labels == [1, 0]
