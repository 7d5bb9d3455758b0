"""The walk of a folder, the order of its names, and what is left out of it and said."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captions_support import shard
from data_support import png
from gspn._errors import UsageError
from gspn.data import LeftOut, LeftOutWarning, image_files, natural_order, open_captions, open_dataset
from gspn.data.images import EXTENSIONS
from support import run_python


def written(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def saved(extension: str) -> bytes:
    """A small image in the format of an extension."""
    file = io.BytesIO()
    form = {".apng": "PNG", ".avifs": "AVIF", ".jfif": "JPEG", ".jpc": "JPEG2000"}.get(extension)
    Image.new("RGB", (8, 8), "red").save(file, form or Image.registered_extensions()[extension])
    return file.getvalue()


# --- Extensions -------------------------------------------------------------------------------------------------------


def from_folder(root: Path, names: dict[str, bytes]):
    for name, data in names.items():
        (root / "cat").mkdir(exist_ok=True)
        (root / "cat" / name).write_bytes(data)
    return open_dataset("folder", "train", root=root)


def from_torchvision(root: Path, names: dict[str, bytes]):
    pytest.importorskip("torchvision")
    from_folder(root, names)
    return open_dataset("torch/folder", "train", root=root)


def from_tar(root: Path, names: dict[str, bytes]):
    shard(root / "data.tar", [(f"x/cat/{name}", data) for name, data in names.items()])
    return open_dataset("folder", "train", root=root / "data.tar")


def from_captions(root: Path, names: dict[str, bytes]):
    for name, data in names.items():
        (root / name).write_bytes(data)
        if not name.endswith(".doc"):
            (root / name).with_suffix(".txt").write_text("a")
    return open_captions("folder", root=root)


def from_shards(root: Path, names: dict[str, bytes]):
    captions = [(f"{Path(name).stem}.txt", b"a") for name in names if not name.endswith(".doc")]
    shard(root / "data.tar", [*names.items(), *captions])
    return open_captions("wds", root=root)


def from_evaluation(root: Path, names: dict[str, bytes]):
    from gspn.tasks.diffusion.images import open_images

    for name, data in names.items():
        (root / name).write_bytes(data)
    return open_images(root)


PLACES = (from_folder, from_torchvision, from_tar, from_captions, from_shards, from_evaluation)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_opens_every_extension(place, tmp_path) -> None:
    Image.init()
    names = {}
    for i, extension in enumerate(sorted(EXTENSIONS)):
        names[f"{2 * i}{extension}"] = names[f"{2 * i + 1}{extension.upper()}"] = saved(extension)
    opened = place(tmp_path, names)
    assert len(opened) == len(names) == 2 * len(EXTENSIONS)
    if place is from_evaluation:
        assert not opened.broken
    else:
        assert {opened[i][0].size for i in range(len(opened))} == {(8, 8)}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_says_what_it_leaves_out(place, tmp_path) -> None:
    with pytest.warns(LeftOutWarning, match=r"left out: .*(not an image|without an image).*\(.*notes\.doc") as caught:
        opened = place(tmp_path, {"a.png": png(), "notes.doc": b"", "._a.png": png()})
    assert len(opened) == 1
    [line] = {str(one.message).partition("left out")[2] for one in caught if one.category is LeftOutWarning}
    assert " hidden file" in line and "._a.png" in line and "\n" not in line


def test_prediction_of_a_folder(tmp_path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    from gspn.tasks.classify import predict

    written(tmp_path, "b/a.png", ".hidden/a.png", "notes.txt")
    (tmp_path / "c.webp").write_bytes(saved(".webp"))
    model = timm.create_model("test_vit", num_classes=3)
    with pytest.warns(LeftOutWarning, match=r"1 file that is not an image \(notes\.txt\), 1 hidden file or folder"):
        found = predict([tmp_path], model)
    assert [Path(one.image).name for one in found] == ["a.png", "c.webp"] and not any(one.broken for one in found)
    assert predict([""], model)[0].broken == "No such file or directory"  # not the current directory
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(UsageError, match=r"empty holds no images; nothing is left out"):  # before the others are done
        predict([tmp_path / "c.webp", tmp_path / "empty"], model, batch_size=1)


def test_a_second_dot_is_another_field_of_a_sample(tmp_path) -> None:
    shard(tmp_path / "a.tar", [("a.png", png()), ("a.v1.png", png()), ("a.txt", b"a")])
    with pytest.warns(LeftOutWarning, match=r"1 image whose name has a second dot, .*\(a\.tar/a\.v1\.png\)"):
        assert len(open_captions("wds", root=tmp_path)) == 1


# --- The walk ---------------------------------------------------------------------------------------------------------


def test_hidden_names_are_left_out(tmp_path) -> None:
    written(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "b/.c/d.png", "b/x.PNG")
    files, left_out = image_files(tmp_path)
    assert files == ["a.png", "b/x.PNG"] and left_out.count == 4


def test_links_stay_inside_and_never_multiply(tmp_path) -> None:
    root = written(tmp_path / "root", *(f"{label}/{i}.png" for label in "abc" for i in range(4)))
    written(tmp_path, "secret.png")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (root / "b" / "absolute").symlink_to(root)
    (root / "b" / "out").symlink_to("../..")
    (root / "b" / "passwd.png").symlink_to("/etc/hostname")
    (root / "b" / "secret.png").symlink_to(tmp_path / "secret.png")
    (root / "b" / "gone.png").symlink_to("nothing")
    (root / "b" / "loop.png").symlink_to("loop.png")
    files, left_out = image_files(root)
    assert len(files) == 12 and all("/" in file for file in files)
    for part in ("3 links to folders that hold them", "3 links that leave the folder", "2 links that lead nowhere"):
        assert part in str(left_out), left_out
    assert left_out.count == 8
    (root / "c" / "4.png").symlink_to("../a/0.png")  # inside
    (root / "d").symlink_to("a")
    files, _ = image_files(root)
    assert len(files) == 17 and "c/4.png" in files and "d/0.png" in files
    (tmp_path / "link").symlink_to(root)  # the folder itself may be a link
    assert image_files(tmp_path / "link")[0] == files


def test_links_of_links_end(tmp_path) -> None:
    """Each folder links twice to the next: 2 to the power of 30 ways."""
    written(tmp_path, *(f"{i:02}/a.png" for i in range(30)))
    for i in range(29):
        for name in "xy":
            (tmp_path / f"{i:02}" / name).symlink_to(f"../{i + 1:02}")
    files, left_out = image_files(tmp_path)
    assert len(files) == 30 + 2 * 29 and "links to folders inside linked folders" in str(left_out)


def test_pipes_sockets_and_devices_are_not_opened(tmp_path) -> None:
    written(tmp_path, "a/a.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(tmp_path / "a")  # the name of a socket is short
        try:
            one.bind("s.png")
        finally:
            os.chdir(here)
        with pytest.warns(LeftOutWarning, match=r"2 pipes, sockets and devices \(a/pipe\.png, a/s\.png\)"):
            assert len(open_dataset("folder", "train", root=tmp_path)) == 1


def test_a_pipe_named_as_an_image_does_not_hang(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    from gspn.data import load_image
    from gspn.tasks.classify import predict
    from gspn.tasks.diffusion.images import read_record

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")
    assert read_record(tmp_path / "pipe.png") == {}
    [found] = predict([tmp_path / "pipe.png"], timm.create_model("test_vit", num_classes=3))
    assert found.broken == "is not a regular file"


ODD = [b"\xff\xfe", b"new\nline", b"\x1b[31mred", b"tab\t", b" ", b"caf\xc3\xa9", b"cafe\xcc\x81", b"1\xc2\xb2", b"-n"]


def test_names_of_any_bytes(tmp_path) -> None:
    for name in ODD:
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        (folder / f"{folder.name}.png").write_bytes(png())
        (folder / f"{folder.name}.doc").write_bytes(b"")
    with pytest.warns(LeftOutWarning) as caught:
        dataset = open_dataset("folder", "train", root=tmp_path)
    text = str(caught[0].message)
    assert text.isprintable() and "9 files that are not images" in text
    assert len(dataset) == len(ODD) and {os.fsencode(name) for name in dataset.classes} == set(ODD)
    assert {dataset[i][0].size for i in range(len(dataset))} == {(16, 8)}
    assert len(dataset.identity()) == 32


def test_a_hundred_thousand_files_are_quick(monkeypatch) -> None:
    """The work for a file, without making as many: one look at its entry, and no call of the system."""
    from gspn.data import files

    class Entry:
        def __init__(self, name: str) -> None:
            self.name, self.path = name, f"/x/{name}"

        def is_symlink(self) -> bool:
            return False

        def is_file(self, *, follow_symlinks: bool) -> bool:
            return True

    class Scanned(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(files.os, "scandir", lambda path: Scanned(Entry(f"{i}.png") for i in range(100_000)))
    monkeypatch.setattr(files.os, "stat", lambda path: pytest.fail("a call of the system"))
    monkeypatch.setattr(files.os.path, "realpath", lambda path: path)
    assert len(files.walk("/x", LeftOut())) == 100_000


# --- Classes ----------------------------------------------------------------------------------------------------------

EQUAL = ("Cat", "cat", "CAT", "1", "01", "001", "a1b", "a01b")


def test_the_order_of_names_is_total_and_timm_s_where_that_decides() -> None:
    timm = pytest.importorskip("timm.utils.misc")
    names = ["10", "2", "1", "b", "A", "c12", "c2", "", "é"]
    assert natural_order(names) == sorted(names, key=timm.natural_key)
    for turned in (EQUAL, EQUAL[::-1], EQUAL[3:] + EQUAL[:3]):
        assert natural_order(turned) == ["001", "01", "1", "a01b", "a1b", "CAT", "Cat", "cat"]
    assert natural_order(["1²", "²", "1"]) == ["1", "1²", "²"]  # of which timm's order raises


def test_classes_are_the_same_in_every_process(tmp_path) -> None:
    root = written(tmp_path, *(f"{name}/{number}.png" for name in EQUAL for number in ("1", "01", "A", "a")))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name in EQUAL:
            archive.add(root / name, name)
    code = (
        "import warnings; warnings.simplefilter('ignore'); from gspn.data import open_dataset\n"
        f"for root in ({str(root)!r}, {str(tmp_path / 'data.tar')!r}):\n"
        "    dataset = open_dataset('folder', 'train', root=root); print(dataset.classes, dataset.identity())"
    )
    said = {run_python(code, PYTHONHASHSEED=seed).stdout for seed in "12"}
    assert len(said) == 1
    one, two = said.pop().splitlines()
    assert one == two and one.startswith("['001', '01', '1', 'a01b', 'a1b', 'CAT', 'Cat', 'cat']")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_split_is_never_another_one(kind, tmp_path) -> None:
    root = written(tmp_path / "x", "train/cat/a.png", "train/dog/a.png", "validation/cat/b.png", "test/c.txt/d.txt")
    whole = written(tmp_path / "y", "cat/a.png")
    if kind == "tar":
        for folder in (root, whole):
            with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
                archive.add(folder, ".")
        root, whole = root.with_suffix(".tar"), whole.with_suffix(".tar")
    for split, names in (("train", ["cat/a.png", "dog/a.png"]), ("val", ["cat/b.png"])):
        dataset = open_dataset("folder", split, root=root)  # nothing is left out of these
        assert [dataset.filename(i) for i in range(len(dataset))] == names
        assert dataset[0][0].size == (16, 8)
    with pytest.warns(LeftOutWarning, match=r"left out: 1 file that is not an image \(test/c\.txt/d\.txt\)"):
        assert len(open_dataset("folder", "all", root=root)) == 3
    assert len(open_dataset("folder", "train", root=whole)) == 1
    with pytest.raises(ValueError, match="root='': 'folder' needs root"):
        open_dataset("folder", "train", root="")
    for split in ("val", "tset"):
        with pytest.raises(ValueError, match=f"split='{split}' is not a split of .*not divided"):
            open_dataset("folder", split, root=whole)


def test_empty_folders_are_counted(tmp_path) -> None:
    written(tmp_path, "cat/a.png")
    (tmp_path / "dog").mkdir()
    with pytest.warns(LeftOutWarning, match=r"left out: 1 empty folder \(dog\)"):
        assert open_dataset("folder", "train", root=tmp_path).classes == ["cat"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_beside_class_folders_have_no_class(kind, tmp_path) -> None:
    root = written(tmp_path / "x", "cat/a.png", "dog/a.png", "loose.png")
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(root, ".")
        root = tmp_path / "x.tar"
    with pytest.warns(LeftOutWarning, match=r"1 image beside the class folders \(loose\.png\)"):
        dataset = open_dataset("folder", "train", root=root)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 2


def test_a_folder_without_class_folders_has_no_classes(tmp_path) -> None:
    from gspn.tasks.core.loaders import class_names

    dataset = open_dataset("folder", "train", root=written(tmp_path, "b.png", "a.png"))
    assert dataset.classes == [] and len(dataset) == 2 and dataset[0][1] == 0
    with pytest.raises(UsageError, match="has no classes"):
        class_names(dataset)
    with pytest.raises(ValueError, match="has images and no class folders"):
        open_dataset("folder", "train", root=tmp_path, classes=["cat"])


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["a", "a"], "'a' is there twice"),
        (["a", ""], "'' is without a name"),
        ("a", "is not a list of names"),
        ([1], "is not a list of names"),
    ],
)
def test_names_of_classes_are_there_once(classes, says, tmp_path) -> None:
    with pytest.raises(UsageError, match=says):
        open_dataset("folder", "train", root=written(tmp_path, "a/a.png"), classes=classes)


def test_a_tar_holds_more_than_files(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"cat/{i}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in (
            ("/abs/cat/a.png", png()),
            ("../cat/b.png", png()),
            ("cat/c.png", b""),
            ("cat/c.png", png()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.warns(LeftOutWarning, match=r"1 file that a later one .*\(cat/c\.png\), 3 links and devices"):
        dataset = open_dataset("folder", "train", root=tmp_path / "a.tar")
    assert dataset.classes == ["cat"] and len(dataset) == 3
    assert {np.asarray(dataset[i][0]).shape for i in range(3)} == {(8, 16, 3)}
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"b\.tar is not a tar, or damaged or cut off"):
        open_dataset("folder", "train", root=tmp_path / "b.tar")


def test_the_identity_tells_every_name_and_class(tmp_path) -> None:
    written(tmp_path, *(f"{label}/{i:03}.png" for label in ("cat", "dog") for i in range(150)))
    first = open_dataset("folder", "train", root=tmp_path).identity()
    assert open_dataset("folder", "train", root=tmp_path).identity() == first
    (tmp_path / "cat" / "001.png").rename(tmp_path / "cat" / "0015.png")
    renamed = open_dataset("folder", "train", root=tmp_path).identity()
    (tmp_path / "cat" / "0015.png").rename(tmp_path / "cat" / "001.png")
    (tmp_path / "cat" / "003.png").rename(tmp_path / "dog" / "1000.png")
    assert len({first, renamed, open_dataset("folder", "train", root=tmp_path).identity()}) == 3


def test_numbers_of_any_length_have_an_order():
    long = "1" * 5000
    assert natural_order([f"{long}1", "10", long, "\u0663", "2", "02"]) == ["02", "2", "\u0663", "10", long, f"{long}1"]
