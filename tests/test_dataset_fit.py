"""`dpt_eval --fit`: what a scale and a shift for a whole folder reach, against NumPy; and the model that is saved."""

import json

import numpy as np
import pytest
import torch

from dpt_nb.commands import is_our_report, main
from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.zoo import create_model
from dpt_nb.weights.load import load_checkpoint

SIZE = dict(image_size=[48, 64])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Eight rooms, and two networks with random weights: of relative depth, and of metres."
    folder = tmp_path_factory.mktemp("fit")
    make_folder(folder / "rooms", count=8, size=(48, 64))
    for head in ("inverse_depth", "depth"):
        torch.manual_seed(3)
        model = create_model("dpt_tiny", heads={head: {}}, **SIZE)
        with torch.no_grad():
            model.heads[head].convolution3.bias += 0.5
        model.save_pretrained(folder / head)
    return folder


def evaluate(home, model, *words):
    folder = ["--data", "folder", "--data-root", str(home / "rooms"), "--set", "held_out=0.4", "--device", "cpu"]
    return main(["dpt_eval", "--model", str(home / model), *folder, *words])


def values(home, head, split):
    "Prediction and metres of each image's measured pixels."
    predictor = Predictor(load_checkpoint(home / head), "cpu")
    for sample in open_dataset("folder", home / "rooms", split, held_out=0.4):
        found = predictor.predict(sample["image"][None])[head][0, 0].double().numpy()
        metres = sample["depth"][0].double().numpy()
        known = (metres > 1e-3) & (metres < 80)
        yield found[known], metres[known]


def line_by_hand(home, head):
    "Scale and shift, every image weighing the same."
    rows, wanted = [], []
    for found, metres in values(home, head, "train"):
        weight = len(found) ** -0.5
        rows.append(np.stack([found, np.ones_like(found)], 1) * weight)
        wanted.append((1 / metres if head == "inverse_depth" else metres) * weight)
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]


def error_by_hand(home, head):
    "The mean AbsRel of the validation images by that line."
    (scale, shift), errors = line_by_hand(home, head), []
    for found, metres in values(home, head, "held_out"):
        line = scale * found + shift
        depth = 1 / np.maximum(line, 1 / 80) if head == "inverse_depth" else np.clip(line, 1e-3, 80)
        errors.append(np.mean(np.abs(depth - metres) / metres))
    return np.mean(errors)


@pytest.mark.parametrize("head", ["inverse_depth", "depth"])
def test_fit_is_that_of_numpy(home, head, capsys):
    assert evaluate(home, head, "--fit", "dataset", "--out", str(home / f"out-{head}")) == 0
    assert is_our_report(home / f"out-{head}/report.json"), "a second evaluation would refuse to replace it"
    report, printed = json.loads((home / f"out-{head}/report.json").read_text()), capsys.readouterr().out
    scale, shift = line_by_hand(home, head)
    assert report["fit"]["scales"]["all"] == pytest.approx(scale, rel=1e-4)
    assert report["fit"]["shift"] == pytest.approx(shift, rel=1e-4)
    assert report["rows"]["one scale and shift"]["abs_rel"] == pytest.approx(error_by_hand(home, head), rel=1e-4)
    assert f"Fitted to {report['fit']['images']} training images" in printed and "image by image" in printed
    assert ("as it is" in report["rows"]) == (head == "depth")
    assert report["fit"]["images"] + report["rows"]["image by image"]["images"] == 8


@pytest.mark.slow
def test_saved_model_predicts_metres(home, capsys):
    (scale, shift), saved = line_by_hand(home, "inverse_depth"), home / "metric"
    code = evaluate(home, "inverse_depth", "--fit", "dataset", "--save-fit", str(saved))
    told = capsys.readouterr()
    assert scale > 0 and shift > 0, "random weights that no head can hold: take another seed"
    assert code == 0 and "it predicts metres" in told.out
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    relative = Predictor(load_checkpoint(home / "inverse_depth"), "cpu").predict(image)["inverse_depth"]
    metres = Predictor(load_checkpoint(saved), "cpu").predict(image)["depth"]
    torch.testing.assert_close(metres, 1 / (scale * relative.double() + shift).float(), rtol=1e-4, atol=0)
    assert evaluate(home, "inverse_depth", "--fit", "dataset", "--save-fit", str(saved)) == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--fit", "focal"], "comes without its camera"),
        (["--save-fit", "elsewhere"], "add --fit dataset"),
        (["--fit", "focal", "--save-fit", "elsewhere"], "found --fit focal"),
        (["--fit", "dataset", "--set", "inverse=true"], "depth in metres was expected"),
    ],
)
def test_what_cannot_be_fitted_is_said(home, words, sentence, capsys):
    assert evaluate(home, "inverse_depth", *words) == 1
    assert sentence in capsys.readouterr().err


def test_one_scale_for_each_focal_length(home, capsys):
    assert evaluate(home, "depth", "--fit", "focal", "--set", "camera=60") == 0
    assert "at a focal length of about" in capsys.readouterr().out
