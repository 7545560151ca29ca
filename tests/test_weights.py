"The weights that come with the library: there, small, usable offline, and as good as their card says."

import re
from importlib.resources import files

import pytest
from conftest import command_here

from dpt_nb.data.registry import open_dataset
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.named import PUBLISHED
from dpt_nb.network.zoo import create_model

FOLDER = files("dpt_nb") / "weights" / "dpt_tiny_scenes"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rooms", "streets"])
def test_they_are_as_good_as_their_card_says(kind, tmp_path):
    card = {
        (what, metric): float(value)
        for what, metric, value in re.findall(
            r"^\| ([^|]+?) \| (\w+) \| ([\d.]+) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    held_out = open_dataset(kind, tmp_path, "held_out", progress=False, count=200, joint=True)
    measured = evaluate(
        Predictor(create_model("dpt_tiny_scenes", pretrained=True), "cpu"), held_out, PROTOCOLS[kind], progress=False
    )
    for metric in ("abs_rel", "delta1", "miou", "pixel_accuracy"):
        assert card[kind, metric] == pytest.approx(measured[metric], abs=2e-3), metric
    assert PUBLISHED["dpt_tiny_scenes"].figures[f"held-out {kind} AbsRel"] == round(card[kind, "abs_rel"], 3)
    assert measured["abs_rel"] < 0.6 * card[f"{kind}, median map", "abs_rel"] and measured["pixel_accuracy"] > 0.8


def test_forty_rooms_are_near_the_card(tmp_path):
    "The card is of 200; the mean over forty of them is not far from it."
    card = float(
        re.search(r"^\| rooms \| abs_rel \| ([\d.]+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)[1]
    )
    held_out = open_dataset("rooms", tmp_path, "held_out", progress=False, count=40, joint=True)
    predictor = Predictor(create_model("dpt_tiny_scenes", pretrained=True), "cpu")
    measured = evaluate(predictor, held_out, PROTOCOLS["rooms"], progress=False)
    assert measured["abs_rel"] == pytest.approx(card, rel=0.2) and measured["pixel_accuracy"] > 0.8


def test_they_are_small_and_go_by_their_name_everywhere(tmp_path, photographs):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20
    done = command_here(
        "dpt_predict",
        photographs / "color.jpg",
        "--model",
        "dpt_tiny_scenes",
        "--out",
        "seen",
        folder=tmp_path,
        check=0,
    )
    assert "color.jpg" in done.stdout and (tmp_path / "seen" / "color-depth.png").exists()
