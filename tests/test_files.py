"""Files are replaced as a whole or not at all, and read without trust."""

from __future__ import annotations

import os
import socket

import pytest

from gspn._errors import UsageError
from gspn._files import (
    check_writable,
    open_regular,
    printable,
    read_json,
    read_tensors,
    read_text,
    replaced,
    replaced_directory,
    write_text,
)


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


@pytest.mark.parametrize("what", ["link", "broken link", "file"])
def test_a_directory_takes_the_place_of_anything(tmp_path, what):
    path, outside = tmp_path / "last", tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    path.touch() if what == "file" else path.symlink_to(outside if what == "link" else "nowhere")
    with replaced_directory(path) as part:
        (part / "new").touch()
    assert [one.name for one in path.iterdir()] == ["new"] and (outside / "kept").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["last", "outside"]


@pytest.mark.parametrize("name", [b"caf\xe9", b"\x1b[31m"])
def test_weights_are_read_under_any_name(tmp_path, name):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / os.fsdecode(name)
    save_file({"a": torch.ones(2)}, tmp_path / "a")
    (tmp_path / "a").rename(path)
    assert read_tensors(path)["a"].tolist() == [1, 1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="not a whole safetensors file") as caught:
        read_tensors(path)
    assert str(caught.value).isascii() and "\x1b" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        read_tensors(path)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_replaced_file_has_an_ordinary_files_mode(tmp_path):
    (tmp_path / "ordinary").touch()
    write_text(tmp_path / "report.csv", "")
    assert (tmp_path / "report.csv").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_nothing_takes_the_place_of_a_pipe_or_socket(kind, link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("special") if kind == "pipe" else socket.socket(socket.AF_UNIX).bind("special")
    (tmp_path / "link").symlink_to("special")
    path = tmp_path / ("link" if link else "special")
    before = path.stat()
    for write in (check_writable, lambda path: write_text(path, "new")):
        with pytest.raises(OSError, match="is not a regular file"):
            write(path)
    assert path.stat() == before and path.is_symlink() == link


def test_the_file_that_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "table.csv").symlink_to("elsewhere/table.csv")
    for content in ("old", "new"):
        write_text(tmp_path / "table.csv", content)
        assert (tmp_path / "elsewhere" / "table.csv").read_text() == content
    assert (tmp_path / "table.csv").is_symlink()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe.png")
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text: byte 0 is 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "is not JSON: Exceeds the limit"),
    ],
)
def test_a_damaged_json_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "\x1b[31m.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_json(path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_text_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "a") == "abc"
    with pytest.raises(UsageError, match="more than 3 bytes"):
        read_text(tmp_path / "a", most=3)


def test_control_characters_are_escaped():
    assert printable("\x1b[2J\r\n\u202e\x9b\udcff\u200b") == "\\x1b[2J\\r\\n\\u202e\\x9b\\xff\\u200b"
    assert printable("né 犬 👨\u200d👩\u200d👧") == "né 犬 👨\u200d👩\u200d👧"
