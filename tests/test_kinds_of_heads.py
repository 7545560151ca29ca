"""Every kind of prediction through everything that reads the table of heads: depth by bins, how sure it is, classes,
normals, and kinds that are registered from outside the library."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_here
from PIL import Image
from torch import nn

from dpt_nb.inference.films import predict_video
from dpt_nb.inference.outputs import FIGURES, NUMBERS, read_map
from dpt_nb.inference.predictor import Predictor
from dpt_nb.inference.video import VideoWriter
from dpt_nb.network.dpt import DPT
from dpt_nb.network.heads import HEADS, register_head
from dpt_nb.network.zoo import create_model
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene

KINDS = {
    "confidence": {},
    "depth": dict(form="bins", bins=16, min_depth=0.5),
    "entropy": {},
    "label": dict(num_classes=7),
    "normal": {},
    "slope": {},
    "material": {},
}


class SlopeHead(nn.Module):
    "A number of either sign."

    def __init__(self, features):
        super().__init__()
        self.convolution = nn.Conv2d(features, 1, kernel_size=1)

    def forward(self, fused, size):
        return F.interpolate(self.convolution(fused[-1]), size=size, mode="bilinear", align_corners=True)


class MaterialHead(SlopeHead):
    "Classes whose names belong to the head."

    def __init__(self, features):
        super().__init__(features)
        self.convolution = nn.Conv2d(features, 3, kernel_size=1)


@pytest.fixture(scope="module")
def predictor():
    "A network with every kind of head, untrained."
    register_head("slope", words="slope", unit="per metre")(SlopeHead)
    register_head("material", words="material", channels=0, missing=255, class_names=("wood", "glass", "tin"))(
        MaterialHead
    )
    torch.manual_seed(0)
    yield Predictor(create_model("dpt_tiny", heads=KINDS).eval(), device="cpu")
    for name in ("slope", "material"):
        del HEADS[name], HEADS.homes[name]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "room.png"
    colors = render(random_scene("rooms", 5, (90, 130)))["image"]
    Image.fromarray((colors * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return path


def test_saved_maps_of_every_kind_are_read_back_as_they_were(predictor, photo, tmp_path):
    prediction = predictor(photo)
    written = prediction.save(tmp_path, (*NUMBERS, *FIGURES))
    assert {head: len(written[head].get("files", [1])) for head in KINDS} == dict(
        confidence=3, depth=3, entropy=3, label=2, normal=2, slope=3, material=2
    )
    for head in KINDS:
        found = read_map(tmp_path / f"room-{head}.npy")
        assert torch.equal(found, prediction[head]) and found.shape[-2:] == (90, 130)
    assert np.load(tmp_path / "room-normal.npy").shape == (90, 130, 3)
    cosine = (read_map(tmp_path / "room-normal.png") * prediction["normal"]).sum(0)
    assert cosine.min() > np.cos(np.radians(0.5))
    assert torch.equal(read_map(tmp_path / "room-material.png"), prediction["material"])
    assert written["material"]["classes"] == ["wood", "glass", "tin"] and written["label"]["classes"] == []
    assert prediction["slope"].min() < 0 < prediction["confidence"].min() and prediction["entropy"].max() <= 1
    for head in ("confidence", "entropy", "slope"):
        values = prediction[head]
        assert torch.allclose(read_map(tmp_path / f"room-{head}.png"), values, atol=float(values.std()) / 1e3)
    for head in KINDS:
        side = np.asarray(Image.open(tmp_path / f"room-{head}-side.png"))
        assert side.shape[0] == 90 and side[:, 140:].std() > 1
    prediction.show()


def test_tiles_give_every_kind_whole(predictor, photo, tmp_path):
    tiled = predictor.predict_tiled(photo, tmp_path, window=(64, 64), progress=False)
    assert {head: tuple(values.shape) for head, values in tiled.maps.items()} == dict.fromkeys(
        KINDS, (1, 90, 130)
    ) | dict(label=(90, 130), normal=(3, 90, 130), material=(90, 130))
    assert torch.allclose(tiled["normal"].norm(dim=0), torch.ones(90, 130), atol=1e-5)
    assert tiled["material"].max() <= 2 and tiled["slope"].min() < 0
    for head, spec in ((head, HEADS[head]) for head in KINDS):
        expected = tiled[head].long() if spec.categorical else tiled[head]
        assert torch.equal(read_map(tmp_path / f"room-{head}.npy"), expected)


def test_mirrored_views_agree_for_every_kind(predictor, photo):
    flipping = Predictor(predictor.model, device="cpu", flip=True)
    image = predictor.read(photo)[None].float() / 255
    straight, mirrored = flipping.predict(image), flipping.predict(image.flip(-1))
    for head in KINDS:
        back = mirrored[head].flip(-1)
        if head == "normal":
            back = back * torch.tensor([-1.0, 1.0, 1.0]).reshape(3, 1, 1)
        assert torch.allclose(straight[head], back, atol=2e-5), head


def test_folder_command_writes_every_kind(predictor, photo, tmp_path):
    predictor.model.save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "room.png").write_bytes(photo.read_bytes())
    words = "dpt_predict", "in", "--model", "model", "--outputs", "png,npy,color", "--out", "out"
    command_here(*words, folder=tmp_path, check=0)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert set(KINDS) <= set(entry)
    assert entry["normal"]["files"] == ["room-normal.png", "room-normal.npy"]
    assert DPT.from_pretrained(tmp_path / "model").config.heads.keys() == KINDS.keys()


def test_film_of_every_kind_is_steadied_and_written(predictor, tmp_path):
    pytest.importorskip("av")
    frames = [render(random_scene("rooms", 5, (64, 64)))["image"] for _ in range(3)]
    with VideoWriter(tmp_path / "film.mp4", 5) as film:
        for number, frame in enumerate(frames):
            film.add((frame * 255).byte().permute(1, 2, 0).numpy(), number / 5)
    entry = predict_video(
        predictor, tmp_path / "film.mp4", tmp_path / "out", outputs=("side", "png", "npy"), smooth=0.5, progress=False
    )
    assert entry["frames"] == 3 and entry["material"]["classes"] == ["wood", "glass", "tin"]
    for head, form in dict.fromkeys(KINDS, "png").items():
        assert len(list((tmp_path / "out" / f"film-{head}").glob(f"*.{form}"))) == 3
    normals = read_map(tmp_path / "out" / "film-normal" / "000002.npy")
    assert torch.allclose(normals.norm(dim=0), torch.ones(64, 64), atol=1e-4)
