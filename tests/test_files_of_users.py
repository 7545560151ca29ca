"""What belongs to a user stays as it is, and what is in a folder is used or named: names, full disks, folders that go
away, files that are not images."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import command_here
from forked import Forked, command_forked
from PIL import Image

from dpt_nb.images.files import InUse
from dpt_nb.inference import folders
from dpt_nb.inference.folders import predict_files
from dpt_nb.inference.outputs import OUTPUTS
from dpt_nb.inference.prediction import Prediction
from dpt_nb.inference.predictor import Predictor
from dpt_nb.inference.result_folder import LOCK, WORK, FolderError, all_files, read_predictions
from dpt_nb.network.zoo import create_model

MODEL = ("--model", "dpt_tiny_scenes", "--device", "cpu")
COMMAND = "import sys; from dpt_nb.commands import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def predictor():
    return Predictor(create_model("dpt_tiny_scenes", pretrained=True), device="cpu")


def some_image(path, seed=0, size=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path, "PNG")
    return path


def predict(folder, *words, check=None):
    return command_here("dpt_predict", *words, *MODEL, folder=folder, check=check)


def contents(folder):
    "Every file below a folder, hidden ones too, and what is in it."
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# nobody else's files


@pytest.mark.parametrize("outputs", [",".join((*OUTPUTS, "ply")), "ply", "side,bar"])
def test_whatever_lies_in_the_folder_is_left_as_it_is(outputs, predictor, tmp_path):
    own = tmp_path / "own"
    some_image(own / "scene.png")
    ends = ("png", "npy", "pfm")
    names = [f"scene-{head}.{end}" for head in ("depth", "label", "inverse_depth") for end in ends] + [
        "scene.ply",
        "SCENE-2.ply",
    ]
    names += [f"scene-{head}-{kind}.png" for head in ("depth", "label") for kind in ("color", "bar", "overlay", "side")]
    for name in names:
        (own / name).write_text(f"my {name}")
    before = contents(own)
    first, _ = predict_files(predictor, [own / "scene.png"], own, progress=False, outputs=outputs.split(","))
    after = contents(own)
    assert before.items() <= after.items() and first[0]["name"] in ("scene-2", "scene-3")
    again, _ = predict_files(predictor, [own / "scene.png"], own, progress=False, outputs=outputs.split(","))
    assert again[0]["earlier"] and again[0]["name"] == first[0]["name"] and contents(own) == after
    predict_files(predictor, [own / "scene.png"], own, progress=False, outputs=outputs.split(","), again=True)
    assert before.items() <= contents(own).items() and contents(own).keys() == after.keys()


def test_images_of_one_name_from_two_folders_in_two_runs(tmp_path):
    one, two = some_image(tmp_path / "A" / "x.png", 1), some_image(tmp_path / "B" / "x.png", 2)
    for path in (one, two, one, two):
        predict(tmp_path, path, "--out", "out", check=0)
    listed = {Path(entry["path"]).parent.name: entry["depth"]["file"] for entry in read_predictions(tmp_path / "out")}
    assert listed == {"A": "x-depth.png", "B": "x-2-depth.png"}
    for path, file in ((one, "x-depth.png"), (two, "x-2-depth.png")):
        predict(tmp_path, path, "--out", path.parent.name + " alone", check=0)
        assert (tmp_path / "out" / file).read_bytes() == (
            tmp_path / f"{path.parent.name} alone" / "x-depth.png"
        ).read_bytes()


def test_results_of_other_settings_stay_ours(predictor, tmp_path):
    path, out = some_image(tmp_path / "a.png"), tmp_path / "out"
    for outputs in (("png", "color"), ("png",), ("png", "color"), ("npy",)):
        written, bad = predict_files(predictor, [path], out, progress=False, outputs=outputs)
        assert written[0]["name"] == "a" and not bad
    path.write_bytes(
        some_image(tmp_path / "other.png", 5).read_bytes()
    )  # another photograph of the same name: the old result goes
    assert predict_files(predictor, [path], out, progress=False)[0][0]["name"] == "a"


def test_a_list_of_somebody_else_is_neither_used_nor_changed(predictor, tmp_path):
    path, out, outside = some_image(tmp_path / "a.png"), tmp_path / "out", tmp_path / "x"
    outside.write_text("outside")
    lists = [
        "[{",
        "{}",
        "null",
        "[1]",
        "[" * 100_000,
        '[{"image_id": 1}]',
        '[{"source": "a.png", "depth": {"file": "../x"}}]',
        "1" * 5000,
    ]
    lists += [
        json.dumps([dict(source="a.png", path=str(path), depth=dict(file="a"), earlier_files=[str(outside)])]),
        '[{"source": "a", "depth": {"file": []}}]',
    ]
    for text in lists:
        out.mkdir(exist_ok=True)
        (out / "predictions.json").write_text(text)
        with pytest.raises(FolderError, match="predictions.json"):
            predict_files(predictor, [path], out, progress=False)
        assert contents(out) == {"predictions.json": text.encode()} and outside.read_text() == "outside"


def test_a_second_run_into_a_folder_is_refused(predictor, tmp_path):
    path, out, begun, go = some_image(tmp_path / "a.png"), tmp_path / "out", threading.Event(), threading.Event()

    class Waiting(Predictor):
        def predict_list(self, *arguments, **options):
            begun.set()
            go.wait(60)
            return super().predict_list(*arguments, **options)

    first = threading.Thread(target=predict_files, args=(Waiting(predictor.model, device="cpu"), [path], out))
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(InUse, match="is being written by this process"):
            predict_files(predictor, [some_image(tmp_path / "b.png")], out, progress=False)
    finally:
        go.set()
        first.join()
    assert [entry["name"] for entry in read_predictions(out)] == ["a"] and not (out / LOCK).exists()


def test_a_killed_run_is_gone_on_with_under_the_same_names(tmp_path):
    for seed in range(8):
        some_image(tmp_path / "in" / f"{seed}.png", seed, (200, 300))
    running = Forked("dpt_predict", "in", *MODEL, "--out", "out", folder=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "1-depth.png").exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -9
    predict(tmp_path, "in", "--out", "out", check=0)
    predict(tmp_path, "in", "--out", "whole", check=0)
    killed, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert killed.keys() == whole.keys() and all(
        killed[name] == whole[name] for name in whole if name != "predictions.json"
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("report.json", ["dpt_eval", *MODEL[:2], "--out", "out"]),
        ("panel.png", ["dpt_eval", *MODEL[:2], "--out", "out"]),
        ("gallery-depth.png", ["dpt_eval", *MODEL[:2], "--out", "out"]),
        ("sent.zip", ["dpt_eval", *MODEL[:2], "--data", "kitti", "--submission", "out/sent.zip"]),
        ("seen.png", ["dpt_data", "show", "rooms", "data", "--out", "out/seen.png"]),
        ("run.sbatch", ["dpt_train", "rooms_tiny", "--slurm", "--out", "out/run"]),
    ],
)
def test_other_commands_leave_what_they_did_not_write(name, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    done = command_here(*words, folder=tmp_path, check=1)
    assert "was left as it is" in done.stderr and "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == {name: b'{"mine": 1}'}


# nothing left out


def test_what_a_folder_holds_is_used_or_named(tmp_path):
    av = pytest.importorskip("av", reason="films need PyAV")
    box = tmp_path / "box"
    some_image(box / "a.png")
    some_image(box / "b.jfif", 1)  # a PNG all the same
    some_image(box / "inside" / "deeper" / "a.png", 2)
    with av.open(str(box / "film.MTS"), "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(3):
            frame = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (box / "notes.txt").write_text("notes")
    os.mkfifo(box / "pipe.png")
    os.symlink(box, box / "inside" / "loop")
    done = predict(tmp_path, box, "--out", "out", check=0)
    assert {Path(entry["path"]).name for entry in read_predictions(tmp_path / "out")} == {"a.png", "b.jfif", "film.MTS"}
    for word in ("notes.txt", "pipe.png", "inside", "--recursive"):
        assert word in done.stderr, word
    done = predict(tmp_path, box, "--out", "out", "--recursive", check=0)
    assert (tmp_path / "out" / "inside_deeper_a-depth.png").exists() and "2 of 4 were there already" not in done.stdout
    assert "3 of 4 were there already" in done.stdout and "inside/loop" in done.stderr and "notes.txt" in done.stderr
    done = predict(tmp_path, box, "--out", "points", "--outputs", "ply", check=0)
    assert "film.MTS" in done.stderr and "ply" in done.stderr  # no points of a film


def test_a_folder_closed_to_us_is_named_and_the_rest_goes_on(predictor, tmp_path):
    some_image(tmp_path / "open" / "a.png")
    some_image(tmp_path / "closed" / "b.png")
    real = Path.iterdir

    def refusing(self):
        if self.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    with mock.patch.object(Path, "iterdir", refusing):
        written, bad = predict_files(
            predictor, [tmp_path / "closed", tmp_path / "open"], tmp_path / "out", progress=False
        )
    assert (
        [entry["name"] for entry in written] == ["a"]
        and len(bad) == 1
        and "closed" in bad[0]
        and "Permission denied" in bad[0]
    )


# one bad file


def test_names_that_are_too_long_or_no_text(tmp_path):
    box = tmp_path / "box"
    for seed, name in enumerate(
        ["l" * 250 + ".png", "l" * 249 + "m.png", "雪" * 83 + ".png", os.fsdecode(b"caf\xe9\n.png"), "$\\frac$.png"]
    ):
        some_image(box / name, seed)
    done = predict(tmp_path, box, "--out", "out", "--outputs", "png,overlay", check=0)
    done.stdout.encode("utf-8")
    listed = read_predictions(tmp_path / "out")
    assert len({entry["name"] for entry in listed}) == 5 and {
        os.fsencode(Path(entry["source"]).name) for entry in listed
    } == set(os.listdir(os.fsencode(box)))
    assert (
        "5 of 5 were there already"
        in predict(tmp_path, box, "--out", "out", "--outputs", "png,overlay", check=0).stdout
    )


@pytest.mark.slow
def test_names_are_printed_on_any_terminal(tmp_path):
    some_image(tmp_path / "box" / os.fsdecode(b"\xff\xc3\xbc\n.png"))
    words = ["dpt_predict", "box", *MODEL, "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING="ascii", LC_ALL="C"),
        timeout=600,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert rb"\xff" in done.stdout and done.stdout.decode("ascii")
    program = f"import sys; sys.stdout.reconfigure(encoding='utf-8', errors='strict'); {COMMAND}"
    done = command_forked(sys.executable, "-c", program, *words[:-1], "other", folder=tmp_path, check=0)
    assert "Traceback" not in done.stderr and r"\xff" in done.stdout and "\ufffd" not in done.stdout


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(36, "File name too long"), "File name too long"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "more memory"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "more memory"),
        (ValueError("odd"), "odd"),
        (OSError(27, "File too large"), "File too large"),
    ],
)
@pytest.mark.parametrize("place, method", [(Prediction, "save"), (folders, "read_image")])
def test_an_error_of_one_image_ends_nothing(place, method, error, words, predictor, tmp_path):
    paths = [some_image(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abc")]
    real = getattr(place, method)

    def failing(first, *arguments, **options):
        if "b" in (getattr(first, "name", "").removesuffix(".png"),):
            raise error
        return real(first, *arguments, **options)

    with mock.patch.object(place, method, failing):
        written, bad = predict_files(predictor, paths, tmp_path / "out", progress=False)
    assert (
        [entry["name"] for entry in written] == ["a", "c"] and len(bad) == 1 and "b.png" in bad[0] and words in bad[0]
    )
    assert not [name for name in contents(tmp_path / "out") if name.startswith((".", "b"))]


def test_a_full_disk_ends_the_run_in_a_sentence_and_leaves_whole_results(predictor, tmp_path):
    paths, real, seen = (
        [some_image(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abcdef")],
        Prediction.save,
        [],
    )

    def filling(found, *arguments, **options):
        seen.append(found.name)
        entry = real(found, *arguments, **options)
        if found.name == "c":
            raise OSError(28, "No space left on device")
        return entry

    with (
        mock.patch.object(Prediction, "save", filling),
        pytest.raises(FolderError, match="No space left on device.*make room"),
    ):
        predict_files(predictor, paths, tmp_path / "out", progress=False)
    assert "f" not in seen  # not worked for in vain
    listed = {name for entry in read_predictions(tmp_path / "out") for name in all_files(entry)}
    assert contents(tmp_path / "out").keys() == listed | {"predictions.json"} and "c-depth.png" not in listed
    written, bad = predict_files(predictor, paths, tmp_path / "out", progress=False)
    assert [entry["name"] for entry in written] == list("abcdef") and not bad


def test_a_folder_that_goes_away_is_noticed_at_once(predictor, tmp_path):
    paths, out, seen = [some_image(tmp_path / f"{seed}.png", seed) for seed in range(9)], tmp_path / "out", []

    class Deleting(Predictor):
        def predict_list(self, *arguments, **options):
            seen.append(1)
            if len(seen) == 3:
                shutil.rmtree(
                    out.rename(tmp_path / "gone")
                )  # at once: rmtree alone fails where a result is just being written
            return super().predict_list(*arguments, **options)

    with pytest.raises(FolderError, match="was deleted or moved"):
        predict_files(Deleting(predictor.model, device="cpu"), paths, out, progress=False)
    assert len(seen) < 8 and not out.exists()


@pytest.mark.parametrize("count", [3])
def test_a_result_that_is_taken_away_is_named(count, predictor, tmp_path):
    paths, out, real = (
        [some_image(tmp_path / f"{seed}.png", seed) for seed in range(count)],
        tmp_path / "out",
        Prediction.save,
    )

    def taking(found, *arguments, **options):
        if found.name == str(count - 1):
            until = time.monotonic() + 60
            while not (out / "0-depth.png").exists():
                assert time.monotonic() < until
                time.sleep(0.01)
            (out / "0-depth.png").unlink()
        return real(found, *arguments, **options)

    with mock.patch.object(Prediction, "save", taking):
        _, bad = predict_files(predictor, paths, out, progress=False)
    assert len(bad) == 1 and "0-depth.png was deleted during the run" in bad[0]


# what is typed, and what is printed


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["dpt_predict", "a.png", "--model", "m", "--batch", "-1"], "Found --batch -1"),
        (["dpt_predict", "a.png", "--model", "m", "--batch", str(10**12)], "Found --batch 1000000000000"),
        (["dpt_predict", "a.png", "--model", "m", "--window", "0"], "Found a window of 0×0"),
        (
            ["dpt_predict", "a.png", "--model", "dpt_tiny_scenes", "--size", "99999x99999"],
            "a network sees 2^24 pixels at most",
        ),
        (["dpt_predict", "a.png", "--model", "m", "--max-memory=-4G"], "Found --max-memory -4G"),
        (["dpt_predict", "a.png", "--model", "m", "--max-pixels", "many"], "Found --max-pixels many"),
        (
            ["dpt_predict", "a.png", "--model", "m", "--outputs", "ply", "--field-of-view", "nan"],
            "The field of view is nan",
        ),
        (["dpt_predict", "a.png", "--model", "m", "--outputs", ""], "Outputs called nothing"),
        (["dpt_predict", "a.png", "--model", "dpt_tiny_scenes", "--scales", "1e9"], "Found --scales 1e9"),
        (
            ["dpt_predict", "a.png", "--model", "dpt_tiny_scenes", "--focal", "90", "--field-of-view", "60"],
            "each says the other",
        ),
        (["dpt_predict", "a.png", "--model", "dpt_tiny_scenes", "--compile", "--engine", "onnx"], "leave out one"),
        (["dpt_predict", "a.png", "--model", "dpt_tiny_scenes", "--prompt", "a.png"], "takes no prompt"),
        (["dpt_predict", "a.png", "--model", "m", "--window", "9", "--overlap", "nan"], "an overlap of nan"),
        (["dpt_eval", "--model", "m", "--count", str(10**12)], "Found --count 1000000000000"),
        (["dpt_eval", "--model", "m", "--batch-size", "0"], "Found --batch-size 0"),
        (["dpt_eval", "--model", "m", "--set", "split=train"], "leave --set split=train out"),
        (
            ["dpt_eval", "--model", "m", "--data", "kitti", "--submission", "s.zip", "--out", "report"],
            "leave --out report out",
        ),
        (
            ["dpt_eval", "--model", "m", "--data", "kitti", "--submission", "s.zip", "--protocol", "kitti_eigen"],
            "leave --protocol kitti_eigen out",
        ),
        (["dpt_eval", "--predictions", "p", "--data", "kitti", "--scale", "nan"], "Found --scale nan"),
        (["dpt_data", "make", "kitti", "k", "--count", str(10**12)], "Found --count 1000000000000"),
        (["dpt_data", "show", "rooms", "k", "--seed", str(10**30)], "Found --seed 1"),
        (["dpt_data", "check", "kitti", "k", "--workers", "-1"], "Found --workers -1"),
        (["dpt_data", "check", "kitti", "k", "--set", "verify=false"], "leave --set verify=false out"),
        (["dpt_train", "rooms_tiny", "--workers", "-1"], "Found --workers -1"),
        (["dpt_train", "rooms_tiny", "--workers", str(10**6)], "Found --workers 1000000"),
        (["dpt_train", "rooms_tiny", "--num-processes", "0"], "Found --num-processes 0"),
        (["dpt_train", "rooms_tiny", "--dry-run", "--sweep", "optimizer.lrr=1e-3,1e-4"], "Did you mean 'lr'"),
        (["dpt_train", "rooms_tiny", "--main-port", "99999"], "Found --main-port 99999"),
        (["dpt_train", "rooms_tiny", "--num-nodes", "-3"], "Found --num-nodes -3"),
        (["dpt_demo", "--seed", str(10**30)], "seed is 1"),
        (["dpt_export", "dpt_tiny_scenes", "x.onnx", "--batch", "0"], "Found --batch 0"),
        (["dpt_export", "dpt_tiny_scenes", "x.onnx", "--size", "99999x99999"], "a network sees 2^24 pixels at most"),
    ],
)
def test_numbers_that_nobody_can_mean_are_refused_in_a_sentence(words, sentence, tmp_path):
    some_image(tmp_path / "a.png")
    done = command_here(*words, folder=tmp_path, check=1)
    assert (
        done.stderr.count("\n") == 1
        and sentence in done.stderr
        and "Traceback" not in done.stderr
        and [path.name for path in tmp_path.iterdir()] == ["a.png"]
    ), done.stderr


LISTING = """
import sys
from unittest.mock import MagicMock
recipes = MagicMock(RECIPES={str(number): MagicMock() for number in range(20)})  # the real ones wait for torch
sys.modules |= {"dpt_nb.training.recipes": recipes, "dpt_nb.training.recipe_fields": recipes}
from dpt_nb.commands import main
sys.argv[0] = "dpt_train"
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, code",
    [
        ("| head -1; exit ${PIPESTATUS[0]}", (0, 141)),
        (">&-", (0,)),
        (">/dev/full", (1,)),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", (0, 141)),
    ],
)
def test_an_output_that_nobody_reads_is_not_a_traceback(where, code, tmp_path):
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(LISTING)} --list 2>err {where}"
    line = line.replace("2>err 2>&1", "2>&1")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    said = done.stderr + ((tmp_path / "err").read_text() if (tmp_path / "err").exists() else "")
    assert done.returncode in code and "Traceback" not in said and "Exception ignored" not in said, (
        done.returncode,
        said,
    )


def test_a_hidden_folder_of_ours_is_cleared_and_one_in_its_place_is_refused(predictor, tmp_path):
    path, out = some_image(tmp_path / "a.png"), tmp_path / "out"
    (out / WORK / "tmpabc").mkdir(parents=True)
    (out / WORK / "tmpabc" / "half.png").write_text("half")
    predict_files(predictor, [path], out, progress=False)
    assert not (out / WORK).exists()
    os.symlink(tmp_path, out / WORK)
    with pytest.raises(FolderError, match="is not a folder"):
        predict_files(predictor, [path], out, progress=False)
    assert path.exists()
