"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import os

import pytest

from gspn._files import replaced, replaced_directory, write_text


def interrupted(path, replace) -> None:
    with replace(path) as part:
        (part / "half" if part.is_dir() else part).write_text("half")
        raise RuntimeError


def test_a_file(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        interrupted(path, replaced)
    assert path.read_text() == "old"
    with replaced(path) as part:
        assert part.suffix == ".csv"  # by which matplotlib and Pillow know the format
        part.write_text("new")
    assert path.read_text() == "new"
    assert [one.name for one in path.parent.iterdir()] == ["table.csv"]


def test_a_directory(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with replaced_directory(path) as part:
            (part / content).write_text(content)
        with pytest.raises(RuntimeError):
            interrupted(path, replaced_directory)
        assert [one.name for one in path.iterdir()] == [content]
        assert [one.name for one in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_replaced_file_has_an_ordinary_files_mode(tmp_path):
    (tmp_path / "ordinary").touch()
    write_text(tmp_path / "report.csv", "")
    assert (tmp_path / "report.csv").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
