"What happens to a run that is stopped, killed, or read by other workers: nothing."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHORT, changes, command
from safetensors.torch import load_file

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


@pytest.mark.parametrize("how, workers", [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 1), (signal.SIGKILL, 0)], ids=["terminated", "interrupted", "killed"])
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


def test_the_number_of_workers_changes_nothing(straight, tmp_path):
    command("dpt_train", "rooms_tiny", "--cpu", "--workers", 2, "--data-root", straight / "data", "--tensorboard", *changes(*LONGER), folder=tmp_path, check=0)
    run = tmp_path / "runs" / "rooms_tiny"
    assert same(weights(straight / "runs" / "rooms_tiny"), weights(run))
    assert list((run / "tensorboard").glob("events.*"))


def test_a_run_of_another_recipe_is_not_continued(straight):
    done = command("dpt_train", "rooms_tiny", "--resume", *changes(*LONGER, "optimizer.lr=0.5"), folder=straight, check=1)
    assert "optimizer.lr: 0.0015 there, 0.5 asked" in done.stderr
