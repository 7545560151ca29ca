"""Kinds of prediction that a user registers, and normals, go through training, validation, figures and the report as
depth and labels do."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from dpt_nb.data.registry import DATASETS, register_dataset
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.gallery import gallery
from dpt_nb.evaluation.head_metrics import METRICS, register_metric
from dpt_nb.evaluation.protocols import Protocol
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT
from dpt_nb.network.heads import HEADS, DepthHead, NormalHead, SegmentationHead, register_head
from dpt_nb.objective.absolute import AbsoluteMetrics
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train

SIZE = (48, 64)


class Things(Dataset):
    "Six images with ground truth of four kinds; of the last nothing is known."

    targets = ("canopy", "part", "flow", "normal")

    def __init__(self, root, split="train"):
        self.first = 0 if split == "train" else 100

    def __len__(self):
        return 6

    def image_path(self, index):
        return f"thing {index}"

    def __getitem__(self, index):
        index = range(6)[index]
        generator = torch.Generator().manual_seed(self.first + index)
        height = torch.rand(1, *SIZE, generator=generator)
        sample = dict(
            image=torch.rand(3, *SIZE, generator=generator),
            canopy=torch.where(height < 0.2, -1.0, height),
            part=torch.randint(0, 3, SIZE, generator=generator),
            flow=torch.randn(3, *SIZE, generator=generator),
            normal=normalize(torch.randn(3, *SIZE, generator=generator), dim=0),
        )
        sample["normal"][2] = -sample["normal"][2].abs()  # what is seen faces the camera
        if index == 5:
            nothing = dict(canopy=-1, part=0, flow=0, normal=0)
            sample |= {name: torch.full_like(sample[name], value) for name, value in nothing.items()}
        return sample | dict(meta=dict(path=self.image_path(index)))


@pytest.fixture
def outside():
    "A number, classes and three channels, none with a loss or metrics of its own."
    register_head("canopy", words="canopy height (m)", missing=-1)(type("Height", (DepthHead,), {}))
    register_head("part", words="part", channels=0, missing=0, class_names=("none", "leaf", "stem"))(
        type("Parts", (SegmentationHead,), {})
    )
    register_head("flow", words="flow", channels=3, color=lambda values: values.sigmoid())(
        type("Flow", (NormalHead,), {})
    )
    register_dataset("things")(Things)
    yield ("canopy", "part", "flow")
    for table, names in ((HEADS, ("canopy", "part", "flow")), (DATASETS, ("things",))):
        for name in names:
            table.pop(name), table.homes.pop(name)


def things_recipe():
    "Four heads on one small trunk, two steps."
    heads = dict(canopy=dict(hidden=8), part=dict(num_classes=3), flow=dict(hidden=8), normal=dict(hidden=8))
    recipe = get_recipe(
        "rooms_tiny",
        model=dict(changes=dict(heads=heads, image_size=SIZE)),
        losses=dict(canopy={}, part=dict(weight=0.5), flow={}, normal={}),
        data=dict(name="things", protocol="rooms", train={}, held_out={}, transforms=[["Flip", {}]], batch_size=3),
    )
    return change_recipe(recipe, ["loop.steps=2", "keep.validate_every=1", "keep.save_steps=2", "keep.pictures=2"])


def test_heads_from_outside_are_trained_validated_drawn_and_reported(outside, tmp_path):
    recipe, names = things_recipe(), ("canopy", "part", "flow", "normal")
    kinds = {head: type(loss).__name__ for head, loss in build_losses(recipe).items()}
    assert kinds == dict(canopy="AbsoluteLoss", part="SegmentationLoss", flow="AbsoluteLoss", normal="AngularLoss")
    report = train(recipe, tmp_path / "run", tmp_path, cpu=True, workers=0, progress=False)
    own = {"canopy_mae", "canopy_rmse", "part_miou", "part_pixel_accuracy", "flow_mae", "flow_rmse", "mean_angle"}
    assert own <= report.keys() and (report["images"], report["skipped"]) == (5, 1)
    assert report["without_truth"] == dict.fromkeys(names, 1)  # six samples were seen, one of them without
    assert len(list((tmp_path / "run" / "pictures").glob("step-*.png"))) == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(own <= row.keys() for row in rows) and (tmp_path / "run" / "best").is_dir()

    predictor, errors, right = Predictor(DPT.from_pretrained(tmp_path / "run" / "model"), "cpu"), [], []
    for index in range(6):
        sample = Things(tmp_path, "held_out")[index]
        maps = {head: values[0].double().numpy() for head, values in predictor.predict(sample["image"][None]).items()}
        height, part = sample["canopy"].double().numpy(), sample["part"].numpy()
        errors += (maps["canopy"] - height)[height != -1].tolist()
        right += (maps["part"].argmax(0) == part)[part != 0].tolist()
    assert abs(report["canopy_mae"] - np.abs(errors).mean()) < 1e-5
    assert abs(report["canopy_rmse"] - np.sqrt(np.square(errors).mean())) < 1e-5
    assert abs(report["part_pixel_accuracy"] - np.mean(right)) < 1e-3


def test_a_metric_of_ones_own_takes_the_place_of_the_usual(outside, tmp_path):
    class Largest(AbsoluteMetrics):
        def compute(self):
            return self.powers[1].sqrt()

    register_metric("root_of_sum", head="canopy")(Largest)
    try:
        heights = dict(canopy=torch.zeros(1, 1, *SIZE))
        predictor = type(
            "Zero", (), dict(predict=lambda self, image: dict(canopy=heights["canopy"].expand(len(image), -1, -1, -1)))
        )
        report = evaluate(predictor(), Things(tmp_path), Protocol(), progress=False)
    finally:
        del METRICS["canopy"]
    truth = torch.stack([Things(tmp_path)[index]["canopy"] for index in range(6)]).double()
    assert report.keys() == {"root_of_sum", "images", "skipped"} and (report["images"], report["skipped"]) == (5, 1)
    assert abs(report["root_of_sum"] - truth[truth != -1].square().sum().sqrt().item()) < 1e-9


@pytest.mark.parametrize("truth", ["canopy", "part", "flow", "normal"])
def test_a_gallery_of_every_kind(truth, outside, tmp_path):
    "The worst image is the one that numpy finds."
    channels, things, figures = dict(canopy=1, part=3, flow=3, normal=3)[truth], Things(tmp_path), []

    class Guess:
        def predict(self, image):
            return {truth: torch.stack([image[0, :channels] - 0.5] * len(image))}

    evaluate(Guess(), things, Protocol(), batch_size=1, progress=False, each=figures.append)
    figure = gallery(Guess(), things, Protocol(), figures, truth, count=1)
    scores = []
    for index in range(5):
        guess, known = things[index]["image"][:channels].double().numpy() - 0.5, things[index][truth].double().numpy()
        if truth == "part":
            found = guess.argmax(0)
            pairs = [(found[known != 0] == each, known[known != 0] == each) for each in range(3)]
            overlaps = [(one & other).sum() / (one | other).sum() for one, other in pairs if (one | other).any()]
            scores.append(-np.mean(overlaps))
        elif truth == "normal":
            cosine = (guess * known).sum(0) / np.linalg.norm(guess, axis=0)
            scores.append(np.degrees(np.arccos(cosine)).mean())
        else:
            scores.append(np.abs(guess - known)[known != HEADS[truth].missing].mean())
    captions = [text.get_text() for text in figure.texts if text.get_text().startswith(("worst", "best"))]
    assert captions[0].startswith(f"worst: thing {np.argmax(scores)} ")
    assert captions[-1].startswith(f"best: thing {np.argmin(scores)} ")
