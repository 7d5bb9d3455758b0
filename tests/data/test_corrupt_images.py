"""No epoch ends at a broken image, and the main process knows which they were."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data_support import bomb, folder, jpeg, png
from gspn._errors import UsageError
from gspn.data import (
    CorruptImages,
    CorruptImageWarning,
    DeterministicAugmentation,
    Digits,
    SkipCorrupt,
    collate,
    collate_padded,
    open_dataset,
)


def to_tensor(image) -> torch.Tensor:
    return torch.tensor([image.size[0]])


@pytest.fixture
def damaged(tmp_path):
    root = folder(tmp_path, ("train",), per_class=4)
    cats = root / "train" / "cat"
    (cats / "1.png").write_bytes(png()[:-40])
    (cats / "2.png").write_text("a letter")
    (root / "train" / "dog" / "3.jpg").write_bytes(jpeg()[: len(jpeg()) // 2])
    (root / "train" / "dog" / "4.png").write_bytes(bomb(100_000))
    return open_dataset("folder", "train", root=root, transform=to_tensor)


# cat/0.png 1 2 3, dog/0.png 1 2 3 (jpg) 3 4
NAMES = {1: "cat/1.png", 2: "cat/2.png", 7: "dog/3.jpg", 9: "dog/4.png"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_an_epoch_with_broken_images(damaged, training, workers) -> None:
    dataset = SkipCorrupt(damaged, training=training)
    record = CorruptImages(dataset)
    targets = []
    for images, target, broken in DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collate):
        assert images.shape == (len(target), 1)
        record.add(broken)
        targets += target.tolist()
    assert len(targets) == len(damaged) == 10
    if training:  # the next sound one; after the last comes the first
        assert targets == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    else:
        assert targets == [0, -1, -1, 0, 1, 1, 1, -1, 1, -1]
    assert record.names == NAMES
    assert record.count == 4
    with pytest.warns(CorruptImageWarning, match="4 of 10 images were corrupt and left out") as caught:
        line = record.end_epoch()
    assert len(caught) == 1 and "\n" not in line
    assert all(name in line for name in NAMES.values())
    assert "truncated" in line and "known format" in line and "pixels" in line
    assert record.end_epoch() is None  # a new epoch
    assert record.count == 4


def test_the_substitute_is_always_the_same(damaged) -> None:
    dataset = DeterministicAugmentation(SkipCorrupt(damaged, training=True), seed=0)
    assert dataset[1] == dataset[1] == dataset[-9]
    assert dataset[1][1:] == (0, 1)
    record = CorruptImages(dataset)  # names and reasons through the wrapper
    record.add([1])
    assert "cat/1.png (cannot be decoded" in record.summary()


def test_a_long_list_is_cut() -> None:
    record = CorruptImages(SkipCorrupt(Digits("val"), training=True))
    record.add(range(9))
    assert "and 4 more" in record.summary()


def test_a_folder_of_nothing_sound_is_an_error(tmp_path) -> None:
    root = folder(tmp_path, ("train",), per_class=1)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    dataset = SkipCorrupt(open_dataset("folder", "train", root=root), training=True)
    with pytest.raises(UsageError, match=r"all 2 images are corrupt, from index 0 on; .*cat/0.png"):
        dataset[0]


def test_thousands_of_corrupt_images_in_a_row_are_left_out(tmp_path) -> None:
    """Files of another format under the extension of a known one, as some cameras write them."""
    root = folder(tmp_path, ("train",), per_class=1)
    for number in range(250):
        (root / "train" / "cat" / f"{number:04}.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    dataset = SkipCorrupt(open_dataset("folder", "train", root=root, transform=to_tensor), training=False)
    record = CorruptImages(dataset)
    targets = [dataset[i] for i in range(len(dataset))]
    record.add([corrupt for *_, corrupt in targets])
    assert [target for _, target, _ in targets if target >= 0] == [0, 1]
    assert record.count == 250 and "250 of 252 images were corrupt" in record.summary()


def test_a_folder_that_is_gone_is_an_error(tmp_path) -> None:
    root = folder(tmp_path, ("train",), per_class=60)
    dataset = SkipCorrupt(open_dataset("folder", "train", root=root, transform=to_tensor), training=True)
    (tmp_path / "train").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"100 images in a row cannot be read, from index 5 on; .*No such file"):
        dataset[5]


def test_a_file_that_is_gone_is_broken_too(damaged, tmp_path) -> None:
    (tmp_path / "train" / "cat" / "0.png").unlink()
    assert SkipCorrupt(damaged, training=False)[0][1:] == (-1, 0)


def test_a_bug_in_a_transform_is_not_hidden() -> None:
    def transform(image):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        SkipCorrupt(Digits("val", transform=transform), training=True)[0]


def test_wrappers_pass_on_what_the_data_set_says(damaged) -> None:
    dataset = DeterministicAugmentation(SkipCorrupt(damaged, training=True), seed=0)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.name == "folder"
    assert dataset.filename(0) == "cat/0.png"
    dataset.transform = None
    assert damaged.transform is None
    assert dataset[0][0].size == (16, 8)
    with pytest.raises(IndexError, match="index=10"):
        SkipCorrupt(damaged, training=True)[10]


def test_a_stream_is_refused_but_collated() -> None:
    class Numbers(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(1), 3), (torch.ones(1), 4)])

    for wrap in (
        lambda stream: SkipCorrupt(stream, training=True),
        lambda stream: DeterministicAugmentation(stream, seed=0),
    ):
        with pytest.raises(TypeError, match="Numbers is a stream"):
            wrap(Numbers())
    ((_, targets, broken),) = DataLoader(Numbers(), batch_size=2, collate_fn=collate)
    assert targets.tolist() == [3, 4] and broken.tolist() == [-1, -1]


def test_a_foreign_data_set_is_guarded(tmp_path) -> None:
    class Files(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            from PIL import Image

            path = tmp_path / f"{index}.png"
            path.write_bytes(png()[:-40] if index else png())
            return Image.open(path).convert("RGB"), 5

    dataset = SkipCorrupt(Files(), training=True)
    assert dataset[1][1:] == (5, 1)
    assert dataset.filename(1) == "Files/1"


def test_padded_batches_hold_each_image_at_the_top_left() -> None:
    samples = [(torch.rand(3, h, w), target, corrupt) for h, w, target, corrupt in ((4, 7, 1, -1), (5, 2, -1, 3))]
    images, sizes, targets, corrupt = collate_padded(samples)
    assert images.shape == (2, 3, 5, 7) and sizes.dtype == torch.int64
    for padded, (h, w), (image, *_) in zip(images, sizes.tolist(), samples, strict=True):
        assert torch.equal(padded[:, :h, :w], image)
        assert not padded[:, h:].any() and not padded[:, :, w:].any()
    assert (targets.tolist(), corrupt.tolist()) == ([1, -1], [-1, 3])


@pytest.mark.parametrize("other", [torch.ones(1, 2, 2), torch.ones(3, 2, 2, dtype=torch.uint8), torch.ones(2, 2)])
def test_padded_batches_refuse_images_of_several_kinds(other) -> None:
    with pytest.raises(ValueError, match="of the same channels and dtype"):
        collate_padded([(torch.ones(3, 4, 5), 1), (other, 2)])
