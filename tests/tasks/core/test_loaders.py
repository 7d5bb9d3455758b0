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
