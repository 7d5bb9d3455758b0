"""The order of training batches, and the share of each process in an evaluation."""

from __future__ import annotations

import pytest

from gspn._errors import UsageError
from gspn.tasks.core.loaders import ShareBatches, UpdateBatches


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
