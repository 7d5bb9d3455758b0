"""Evaluating and applying a trained network."""

from __future__ import annotations

import json

import pytest
import timm
from PIL import Image

from gspn._errors import UsageError
from gspn.data import open_dataset
from gspn.tasks.classify import evaluate, predict
from gspn.tasks.classify.confusion import plot_confusion, save_confusion
from gspn.tasks.classify.evaluation import Evaluation
from tasks.runs import newest_state, rows


@pytest.fixture(scope="module")
def trained(finished):
    return finished[0].output


@pytest.fixture(scope="module")
def evaluation(trained):
    return evaluate(trained / "last", data="digits", batch_size=100)


def test_evaluation_agrees_with_training(trained, evaluation):
    last = rows(trained)[-1]
    assert evaluation.top1 == pytest.approx(float(last["ema_top1"]))
    assert evaluation.loss == pytest.approx(float(last["ema_loss"]), rel=1e-4)
    model = timm.create_model(f"local-dir:{trained / 'last'}", pretrained=True)
    state = newest_state(trained).items()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state if k.startswith("model.")})
    raw = evaluate(model, data="digits", batch_size=100)
    assert (raw.top1, raw.top5) == pytest.approx((float(last["top1"]), float(last["top5"])))
    assert raw.loss == pytest.approx(float(last["eval_loss"]), rel=1e-4)
    assert evaluation.images == len(open_dataset("digits", "val")) == sum(map(sum, evaluation.confusion))


def test_confusions_add_up(evaluation):
    right = sum(evaluation.confusion[i][i] for i in range(10))
    assert 100 * right / evaluation.images == pytest.approx(evaluation.top1)
    for i, row in enumerate(evaluation.confusion):
        assert evaluation.per_class[i] == pytest.approx(100 * row[i] / sum(row))
    assert evaluation.worst_classes(1)[0][1] == min(evaluation.per_class)
    assert evaluation.images_per_second > 0 and evaluation.model_images_per_second > 0
    assert evaluation.parameters > 0 and evaluation.peak_memory_mib > 0


def test_json_holds_everything(evaluation, tmp_path):
    evaluation.write_json(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["top1"] == evaluation.top1
    assert found["classes"] == list(evaluation.classes)
    assert found["confusion"] == [list(row) for row in evaluation.confusion]


def many_classes(count: int) -> Evaluation:
    confusion = tuple(tuple(3 if i == j else int((i + 1) % count == j) for j in range(count)) for i in range(count))
    return Evaluation(
        model="runs/some/best", data="sets", split="val", images=4 * count, top1=75.0, top5=100.0, loss=1.0,
        classes=tuple(f"class with the number {i}" for i in range(count)), per_class=(75.0,) * count,
        confusion=confusion, images_per_second=1.0, model_images_per_second=1.0, peak_memory_mib=1.0, parameters=1,
        device="cpu", precision="fp32", batch_size=1,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_confusions_as_an_image(tmp_path, count):
    pytest.importorskip("matplotlib")
    figure = plot_confusion(many_classes(count))
    [axes] = figure.axes
    assert "some on sets/val" in axes.get_title(loc="left")
    assert len(axes.get_xticks()) == (count if count <= 110 else 0)
    if count == 10:
        save_confusion(many_classes(count), tmp_path / "it.png", dpi=40)
        assert Image.open(tmp_path / "it.png").size[0] > 100
    with pytest.raises(UsageError, match=r"\.png"):
        save_confusion(many_classes(count), tmp_path / "it.txt")


def test_refuses_data_of_other_classes(trained):
    with pytest.raises(UsageError, match="10 classes"):
        evaluate(trained, data="emoji")
    with pytest.raises(UsageError, match="unknown labelled data set"):
        evaluate(trained, data="digit")


def test_predicts_and_names_what_is_broken(trained, tmp_path):
    dataset = open_dataset("digits", "val")
    for i in range(3):
        dataset[i][0].save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    names = [tmp_path / name for name in ("0.png", "bad.png", "1.png", "none.png", "2.png")]
    found = predict(names, trained, top=3, batch_size=2)
    assert [one.image for one in found] == [str(name) for name in names]
    assert [one.broken is not None for one in found] == [False, True, False, True, False]
    for one in found:
        if one.broken is None:
            assert len(one.classes) == 3
            assert list(one.probabilities) == sorted(one.probabilities, reverse=True)
            assert one.classes == tuple(str(i) for i in one.indices)
    # One by one and as images they are the same.
    alone = predict([dataset[0][0]], timm.create_model(f"local-dir:{trained / 'best'}", pretrained=True), top=3)
    assert alone[0].classes == found[0].classes
    assert alone[0].probabilities == pytest.approx(found[0].probabilities, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/place", "is not a directory"),
        ("./nowhere", "is not a directory"),
        ("test_vitt", "did you mean 'test_vit'"),
        ("test_vit.no_such_tag", r"no_such_tag.*Leave the tag out"),
        ("local-dir:/nowhere", "has no config.json"),
    ],
)
def test_a_model_that_is_not_there(model, message):
    with pytest.raises(UsageError, match=message):
        predict([], model)


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json and model\.safetensors"):
        predict([], tmp_path)
