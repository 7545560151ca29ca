"From an image to files: what crosses several notebooks, and what needs a process of its own."

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, command_here
from PIL import Image

from dpt_nb.commands import main
from dpt_nb.images.images import read_image, write_image
from dpt_nb.inference.folders import predict_files
from dpt_nb.inference.outputs import read_map
from dpt_nb.inference.point_clouds import read_ply
from dpt_nb.inference.predictor import Predictor
from dpt_nb.inference.resizing import fit_size, resize_policy
from dpt_nb.inference.result_folder import read_predictions
from dpt_nb.inference.video import VideoWriter, read_video
from dpt_nb.network.zoo import config_for, create_model
from dpt_nb.scenes.raycast import classes, render
from dpt_nb.scenes.scenes import random_scene


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A saved model with a head for metres and one for labels."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    heads = {"depth": dict(output="exp"), "label": dict(num_classes=12)}
    create_model("dpt_tiny", heads=heads, class_names=list(classes("rooms"))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Twelve photographs of rooms."
    folder = tmp_path_factory.mktemp("rooms")
    for seed in range(12):
        write_image(folder / f"{seed:02}.png", render(random_scene("rooms", seed, (96, 128)))["image"])
    return folder


def official_resize(height, width, target_height, target_width, multiple, method):
    "isl-org/DPT and Depth Anything `transforms.py`, `Resize.get_size` with keep_aspect_ratio, written down anew."
    scale_height, scale_width = target_height / height, target_width / width
    if method == "lower_bound":
        scale_width = scale_height = max(scale_width, scale_height)
    elif abs(1 - scale_width) < abs(1 - scale_height):
        scale_height = scale_width
    else:
        scale_width = scale_height

    def constrain(x, least=0):
        y = int(np.round(x / multiple) * multiple)
        return int(np.ceil(x / multiple) * multiple) if y < least else y

    bound = (target_height, target_width) if method == "lower_bound" else (0, 0)
    return constrain(scale_height * height, bound[0]), constrain(scale_width * width, bound[1])


@pytest.mark.parametrize(
    "name, patch",
    [
        ("dpt_large", 16),
        ("dpt_hybrid_kitti", 16),
        ("dpt_hybrid_nyu", 16),
        ("dpt_large_ade20k", 16),
        ("dpt_beit_large_512", 16),
        ("depth_anything_v2_small", 14),
    ],
)
def test_published_networks_see_images_at_their_authors_sizes(name, patch):
    native, multiple, method = resize_policy(config_for(name), patch)
    for height, width in [
        (375, 1242),
        (480, 640),
        (640, 480),
        (512, 683),
        (1080, 1920),
        (500, 375),
        (384, 384),
        (768, 1024),
        (333, 500),
    ]:
        official = official_resize(height, width, *native, multiple, method)
        if official[0] * official[1] <= 8 * native[0] * native[1]:  # the bound is ours
            assert fit_size(height, width, native, multiple, method=method) == official, (name, height, width)


def test_every_way_in_gives_the_same(saved, rooms):
    from dpt_nb.network.dpt import DPT

    predictor, path = Predictor(DPT.from_pretrained(saved), "cpu"), rooms / "03.png"
    image = read_image(path)
    ways = [
        path,
        str(path),
        Image.open(path),
        np.asarray(Image.open(path)),
        image,
        image[None],
        (image * 255).round().byte(),
    ]
    expected = predictor.predict(image[None])["depth"][0]
    for way in ways:
        assert torch.allclose(predictor(way)["depth"], expected, atol=1e-5), type(way)
    assert torch.allclose(predictor([path, path])[1]["depth"], expected, atol=1e-5)
    assert torch.allclose(predictor(rooms)[3]["depth"], expected, atol=1e-5)
    assert len(predictor(torch.stack([image, image, image]))) == 3


@pytest.mark.slow
def test_a_killed_folder_run_leaves_whole_files_and_goes_on(saved, rooms, tmp_path):
    words = ["dpt_predict", rooms, "--model", saved, "--outputs", "png,npy,color"]
    command_here(*words, "--out", tmp_path / "at once", folder=tmp_path, check=0)
    slow = "import sys, time; from dpt_nb.inference.prediction import Prediction as P; old = P.save; "
    slow += "P.save = lambda *a, **k: (time.sleep(0.3), old(*a, **k))[1]; from dpt_nb.commands import main; "
    slow += "sys.exit(main(sys.argv[1:]))"
    running = subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, words), "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    deadline = time.monotonic() + 120
    while (
        len(list((tmp_path / "out").glob("*-label.png")) if (tmp_path / "out").is_dir() else []) < 3
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130 and error.decode().strip().endswith("Interrupted."), error
    described = read_predictions(tmp_path / "out")
    assert 3 <= len(described) < 12
    for entry in described:
        assert read_map(tmp_path / "out" / entry["depth"]["file"]).shape == (1, 96, 128)
    assert {path.name[:2] for path in (tmp_path / "out").glob("*-depth.png")} == {entry["name"] for entry in described}
    done = command(*words, "--out", tmp_path / "out", folder=tmp_path, check=0)
    assert f"{len(described)} of 12 were there already." in done.stdout
    for path in (tmp_path / "at once").glob("*-depth.npy"):
        assert np.array_equal(np.load(path), np.load(tmp_path / "out" / path.name))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_all_outputs_from_the_shell(saved, rooms, tmp_path):
    command_here(
        "dpt_predict",
        rooms / "00.png",
        "--model",
        saved,
        "--out",
        "out",
        "--flip",
        "--scales",
        "0.5,1",
        "--outputs",
        "png,npy,pfm,color,bar,overlay,side,ply",
        "--field-of-view",
        75,
        folder=tmp_path,
        check=0,
    )
    out = tmp_path / "out"
    (entry,) = read_predictions(out)
    assert {path.name for path in out.iterdir()} == {
        "predictions.json",
        "00.ply",
        *(f"00-depth{end}" for end in (".png", ".npy", ".pfm", "-color.png", "-bar.png", "-overlay.png", "-side.png")),
        *(f"00-label{end}" for end in (".png", ".npy", "-bar.png", "-overlay.png", "-side.png")),
    }
    depth = read_map(out / "00-depth.pfm")
    assert (
        torch.equal(depth, read_map(out / "00-depth.npy"))
        and (depth - read_map(out / "00-depth.png")).abs().max() <= 0.00051
    )
    points, colors = read_ply(out / "00.ply")
    assert len(points) == entry["points"]["count"] and colors.dtype == torch.uint8
    focal = 64 / np.tan(np.radians(75 / 2))
    column = points[:, 0] / points[:, 2] * focal + 63.5
    assert (column - column.round()).abs().max() < 1e-3 and -0.01 <= column.min() and column.max() <= 127.01
    assert entry["label"]["classes"][0] == "floor"


def test_a_video_from_the_shell(saved, tmp_path):
    with VideoWriter(tmp_path / "film.mp4", 12) as video:
        for seed in range(3):
            video.add((render(random_scene("rooms", 4, (96, 128)))["image"] * 255).byte().permute(1, 2, 0).numpy())
    (tmp_path / "empty.mp4").touch()
    done = command_here(
        "dpt_predict",
        "film.mp4",
        "empty.mp4",
        "--model",
        saved,
        "--out",
        "out",
        "--smooth",
        0.5,
        folder=tmp_path,
        check=1,
    )
    assert "film.mp4 → out/film-depth.mp4 (3 frames)" in done.stdout
    assert (
        re.search(r"1 could not be used:\n.*empty\.mp4 is empty \(0 bytes\)", done.stderr)
        and "Traceback" not in done.stderr
    )
    assert len(list(read_video(tmp_path / "out" / "film-depth.mp4"))) == 3
    assert not (tmp_path / "out" / "empty-depth.mp4").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--outputs", "png,tiff"], "Outputs called tiff were asked for"),
        (["--scales", "1;2"], "--scales 1;2"),
        (["--scales", "0"], "at least one positive factor"),
        (["--window", "0"], "at least 1 pixel"),
        (["--window", "64", "--overlap", "1"], "below 0.9"),
        (["--precision", "half"], "expected one of float32"),
        (["--out", "/proc/nothing"], "Nothing can be written into the folder /proc/nothing"),
        (["--every", "0"], "--every 0"),
        (["--outputs", "ply", "--field-of-view", "200"], "between 0 and 180"),
    ],
)
def test_mistakes_in_predicting_get_one_sentence(saved, rooms, tmp_path, words, sentence, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["dpt_predict", str(rooms / "00.png"), "--model", str(saved), "--device", "cpu", *words]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") <= 2, error


def test_a_strip_is_predicted_and_said_to_be_one(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2000, 40), "red").save("strip.png")
    assert main(["dpt_predict", "strip.png", "--model", str(saved), "--device", "cpu"]) == 0
    assert "expect little of the result" in capsys.readouterr().out and Image.open(
        "predictions/strip-depth.png"
    ).size == (2000, 40)


def test_an_entry_is_never_lost(saved, rooms, tmp_path):
    from dpt_nb.network.dpt import DPT

    predictor = Predictor(DPT.from_pretrained(saved), "cpu")
    for file in sorted(rooms.iterdir())[:4]:
        predict_files(predictor, [file], tmp_path, progress=False)
    assert [entry["name"] for entry in read_predictions(tmp_path)] == ["00", "01", "02", "03"]
    (tmp_path / "predictions.json").write_text("[{")
    with pytest.raises(ValueError, match="is not readable as JSON"):
        predict_files(predictor, [rooms / "05.png"], tmp_path, progress=False)


LARGE = """
import sys, torch
from dpt_nb.commands import main
from dpt_nb.training.dry_run import peak_memory
code = main(sys.argv[1:])
print("peak", peak_memory(torch.device("cpu")))
sys.exit(code)
"""


@pytest.mark.slow
def test_an_image_of_12000_by_9000_in_less_than_3_gb(saved, tmp_path):
    small = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(small).resize((12000, 9000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    words = [
        "dpt_predict",
        "large.jpg",
        "--model",
        str(saved),
        "--window",
        "768",
        "--outputs",
        "png,npy,color",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"peak (\d+)", done.stdout).group(1))
    print(f"{peak / 1e9:.2f} GB at most")
    assert peak < 3e9
    assert Image.open(tmp_path / "predictions" / "large-depth-color.png").size == (12000, 9000)
    assert json.loads((tmp_path / "predictions" / "predictions.json").read_text())[0]["width"] == 12000
    assert np.load(tmp_path / "predictions" / "large-depth.npy", mmap_mode="r").shape == (9000, 12000)


def test_names_of_classes_come_with_the_weights_and_are_not_guessed(rooms, tmp_path):
    torch.manual_seed(0)
    nameless = create_model("dpt_tiny", heads={"label": dict(num_classes=12)})  # as many as a room has
    nameless.save_pretrained(tmp_path / "nameless")
    for model, names in [(tmp_path / "nameless", []), ("dpt_tiny_scenes", [*classes("rooms"), *classes("streets")])]:
        command_here(
            "dpt_predict",
            rooms / "00.png",
            "--model",
            model,
            "--out",
            tmp_path / Path(model).name,
            folder=tmp_path,
            check=0,
        )
        (entry,) = read_predictions(tmp_path / Path(model).name)
        assert entry["label"]["classes"] == names


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--size", "100x128"], "multiples of the patch, 16 pixels. The nearest is 96×128"),
        (["--size", "96"], "such as 384x512"),
        (["--resizing", "nearest"], "no resizing called 'nearest'"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_written(saved, rooms, tmp_path, words, sentence):
    done = command_here(
        "dpt_predict", rooms / "00.png", "--model", saved, "--out", tmp_path / "out", *words, folder=tmp_path, check=1
    )
    assert sentence in done.stderr and not (tmp_path / "out").exists()


def test_the_size_and_the_interpolation_that_are_asked_for_are_used(saved, rooms, tmp_path):
    from dpt_nb.network.dpt import DPT

    command_here(
        "dpt_predict",
        rooms / "00.png",
        "--model",
        saved,
        "--out",
        tmp_path / "out",
        "--size",
        "192x256",
        "--resizing",
        "isl-org",
        "--outputs",
        "npy",
        folder=tmp_path,
        check=0,
    )
    wanted = Predictor(DPT.from_pretrained(saved), "cpu", size=(192, 256), resizing="isl-org").predict(
        read_image(rooms / "00.png")[None]
    )["depth"][0]
    assert torch.allclose(read_map(tmp_path / "out" / "00-depth.npy"), wanted, atol=1e-5)
