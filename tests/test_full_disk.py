"""Every command that writes, on disks that are too small for what it writes: one sentence, nothing damaged, nothing
left over, and the work can be gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import changes
from PIL import Image

from dpt_nb.network.zoo import create_model

HERE = Path(__file__).parent
BIG = 600_000  # kilobytes: enough for anything here


def name_spaces():
    "Whether this machine lets us have a disk of our own."
    try:
        return (
            subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode
            == 0
        )
    except OSError:
        return False


pytestmark = pytest.mark.skipif(
    not name_spaces(), reason="unshare -rm with a file system in memory is not possible here"
)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A tiny model of both heads, three photographs, a film where PyAV is installed, and an empty folder."
    folder = tmp_path_factory.mktemp("things")
    shape = dict(taps=[0, 1, 2, 3], channels=[16, 32, 48, 64], image_size=[64, 64], features=16)
    heads = {"depth": dict(output="exp"), "label": dict(num_classes=5)}
    create_model("dpt_tiny", **shape, heads=heads).eval().save_pretrained(folder / "model")
    published = dict(
        image_size=[96, 96], backbone_arguments=dict(depth=4, embed_dim=64, num_heads=1)
    )  # in other projects' names too
    create_model("dpt_large", **shape | published).eval().save_pretrained(folder / "large")
    random = np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (96, 160, 3), dtype=np.uint8)).save(
            folder / "photographs" / f"photo{index}.png"
        )
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def on_disk():
    """Run a command on a disk of its own of so many kilobytes, which holds a copy of the folder `before` first, and say
    what came of it. All do so in forks of one process, which has imported torch once."""
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    program = ["unshare", "-rm", sys.executable, HERE / "small_disk.py"]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as running:

        def run(place, kilobytes, before, words, keep=""):
            given = [str(place), kilobytes, str(before), list(map(str, words)), str(keep)]
            running.stdin.write(json.dumps(given) + "\n"), running.stdin.flush()
            return json.loads(running.stdout.readline())

        yield run
        running.stdin.close()


def try_sizes(on_disk, tmp_path, before, words, shares, room=0):
    "A command on disks with a fraction of the room that it needs. Returns (fraction, what came of it) of each."
    place = tmp_path / "disk"
    place.mkdir()
    need = on_disk(place, BIG, before, words)
    assert need["code"] == 0, need["err"]
    empty = sum(-(-path.stat().st_size // 4096) * 4 for path in Path(before).rglob("*") if path.is_file())
    sizes = [max(8, int(empty + room + share * (need["used"] - empty))) for share in shares]
    return [(share, on_disk(place, size, before, words)) for share, size in zip(shares, sizes)]


def check_outcome(share, came, may_be_new=()):
    "What has to hold for every command."
    said = f"with {share:.0%} of the room:\n{came['err']}"
    assert came["code"] in (0, 1), f"exit code {came['code']} {said}"
    assert "Traceback" not in came["err"], said
    new = set(came["after"]) - set(came["before"])
    # Results that are not listed yet keep the plan that says whose they are, for the run that goes on
    planned = {name for name in new if f"{name}/plans.json" in new}
    left_over = [name for name in new - planned if Path(name).name.startswith(".") and Path(name).name != ".lock"]
    assert not left_over, f"{left_over} {said}"
    lost = [
        name for name, digest in came["before"].items() if came["after"].get(name) != digest and name not in may_be_new
    ]
    assert not lost, f"{lost} {said}"
    if came["code"]:
        assert "make room" in came["err"].lower() or "No space left" in came["err"], said
    return came["code"]


SHARES = [0.05, 0.3, 0.6, 0.9]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(["--window", "64", "--outputs", "png,npy,color"], id="window", marks=pytest.mark.slow),
        pytest.param(["--outputs", "npy,pfm,side"], id="many"),
    ],
)
@pytest.mark.parametrize(
    "share", [pytest.param([0.3], id="some"), pytest.param(SHARES, id="all", marks=pytest.mark.slow)]
)
def test_predictions(things, on_disk, tmp_path, options, share):
    words = ["dpt_predict", things / "photographs", "--model", things / "model", "--out", "out", *options]
    codes = []
    for part, came in try_sizes(on_disk, tmp_path, things / "empty", words, share):
        codes.append(check_outcome(part, came))
        entries = json.loads(came["texts"].get("out/predictions.json", "[]"))
        named = {
            name
            for entry in entries
            for part in entry.values()
            if isinstance(part, dict)
            for name in [part.get("file"), *part.get("pictures", [])]
            if name
        }
        assert all(f"out/{name}" in came["after"] for name in named)
    assert codes[0] == 1


CONVERTED = {"dpt_nb": "own", "isl-org": "file.pt", "transformers": "folder", "timm": "backbone.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("to", CONVERTED)
def test_conversions(things, on_disk, tmp_path, to):
    before = tmp_path / "before"
    before.mkdir()
    words = ["dpt_convert", things / "large", CONVERTED[to], "--to", to]
    codes = [check_outcome(*pair) for pair in try_sizes(on_disk, tmp_path, before, words, SHARES)]
    assert codes[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file.onnx", "file.pt2"])
@pytest.mark.parametrize(
    "shares", [pytest.param([0.6], id="some"), pytest.param([0.05, 0.6], id="all", marks=pytest.mark.slow)]
)
def test_exports(things, on_disk, tmp_path, name, shares):
    before = tmp_path / "before"
    before.mkdir()
    (before / name).write_text("a former file")
    words = ["dpt_export", things / "model", name, "--size", "64x64", "--force"]
    for share, came in try_sizes(on_disk, tmp_path, before, words, shares):
        assert check_outcome(share, came) == 1


@pytest.mark.slow
def test_compiled_exports(things, on_disk, tmp_path):
    words = ["dpt_export", things / "model", "file.pt2", "--form", "compiled", "--size", "64x64"]
    for share, came in try_sizes(on_disk, tmp_path, things / "empty", words, [0.05, 0.6]):
        assert check_outcome(share, came) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kitti", "nyu", "ade20k", "pascal_context", "folder"])
def test_making_data(things, on_disk, tmp_path, name):
    codes = [
        check_outcome(*pair)
        for pair in try_sizes(
            on_disk, tmp_path, things / "empty", ["dpt_data", "make", name, "data", "--count", "4"], SHARES
        )
    ]
    assert codes[0] == 1


@pytest.mark.slow
def test_evaluating(things, demo, on_disk, tmp_path):
    model, data = demo / "runs" / "demo" / "model", demo / "data"
    words = ["dpt_eval", "--model", model, "--data-root", data, "--count", "4", "--out", "report"]
    codes = [check_outcome(*pair) for pair in try_sizes(on_disk, tmp_path, things / "empty", words, [0.05, 0.6])]
    assert codes[0] == 1


TINY = [
    "loop.steps=6",
    "data.batch_size=2",
    "keep.validate_every=3",
    "keep.save_steps=2",
    "data.train.count=6",
    "data.held_out.count=2",
]


@pytest.mark.slow
def test_training_stops_in_a_sentence_and_goes_on(things, demo, on_disk, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo / "data", data)
    words = ["dpt_train", "rooms_tiny", "--out", "run", "--data-root", data, *changes(*TINY)]
    (tmp_path / "disk").mkdir()
    whole = tmp_path / "whole"
    need = on_disk(tmp_path / "disk", BIG, things / "empty", words, whole)
    assert need["code"] == 0, need["err"]
    rows = [json.loads(line) for line in (whole / "run" / "metrics.jsonl").read_text().splitlines()]
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95):
        left = tmp_path / f"left{share}"
        came = on_disk(tmp_path / "disk", max(8, int(share * need["used"])), things / "empty", words, left)
        assert check_outcome(share, came) == 1
        again = words + ["--resume"] * (left / "run" / "config.json").exists()
        went_on = on_disk(tmp_path / "disk", BIG, left, again, tmp_path / f"on{share}")
        assert went_on["code"] == 0, went_on["err"]
        found = [
            json.loads(line) for line in (tmp_path / f"on{share}" / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        assert [(row["step"], row.get("loss")) for row in found] == [(row["step"], row.get("loss")) for row in rows]


@pytest.mark.slow
def test_drawing_scenes(things, on_disk, tmp_path):
    words = ["dpt_train", "rooms_tiny", "--data-root", "data", "--dry-run", *changes(*TINY)]
    codes = [check_outcome(*pair) for pair in try_sizes(on_disk, tmp_path, things / "empty", words, [0.05, 0.6])]
    assert codes[0] == 1
