"""The cache of shards: what is written, again after a kill, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from gspn._errors import UsageError
from gspn.tasks.diffusion.shard_cache import FORMAT, ShardReader
from tasks.class_conditional.latent_runs import files
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
    from gspn.tasks.diffusion import shard_cache

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
    index = copy / "index.json"
    values = json.loads(index.read_text())
    for content, message in (
        ("{}", "cannot be read as an index of numbers"),
        (json.dumps({**values, "format": 3}), "format 3, and this version of gspn reads 1 to 2; remove the directory"),
        (json.dumps({**values, "colour": "red"}), "colour"),
    ):
        index.write_text(content)
        with pytest.raises(UsageError, match=message):
            write(copy)


def test_two_processes_share_the_files(whole, tmp_path):
    start_many(2, tmp_path / "printed.txt", write, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)
