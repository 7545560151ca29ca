"Several processes: they do what one does, stop together, and leave nothing running."

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from conftest import alive, changes, command_here, wait_until
from forked import Forked, command_forked
from safetensors.torch import load_file

import dpt_nb.training.loop
import dpt_nb.training.run
from dpt_nb.data.datasets import DatasetError
from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.training.launch import launch
from dpt_nb.training.processes import recipe_words
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import run_words
from dpt_nb.training.run_folder import TrainingError
from dpt_nb.workbench.training_room import BackgroundRun

SMALL = [
    "loop.steps=20",
    "data.batch_size=8",
    "data.train.count=16",
    "data.held_out.count=4",
    "keep.validate_every=20",
    "keep.save_steps=4",
    "keep.best=false",
    "optimizer.lr=2e-4",
]
pytestmark = pytest.mark.usefixtures("no_figures")
DEPTH = change_recipe(get_recipe("rooms_tiny"), SMALL)
LONG = [
    "loop.steps=2000",
    "keep.save_steps=2000",
    "keep.validate_every=2000",
]  # on a busy machine a short run ends before it is stopped
SCRIPT = """
import json, sys
from dpt_nb.training.launch import launch
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run_folder import Stopped
given = json.loads(sys.argv[1])
try:
    launch(change_recipe(get_recipe(given.pop("recipe")), given.pop("assignments")), progress=False, cpu=True, **given)
except Stopped as stop:
    print(stop)
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "The rooms, drawn once."
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "held_out"):
        open_dataset("rooms", folder, split, progress=False, **getattr(DEPTH.data, split))
    return folder


@pytest.fixture(scope="module")
def straight(no_figures, data, tmp_path_factory):
    "A run of two processes that was never stopped."
    run = tmp_path_factory.mktemp("straight") / "run"
    launch(DEPTH, run, data, num_processes=2, method="fork", cpu=True, workers=0, progress=False)
    return run


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def assert_same_weights(one, other):
    one, other = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


BEGUN = []


@pytest.fixture(autouse=True)
def nothing_left():
    "A test that fails half-way leaves no process behind either."
    yield
    for running, started in BEGUN:
        for process in alive(
            [*started, *(psutil.Process(running.pid).children(recursive=True) if running.poll() is None else [])]
        ):
            process.kill()
        running.kill()
        running.wait()
    BEGUN.clear()


def begin(recipe, folder, before="", **options):
    "A process like a kernel, in which a cell launches; `before` is run in it first."
    name, assignments = recipe_words(recipe)
    words = json.dumps(dict(recipe=name, assignments=assignments) | options, default=str)
    running = Forked(sys.executable, "-c", before + SCRIPT, words, folder=folder, merged=True, TMPDIR=folder)
    BEGUN.append((running, []))
    return running


def reached(run, step, process):
    "Wait until a run has made a step; everything that the process has started by then."
    log = run / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or log.exists() and log.read_text().count("\n") >= step)
    assert process.poll() is None, process.communicate()[0]
    family = psutil.Process(process.pid).children(recursive=True)
    for running, started in BEGUN:
        if running is process:
            started += family
    return family


def here():
    "What this process has started and is still running; Python's own tracker of shared memory stays to the end."
    return [
        process
        for process in alive(psutil.Process().children(recursive=True))
        if "resource_tracker" not in " ".join(process.cmdline())
    ]


@pytest.mark.slow
def test_two_processes_follow_one(data, straight, tmp_path):
    report = launch(DEPTH, tmp_path / "one", data, num_processes=1, cpu=True, workers=0, progress=False)
    assert report["processes"] == 1 and json.loads((straight / "report.json").read_text())["processes"] == 2
    one, two = losses(tmp_path / "one"), losses(straight)
    assert len(one) == 20 and (one - two).abs().max() < 1e-5, (one - two).abs().max()
    assert (one[0] - one[-1]).abs() > 1e-3  # something was learned meanwhile


@pytest.mark.slow
def test_two_processes_that_share_batch_norms_follow_one(data, tmp_path):
    """Depth and labels, with plain gradient descent, which shows a gradient of the wrong size as well. (Adam divides by
    the size of the gradient, which before a batch norm can be rounding alone.)"""
    heads = {"depth": dict(output="exp", hidden=16), "label": dict(num_classes=12, dropout=0.0)}
    joint, runs = get_recipe("rooms_joint", model=dict(changes=dict(heads=heads, batch_norm=True))), {}
    for name, processes, synchronised, steps in (
        ("one", 1, "true", 20),
        ("shared", 2, "true", 20),
        ("apart", 2, "false", 1),
    ):
        descent = [
            "optimizer.name=sgd",
            "optimizer.lr=1e-3",
            "optimizer.clip=1e9",
            f"loop.sync_bn={synchronised}",
            f"loop.steps={steps}",
            "keep.save_steps=20",
        ]
        launch(
            change_recipe(joint, SMALL + descent),
            tmp_path / name,
            data,
            num_processes=processes,
            cpu=True,
            workers=0,
            progress=False,
        )
        runs[name] = losses(tmp_path / name)
    assert (runs["one"] - runs["shared"]).abs().max() < 1e-4, (runs["one"] - runs["shared"]).abs().max()
    assert runs["one"][-4:].mean() < runs["one"][:4].mean() - 0.02
    assert (runs["one"][0] - runs["apart"][0]).abs() > 1e-3  # what sharing prevents


@pytest.mark.parametrize(
    "method, how, workers",
    [("fork", signal.SIGINT, 1), pytest.param("fresh", signal.SIGTERM, 1, marks=pytest.mark.slow)],
    ids=["fork interrupted", "fresh terminated"],
)
def test_a_stop_reaches_all_processes(data, tmp_path, method, how, workers):
    running = begin(
        change_recipe(DEPTH, LONG), tmp_path, out="run", data_root=data, num_processes=2, method=method, workers=workers
    )
    family = reached(tmp_path / "run", 5, running)
    assert len(family) >= 2 * (1 + workers)
    running.send_signal(how)
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 130 and "Stopped after step" in said, said
    wait_until(lambda: not alive(family), seconds=60)
    assert not (tmp_path / "run" / "report.json").exists(), "the run had ended before it was stopped"
    stopped = len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}.pt").exists()


@pytest.mark.slow
def test_a_run_killed_at_any_step_goes_on_to_the_same_weights(data, straight, tmp_path):
    running = begin(DEPTH, tmp_path, out="run", data_root=data, num_processes=2, method="fork", workers=0)
    family = reached(tmp_path / "run", 7, running)
    for process in (psutil.Process(running.pid), *family):
        process.kill()
    running.communicate(timeout=300)
    assert not (tmp_path / "run" / "report.json").exists() and list(
        (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    )
    launch(
        DEPTH, tmp_path / "run", data, num_processes=2, method="fork", resume=True, cpu=True, workers=0, progress=False
    )
    assert_same_weights(straight, tmp_path / "run")
    assert torch.equal(losses(tmp_path / "run"), losses(straight))


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells a process of its parent's end on Linux only")
@pytest.mark.parametrize("method", ["fork", pytest.param("fresh", marks=pytest.mark.slow)])
def test_no_process_outlives_the_kernel(data, tmp_path, method):
    running = begin(
        change_recipe(DEPTH, ["loop.steps=2000", "keep.save_steps=2000"]),
        tmp_path,
        out="run",
        data_root=data,
        num_processes=2,
        method=method,
        workers=1,
    )
    family = reached(tmp_path / "run", 3, running)
    running.kill()
    running.communicate(timeout=300)
    try:
        wait_until(lambda: not alive(family))
        assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt")) and not list(tmp_path.glob("dpt_nb-*"))
    finally:
        for process in alive(family):
            process.kill()


def listened(processes):
    "The addresses at which any of some processes listens."
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


def test_forks_listen_on_this_machine_only_and_one_that_is_killed_is_named(data, tmp_path):
    running = begin(
        change_recipe(DEPTH, LONG), tmp_path, out="run", data_root=data, num_processes=2, method="fork", workers=1
    )
    family = reached(tmp_path / "run", 3, running)
    assert listened([psutil.Process(running.pid), *family]) == {"127.0.0.1"}  # something listens, or nobody would meet
    psutil.Process(running.pid).children()[-1].kill()
    said = running.communicate(timeout=300)[0]
    assert re.search(
        r"TrainingError: Training process [01] (was killed \(signal 9\)|ended without a word: it was killed), "
        "perhaps for lack of memory",
        said,
    ), said
    wait_until(lambda: not alive(family), seconds=60)
    assert not list(tmp_path.glob("dpt_nb-*"))


@pytest.mark.slow
def test_fresh_processes_listen_on_this_machine_only_and_end_with_their_launcher(data, tmp_path):
    running = begin(
        change_recipe(DEPTH, LONG), tmp_path, out="run", data_root=data, num_processes=2, method="fresh", workers=1
    )
    family = reached(tmp_path / "run", 3, running)
    assert listened([psutil.Process(running.pid), *family]) == {"127.0.0.1"}
    launcher = next(
        process
        for process in psutil.Process(running.pid).children()
        if "dpt_nb.training.processes" in process.cmdline()
    )
    launcher.kill()
    said = running.communicate(timeout=300)[0]
    assert (
        "TrainingError: The launcher of the training processes was killed (signal 9)" in said
        and "Stopped after step" in said
    ), said
    wait_until(lambda: not alive(family), seconds=60)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt")) and not list(tmp_path.glob("dpt_nb-*"))


@pytest.mark.slow
def test_a_hangup_does_not_end_what_runs_under_nohup(data, tmp_path):
    deaf = "import os, signal; os.setsid(); signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    running = begin(DEPTH, tmp_path, deaf, out="run", data_root=data, num_processes=2, method="fork", workers=1)
    reached(tmp_path / "run", 3, running)
    os.killpg(running.pid, signal.SIGHUP)  # as the end of a terminal does
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 0 and len(losses(tmp_path / "run")) == 20, said


@pytest.mark.parametrize(
    "method, processes", [("fork", 2), *(pytest.param("fresh", count, marks=pytest.mark.slow) for count in (1, 2))]
)
def test_an_error_of_one_process_is_told_in_its_words(data, tmp_path, method, processes):
    before = set(here())
    own = change_recipe(DEPTH, ["data.name=folder", "data.train={}", "data.held_out={}", "data.protocol=rooms"])
    make_folder(tmp_path / "own", count=24)
    victim = open_dataset("folder", tmp_path / "own", "train").entries[3].depth
    victim.write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=f"^A training sample cannot be used: .*{victim.name}"):
        launch(
            own,
            tmp_path / "run",
            tmp_path / "own",
            num_processes=processes,
            method=method,
            cpu=True,
            workers=0,
            progress=False,
        )
    with pytest.raises(DatasetError, match="nowhere"):
        launch(own, tmp_path / "other", tmp_path / "nowhere", num_processes=2, cpu=True, progress=False)
    with pytest.raises(TrainingError, match="cannot be shared evenly by 3"):
        launch(DEPTH, tmp_path / "other", data, num_processes=3, cpu=True, progress=False)
    assert set(here()) <= before and not (tmp_path / "other").exists()


def test_an_unforeseen_error_is_told_with_its_traceback(data, tmp_path, monkeypatch):
    before = set(here())
    monkeypatch.setattr(dpt_nb.training.loop, "batch_loss", lambda *inputs: 1 / 0)
    with pytest.raises(TrainingError, match="(?s)Traceback.*part_loss.*ZeroDivisionError"):
        launch(DEPTH, tmp_path / "run", data, num_processes=2, method="fork", cpu=True, workers=0, progress=False)
    assert set(here()) <= before


@pytest.mark.slow
def test_two_machines(data, straight, tmp_path):
    options = dict(out="run", data_root=data, num_processes=1, num_nodes=2, main_port=29617, workers=0)
    machines = [begin(DEPTH, tmp_path, node_rank=rank, **options) for rank in (1, 0)]
    for machine in machines:
        said = machine.communicate(timeout=300)[0]
        assert machine.returncode == 0, said
    assert_same_weights(straight, tmp_path / "run")
    assert torch.equal(losses(tmp_path / "run"), losses(straight))


def test_a_script_for_slurm(data, tmp_path):
    wide = change_recipe(DEPTH, ["data.batch_size=32"])
    script = launch(
        wide,
        tmp_path / "my run",
        data,
        num_processes=8,
        num_nodes=4,
        scheduler="slurm",
        hours=36.5,
        workers=3,
        sbatch=("--partition=gpu",),
        mixed_precision="bf16",
        resume=True,
    )
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    header = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    for option in (
        "job-name=rooms_tiny",
        "nodes=4",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "cpus-per-task=32",
        "time=36:30:00",
        "requeue",
        "signal=B:TERM@120",
        "partition=gpu",
    ):
        assert f"--{option}" in header
    command = shlex.split(text[text.index("srun") : text.index(" &\n")].replace("\\\n", " "))
    words = command[command.index("dpt_nb.training.run") + 1 : -1]
    recipe = change_recipe(
        get_recipe(words[0]), [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    )
    assert json.dumps(asdict(recipe)) == json.dumps(asdict(change_recipe(wide, ["loop.precision=bf16"])))
    assert (
        words[words.index("--out") + 1] == str(tmp_path / "my run")
        and "--cpu" not in words
        and "how=(--resume)" in text
    )
    assert not (tmp_path / "my run").exists()


def in_python(code):
    "A script for the shell that runs some code: a first line cannot name a Python in a folder whose name has spaces."
    return f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n'


@pytest.mark.parametrize(
    "odd",
    [
        "with spaces",
        "it's",
        'a "b"',
        "$(touch pwned)",
        "`touch pwned`",
        "a;touch pwned",
        "a&&touch pwned",
        "#none",
        "größe 雪",
        "--replace",
        "a\\b",
        "*",
        "~",
        "%j",
        "{words}",
        os.fsdecode(b"caf\xe9"),
        "two\nlines\ntouch pwned\n",
    ],
)
def test_names_reach_the_training_as_they_are(odd, tmp_path, monkeypatch):
    "The script's body runs in bash, with commands of Slurm that note what they were given."
    monkeypatch.chdir(tmp_path)
    commands, name = tmp_path / "bin", odd.replace("\n", "")
    commands.mkdir()
    (commands / "srun").write_text(in_python("import json, sys; json.dump(sys.argv[1:], open('given', 'w'))"))
    for stub in ("scontrol", "scancel"):
        (commands / stub).write_text("#!/bin/sh\necho localhost\n")
    for stub in commands.iterdir():
        stub.chmod(0o755)
    recipe = change_recipe(get_recipe("folder_depth"), [f"data.train.split={json.dumps(odd)}"])
    for nodes in (1, 2):
        script = launch(
            recipe, f"{name}/run", odd, num_processes=1, num_nodes=nodes, scheduler="slurm", trackers=(odd,), hours=1
        )
        assert script == Path(f"{name}/run.sbatch")
        environment = os.environ | dict(
            PATH=f"{commands}:{os.environ['PATH']}",
            SLURM_JOB_ID="7",
            SLURM_JOB_NUM_NODES="1",
            SLURM_JOB_NODELIST="localhost",
        )
        done = subprocess.run(["bash", script.absolute()], capture_output=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        words = json.loads((tmp_path / "given").read_text())
        words = words[words.index("dpt_nb.training.run") + 1 :]
        assert not list(tmp_path.rglob("pwned"))
        parsed = mock.MagicMock()
        monkeypatch.setattr(dpt_nb.training.run, "train", parsed)
        run_words(words)
        (given, out, data_root, *_, trackers), _ = parsed.call_args
        assert (out, data_root, trackers) == (f"{name}/run", odd, (odd,)) and given.data.train == recipe.data.train
        logs = [
            line.removeprefix("#SBATCH ")
            for line in script.read_bytes().decode("utf-8", "surrogateescape").split("\n")
            if "--output" in line and line.startswith("#SBATCH")
        ]
        assert [shlex.split(line) for line in logs] == [[f"--output={name}/run".replace("%", "%%") + ".%j.log"]]


@pytest.mark.slow
@pytest.mark.parametrize("told", ["all", "launcher"])
def test_the_script_stops_in_time_and_resumes(data, tmp_path, told):
    """Slurm's commands are imitated: `srun` runs, `scancel` signals all processes of the step as Slurm does, or the
    launcher only, `scontrol` notes what was asked."""
    script = launch(
        change_recipe(DEPTH, ["loop.steps=60"]),
        tmp_path / "run",
        data,
        num_processes=2,
        cpu=True,
        workers=1,
        scheduler="slurm",
    )
    commands, everyone = tmp_path / "bin", "*family" if told == "all" else ""
    commands.mkdir()
    for name, text in {
        "srun": '#!/bin/bash\nshift\necho $$ > step\nexec "$@"\n',
        "scontrol": "#!/bin/bash\nif [ $1 = show ]; then echo localhost; else echo $@ >> asked; fi\n",
        "scancel": in_python(
            "import psutil, signal\nstep = psutil.Process(int(open('step').read()))\n"
            f"family = step.children(recursive=True)\n"
            f"for process in (step, {everyone}): process.send_signal(signal.SIGINT)"
        ),
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    script.write_text(
        script.read_text()
        .replace(f"cd {shlex.quote(os.getcwd())}", f"cd {shlex.quote(str(tmp_path))}")
        .replace(":29500", ":29618")
    )
    environment = os.environ | dict(
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="localhost",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    start = lambda count: subprocess.Popen(
        ["bash", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | dict(SLURM_RESTART_COUNT=count),
    )
    running = start("0")
    family = reached(tmp_path / "run", 5, running)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=300)[0]
    wait_until(lambda: not alive(family), seconds=60)
    assert running.returncode == 0 and "Stopped after step" in said, said
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    stopped = len(losses(tmp_path / "run"))
    assert stopped < 60 and (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}.pt").exists()
    running = start("1")
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 0 and len(losses(tmp_path / "run")) == 60, said


@pytest.mark.slow
def test_the_training_room_says_what_one_of_several_processes_said(tmp_path):
    sitting = BackgroundRun(
        [
            "rooms_tiny",
            "--cpu",
            "--workers",
            "0",
            "--out",
            str(tmp_path / "run"),
            "--data-root",
            str(tmp_path),
            "--set",
            "data.batch_size=7",
        ],
        processes=2,
    )
    sitting.process.wait(240)
    assert sitting.ended().startswith("A batch of 7 samples cannot be shared evenly by 2 processes")


def test_from_a_shell(data, tmp_path):
    done = command_forked(
        "dpt_train",
        "rooms_tiny",
        "--cpu",
        "--workers",
        "0",
        "--num-processes",
        "2",
        "--out",
        "run",
        "--data-root",
        data,
        *changes(*SMALL, "loop.steps=2"),
        folder=tmp_path,
        check=0,
    )
    assert "abs_rel" in done.stdout and "The model is in run/model" in done.stdout
    assert json.loads((tmp_path / "run" / "report.json").read_text())["processes"] == 2
    script = command_here(
        "dpt_train", "rooms_tiny", "--num-processes", "2", "--out", "again", "--slurm", folder=tmp_path, check=0
    )
    assert script.stdout == "again.sbatch is written; submit it with sbatch.\n" and not (tmp_path / "again").exists()
    uneven = command_here("dpt_train", "rooms_tiny", "--cpu", "--num-processes", "3", folder=tmp_path, check=1)
    assert uneven.stderr.count("\n") == 1 and "cannot be shared evenly by 3 processes" in uneven.stderr


def test_a_launched_process_does_not_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="itself started by a launcher, as one of 2"):
        launch(DEPTH, tmp_path / "run", num_processes=2, cpu=True)
