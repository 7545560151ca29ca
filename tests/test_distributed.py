"Two processes train as one: the same losses, shared batch norms, an exact resume after any end, and no process left behind."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import changes, command
from safetensors.torch import load_file

TWENTY = ["loop.steps=20", "data.batch_size=8", "data.train.count=16", "data.held_out.count=3", "keep.validate_every=20", "keep.every=5", "optimizer.lr=2e-4"]
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def words(processes, recipe, out, data, *assignments, workers=0):
    "A run in a number of processes, as one types it."
    launcher = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "dpt_nb.training"]
    return [*launcher, recipe, "--cpu", "--workers", str(workers), "--out", out, "--data-root", data, *changes(*TWENTY, *assignments)]


def run(processes, recipe, out, data, *assignments, resume=False):
    "Train to the end, or fail with what was said."
    done = subprocess.run([*words(processes, recipe, out, data, *assignments), *(["--resume"] if resume else [])], capture_output=True, text=True, timeout=300, env=QUIET)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "One process and two on the same recipe, for depth alone."
    folder = tmp_path_factory.mktemp("distributed")
    for processes in (1, 2):
        run(processes, "rooms_tiny", folder / f"with{processes}", folder / "data")
    return folder


def follow(folder):
    "The second run's losses are the first's, and so are the figures of its share-wise judging."
    one, two = rows(folder / "with1"), rows(folder / "with2")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 21))
    assert max(abs(first["loss"] - second["loss"]) for first, second in zip(one, two)) <= 1e-5
    reports = [json.loads((folder / f"with{processes}" / "report.json").read_text()) for processes in (1, 2)]
    assert [report["processes"] for report in reports] == [1, 2] and [report["images"] for report in reports] == [3, 3]
    assert reports[0]["abs_rel"] == pytest.approx(reports[1]["abs_rel"], rel=1e-3)


def test_two_processes_follow_one(pair):
    follow(pair)


@pytest.mark.slow
def test_two_processes_that_share_their_batch_norms_follow_one(tmp_path):
    for processes in (1, 2):
        run(processes, "rooms_joint", tmp_path / f"with{processes}", tmp_path / "data", "loop.synchronised=true", "model.changes.heads.label.dropout=0")
    follow(tmp_path)


def descendants(pid):
    "The processes below one, by pid."
    children = [int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return [child for each in children for child in (each, *descendants(each))]


def alive(pid):
    "Whether a process runs; one that ended and was not yet asked after does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["killed", "terminated"])
def test_two_processes_that_were_stopped_end_with_the_same_weights(how, pair, tmp_path):
    out = tmp_path / "run"
    running = subprocess.Popen(words(2, "rooms_tiny", out, pair / "data", workers=1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=QUIET)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 7):
        assert time.monotonic() < deadline and running.poll() is None, "the run did not get to step 7"
        time.sleep(0.01)
    below = descendants(running.pid)
    for pid in [running.pid] if how == signal.SIGTERM else [running.pid, *below]:
        os.kill(pid, how)
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0 and not (out / "report.json").exists(), said
    assert len(below) >= 2 and not any(map(alive, below)), "a process was left behind"
    if how == signal.SIGTERM:
        assert sorted((out / "checkpoints").glob("step-*.pt"))[-1].name >= "step-00000007.pt", "the state at the stop was not kept"
        assert "Stopped after step" in said, said[-2000:]
    run(2, "rooms_tiny", out, pair / "data", resume=True)
    straight, resumed = weights(pair / "with2"), weights(out)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [row["step"] for row in rows(out)] == list(range(1, 21))


def test_what_two_processes_wrote_one_opens(pair, tmp_path):
    done = command("dpt_eval", "--model", pair / "with2" / "model", "--data-root", pair / "data", "--count", 3, "--out", tmp_path, folder=tmp_path, check=0)
    report = json.loads((pair / "with2" / "report.json").read_text())
    assert json.loads((tmp_path / "report.json").read_text())["abs_rel"] == pytest.approx(report["abs_rel"], rel=1e-5), done.stdout


def test_a_mistake_is_a_sentence_and_all_processes_end(pair, tmp_path):
    done = subprocess.run(words(2, "rooms_tiny", tmp_path / "run", pair / "data", "data.batch_size=7"), capture_output=True, text=True, timeout=120, env=QUIET)
    assert done.returncode != 0 and "A batch of 7 samples cannot be shared evenly by 2 processes" in done.stderr


def test_run_as_a_module_an_error_of_its_own_is_one_line(pair):
    done = subprocess.run([sys.executable, "-m", "dpt_nb.training", "rooms_tiny", "--cpu", "--out", pair / "with1", "--data-root", pair / "data"], capture_output=True, text=True, timeout=120, env=QUIET)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "holds a run already" in done.stderr, done.stderr
