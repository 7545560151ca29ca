"The commands, end to end, as a visitor types them."

import json
import math
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from conftest import REPOSITORY, SHORT, changes, command, command_here
from forked import command_forked, quick_figures
from PIL import Image

from dpt_nb.commands import COMMANDS, main


def test_importing_the_package_or_its_commands_does_not_import_torch():
    code = "import sys, dpt_nb, dpt_nb.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WITHOUT_OUT = {"dpt_export", "dpt_convert", "dpt_report"}  # they are told where in another way


@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_without_torch(name):
    code = f"import sys; from dpt_nb.commands import build_parser; print(build_parser({name!r}).format_help()); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and ("--out" in done.stdout or name in WITHOUT_OUT) and "_root" not in done.stdout


def test_the_demo_leaves_the_folder_it_promises(demo):
    run = demo / "runs" / "demo"
    assert {"config.json", "metrics.jsonl", "report.json", "panel.png", "checkpoints", "best", "model"} <= {
        path.name for path in run.iterdir()
    }
    assert {"config.json", "model.safetensors"} <= {path.name for path in (run / "model").iterdir()}
    report = json.loads((run / "report.json").read_text())
    for key in ("abs_rel", "rmse", "delta1", "baseline_abs_rel", "train_seconds", "parameters"):
        assert math.isfinite(report[key]) and report[key] >= 0, key
    assert report["seed"] == 0 and report["device"] == "cpu" and report["images"] == 4
    assert Image.open(run / "panel.png").width > 600
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_demo_twice_gives_the_same_digits(demo, tmp_path):
    done = command("dpt_demo", "--data-root", demo / "data", *changes(*SHORT), folder=tmp_path, check=0)
    first, second = (json.loads((folder / "runs" / "demo" / "report.json").read_text()) for folder in (demo, tmp_path))
    assert first["abs_rel"] == second["abs_rel"] and f"{first['abs_rel']:.4f}" in done.stdout
    other = command_here(
        "dpt_demo",
        "--data-root",
        demo / "data",
        "--seed",
        1,
        "--out",
        "other",
        *changes(*SHORT),
        folder=tmp_path,
        check=0,
    )
    assert json.loads((tmp_path / "other" / "report.json").read_text())["abs_rel"] != first["abs_rel"], other.stdout


def test_a_run_is_not_written_over_unless_asked(demo):
    again = command_here("dpt_demo", *changes(*SHORT), folder=demo, check=1)
    assert "holds a run already" in again.stderr and again.stderr.count("\n") <= 2
    (demo / "runs" / "demo" / "mine.txt").write_text("kept")
    with quick_figures():
        command_here("dpt_demo", "--replace", *changes(*SHORT), folder=demo, check=0)
    assert (demo / "runs" / "demo" / "mine.txt").read_text() == "kept"


def test_evaluating_a_saved_model_repeats_the_report(demo, tmp_path):
    report = json.loads((demo / "runs" / "demo" / "report.json").read_text())
    command_here(
        "dpt_eval",
        "--model",
        demo / "runs" / "demo" / "model",
        "--data-root",
        demo / "data",
        "--count",
        4,
        "--out",
        tmp_path,
        "--batch-size",
        3,
        folder=tmp_path,
        check=0,
    )
    evaluated = json.loads((tmp_path / "report.json").read_text())
    for key in ("abs_rel", "rmse", "delta1", "silog"):
        assert evaluated[key] == pytest.approx(report[key], rel=1e-5), key
    assert (tmp_path / "panel.png").exists()
    flipped = command_here(
        "dpt_eval",
        "--model",
        demo / "runs" / "demo" / "model",
        "--data-root",
        demo / "data",
        "--count",
        4,
        "--flip",
        folder=tmp_path,
        check=0,
    )
    assert "+flip" in flipped.stdout


def test_merged_tokens_change_the_depth_a_little(photographs, tmp_path):
    model, depths = ("--model", "dpt_tiny_scenes"), []
    for name, words in (("all", []), ("merged", ["--merge-tokens", "0.6"])):
        options = (*model, "--outputs", "npy", "--out", tmp_path / name, *words)
        command_here("dpt_predict", photographs / "color.jpg", *options, folder=tmp_path, check=0)
        depths.append(np.load(tmp_path / name / "color-depth.npy"))
    moved = np.abs(depths[1] / depths[0] - 1).mean()
    assert 1e-4 < moved < 0.1
    scores = []
    for name, words in (("all", []), ("merged", ["--merge-tokens", "0.6"])):
        options = (*model, "--count", 4, "--set", "joint=true", "--out", tmp_path / f"eval-{name}", *words)
        done = command_here("dpt_eval", *options, folder=tmp_path, check=0)
        assert ("60% merged" in done.stdout) == (name == "merged"), done.stdout
        scores.append(json.loads((tmp_path / f"eval-{name}" / "report.json").read_text()))
    assert scores[0]["abs_rel"] != scores[1]["abs_rel"] == pytest.approx(scores[0]["abs_rel"], rel=0.2)


def test_some_of_a_networks_heads(photographs, tmp_path):
    options = ("--model", "dpt_tiny_scenes", "--outputs", "npy", "--out")
    for name, words in (("all", []), ("depth", ["--heads", "depth"])):
        command_here(
            "dpt_predict", photographs / "color.jpg", *options, tmp_path / name, *words, folder=tmp_path, check=0
        )
    whole, alone = ({path.name: np.load(path) for path in (tmp_path / name).glob("*.npy")} for name in ("all", "depth"))
    assert set(whole) == {"color-depth.npy", "color-label.npy"} and set(alone) == {"color-depth.npy"}
    assert np.array_equal(whole["color-depth.npy"], alone["color-depth.npy"])


def test_depth_is_evaluated_on_data_with_other_classes(tmp_path):
    rooms = ("--model", "dpt_tiny_scenes", "--count", 3, "--set")  # 12 classes in a room alone, and the network has 21
    refused = command_here("dpt_eval", *rooms, "joint=false", folder=tmp_path, check=1)
    assert "21 classes apart and 12 were expected" in refused.stderr and "--heads" in refused.stderr, refused.stderr
    scores = {}
    for joint in ("true", "false"):
        words = (*rooms, f"joint={joint}", "--heads", "depth", "--out", tmp_path / joint)
        command_here("dpt_eval", *words, folder=tmp_path, check=0)
        scores[joint] = json.loads((tmp_path / joint / "report.json").read_text())
    assert scores["true"]["abs_rel"] == scores["false"]["abs_rel"] > 0
    assert not {"miou", "label_miou"} & set(scores["false"])


def test_every_kind_of_photograph_is_predicted_at_its_own_size(demo, photographs, tmp_path):
    command_here(
        "dpt_predict",
        photographs,
        "--model",
        demo / "runs" / "demo" / "model",
        "--out",
        tmp_path / "out",
        folder=tmp_path,
        check=0,
    )
    sizes = {"turned": (70, 90), "one": (1, 1), "strip": (2000, 1)}
    for photo in photographs.iterdir():
        depth = Image.open(tmp_path / "out" / f"{photo.stem}-depth.png")
        assert depth.size == sizes.get(photo.stem, (90, 70)) and depth.mode.startswith("I;16"), photo.name
        assert np.asarray(depth).min() > 0
        assert Image.open(tmp_path / "out" / f"{photo.stem}-depth-color.png").size == depth.size
    described = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert len(described) == len(list(photographs.iterdir())) and all(
        entry["depth"]["scale"] in (256, 1000) for entry in described
    )


def test_bad_images_get_a_sentence_each_and_good_ones_are_still_written(demo, photographs, tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    (box / "good.jpg").write_bytes((photographs / "color.jpg").read_bytes())
    (box / "cut.jpg").write_bytes((photographs / "color.jpg").read_bytes()[:900])
    (box / "text.jpg").write_text("Dear diary")
    (box / "empty.png").touch()
    (tmp_path / "none").mkdir()
    done = command_here(
        "dpt_predict",
        box,
        tmp_path / "none",
        tmp_path / "gone.jpg",
        "--model",
        demo / "runs" / "demo" / "model",
        "--out",
        "out",
        folder=tmp_path,
        check=1,
    )
    lines = [
        line for line in done.stderr.splitlines() if re.search(r"cut\.jpg|text\.jpg|empty\.png|none|gone\.jpg", line)
    ]
    assert len(lines) == 5 and "5 could not be used" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "good-depth.png").exists() and len(list((tmp_path / "out").glob("*-depth.png"))) == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["dpt_predict", "photo.jpg", "--model", "nowhere/model"], "There is no checkpoint at nowhere/model"),
        (["dpt_train", "rooms_tinny"], "Did you mean 'rooms_tiny'?"),
        (["dpt_train", "rooms_tiny", "--set", "loop.stepps=3"], "Did you mean 'steps'?"),
        (["dpt_train"], "No recipe was named"),
        (["dpt_eval", "--model", ".", "--data", "rooms"], "holds no config.json"),
        (["dpt_eval", "--model", ".", "--data", "kiti"], "There is no protocol 'kiti'"),
        (["dpt_eval", "--model", "my models/best"], "There is no checkpoint at my models/best"),
        (["dpt_train", "rooms_tiny", "--set", "loop.steps=5"], "Try schedule.warm_up=0"),
        (["dpt_train", "rooms_tiny", "--set", "losses={}"], "Every loss needs its head"),
        (["dpt_train", "rooms_tiny", "--set", "data.train.cnt=3"], "cannot be opened with"),
        (["dpt_train", "rooms_tiny", "--set", "data.train.count=0"], "at least 1"),
        (["dpt_train", "rooms_tiny", "--resume"], "There is no run in runs/rooms_tiny"),
        (["dpt_demo", "--seed", "-1"], "seed is -1"),
        (
            ["dpt_export", "dpt_tiny_scenes", "depth.onnx", "--size", "384"],
            "expected height and width in pixels, such as 384x512",
        ),
        (["dpt_export", "dpt_tiny_scenes", "depth.onnx", "--form", "tflite"], "There is no form 'tflite'"),
        (["dpt_eval", "--model", "dpt_tiny_scenes", "--heads", "normal"], "this network has depth, label"),
        (["dpt_predict", "photo.jpg", "--model", "m", "--merge-tokens", "0.9"], "--merge-tokens 0.9, and 0 or more"),
        (
            ["dpt_predict", "photo.jpg", "--model", "dpt_tiny_scenes", "--merge-tokens", "0.4", "--engine", "onnx"],
            "tokens merge in the engine torch alone",
        ),
    ],
)
def test_mistakes_get_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said


def test_a_mistake_ends_a_shells_command_with_its_sentence_and_1(tmp_path):
    done = command_forked("dpt_train", "rooms_tinny", folder=tmp_path, check=1)
    assert "Did you mean 'rooms_tiny'?" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_device_that_is_not_there_and_a_file_in_the_way_get_a_sentence(demo, photographs, tmp_path):
    (tmp_path / "taken").touch()
    model = demo / "runs" / "demo" / "model"
    for words, sentence in [
        (["--device", "gpu"], "The device 'gpu' cannot be used here"),
        (["--out", "taken"], "taken"),
    ]:
        done = command_here("dpt_predict", photographs / "one.png", "--model", model, *words, folder=tmp_path, check=1)
        assert sentence in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_lines_of_the_readme_work(demo, photographs):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"~~~python\n(.*?)~~~", readme, re.S).group(1)
    (demo / "photo.jpg").write_bytes((photographs / "color.jpg").read_bytes())
    command_forked(sys.executable, "-c", lines, folder=demo, check=0)
    assert (demo / "photos" / "photo-depth.png").exists()
    assert len(lines.strip().splitlines()) == 5


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(tmp_path):
    command("dpt_demo", "--cpu", folder=tmp_path, check=0, timeout=3600)  # a busy machine takes several times as long
    report = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    assert report["abs_rel"] <= 0.5 * report["baseline_abs_rel"] and report["images"] == 200


@pytest.mark.parametrize(
    "words",
    [
        ["dpt_train", "nyu_vitb", "--out", "run", "--cpu"],
        ["dpt_train", "mix_relative", "--out", "run", "--cpu", "--dry-run"],
        ["dpt_eval", "--model", "dpt_large", "--data", "nyu"],
        ["dpt_eval", "--model", "dpt_large", "--data", "kitti", "--submission", "sent.zip"],
    ],
)
def test_a_data_root_that_lacks_the_set_is_told_before_a_network_is_fetched(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    fetched = AssertionError("a network was opened before its data was looked for")
    with (
        mock.patch("dpt_nb.weights.load.load_checkpoint", side_effect=fetched),
        mock.patch("dpt_nb.training.train_state.build_model", side_effect=fetched),
    ):
        assert main(words) == 1
    assert "which is obtained from" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data"]
