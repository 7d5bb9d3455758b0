"""The order of training batches, and the share of each process in an evaluation."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from PIL import Image
from rich.console import Console

from gspn._errors import UsageError
from gspn.tasks.core.config import to_mapping
from gspn.tasks.core.loaders import (
    ShareBatches,
    UpdateBatches,
    facts_of,
    loaded,
    open_data,
    open_splits,
    share_loader,
    with_classes,
)
from gspn.tasks.core.sections import Configuration, ImageData
from gspn.tasks.core.task import Context, Setup


def test_update_batches_split_each_update_over_processes():
    def order(processes, batch, accumulate, epoch=0, update=0):
        parts = []
        for process in range(processes):
            batches = UpdateBatches(
                50, batch_size=batch, accumulate=accumulate, processes=processes, process=process, seed=3
            )
            batches.start(epoch, update)
            parts.append(list(batches))
        # Update by update, the images of all processes.
        updates = len(parts[0]) // accumulate
        return [
            {i for part in parts for one in part[u * accumulate : (u + 1) * accumulate] for i in one}
            for u in range(updates)
        ]

    whole = order(1, 12, 1)
    assert [len(update) for update in whole] == [12] * 4
    assert order(2, 6, 1) == order(3, 2, 2) == order(1, 4, 3) == whole
    assert order(2, 6, 1, update=3) == whole[3:]
    assert order(1, 12, 1, epoch=1) != whole


def sized_batches(process=0, epoch=0, update=0, sizes=None):
    sizes = {8: 6, 12: 2, 16: 1} if sizes is None else sizes
    batches = UpdateBatches(
        200, batch_size=6, accumulate=2, processes=2, process=process, seed=3, sizes=sizes
    )  # fmt: skip
    batches.start(epoch, update)
    return batches


def test_each_update_has_one_size_the_same_in_all_processes():
    whole, plain = list(sized_batches()), list(sized_batches(sizes={}))
    assert len(whole) == len(plain) == len(sized_batches()) == 16
    sizes = [{size for _, size in batch} for batch in whole]
    assert all(len(one) == 1 for one in sizes) and set.union(*sizes) == {8, 12, 16}
    assert sizes == [{size for _, size in batch} for batch in sized_batches(1)]
    assert sizes[::2] == sizes[1::2] != [{size for _, size in batch} for batch in sized_batches(epoch=1)][::2]
    # An update takes the first images of what it takes without sizes, each in one batch, and skips the rest.
    both, others = list(sized_batches(process=1)), list(sized_batches(process=1, sizes={}))
    for i in range(0, 16, 2):
        taken = [index for batch in (whole[i], both[i], whole[i + 1], both[i + 1]) for index, _ in batch]
        assert len(taken) == 4 * {8: 6, 12: 2, 16: 1}[whole[i][0][1]]
        assert taken == [*plain[i], *others[i], *plain[i + 1], *others[i + 1]][: len(taken)]
    assert list(sized_batches(update=5)) == whole[10:]
    first = sum(len(batch) for process in range(2) for batch in list(sized_batches(process))[:10])
    assert sized_batches().images_in(0, 5) == first and sized_batches(sizes={}).images_in(0, 5) == 5 * 24


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_batch_of_any_size_has_no_more_pixels(batch_size):
    data = ImageData(size=64, sizes=[16, 64, 96, 128, 256], batch_size=batch_size)
    for size, images in data.images_by_size.items():
        assert 1 <= images <= batch_size and (images == 1 or images * size**2 <= batch_size * 64**2)
        assert images == batch_size or (images + 1) * size**2 > batch_size * 64**2
    assert ImageData().images_by_size == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], r"data\.sizes is \[\]; name each size once"),
        ([64, 96, 96], r"\[64, 96, 96\]; name each size once"),
        ([32, 96], r"with data\.size 64 among them"),
        ([64, 0], r"data\.sizes\[1\] is 0; it has to be between 1 and 65536"),
        ([64, 9.5], r"data\.sizes\[1\]"),
        (96, r"data\.sizes"),
    ],
)
def test_sizes_that_cannot_be_met(sizes, message):
    with pytest.raises(UsageError, match=message):
        Configuration.from_values({"data": {"sizes": sizes}})


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_at_the_size_of_their_update(workers, tmp_path):
    from gspn.tasks.diffusion.transforms import image_transform

    root = written(tmp_path, *(f"train/a/{i}.png" for i in range(8)))
    (root / "train/a/3.png").write_bytes(b"damaged")
    options = {"name": "folder", "root": str(root), "size": 8, "sizes": [8, 12], "batch_size": 4, "workers": workers}
    config = Configuration.from_values({"data": options, "run": {"device": "cpu"}})
    train, _ = open_splits(config.data)
    loader = context(config).train_loader(train, {size: image_transform(size, hflip=0.5) for size in (8, 12)})
    batches = [images for epoch in range(4) for images, _ in loader.batches(epoch)]
    assert {tuple(images.shape) for images in batches} == {(4, 3, 8, 8), (1, 3, 12, 12)}
    sizes = [loader.order.size(epoch, update) for epoch in range(4) for update in range(2)]
    assert [images.shape[2] for images in batches] == sizes
    assert list(loader.broken.names.values()) == ["a/3.png"]
    again = [images for images, _ in loader.batches(2, 1)]
    assert len(again) == 1 and torch.equal(again[0], batches[5])


@pytest.mark.parametrize(("images", "processes", "batch"), [(11, 2, 4), (12, 3, 5), (2, 4, 3), (7, 1, 7)])
def test_share_batches_cover_each_image_once(images, processes, batch):
    real, batches = [], set()
    for process in range(processes):
        share = ShareBatches(images, batch_size=batch, processes=processes, process=process)
        own = [i for one in share for i in one]
        assert len(list(share)) == len(share)
        real += own[: share.real]
        batches.add(tuple(len(one) for one in share))
    assert sorted(real) == list(range(images))
    assert len(batches) == 1  # as many, and as large, in each process


def test_fewer_images_than_an_update_takes_are_refused():
    with pytest.raises(UsageError, match=r"lower data\.batch_size"):
        UpdateBatches(10, batch_size=6, accumulate=2, processes=1, process=0, seed=0)


# --- Classes by name, and what a run's data are -----------------------------------------------------------------------


def written(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)
    return root


def test_a_class_without_held_out_images_shifts_no_other(tmp_path):
    root = written(tmp_path, "train/a/0.png", "train/b/0.png", "train/c/0.png", "val/a/0.png", "val/c/0.png")
    train, held_out = open_splits(ImageData(name="folder", root=root, eval_split="val"))
    assert train.classes == held_out.classes == ["a", "b", "c"]
    assert [held_out.target(i) for i in range(2)] == [0, 2]
    assert open_splits(ImageData(name="folder", root=root))[1] is None
    written(root, "val/d/0.png")
    with pytest.raises(UsageError, match=r"classes that are not in classes=\['a', 'b', 'c'\]: \['d'\]"):
        open_splits(ImageData(name="folder", root=root, eval_split="val"))


@pytest.mark.parametrize("task", ["classify", "class_conditional"])
def test_every_task_has_the_classes_of_its_training(task, tmp_path):
    root = written(tmp_path, "train/a/0.png", "train/b/0.png", "val/b/0.png")
    options = {"data.name": "folder", "data.root": root, "data.eval_split": "val", "data.size": 16, "data.workers": 0}
    options |= {"data.batch_size": 1, "run.device": "cpu"}
    if task == "classify":
        from gspn.tasks.classify.config import TrainConfig
        from gspn.tasks.classify.training import Classification

        run = Classification(TrainConfig().changed(**options, **{"model.name": "test_vit"}))
        setup = run.setup(context(run.config))
    else:
        from gspn.tasks.class_conditional.config import ClassConditionalConfig
        from gspn.tasks.class_conditional.data import open_data_of

        config = ClassConditionalConfig().changed(**options)
        opened = open_data_of(config, context(config))
        setup = Setup(torch.nn.Identity(), opened.train, "model", "data", evaluation=opened.held_out)
    assert [target for _, targets in setup.evaluation for target in targets.tolist()] == [1]
    facts = {key: value for key, value in setup.resolved.items() if key.startswith(("train_", "eval_"))}
    assert facts["train_classes"] == ["a", "b"] and facts["train_files"].startswith("2 images, ")
    assert facts["eval_classes"] == facts["train_classes"] and facts["eval_files"] != facts["train_files"]


def context(config):
    from gspn.tasks.core.devices import make_accelerator
    from gspn.tasks.core.progress import Reporter

    return Context(config, make_accelerator(device="cpu"), Reporter(Console(quiet=True), 1, quiet=True))


@pytest.mark.parametrize(
    ("classes", "targets", "warned"),
    [(["a", "b"], [0, 1], False), (["b", "a"], [1, 0], False), (["x", "y"], [0, 1], True)],
)
def test_data_are_matched_by_the_names_of_classes(classes, targets, warned, tmp_path):
    pytest.importorskip("torchvision")
    root = written(tmp_path, "a/0.png", "b/0.png")
    dataset, warning = with_classes("torch/folder", "train", root, classes)
    assert [dataset[i][1] for i in range(2)] == targets
    assert (warning is not None) == warned and (not warned or "matched by their positions" in warning)
    for other in (["a", "c"], ["a", "b", "c"]):
        with pytest.raises(UsageError, match="use the data it was trained on"):
            with_classes("torch/folder", "train", root, other)


@pytest.mark.parametrize("change", ["a file", "a class"])
def test_a_run_is_not_resumed_with_other_data(change, tmp_path):
    root = written(tmp_path, *(f"{label}/{i}.png" for label in "ab" for i in range(100)))
    saved = facts_of(open_data("folder", "train", root))
    config = ImageConfig(data=ImageData(name="folder", root=root))
    assert not config.differences({**to_mapping(config), "resolved": saved}, saved)
    earlier = {"files": saved["files"]}  # as a version that saved less
    assert not config.differences({**to_mapping(config), "resolved": earlier}, saved)
    if change == "a class":
        (root / "a").rename(root / "c")
    else:
        (root / "a" / "3.png").rename(root / "a" / "3a.png")
    changed = config.differences(
        {**to_mapping(config), "resolved": saved}, facts_of(open_data("folder", "train", root))
    )
    assert set(changed) == {"resolved.files"} | ({"resolved.classes"} if change == "a class" else set())


class ImageConfig(Configuration):
    pass


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_read_are_one_line(workers, tmp_path):
    root = written(tmp_path, "a/0.png", "a/1.png")
    dataset = open_data("folder", "train", root)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"^all 2 images are corrupt, .*known format.*Repair the data .*--resume\.$"):
        list(share_loader(dataset, batch_size=2, workers=workers))


def test_a_killed_worker_is_one_line():
    class Deadly(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UsageError, match=r"^a process that loads images was killed; .* Lower the number .*\.$"):
        list(loaded(torch.utils.data.DataLoader(Deadly(), num_workers=1)))
