"What happens to a run that is stopped, killed, or read by other workers: nothing."

import json
import math
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SHORT, changes, command, command_here
from forked import Forked, command_forked
from safetensors.torch import load_file

import dpt_nb.network.heads
import dpt_nb.training.loop
import dpt_nb.training.run
import dpt_nb.training.validation
from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.data.sampling import ResumableSampler
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.images.images import write_depth
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT
from dpt_nb.network.zoo import create_model
from dpt_nb.objective.depth_losses import DepthLoss
from dpt_nb.training.batch_loss import batch_fractions, batch_loss
from dpt_nb.training.recipe_fields import RecipeError, change_recipe
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.run_folder import Stopped, TrainingError, TrainingWarning
from dpt_nb.training.run_log import RunLog
from dpt_nb.training.train_state import build_model

pytestmark = pytest.mark.usefixtures("no_figures")
LONGER = [assignment for assignment in SHORT if not assignment.startswith(("loop.steps", "keep.save_steps"))] + [
    "loop.steps=14",
    "keep.save_steps=4",
]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(no_figures, tmp_path_factory):
    "A folder with a run that was never stopped."
    folder = tmp_path_factory.mktemp("straight")
    command_forked("dpt_train", "rooms_tiny", "--cpu", "--workers", 0, *changes(*LONGER), folder=folder, check=0)
    return folder


def test_figures_are_of_float32_whatever_training_computes_in(tmp_path):
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, "loop.precision=bf16"])
    report = train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    predictor = Predictor(DPT.from_pretrained(tmp_path / "run" / "model"), "cpu")
    held_out = open_dataset("rooms", tmp_path / "data", "held_out", progress=False, **recipe.data.held_out)
    again = evaluate(predictor, held_out, PROTOCOLS["rooms"], progress=False)
    for name in ("abs_rel", "rmse", "silog"):
        assert report[name] == pytest.approx(again[name], rel=1e-6), name


@pytest.mark.slow  # the quick tests kill a run, and stop one in the lesson of the loop
@pytest.mark.parametrize(
    "how, workers",
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 1),
        (signal.SIGKILL, 0),
    ],
    ids=["terminated", "interrupted", "killed"],
)
def test_a_stopped_run_goes_on_to_the_same_weights(straight, tmp_path, how, workers):
    words = [
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--workers",
        workers,
        "--data-root",
        straight / "data",
        "--out",
        "run",
        *changes(*LONGER),
    ]
    running = Forked(*words, folder=tmp_path, own_session=True)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline and running.poll() is None, "the run did not get to step 5"
        time.sleep(0.01)
    os.killpg(running.pid, how)  # as a terminal does: to the workers as well
    said = running.communicate(timeout=120)[1]
    assert running.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
    assert not (tmp_path / "run" / "report.json").exists(), "the run had ended before it was stopped"
    if how != signal.SIGKILL:
        assert "Stopped after step" in said and "Traceback" not in said
    command_forked(*words, "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 15))


def test_a_run_with_muon_goes_on_to_the_same_weights(no_figures, tmp_path):
    "Its momentum of matrices and Adam's moments of vectors are in the checkpoint."
    recipe = change_recipe(get_recipe("rooms_fast"), [*SHORT, "loop.steps=6", "keep.save_steps=3"])
    quiet = dict(cpu=True, workers=0, progress=False)
    train(recipe, tmp_path / "straight", tmp_path / "data", **quiet)
    write = RunLog.write

    def write_and_stop(self, row):
        write(self, row)
        if row.get("step") == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(RunLog, "write", write_and_stop), pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", tmp_path / "data", **quiet)
    train(recipe, tmp_path / "stopped", tmp_path / "data", **quiet, resume=True)
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_network_that_only_convolves_trains_and_opens(tmp_path):
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [
            *SHORT,
            "model.name=resnet_tiny",
            "optimizer.backbone=0.5",
            "optimizer.freeze_steps=2",
            "loop.checkpointing=true",
        ],
    )
    torch.manual_seed(recipe.seed)
    start = build_model(recipe).state_dict()
    train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    model = DPT.from_pretrained(tmp_path / "run" / "model")
    assert model.config.backbone == "resnetv2_50" and model.backbone.patch == 32
    still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert not still, f"did not move: {still}"
    with pytest.raises(RecipeError, match="a convolutional network have stages"):
        train(
            change_recipe(recipe, ["optimizer.layer_decay=0.9"]),
            tmp_path / "other",
            tmp_path / "data",
            cpu=True,
            workers=0,
            progress=False,
        )


def wait_for(path, running):
    "Wait until a file exists while a process runs."
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and running.poll() is None, f"the run did not come to write {path.name}"
        time.sleep(0.01)


HALF_A_CHECKPOINT = """
import sys, time, torch
from pathlib import Path
from dpt_nb.training.run import run_words

save, marker = torch.save, Path(sys.argv[1])

def save_half_the_second_time(state, file):
    save(state, file)
    if state["step"] == 8:
        file.flush()
        file.truncate(file.tell() // 2)
        marker.touch()
        time.sleep(600)

torch.save = save_half_the_second_time
run_words(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(straight, tmp_path):
    words = [
        "rooms_tiny",
        "--cpu",
        "--workers",
        "0",
        "--data-root",
        str(straight / "data"),
        "--out",
        str(tmp_path / "run"),
        *changes(*LONGER),
    ]
    running = subprocess.Popen(
        [sys.executable, "-c", HALF_A_CHECKPOINT, tmp_path / "half", *words],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    wait_for(tmp_path / "half", running)
    running.kill()
    running.wait()
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    leftover = names - {"step-00000004.pt"}
    assert "step-00000004.pt" in names and len(leftover) == 1 and leftover.pop().startswith("."), names
    torch.load(tmp_path / "run" / "checkpoints" / "step-00000004.pt", weights_only=True)
    done = command(sys.executable, "-m", "dpt_nb.training.run", *words, "--resume", folder=tmp_path, check=0)
    assert "damaged" not in done.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "step-00000012.pt",
        "step-00000014.pt",
    }
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(tmp_path / "run"))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 15)
    )


@pytest.fixture
def small_disk(tmp_path):
    "Makes a folder that is a disk of a size in bytes, or of another size from then on."
    folder, made = tmp_path / "disk", []
    folder.mkdir()

    def give(size):
        options = f"size={size}" if not made else f"remount,size={size}"
        done = (
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() if done else 'there is no mount'}")
        made.append(folder)
        return folder

    yield give
    if made:
        subprocess.run(["umount", folder], check=True)


def told_of_a_full_disk(done, out, last, words):
    "The run ended with one sentence, and the state it names can be opened."
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    name = f"step-{last:08d}.pt"
    assert all(part in sentence for part in (str(out), words, name, "Make room", "--resume")), sentence
    assert [path.name for path in sorted((out / "checkpoints").iterdir())][-1] == name
    torch.load(out / "checkpoints" / name, weights_only=True)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")], "half a file was left"


@pytest.mark.slow
def test_a_full_disk_loses_nothing_already_written(straight, small_disk, tmp_path):
    state = (straight / "runs" / "rooms_tiny" / "checkpoints" / "step-00000014.pt").stat().st_size
    out = (
        small_disk(3 * state) / "run"
    )  # a state and the best network have room, a second state beside them has, a third has not
    words = [
        sys.executable,
        "-m",
        "dpt_nb.training.run",
        "rooms_tiny",
        "--cpu",
        "--workers",
        "0",
        "--data-root",
        straight / "data",
        "--out",
        out,
        *changes(*LONGER),
    ]
    told_of_a_full_disk(command(*words, folder=tmp_path), out, 8, "No space left on device")
    small_disk(8 * state)
    command(*words, "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(out))


@pytest.mark.slow
def test_a_file_as_large_as_allowed_loses_nothing_already_written(straight, tmp_path):
    out = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "dpt_nb.training.run",
        "rooms_tiny",
        "--cpu",
        "--workers",
        "0",
        "--data-root",
        straight / "data",
        "--out",
        out,
        *changes(*LONGER),
    ]
    shutil.copytree(straight / "runs" / "rooms_tiny", out)
    (out / "report.json").unlink()
    states = sorted((out / "checkpoints").iterdir())
    states[-1].unlink()
    limit = states[0].stat().st_size // 2
    with mock.patch.dict(os.environ, PYTHONDONTWRITEBYTECODE="1"):  # half a file would be read by later processes
        done = command(
            *words,
            "--resume",
            folder=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    told_of_a_full_disk(done, out, 12, "File too large")
    command(*words, "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(out))


@pytest.mark.slow  # none and one are compared by a run that is interrupted
def test_the_number_of_workers_changes_nothing(straight, tmp_path):
    command_forked(
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--workers",
        2,
        "--data-root",
        straight / "data",
        "--tensorboard",
        *changes(*LONGER),
        folder=tmp_path,
        check=0,
    )
    run = tmp_path / "runs" / "rooms_tiny"
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(run))
    assert list((run / "tensorboard").glob("events.*"))


def test_a_run_of_another_recipe_is_not_continued(straight):
    done = command_here(
        "dpt_train", "rooms_tiny", "--resume", *changes(*LONGER, "optimizer.weight_decay=0.5"), folder=straight, check=1
    )
    assert "optimizer.weight_decay: 0.01 there, 0.5 asked" in done.stderr


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewound(run, out, step):
    "A copy of a run, as if it had been killed after a checkpoint."
    shutil.copytree(run, out)
    (out / "report.json").unlink()
    for path in (out / "checkpoints").glob("step-*.pt"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    assert (out / "checkpoints" / f"step-{step:08d}.pt").exists()
    return out


def one_cycle(done, steps, largest, rise=0.2, first=25.0, last=1e4):
    "The rate of the step after so many, by the formula."
    between = lambda start, end, share: end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    top = rise * steps - 1
    return (
        between(largest / first, largest, done / top)
        if done <= top
        else between(largest, largest / first / last, (done - top) / (steps - 1 - top))
    )


def test_the_rate_that_is_logged_is_the_one_that_was_used(straight, tmp_path):
    for row in rows(straight / "runs" / "rooms_tiny"):
        assert (
            row["learning_rate"]
            == row["learning_rate_backbone"]
            == pytest.approx(one_cycle(row["step"] - 1, 14, 1.5e-3), rel=1e-9)
        )
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, "optimizer.backbone=0.1", "optimizer.freeze_steps=2"])
    train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    for row in rows(tmp_path / "run"):
        rate = one_cycle(row["step"] - 1, 6, 1.5e-3)
        assert (row["learning_rate"], row["learning_rate_backbone"]) == pytest.approx(
            (rate, 0.0 if row["step"] <= 2 else rate / 10), rel=1e-9
        )


def test_after_a_loss_that_is_not_a_number_the_way_that_is_named_leads_out(straight, tmp_path):
    out, data = rewound(straight / "runs" / "rooms_tiny", tmp_path / "run", 12), straight / "data"
    recipe, part_loss = change_recipe(get_recipe("rooms_tiny"), LONGER), dpt_nb.training.loop.part_loss

    def breaks_when_fast(state, inputs, step, fractions):
        backward, shown = part_loss(state, inputs, step, fractions)
        return backward, shown * torch.nan if step == 13 and state.optimizer.param_groups[0]["lr"] > 2e-5 else shown

    with mock.patch("dpt_nb.training.loop.part_loss", breaks_when_fast):
        with pytest.raises(TrainingError) as said:
            train(recipe, out, data, resume=True, cpu=True, workers=0, progress=False)
        words = str(said.value)
        assert "The loss is nan at step 13 of rooms_tiny" in words and "resume (--resume)" in words and "rgb" in words
        assignment = re.search(r"--set (optimizer\.lr=\S+?):", words)[1]
        assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000012.pt"]
        with pytest.warns(TrainingWarning, match="optimizer.lr: 0.0015 there, 0.00075 asked"):
            train(change_recipe(recipe, [assignment]), out, data, resume=True, cpu=True, workers=0, progress=False)
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, 15))
    for row in found:
        largest = 1.5e-3 if row["step"] <= 12 else 7.5e-4
        assert row["learning_rate"] == pytest.approx(one_cycle(row["step"] - 1, 14, largest), rel=1e-9)
    assert json.loads((out / "config.json").read_text())["recipe"]["optimizer"]["lr"] == 7.5e-4


class NoGradient(torch.autograd.Function):
    "One, with a gradient that is not a number."

    @staticmethod
    def forward(context, value):
        return torch.ones_like(value)

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, torch.nan)


def test_a_finite_loss_with_a_gradient_that_is_not_moves_nothing(straight, tmp_path):
    recipe, forward = change_recipe(get_recipe("rooms_tiny"), [*SHORT, "keep.save_steps=1"]), DepthLoss.forward

    def spoilt(self, prediction, target, step=None):
        loss = forward(self, prediction, target, step=step)
        return loss + NoGradient.apply(prediction.mean()) if step == 2 else loss

    with (
        mock.patch.object(DepthLoss, "forward", spoilt),
        pytest.raises(
            TrainingError, match="(?s)gradient's norm is nan, of a finite loss, at step 3 .* --set optimizer.lr=0.00075"
        ),
    ):
        train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    state = torch.load(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1], weights_only=True)
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


STATE = (
    "The state after step 4 holds values that are not finite, in"  # at a step that saves and validates: saving first
)
NETWORK = "After step 4 the network holds values that are not finite"  # at one that only validates


@pytest.mark.parametrize(
    "spoil, saves, expected",
    [
        pytest.param("weights", 2, f"{STATE} model.", marks=pytest.mark.slow),
        pytest.param("weights", 3, NETWORK, marks=pytest.mark.slow),
        pytest.param("moments", 2, f"{STATE} optimiser.", marks=pytest.mark.slow),
    ],
)
def test_a_state_that_is_not_finite_is_neither_written_nor_called_good(straight, tmp_path, spoil, saves, expected):
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, f"keep.save_steps={saves}", "keep.validate_every=2"])
    optimizer_step = dpt_nb.training.loop.optimizer_step

    def spoiling(state, step):
        done = optimizer_step(state, step)
        if step == 4:
            parameter = next(state.model.heads["depth"].parameters())
            target = parameter.data if spoil == "weights" else state.optimizer.state[parameter]["exp_avg_sq"]
            target.view(-1)[5] = torch.inf
        return done

    with mock.patch("dpt_nb.training.loop.optimizer_step", spoiling), pytest.raises(TrainingError, match=expected):
        train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{saves:08d}.pt"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "best" / "model.safetensors").values())
    report = train(recipe, tmp_path / "run", straight / "data", resume=True, cpu=True, workers=0, progress=False)
    assert math.isfinite(report["abs_rel"]) and report["steps"] == 6


def unwell_until(step, function, value):
    """A part of the network that gives a value in places of images that are not trained on, until so many steps have
    been made."""
    steps = []

    def unwell(*inputs, **options):
        found = function(*inputs, **options)
        steps.append(torch.is_grad_enabled() and found.ndim == 4)
        return (
            found
            if torch.is_grad_enabled() or sum(steps) > step
            else torch.where(torch.rand_like(found) < 0.5, found, value)
        )

    return unwell


@pytest.mark.parametrize(
    "name, part",
    [("rooms_tiny", "to_depth"), pytest.param("rooms_labels", "SegmentationHead.forward", marks=pytest.mark.slow)],
)
def test_predictions_that_are_not_finite_are_an_error_and_never_best(straight, tmp_path, name, part):
    recipe = change_recipe(get_recipe(name), [*SHORT, "keep.validate_every=2", "keep.pictures=0"])
    owner, _, own = f"dpt_nb.network.heads.{part}".rpartition(".")
    function = getattr(pkgutil.resolve_name(owner.replace("heads.", "heads:")), own)
    with mock.patch(f"dpt_nb.network.heads.{part}", unwell_until(100, function, torch.nan)):
        with pytest.raises(
            TrainingError,
            match=r"(?s)Predictions on validation samples are not finite \((depth|label)\).*try a lower learning rate",
        ):
            train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    assert not (tmp_path / "run" / "best").exists() and len(rows(tmp_path / "run")) == 1


@pytest.mark.slow
def test_infinite_predictions_that_can_be_evaluated_are_a_warning_and_never_best(straight, tmp_path):
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, "keep.validate_every=2", "keep.pictures=0"])
    kept, save_model = [], dpt_nb.training.run.save_model
    note = lambda model, folder: kept.append((folder.name, len(rows(tmp_path / "run")))) or save_model(model, folder)
    with (
        mock.patch("dpt_nb.network.heads.to_depth", unwell_until(3, dpt_nb.network.heads.to_depth, torch.inf)),
        mock.patch.object(dpt_nb.training.run, "save_model", note),
    ):
        with pytest.warns(
            TrainingWarning,
            match=r"Predictions on validation samples are not finite \(depth\), so there are no metrics",
        ):
            train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    assert [row["step"] for row in rows(tmp_path / "run") if "abs_rel" in row] == [4, 6]
    assert kept[0] == ("best", 3) and kept[-1][0] == "model"


@pytest.mark.slow
def test_other_data_is_found_out_before_a_run_goes_on(tmp_path):
    make_folder(tmp_path / "own", count=30)
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [*SHORT, "data.name=folder", "data.train={}", "data.held_out={}", "data.protocol=rooms"],
    )
    train(recipe, tmp_path / "run", tmp_path / "own", cpu=True, workers=0, progress=False)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert {split: part["samples"] for split, part in kept.items()} == {
        split: len(open_dataset("folder", tmp_path / "own", split)) for split in ("train", "held_out")
    }
    moved = (tmp_path / "own").rename(tmp_path / "elsewhere")
    resume = lambda out, *texts: train(
        change_recipe(recipe, list(texts)), out, moved, resume=True, cpu=True, workers=0, progress=False
    )
    resume(rewound(tmp_path / "run", tmp_path / "moved", 4))  # the same samples at another place
    assert same(weights(tmp_path / "run"), weights(tmp_path / "moved"))
    victim = open_dataset("folder", moved, "train").entries[3]
    for path in (victim.image, victim.depth, victim.label):
        path.unlink()
    out = rewound(tmp_path / "run", tmp_path / "changed", 4)
    before = (out / "config.json").read_text()
    with pytest.raises(TrainingError) as said:
        resume(out)
    count, name = kept["train"]["samples"], victim.image.name
    assert all(
        words in str(said.value)
        for words in (
            f"train had {count} samples and has {count - 1}",
            "number 3, the first that differs",
            name,
            "data.may_change=true",
        )
    ), said.value
    assert (out / "config.json").read_text() == before and len(rows(out)) == 6, "something was touched"
    with pytest.warns(TrainingWarning, match="goes on with other data"):
        resume(out, "data.may_change=true")
    assert len(rows(out)) == 6
    resume(rewound(out, tmp_path / "again", 4))  # what it went on with is what it has now


def test_a_run_that_was_begun_before_it_noted_its_samples_goes_on(straight, tmp_path):
    out = rewound(straight / "runs" / "rooms_tiny", tmp_path / "run", 12)
    (out / "samples.json.gz").unlink()
    config = json.loads((out / "config.json").read_text())
    del (
        config["data"],
        config["recipe"]["data"]["drop_last"],
        config["recipe"]["optimizer"]["no_weight_decay"],
        config["recipe"]["schedule"]["cycle_momentum"],
        config["recipe"]["model"]["decoder_init"],
    )
    (out / "config.json").write_text(json.dumps(config))
    state = torch.load(out / "checkpoints" / "step-00000012.pt", weights_only=True)
    del state["without_truth"]
    torch.save(state, out / "checkpoints" / "step-00000012.pt")
    train(
        change_recipe(get_recipe("rooms_tiny"), LONGER),
        out,
        straight / "data",
        resume=True,
        cpu=True,
        workers=0,
        progress=False,
    )
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(out))
    assert json.loads((out / "config.json").read_text())["data"]["train"]["samples"] == 12


@pytest.mark.slow
def test_images_without_truth_are_counted_over_all_sittings(tmp_path):
    make_folder(tmp_path / "own", count=30)
    blank = [entry.depth for entry in open_dataset("folder", tmp_path / "own", "train").entries[::3]]
    for path in blank:
        write_depth(path, torch.zeros(1, 96, 128), 1000.0)
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [*LONGER, "data.name=folder", "data.train={}", "data.held_out={}", "data.protocol=rooms", "data.transforms=[]"],
    )
    straight = train(recipe, tmp_path / "straight", tmp_path / "own", cpu=True, workers=0, progress=False)
    count, samples = len(open_dataset("folder", tmp_path / "own", "train")), 14 * 4
    order = [index for _, index in ResumableSampler(count, 0, stop=samples)]
    assert (
        straight["without_truth"] == {"depth": sum(index % 3 == 0 for index in order)}
        and straight["without_truth"]["depth"] > 5
    )
    out = rewound(tmp_path / "straight", tmp_path / "run", 12)
    assert (
        train(recipe, out, tmp_path / "own", resume=True, cpu=True, workers=0, progress=False)["without_truth"]
        == straight["without_truth"]
    )


@pytest.mark.slow
def test_tensorboard_has_every_step_once_after_a_run_went_on(straight, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, out = change_recipe(get_recipe("rooms_tiny"), LONGER), tmp_path / "run"
    options = dict(cpu=True, workers=0, progress=False, trackers=("tensorboard",))
    after = dpt_nb.training.run.Run.after

    def stopping(self, step, loss, asked, bar):
        after(self, step, loss, asked, bar)
        if step == 11:
            raise KeyboardInterrupt  # as if killed: three steps after the last checkpoint

    with mock.patch.object(dpt_nb.training.run.Run, "after", stopping), pytest.raises(KeyboardInterrupt):
        train(recipe, out, straight / "data", **options)
    train(recipe, out, straight / "data", resume=True, **options)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance=dict(scalars=0)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 15))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows(out)], rel=1e-6
    )
    assert len(list((out / "tensorboard").glob("events.*"))) == 2


@pytest.mark.slow
def test_validation_of_a_mixture_sees_all_of_its_sets(tmp_path):
    sets = {"rooms": dict(count=20, joint=True), "streets": dict(count=20, joint=True)}
    recipe = change_recipe(
        get_recipe("scenes_tiny"),
        [
            *SHORT[:4],
            f"data.train={json.dumps(dict(inverse=False, sets=sets))}",
            f"data.held_out={json.dumps(dict(inverse=False, sets=sets))}",
            "keep.validate_on=6",
            "keep.pictures=2",
        ],
    )
    seen = []
    with mock.patch.object(
        dpt_nb.training.validation,
        "evaluate",
        lambda predictor, dataset, *more, **options: (
            seen.append([dataset[index]["meta"]["path"] for index in range(len(dataset))])
            or evaluate(predictor, dataset, *more, **options)
        ),
    ):
        report = train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    assert [[sum(kind in path for path in paths) for kind in ("/rooms-", "/streets-")] for paths in seen[:2]] == [
        [3, 3]
    ] * 2
    assert [Path(path).stem for path in seen[0]] == ["000000", "000006", "000013"] * 2, "not spread over the whole list"
    for row in (rows(tmp_path / "run")[2], report):
        assert row["abs_rel"] == pytest.approx((row["abs_rel_rooms"] + row["abs_rel_streets"]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "texts, words",
    [
        (["loop.precision=fp16"], "loop.precision=fp16 needs a GPU"),
        (["data.drop_last=true", "data.batch_size=13"], "data.drop_last leaves nothing of 12 samples"),
        (
            ["losses.depth.loss=silog", "losses.depth.gradient=0", "losses.depth.images_per_group=3"],
            "4 images go through the network at once",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(straight, tmp_path, texts, words):
    done = command_here(
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--out",
        tmp_path / "run",
        "--data-root",
        straight / "data",
        *changes(*SHORT, *texts),
        folder=tmp_path,
        check=1,
    )
    assert words in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_setting_without_effect_is_said_before_the_first_step(straight, tmp_path):
    done = command_here(
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--workers",
        0,
        "--out",
        tmp_path / "run",
        "--data-root",
        straight / "data",
        *changes(*SHORT, "schedule.power=2", "optimizer.freeze_steps=6", "loop.sync_bn=true"),
        folder=tmp_path,
        check=0,
    )
    for words in (
        "schedule.power has no effect",
        "The backbone does not move at all",
        "loop.sync_bn has no effect: this network has no batch norm",
    ):
        assert f"Note: {words}" in done.stderr


def test_other_classes_than_outputs_are_refused_and_their_names_are_kept(straight, tmp_path):
    recipe = change_recipe(get_recipe("rooms_labels"), SHORT)
    for outputs in (7, 20):
        with pytest.raises(
            RecipeError, match=f"The data has 12 classes and the head has {outputs} outputs.*num_classes=12"
        ):
            train(
                change_recipe(recipe, [f"model.changes.heads.label.num_classes={outputs}"]),
                tmp_path / "other",
                straight / "data",
                cpu=True,
                workers=0,
                progress=False,
            )
    assert not (tmp_path / "other").exists()
    train(recipe, tmp_path / "run", straight / "data", cpu=True, workers=0, progress=False)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["class_names"] == list(
        open_dataset("rooms", straight / "data", "train", count=12, progress=False).classes
    )


def test_a_batch_in_parts_with_unequal_labels_has_the_gradient_of_the_whole():
    "In double precision, the auxiliary head included; the parts have all and an eighth of their labels."
    torch.manual_seed(0)
    model = (
        create_model("dpt_tiny", heads={"label": dict(num_classes=5, auxiliary=True, dropout=0.0)}, batch_norm=True)
        .double()
        .train()
    )
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.eval()  # a batch norm sees each part by itself, by definition
    images, labels = torch.rand(4, 3, 96, 128, dtype=torch.float64), torch.randint(5, (4, 96, 128))
    labels[2:][torch.rand(2, 96, 128) < 7 / 8] = 255
    losses = build_losses(
        get_recipe("rooms_labels", losses={"label": dict(auxiliary_weight=0.4, class_weights=[1, 2, 3, 4, 5])})
    )

    def gradient_of(parts):
        model.zero_grad()
        pieces = [{"label": part} for part in labels.chunk(parts)]
        total = 0.0
        for image, piece, fraction in zip(images.chunk(parts), pieces, batch_fractions(pieces, losses)):
            predictions = {name: logits.double() for name, logits in model(image).items()}
            backward, shown = batch_loss(predictions, piece, losses, fractions=fraction)
            backward.backward()
            total += shown.item()
        return total, {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    def by_hand():
        model.zero_grad()
        predictions, weight = (
            {name: logits.double() for name, logits in model(images).items()},
            torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64),
        )
        resized = torch.nn.functional.interpolate(predictions["label_auxiliary"], (96, 128), mode="bilinear")
        loss = sum(
            share * torch.nn.functional.cross_entropy(logits, labels, weight, ignore_index=255)
            for share, logits in ((1, predictions["label"]), (0.4, resized))
        )
        loss.backward()
        return loss.item(), {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    loss, expected = by_hand()
    largest = max(value.abs().max() for value in expected.values())
    for parts in (1, 2, 4):
        found_loss, found = gradient_of(parts)
        assert found_loss == pytest.approx(loss, rel=1e-6) and found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max() for name in expected) <= 1e-6 * largest


def test_a_dry_run_of_few_steps_says_how_long_a_step_takes(straight, tmp_path):
    done = command_here(
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--workers",
        0,
        "--data-root",
        straight / "data",
        "--dry-run",
        *changes(*SHORT, "loop.steps=3", "schedule.warm_up=0"),
        folder=tmp_path,
        check=0,
    )
    seconds = float(done.stdout.split("time: ")[1].split(" s a step")[0])
    assert seconds > 0 and "steps: 3 of" in done.stdout


def test_a_rise_of_one_step_is_refused_where_epochs_come_to_it(straight, tmp_path):
    from dpt_nb.training.optim import build_optimizer, build_schedule

    recipe = get_recipe("rooms_tiny", schedule=dict(warm_up=0.25))
    optimizer = build_optimizer(recipe, torch.nn.ModuleDict(dict(heads=torch.nn.Linear(2, 2))))
    with pytest.raises(RecipeError, match="0.25 of 4 steps, which is one single step"):
        build_schedule(recipe, optimizer, 4)
    build_schedule(change_recipe(recipe, ["schedule.warm_up=0"]), optimizer, 4)  # a whole number
