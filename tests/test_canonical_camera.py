"""One canonical camera: a run that learns its metres, and every place that says them again in those of the image."""

import json
import math

import numpy as np
import pytest
import torch

from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.evaluation.evaluate import with_camera
from dpt_nb.inference.predictor import Predictor
from dpt_nb.training.distributed import open_accelerator
from dpt_nb.training.loop import part_loss, to_device
from dpt_nb.training.recipe_fields import RecipeError, change_recipe
from dpt_nb.training.recipe_parts import TRANSFORMS
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.train_state import open_run
from dpt_nb.weights.load import load_checkpoint

LENSES = (40.0, 90.0)  # of alternating images: (fx + fy) / 2
CANONICAL = 60.0


def two_lenses(root):
    "A folder whose images have two cameras in turn, by its list."
    make_folder(root, count=6, size=(48, 64))
    rows = ["image,depth,split,fx,fy,cx,cy"]
    for index in range(6):
        lens, split = LENSES[index % 2], "held_out" if index >= 4 else "train"
        name = f"{index:06d}.png"
        rows.append(f"rgb/{name},depth/{name},{split},{lens - 2},{lens + 2},31.5,23.5")
    (root / "files.csv").write_text("\n".join(rows) + "\n")
    return root


def recipe(*changes):
    few = ["data.name=folder", "data.train={}", "data.held_out={}", "data.protocol=rooms", "data.batch_size=4"]
    few += [
        "model.changes.image_size=[48,64]",
        "loop.steps=2",
        "keep.pictures=1",
        "data.transforms=[]",
        f"data.canonical_focal={CANONICAL}",
    ]
    return change_recipe(get_recipe("rooms_tiny"), few + list(changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("canonical")
    two_lenses(home / "images")
    report = train(recipe(), home / "run", home / "images", cpu=True, workers=0, progress=False)
    return home, report


def test_saved_model_says_metres_of_each_images_own_camera(trained):
    home, report = trained
    config = json.loads((home / "run/model/config.json").read_text())
    assert config["heads"]["depth"]["canonical_focal"] == CANONICAL
    network = load_checkpoint(home / "run/model")
    held_out, errors = open_dataset("folder", home / "images", "held_out"), []
    for sample in held_out:
        lens = LENSES[len(errors) % 2]
        with torch.no_grad():
            raw = network(sample["image"][None])["depth"][0, 0].double().numpy()
        metres = np.clip(raw * lens / CANONICAL, 1e-3, 10)
        for predictor in (Predictor(network, "cpu", focal=lens), with_camera(Predictor(network, "cpu"), sample)):
            np.testing.assert_allclose(predictor(sample["image"])["depth"][0], raw * lens / CANONICAL, rtol=1e-4)
        truth = sample["depth"][0].double().numpy()
        known = (truth > 1e-3) & (truth < 10)
        errors.append(np.mean(np.abs(metres - truth)[known] / truth[known]))
        twice = Predictor(network, "cpu", size=(96, 128), focal=lens).predict(sample["image"][None])["depth"]
        seen = Predictor(network, "cpu", size=(96, 128), focal=2 * lens).predict(sample["image"][None])["depth"]
        torch.testing.assert_close(seen, 2 * twice)
    assert len(errors) == 2
    assert report["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-4)
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["abs_rel"] == pytest.approx(report["abs_rel"], rel=1e-5), "validation in training is another"


def test_an_unknown_camera_is_told_of(trained):
    home, _ = trained
    network = load_checkpoint(home / "run/model")
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    assumed = Predictor(network, "cpu")(image)
    assert "Nothing says which lens" in assumed.note and "--focal" in assumed.note
    wide = 32 / math.tan(math.radians(30))
    torch.testing.assert_close(assumed["depth"], Predictor(network, "cpu", focal=wide)(image)["depth"])


def test_loss_is_that_of_scaled_metres(trained):
    home, _ = trained
    state = open_run(recipe("losses.depth={}"), home / "images", open_accelerator(cpu=True), progress=False)
    samples = [state.train[index] for index in range(4)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "depth", "intrinsics")}
    inputs = to_device(state, batch)
    state.losses["depth"].gradient = 0.0
    with torch.no_grad():
        prediction = state.model(batch["image"])["depth"].double().numpy()
        found = part_loss(state, inputs, 1, {"depth": 1.0})[1].item()
    truth = batch["depth"].double().numpy()
    assert [round(float(each)) for each in batch["intrinsics"][:, 0, 0]] == [38, 88, 38, 88]
    for place in range(4):
        truth[place] *= CANONICAL / LENSES[place % 2]
    known = truth > 0
    error = np.log(prediction[known] + 1e-3) - np.log(truth[known] + 1e-3)
    assert found == pytest.approx(math.sqrt(error.var(ddof=1) + 0.15 * error.mean() ** 2), rel=1e-4)


def test_data_without_cameras_are_refused_before_training(trained, tmp_path):
    make_folder(tmp_path / "plain", count=6, size=(48, 64))
    few = recipe("data.train.held_out=0.3", "data.held_out.held_out=0.3")
    with pytest.raises(RecipeError, match="Say it by data.train.camera"):
        open_run(few, tmp_path / "plain", open_accelerator(cpu=True), progress=False)
    told = recipe("data.train.held_out=0.3", "data.held_out.held_out=0.3", "data.train.camera=60")
    state = open_run(told, tmp_path / "plain", open_accelerator(cpu=True), progress=False)
    assert state.network.config.heads["depth"]["canonical_focal"] == CANONICAL


ARGUMENTS = {  # transform → arguments with which it changes a sample of 40 × 56 pixels
    "Crop": dict(height=24, width=32),
    "KBCrop": dict(height=30, width=41),
    "Window": dict(top=3, bottom=20, left=5, right=50),
    "Resize": dict(height=64, width=64, multiple=16, method="lower_bound"),
    "Rescale": dict(low=1.2, high=1.6),
    "Pad": dict(height=50, width=60),
    "Flip": dict(probability=1.0),
    "Rotate": dict(degrees=10, probability=1.0),
    "ColorJitter": {},
    "Blur": dict(probability=1.0),
}
OF_TWO = {"CutMix"}  # what comes of two images has no camera


@pytest.mark.parametrize("name", TRANSFORMS)
def test_camera_sees_every_point_where_it_went(name):
    "Each pixel's depth is its number; after a transform the camera must project that pixel's point to where it is."
    if name in OF_TWO or not TRANSFORMS[name].__module__.startswith("dpt_nb."):
        pytest.skip("a transform that another test has registered, or that mixes two images")
    height, width, lens, middle = 40, 56, (50.0, 44.0), (26.0, 19.0)
    number = torch.arange(height * width).view(1, height, width).float() + 1000
    camera = torch.tensor([[lens[0], 0, middle[0]], [0, lens[1], middle[1]], [0, 0, 1]])
    sample = dict(image=torch.rand(3, height, width), depth=number, intrinsics=camera)
    moved = TRANSFORMS[name](**ARGUMENTS[name])(sample, torch.Generator().manual_seed(3))
    depth, (fx, skew, cx), (fy, cy) = moved["depth"][0], moved["intrinsics"][0], moved["intrinsics"][1, 1:]
    v, u = torch.nonzero(depth, as_tuple=True)
    place = depth[v, u] - 1000
    x, y = (place % width - middle[0]) / lens[0], (place // width - middle[1]) / lens[1]
    if name == "Flip":
        x = -x
    if name == "Rotate":  # the roll of the world that explains the new places best, and nothing else
        new_y = (v - cy) / fy
        new_x = (u - cx - skew * new_y) / fx
        roll = torch.atan2((new_y * x - new_x * y).sum(), (new_x * x + new_y * y).sum())
        assert abs(math.degrees(roll)) > 1
        x, y = roll.cos() * x - roll.sin() * y, roll.sin() * x + roll.cos() * y
    scale = max(1, fx / lens[0], fy / lens[1])
    assert len(u) > 300
    assert (fx * x + skew * y + cx - u).abs().max() < 0.75 * scale + 0.01
    assert (fy * y + cy - v).abs().max() < 0.75 * scale + 0.01
    assert (fx * x + skew * y + cx - u).mean().abs() < 0.1 and (fy * y + cy - v).mean().abs() < 0.1
