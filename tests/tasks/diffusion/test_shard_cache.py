"""The cache of shards: what is written, again after a kill, and what is refused."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from gspn._errors import UsageError
from gspn._locks import DirectoryLock
from gspn.tasks.diffusion import shard_cache
from gspn.tasks.diffusion.shard_cache import FORMAT, ShardReader
from tasks.class_conditional.latent_runs import files
from tasks.core.test_checkpoints import Bomb
from tasks.diffusion.shard_runs import NumberIndex, start, write
from tasks.processes import start_many


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eighteen rows in five files."""
    directory = tmp_path_factory.mktemp("cache") / "whole"
    write(directory)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_rows_are_found_again_in_any_process(whole):
    index = NumberIndex.read(whole)
    assert index is not None and index.format == FORMAT
    assert [shard.rows for shard in index.shards] == [4, 4, 4, 4, 2]
    assert {shard.dtype for shard in index.shards} == {"float16"}
    reader = ShardReader(whole, index, "start again")
    reader.check({}, checksums=True)
    reader.check({"square": (2,), "number": ()})
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        for i in (0, 3, 4, 17):
            shard, row = one.locate(i)
            assert one.opened(shard).get_slice("square")[row].tolist() == [i * i, i * i]
            assert one.opened(shard).get_tensor("number")[row] == i
    for i in (-1, 18):
        with pytest.raises(IndexError, match="18 numbers"):
            reader.locate(i)
    with pytest.raises(UsageError, match=r"numbers-00000.*not what index\.json says; start again"):
        reader.check({"square": (3,)})


def test_what_cannot_be_read_is_left_out(tmp_path):
    index, made, is_main = write(tmp_path / "some", broken=(1, 16, 17))
    assert (made, is_main) == (5, True)
    assert [shard.rows for shard in index.shards] == [3, 4, 4, 4, 0] and index.rows == 18
    assert [shard.broken for shard in index.shards] == [["row 1"], [], [], [], ["row 16", "row 17"]]
    reader = ShardReader(tmp_path / "some", index, "")
    assert len(reader) == 15 and reader.locate(3) == (1, 0) and reader.locate(14) == (3, 3)
    with pytest.raises(UsageError, match="none of the data could be read"):
        write(tmp_path / "none", rows=3, broken=(0, 1, 2))


def test_numbers_beyond_half_precision_are_kept(tmp_path):
    index, _, _ = write(tmp_path / "out", factor=1e3)
    assert [shard.dtype for shard in index.shards] == ["float16"] * 2 + ["float32"] * 3  # 49,000 and 121,000
    tensors = load_file(tmp_path / "out" / "numbers-00004.safetensors")
    assert tensors["square"][1, 0] == 17**2 * 1e3 and tensors["number"].dtype == torch.int64


@pytest.mark.parametrize("die_at", [1, 4])
def test_killed_and_started_again_has_the_same_bytes(whole, tmp_path, die_at):
    process = start(tmp_path / "killed", die_at)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == die_at  # the last one without a record
    index = NumberIndex.read(tmp_path / "killed")
    assert index is not None and not index.shards
    assert write(tmp_path / "killed")[1] == 6 - die_at
    assert files(tmp_path / "killed") == files(whole)


def test_killed_at_any_time(whole, tmp_path):
    process = start(tmp_path / "killed", 99)
    records, deadline = random.Random().randint(0, 4), time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if len(list((tmp_path / "killed").glob("numbers-*.json"))) >= records:
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    write(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole)


def test_killed_before_the_index_lists_the_shards(whole, tmp_path, monkeypatch):
    plain, written = shard_cache.write_text, []

    class Killed(Exception):  # noqa: N818
        pass

    def write_text(path, content):
        written.append(path.name)
        if written.count("index.json") == 2:
            raise Killed
        plain(path, content)

    monkeypatch.setattr(shard_cache, "write_text", write_text)
    with pytest.raises(Killed):
        write(tmp_path / "out")
    monkeypatch.undo()
    assert write(tmp_path / "out")[1] == 0
    assert files(tmp_path / "out") == files(whole)


def test_done_is_done(whole):
    before = files(whole)
    assert write(whole)[1] == 0
    assert write(whole, source="there")[1] == 0  # a key that may differ
    assert files(whole) == before


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "header"])
def test_damaged_files_are_written_again(whole, copy, damage):
    path = copy / "numbers-00001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * len(content))
    reader = ShardReader(copy, NumberIndex.read(copy), "start again")
    shapes = {"square": (2,), "number": ()}
    if damage == "bit":  # only reading the tensors finds it
        reader.check(shapes)
    problems = {"bit": "checksum", "short": "bytes and not", "gone": "cannot be read", "header": "cannot be read"}
    with pytest.raises(UsageError, match=rf"numbers-00001\.safetensors.*{problems[damage]}.*; start again"):
        reader.check(shapes, checksums=damage == "bit")
    assert write(copy)[1] == 1
    assert files(copy) == files(whole)


def test_other_requests_are_refused(whole):
    for options, message in (
        ({"factor": 2.0}, "factor is 2.0, and the numbers in .*were begun with 1.0; .*--output"),
        ({"rows": 17}, "rows is 17.*begun with 18"),
        ({"shard_size": 5}, "shard_size is 5.*begun with 4"),
    ):
        with pytest.raises(UsageError, match=message):
            write(whole, **options)


def test_directories_of_something_else(copy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"other files and no index\.json"):
        write(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "notes.txt")


CHANGES = {
    "format": [3, "2", None, [2]],
    "rows": [-1, 10**30, "many", 17],
    "shard_size": [0, -4, None],
    "shards": [3, [], [{}], ["x"], None],
    "factor": ["red", None],
    "colour": ["red"],
}
"""Values of keys that no index has."""


@pytest.mark.parametrize("key", CHANGES)
def test_an_index_that_says_something_else(copy, key):
    index = copy / "index.json"
    values = json.loads(index.read_text())
    for change in CHANGES[key]:
        index.write_text(json.dumps({**values, key: change}))
        if key == "shards" and change == []:
            assert write(copy)[1] == 5  # as after a kill: encoded again
            continue
        with pytest.raises(UsageError) as refused:
            write(copy)
        assert "\n" not in str(refused.value) and any(word in str(refused.value) for word in (key, "shards"))
        assert "remove the directory" in str(refused.value) or "name another directory" in str(refused.value)


@pytest.mark.parametrize("key", ["file", "rows", "sha256", "bytes", "broken"])
def test_a_shard_that_says_something_else(whole, copy, key):
    """In the index or in the shard's own record: refused, or encoded again, and never believed."""
    index, record = copy / "index.json", copy / "numbers-00002.json"
    text = index.read_text()
    for change in (None, "../../etc/passwd", 5, -1, 10**30, [1], {"a": 1}):
        values = json.loads(text)
        values["shards"][2][key] = change
        for path, content in ((index, values), (record, values["shards"][2])):
            shutil.rmtree(copy)
            shutil.copytree(whole, copy)
            path.write_text(json.dumps(content))
            try:
                write(copy)
            except UsageError as error:
                assert path == index and "\n" not in str(error)  # noqa: PT017
            else:
                assert {name: files(copy)[name] for name in files(whole) if name.endswith("rs")} == {
                    name: content for name, content in files(whole).items() if name.endswith("rs")
                }


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"[" * 100_000, b"\xff\xfe", b"{}", b"null", b"[1, 2]", b'"a"'])
def test_a_damaged_index_or_record(whole, copy, content):
    (copy / "numbers-00002.json").write_bytes(content)
    assert write(copy)[1] == 0  # the index has the same
    assert files(copy) == files(whole)
    (copy / "index.json").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"index of numbers: .*remove the directory and encode the data again"
    ) as found:
        write(copy)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_no_file_of_a_cache_is_a_program(whole, copy, tmp_path):
    mark = tmp_path / "mark"
    for name in files(whole):
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb(mark)))
        with contextlib.suppress(UsageError):
            index = NumberIndex.read(copy)
            ShardReader(copy, index, "").check({"square": (2,)})
        with contextlib.suppress(UsageError):
            write(copy)
        assert not mark.exists(), name


def test_another_process_that_writes_is_named(copy):
    (copy / "numbers-00001.safetensors").unlink()
    with DirectoryLock(copy), pytest.raises(UsageError, match=r"is being written by process \d+ on .*--output"):
        write(copy)
    shutil.rmtree(copy)
    with DirectoryLock(copy), pytest.raises(UsageError, match="is being written"):
        write(copy)


def test_complete_ones_are_read_by_many(copy):
    with DirectoryLock(copy):
        assert write(copy)[1] == 0


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_MOST_OPEN", 3)
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, kept[1]))
        index, _, _ = write(tmp_path / "many", rows=600)
        reader = ShardReader(tmp_path / "many", index, "")
        reader.check({"square": (2,)}, checksums=True)
        for i in (*range(600), *reversed(range(600))):
            shard, row = reader.locate(i)
            assert reader.opened(shard).get_slice("number")[row] == i
        assert len(reader._opened) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)


def test_a_full_disk_leaves_what_was_there(whole, copy):
    """A limit on the size of a file, which stops the shards and then the index."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 1000):
        shutil.rmtree(copy)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
            with pytest.raises(OSError, match="File too large") as refused:
                write(copy)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        assert str(copy) in refused.value.filename and ".part" not in refused.value.filename
        assert not list(copy.glob(".*"))
        write(copy)
        assert files(copy) == files(whole)


def test_two_processes_share_the_files(whole, tmp_path):
    start_many(2, tmp_path / "printed.txt", write, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)
