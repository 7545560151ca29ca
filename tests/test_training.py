"What happens to a run that is stopped, killed, or read by other workers: nothing."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import resource
import shutil

import pytest
import torch
from conftest import SHORT, changes, command, command_here
from safetensors.torch import load_file

from dpt_nb.models import DPT
from dpt_nb.recipes import RecipeError, change_recipe, get_recipe
from dpt_nb.training import build_model, train

LONGER = [assignment for assignment in SHORT if not assignment.startswith(("loop.steps", "keep.every"))] + ["loop.steps=14", "keep.every=4"]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A folder with a run that was never stopped."
    folder = tmp_path_factory.mktemp("straight")
    command("dpt_train", "rooms_tiny", "--cpu", "--workers", 0, *changes(*LONGER), folder=folder, check=0)
    return folder


@pytest.mark.parametrize("how, workers", [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 1), pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow)], ids=["terminated", "interrupted", "killed"])
def test_a_stopped_run_goes_on_to_the_same_weights(straight, tmp_path, how, workers):
    words = [Path(sys.executable).parent / "dpt_train", "rooms_tiny", "--cpu", "--workers", str(workers), "--data-root", straight / "data", "--out", "run", *changes(*LONGER)]
    running = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
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
    command(*words[:1], *words[1:], "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 15))


def test_a_network_that_only_convolves_trains_and_opens(tmp_path):
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, "model.name=resnet_tiny", "optimizer.backbone=0.5", "optimizer.frozen=2", "loop.checkpointing=true"])
    torch.manual_seed(recipe.seed)
    start = build_model(recipe).state_dict()
    train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    model = DPT.from_pretrained(tmp_path / "run" / "model")
    assert model.config.backbone == "resnetv2_50" and model.backbone.patch == 32
    still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert not still, f"did not move: {still}"
    with pytest.raises(RecipeError, match="a convolutional network have stages"):
        train(change_recipe(recipe, ["optimizer.layer_decay=0.9"]), tmp_path / "other", tmp_path / "data", cpu=True, workers=0, progress=False)


def wait_for(path, running):
    "Wait until a file exists while a process runs."
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and running.poll() is None, f"the run did not come to write {path.name}"
        time.sleep(0.01)


HALF_A_CHECKPOINT = """
import sys, time, torch
from pathlib import Path
from dpt_nb.training import run_words

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


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(straight, tmp_path):
    words = ["rooms_tiny", "--cpu", "--workers", "0", "--data-root", str(straight / "data"), "--out", str(tmp_path / "run"), *changes(*LONGER)]
    running = subprocess.Popen([sys.executable, "-c", HALF_A_CHECKPOINT, tmp_path / "half", *words], stderr=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    wait_for(tmp_path / "half", running)
    running.kill()
    running.wait()
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    leftover = names - {"step-00000004.pt"}
    assert "step-00000004.pt" in names and len(leftover) == 1 and leftover.pop().startswith("."), names
    torch.load(tmp_path / "run" / "checkpoints" / "step-00000004.pt", weights_only=True)
    done = command(sys.executable, "-m", "dpt_nb.training", *words, "--resume", folder=tmp_path, check=0)
    assert "damaged" not in done.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000012.pt", "step-00000014.pt"}
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(tmp_path / "run"))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(range(1, 15))


@pytest.fixture
def small_disk(tmp_path):
    "Makes a folder that is a disk of a size in bytes, or of another size from then on."
    folder, made = tmp_path / "disk", []
    folder.mkdir()

    def give(size):
        options = f"size={size}" if not made else f"remount,size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True) if shutil.which("mount") else None
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
    assert all(part in sentence for part in (str(out), words, "step-%08d.pt" % last, "Make room", "--resume")), sentence
    assert [path.name for path in sorted((out / "checkpoints").iterdir())][-1] == "step-%08d.pt" % last
    torch.load(out / "checkpoints" / ("step-%08d.pt" % last), weights_only=True)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")], "half a file was left"


def test_a_full_disk_loses_nothing_already_written(straight, small_disk, tmp_path):
    state = (straight / "runs" / "rooms_tiny" / "checkpoints" / "step-00000014.pt").stat().st_size
    out = small_disk(3 * state) / "run"  # a state and the best network have room, a second state beside them has, a third has not
    words = [sys.executable, "-m", "dpt_nb.training", "rooms_tiny", "--cpu", "--workers", "0", "--data-root", straight / "data", "--out", out, *changes(*LONGER)]
    told_of_a_full_disk(command(*words, folder=tmp_path), out, 8, "No space left on device")
    small_disk(8 * state)
    command(*words, "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(out))


@pytest.mark.slow
def test_a_file_as_large_as_allowed_loses_nothing_already_written(straight, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "dpt_nb.training", "rooms_tiny", "--cpu", "--workers", "0", "--data-root", straight / "data", "--out", out, *changes(*LONGER)]
    shutil.copytree(straight / "runs" / "rooms_tiny", out)
    (out / "report.json").unlink()
    states = sorted((out / "checkpoints").iterdir())
    states[-1].unlink()
    limit = states[0].stat().st_size // 2
    done = command(*words, "--resume", folder=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    told_of_a_full_disk(done, out, 12, "File too large")
    command(*words, "--resume", folder=tmp_path, check=0)
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(out))


def test_the_number_of_workers_changes_nothing(straight, tmp_path):
    command("dpt_train", "rooms_tiny", "--cpu", "--workers", 2, "--data-root", straight / "data", "--tensorboard", *changes(*LONGER), folder=tmp_path, check=0)
    run = tmp_path / "runs" / "rooms_tiny"
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(run))
    assert list((run / "tensorboard").glob("events.*"))


def test_a_run_of_another_recipe_is_not_continued(straight):
    done = command_here("dpt_train", "rooms_tiny", "--resume", *changes(*LONGER, "optimizer.lr=0.5"), folder=straight, check=1)
    assert "optimizer.lr: 0.0015 there, 0.5 asked" in done.stderr
