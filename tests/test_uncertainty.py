"""Bins, and heads that say how sure depth is, through training, validation, figures, checkpoints and the report; their
numbers beside numpy's."""

import json

import numpy as np
import pytest
import torch

from dpt_nb.data.registry import open_dataset
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.gallery import gallery
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT
from dpt_nb.network.zoo import create_model
from dpt_nb.training.batch_loss import batch_loss
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.train_state import build_model, freeze_untrained
from dpt_nb.weights.load import CheckpointError, CheckpointWarning, load_checkpoint
from dpt_nb.weights.write import convert

SIZE = (48, 64)
FORMS = dict(rooms_bins="entropy", rooms_confidence="confidence")


@pytest.fixture(scope="module", params=FORMS)
def run(request, tmp_path_factory):
    "Name, head, folder and report of three steps."
    data = dict(batch_size=4, train=dict(count=8, size=list(SIZE)), held_out=dict(count=3, size=list(SIZE)))
    keep = dict(validate_every=3, validate_on=3, save_steps=3, pictures=1)
    recipe = get_recipe(request.param, data=data, loop=dict(steps=3), keep=keep)
    recipe.model.changes["image_size"] = list(SIZE)
    folder = tmp_path_factory.mktemp(request.param)
    report = train(recipe, folder / "run", folder / "data", cpu=True, workers=0, progress=False)
    return request.param, FORMS[request.param], folder, report


def held_out(folder):
    return open_dataset("rooms", folder / "data", "held_out", count=3, size=list(SIZE), progress=False)


def area_by_numpy(error, sure):
    "AUSE of one image whose pixels are all differently sure, in units of its mean error; and that of a random order."

    def curve(order):
        ranked = error[order]
        return np.array([ranked[: int(np.ceil(len(error) * (20 - step) / 20))].mean() for step in range(20)])

    oracle = curve(np.argsort(error))
    area = lambda values: np.trapezoid(values - oracle, dx=1 / 20) / error.mean()
    return area(curve(np.argsort(-sure))), area(np.full(20, error.mean()))


def test_training_reports_what_numpy_finds(run):
    name, head, folder, report = run
    predictor, areas = Predictor(DPT.from_pretrained(folder / "run" / "model"), "cpu"), []
    for sample in held_out(folder):
        maps = {
            kind: values[0, 0].double().numpy() for kind, values in predictor.predict(sample["image"][None]).items()
        }
        truth = sample["depth"][0].double().numpy()
        error = np.abs(np.clip(maps["depth"], 1e-3, 10) - truth) / truth
        sign = 1 if head == "confidence" else -1
        assert len(np.unique(maps[head])) > 0.95 * maps[head].size  # equally sure pixels are another test's
        areas.append(area_by_numpy(error.ravel(), sign * maps[head].ravel()))
    expected = np.mean(areas, 0)
    assert abs(report[f"{head}_ause"] - expected[0]) < 5e-3 and abs(report[f"{head}_random_ause"] - expected[1]) < 1e-6
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get(f"{head}_ause") == pytest.approx(report[f"{head}_ause"], abs=1e-6) for row in rows)
    assert list((folder / "run" / "pictures").glob("step-*.png")) and (folder / "run" / "panel.png").exists()
    card = (folder / "run" / "model" / "README.md").read_text()
    assert f"`{head}`" in card and f"{head}_ause" in card


@pytest.mark.parametrize("teaches_depth", [True, False])
def test_depth_learns_from_a_loss_of_confidence_where_that_is_asked(teaches_depth):
    losses = {"confidence": dict(teaches_depth=teaches_depth)}
    recipe = get_recipe("rooms_confidence", losses=losses)
    model, built = build_model(recipe), build_losses(recipe)
    model = freeze_untrained(model, built).train()
    batch = dict(depth=1 + torch.rand(2, 1, 32, 64, generator=torch.Generator().manual_seed(0)))
    batch_loss(model(torch.rand(2, 3, 32, 64)), batch, built)[0].backward()
    moved = lambda module: any(each.grad is not None and bool(each.grad.any()) for each in module.parameters())
    assert moved(model.heads["confidence"]) and moved(model.heads["depth"].convolution1) and moved(model.backbone)
    assert moved(model.heads["depth"].convolution3) == teaches_depth
    # DistributedDataParallel waits for a gradient of each parameter that asks for one
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_a_gallery_shows_depth_and_not_what_is_said_of_it(run):
    name, head, folder, _ = run
    predictor, data, figures = Predictor(DPT.from_pretrained(folder / "run" / "model"), "cpu"), held_out(folder), []
    evaluate(predictor, data, PROTOCOLS["rooms"], progress=False, each=figures.append)
    assert all(f"{head}_ause" in row for row in figures)
    figure = gallery(predictor, data, PROTOCOLS["rooms"], figures, count=1)
    assert "depth" in " ".join(axis.get_xlabel() for axis in figure.axes)


def test_scales_and_mirror_images_average_every_map(run):
    name, head, folder, _ = run
    model = DPT.from_pretrained(folder / "run" / "model")
    image = held_out(folder)[0]["image"][None]
    once, back = (Predictor(model, "cpu").predict(each)[head] for each in (image, image.flip(-1)))
    both = Predictor(model, "cpu", flip=True).predict(image)[head]
    torch.testing.assert_close(both, (once + back.flip(-1)) / 2)
    scaled = Predictor(model, "cpu", scales=(1.0, 1.5)).predict(image)
    assert scaled[head].shape == (1, 1, *SIZE) and scaled[head].isfinite().all()


def test_heads_are_exchanged_where_a_checkpoint_is_opened(tmp_path):
    "Bins come in with random weights, said in a warning; other bounds of the same bins as well."
    torch.manual_seed(0)
    create_model("dpt_tiny", heads={"depth": dict(output="exp")}).save_pretrained(tmp_path / "plain")
    bins = dict(form="bins", bins=8)
    with pytest.warns(CheckpointWarning, match="has no such depth"):
        model = load_checkpoint(tmp_path / "plain", heads={"depth": bins, "entropy": {}})
    model.save_pretrained(tmp_path / "bins")
    again = load_checkpoint(tmp_path / "bins")
    image = torch.rand(1, 3, 96, 128)
    assert all(torch.equal(values, again(image)[name]) for name, values in model.eval()(image).items())
    with pytest.warns(CheckpointWarning, match="max_depth=80"):
        load_checkpoint(tmp_path / "bins", heads={"depth": bins | dict(max_depth=80.0)})
    load_checkpoint(tmp_path / "bins", heads={"depth": bins}).save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="depth by bins"):
        convert(tmp_path / "alone", tmp_path / "file.pt", "isl-org")
