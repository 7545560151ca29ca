"""From images without ground truth to a student: labels and runs that are killed and go on, processes that share the
work, and a loss checked by hand."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import changes, command_here
from forked import Forked, command_forked, end_together, forked_ranks
from safetensors.torch import load_file

from dpt_nb.data.image_streams import open_images
from dpt_nb.data.pseudo_labels import PseudoLabels, finished_shards
from dpt_nb.data.sampling import training_loader
from dpt_nb.data.scene_sets import render_scenes
from dpt_nb.inference.teacher import open_teacher, write_in_processes, write_pseudo_labels
from dpt_nb.network.zoo import create_model
from dpt_nb.objective.regions import RegionSSILoss
from dpt_nb.training.checkpointing import save_model
from dpt_nb.training.distillation import distillation_recipe
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipe_files import write_recipe
from dpt_nb.training.recipe_parts import build_transforms
from dpt_nb.training.run import train

pytestmark = pytest.mark.usefixtures("no_figures")
SIZE = (32, 48)
TINY = [
    'model.changes={"image_size": [32, 48], "heads": {"inverse_depth": {"hidden": 16}}}',
    'data.transforms=[["Crop", {"height": 32, "width": 48}], ["Flip", {}], ["Blur", {}], ["CutMix", {}]]',
    "data.batch_size=4",
    'data.held_out={"held_out": 0.2}',
    "loop.steps=4",
    "keep.validate_every=4",
    "keep.save_steps=2",
    "keep.best=false",
    "keep.pictures=0",
    "optimizer.lr=2e-4",
]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("[!.]*"))}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Twelve images, and the labels of a network that nobody has stopped."
    folder = tmp_path_factory.mktemp("distilled")
    render_scenes(folder / "rooms", "rooms", 12, seed=4_000_000, size=SIZE, progress=False)
    torch.manual_seed(0)
    save_model(create_model("dpt_tiny", image_size=list(SIZE), heads={"depth": dict(output="exp")}), folder / "teacher")
    teacher = open_teacher(str(folder / "teacher"), device="cpu")
    write_pseudo_labels(teacher, open_images(folder / "rooms/rgb"), folder / "labels", 4, progress=False)
    return folder


def recipe(*more):
    return change_recipe(distillation_recipe("rooms_tiny"), [*TINY, *more])


def run(out, home, resume=False):
    train(recipe(), out, home / "labels", cpu=True, workers=0, progress=False, resume=resume)


@pytest.fixture(scope="module")
def straight(no_figures, home):
    run(home / "straight", home)
    return home / "straight"


@pytest.mark.slow  # the room of the teacher interrupts one
def test_a_killed_writer_goes_on_to_the_same_bytes(home, tmp_path):
    labelling = """
import sys, time
import dpt_nb.inference.teacher as rooms
before = rooms.Teacher.label
def slowly(self, *given):
    time.sleep(0.05)
    return before(self, *given)
rooms.Teacher.label = slowly
teacher = rooms.open_teacher(sys.argv[1], device="cpu")
rooms.write_pseudo_labels(teacher, rooms.open_images(sys.argv[2]), sys.argv[3], 4, progress=False)
"""
    words = [sys.executable, "-c", labelling, home / "teacher", home / "rooms/rgb", tmp_path / "labels"]
    running, deadline = Forked(*words, folder=tmp_path, own_session=True), time.monotonic() + 60
    while not list(tmp_path.glob("labels/labels-*.tar")):
        assert time.monotonic() < deadline and running.poll() is None, "no shard was written"
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    assert len(finished_shards(tmp_path / "labels")) < 3, "it had ended before it was killed"
    kept = (tmp_path / "labels/labels-000000.tar").stat().st_mtime_ns
    command_forked(*words, folder=tmp_path, check=0)
    assert contents(tmp_path / "labels") == contents(home / "labels")
    assert (tmp_path / "labels/labels-000000.tar").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_student_goes_on_to_the_same_weights(straight, home, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(straight, out)
    (out / "checkpoints" / "step-00000004.pt").unlink()
    shutil.rmtree(out / "model")
    run(out, home, resume=True)
    assert same(weights(straight), weights(out))
    begun = create_model("dpt_tiny", image_size=list(SIZE), heads={"inverse_depth": {"hidden": 16}}).state_dict()
    assert weights(out).keys() == begun.keys()


def test_pasted_parts_do_not_depend_on_workers_or_processes(home):
    data = PseudoLabels(home / "labels", held_out=0.2)
    mixed = build_transforms(recipe('data.transforms=[["CutMix", {"probability": 1.0}]]'))
    options = dict(batch_size=4, seed=1, transform=mixed, stop=16)
    whole = torch.cat([batch["inverse_depth"] for batch in training_loader(data, **options)])
    assert ((whole < 0).flatten(1).any(1)).all()
    late = torch.cat([batch["inverse_depth"] for batch in training_loader(data, **options, start=8, workers=1)])
    assert torch.equal(late, whole[8:])
    halves = [list(training_loader(data, **options, rank=rank, world_size=2)) for rank in (0, 1)]
    joined = [torch.cat([one["inverse_depth"], other["inverse_depth"]]) for one, other in zip(*halves)]
    assert torch.equal(torch.cat(joined), whole)


def test_the_loss_of_a_mixed_image_by_hand():
    """Four rows of four: the upper half is the image, the lower half is pasted. The upper prediction 0 … 7 has the
    lower median 3 and the mean deviation 2, the target is 2·prediction + 1 but for its last value. The lower half
    agrees up to scale and shift, and has two pixels without a label."""
    upper = torch.arange(8, dtype=torch.float64)
    truth = 2 * upper + 1
    truth[7] += 8
    lower = torch.tensor([5.0, 1.0, 2.0, 9.0, 4.0, 3.0, 7.0, 8.0], dtype=torch.float64)
    pasted = -(0.5 * lower + 4)
    pasted[[1, 6]] = 0
    prediction, target = torch.cat((upper, lower)).view(1, 1, 4, 4), torch.cat((truth, pasted)).view(1, 1, 4, 4)
    # target 1 3 5 7 9 11 13 23: median 7, deviations 6 4 2 0 2 4 6 16, mean 5; prediction: 3 2 1 0 1 2 3 4, mean 2
    errors = [abs((p - 3) / 2 - (t - 7) / 5) for p, t in zip(range(8), (1, 3, 5, 7, 9, 11, 13, 23))]
    expected = sum(errors) / (2 * 8) * 8 / 14  # the lower half adds nothing; 8 of 14 labelled pixels are above
    loss = RegionSSILoss(trim=0.0, gradient=0.0)
    assert loss(prediction, target).item() == pytest.approx(expected, abs=1e-12)
    residual = torch.tensor([(p - 3) / 2 - (t - 7) / 5 for p, t in zip(range(8), (1, 3, 5, 7, 9, 11, 13, 23))]).view(
        2, 4
    )
    steps = residual.diff(dim=1).abs().sum() + residual.diff(dim=0).abs().sum()  # the halves have no step between them
    matched = RegionSSILoss(trim=0.0, gradient=1.0, scales=1)(prediction, target).item()
    assert matched == pytest.approx(expected + steps.item() / 8 * 8 / 14, abs=1e-6)


def test_what_is_refused(home, tmp_path):
    student = ["--student", "rooms_tiny", "--out", tmp_path / "run", "--cpu", *changes(*TINY)]
    save_model(create_model("dpt_tiny", heads={"label": dict(num_classes=3)}), tmp_path / "labeler")
    (tmp_path / "empty").mkdir()
    save_model(create_model("dpt_tiny", image_size=list(SIZE)), tmp_path / "other")
    for teacher, images, labels, words in [
        (tmp_path / "labeler", home / "rooms/rgb", tmp_path / "new", "The teacher predicts label, and one of depth"),
        (home / "teacher", tmp_path / "empty", tmp_path / "new", "holds no images (it is empty)"),
        (tmp_path / "other", home / "rooms/rgb", home / "labels", "holds labels of another teacher's weights"),
    ]:
        told = ["--teacher", teacher, "--images", images, "--labels", labels, "--shard-size", 4]
        done = command_here("dpt_distill", *told, *student, folder=tmp_path, check=1)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_labels_and_trains_and_goes_on(home, straight, tmp_path):
    told = ["--teacher", home / "teacher", "--images", home / "rooms/rgb", "--shard-size", 4, "--workers", 0, "--cpu"]
    told += ["--student", "rooms_tiny", "--out", tmp_path / "run", *changes(*TINY)]
    done = command_forked("dpt_distill", *told, folder=tmp_path, check=0)
    assert "The model is in" in done.stdout
    assert contents(tmp_path / "run_labels") == contents(home / "labels") and same(
        weights(tmp_path / "run"), weights(straight)
    )
    again = command_forked("dpt_distill", *told, folder=tmp_path, check=1)
    assert "holds a run already. Go on with it (--resume)" in again.stderr
    (tmp_path / "run/checkpoints/step-00000004.pt").unlink()
    command_forked("dpt_distill", *told, "--resume", folder=tmp_path, check=0)
    assert same(weights(tmp_path / "run"), weights(straight))
    only = command_forked("dpt_distill", *told, "--labels-only", folder=tmp_path, check=0)
    assert "12 images are labelled by" in only.stdout


@pytest.mark.slow
def test_two_processes_label_as_one(home, tmp_path):
    options = dict(opening=dict(device="cpu"), shard_size=4, progress=False)
    write_in_processes(str(home / "teacher"), home / "rooms/rgb", tmp_path / "labels", 2, **options)
    assert contents(tmp_path / "labels") == contents(home / "labels")


@pytest.mark.slow
def test_two_processes_train_as_one(home, straight, tmp_path):
    told = ["rooms_tiny.yaml", "--cpu", "--workers", "0", "--out", tmp_path / "two", "--data-root", home / "labels"]
    write_recipe(recipe(), tmp_path / "rooms_tiny.yaml")
    end_together(forked_ranks(2, sys.executable, "-m", "dpt_nb.training.run", *told, folder=tmp_path))
    rows = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (straight, tmp_path / "two")
    ]
    apart = [abs(one["loss"] - two["loss"]) for one, two in zip(*rows, strict=True)]
    # what is rounded otherwise in the second gradient grows: Adam divides small gradients by their own size
    assert max(apart[:2]) <= 1e-6 and max(apart) <= 1e-4, apart


@pytest.mark.slow
def test_webdataset_reads_the_shards(home):
    import webdataset

    shards = sorted(map(str, (home / "labels").glob("*.tar")))
    rows = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(rows) == 12 and {"png", "inverse_depth.png", "confidence.png", "json"} <= rows[0].keys()
    assert [row["png"] for row in rows] == [stored.content for stored in open_images(home / "rooms/rgb").read(0, 12)]
