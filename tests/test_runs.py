"Runs that go on by their folder alone, past their end, one for each value of a setting, and beside each other."

import json
import shutil

import pytest
import torch
from conftest import SHORT, changes, command_here
from forked import Forked, command_forked
from safetensors.torch import load_file

from dpt_nb.training.compare_runs import compare_runs
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run_again import resume_run
from dpt_nb.training.run_folder import TrainingError

pytestmark = pytest.mark.usefixtures("no_figures")
QUICK = changes(*SHORT, "keep.pictures=0", "keep.best=false")
STEP = """
import os, signal, sys
import dpt_nb.training.run as run
from dpt_nb.commands import main

after = run.Run.after


def stopped_at(self, step, loss, asked, bar):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    after(self, step, loss, asked, bar)


run.Run.after = stopped_at
sys.exit(main(sys.argv[3:]))
"""


def stopped(step, signal, *words, folder):
    "Run a command in a process that a signal meets after a step."
    running = Forked("python", "-c", STEP, step, signal, *words, folder=folder)
    try:
        return running.wait(300), "".join(running.communicate(60))
    finally:
        running.kill()


@pytest.fixture(scope="module")
def home(no_figures, tmp_path_factory):
    "A folder with data, and a run of six steps that was started with options of its own."
    folder = tmp_path_factory.mktemp("runs")
    words = ["--out", "six", "--data-root", "elsewhere/data", "--workers", "0", "--cpu", *QUICK]
    command_here("dpt_train", "rooms_tiny", *words, folder=folder, check=0)
    return folder


@pytest.fixture(scope="module")
def longer(home):
    "The same run, trained for five steps more at one go."
    shutil.copytree(home / "six", home / "longer")
    command_here("dpt_train", "longer", "--extend", 5, folder=home, check=0)
    return home / "longer"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_end(one, other):
    "The same weights, and the same line for each step but for how fast it went."
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    timeless = [[row | dict(images_per_second=0) for row in rows(run)] for run in (one, other)]
    assert timeless[0] == timeless[1]


def test_the_folder_says_how_the_run_was_started(home):
    said = json.loads((home / "six" / "command.json").read_text())
    assert said == dict(
        data_root=str(home / "elsewhere" / "data"), cpu=True, workers=0, trackers=[], num_processes=1, num_nodes=1
    )
    assert set(json.loads((home / "six" / "config.json").read_text())) == {"recipe", "data"}  # as it has always been


@pytest.mark.parametrize("signal", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGKILL"])
def test_a_run_that_was_ended_is_resumed_by_its_folder_from_anywhere(signal, home, tmp_path):
    words = ["--out", tmp_path / "run", "--data-root", "elsewhere/data", "--workers", "0", "--cpu", *QUICK]
    code, said = stopped(3, signal, "dpt_train", "rooms_tiny", *words, folder=home)
    assert code != 0 and not (tmp_path / "run" / "report.json").exists(), said
    command_here("dpt_train", "--resume", "run", folder=tmp_path, check=0)
    same_end(home / "six", tmp_path / "run")


@pytest.mark.parametrize(
    "step, signal",
    [
        (8, "SIGINT"),
        pytest.param(9, "SIGKILL", marks=pytest.mark.slow),
        pytest.param(6, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_an_extension_that_is_ended_and_resumed_is_one_at_one_go(step, signal, home, longer, tmp_path):
    shutil.copytree(home / "six", tmp_path / "run")
    if step > 6:
        code, said = stopped(step, signal, "dpt_train", "run", "--extend", 5, folder=tmp_path)
        assert code != 0, said
    else:  # the run itself is ended before its last step is over, and extended then
        for path in sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1:]:
            path.unlink()
        command_here("dpt_train", "run", "--extend", 5, folder=tmp_path, check=0)
    command_here("dpt_train", "run", "--resume", folder=tmp_path, check=0)
    same_end(longer, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 11


def test_rates_of_an_extension_are_those_that_were_promised(longer):
    recipe = change_recipe(get_recipe("rooms_tiny"), SHORT)
    peak, rise = 0.3 * recipe.optimizer.lr, 0.2 * 5  # one step rises, four fall by a cosine
    found = [row["learning_rate"] for row in rows(longer)][6:]
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 4, dtype=torch.float64)).item()) for step in range(4)]
    assert rise == 1 and found == pytest.approx([peak / 2, *(peak * share for share in cosine)], rel=1e-12)


def test_extensions_add_up_and_what_makes_no_sense_is_refused_without_a_trace(home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(home / "six", run)
    assert resume_run(run, extend=2, progress=False)["steps"] == 8
    assert resume_run(run, extend=1, progress=False)["steps"] == 9
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for words, sentence in [
        (["run", "--extend", "0"], "give a whole number, at least 1"),
        (["run", "--extend", "3", "--set", "seed=7"], "follows another recipe, so it cannot go on with this one: seed"),
        (["none/run", "--extend", "3"], "There is no run in none/run to go on with."),
        (["rooms_tiny", "--extend", "3"], "There is no run in runs/rooms_tiny to extend."),
        (["rooms_tiny", "--resume", "--out", "run", *QUICK], "loop.extensions: [2, 1] there, [] asked"),
    ]:
        done = command_here("dpt_train", *words, folder=tmp_path, check=1)
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(TrainingError, match="A new run can begin with its weights: --set model.weights="):
        resume_run(run, extend=3)


def test_data_that_has_gone_is_asked_for(home, tmp_path):
    shutil.copytree(home / "six", tmp_path / "run")
    said = tmp_path / "run" / "command.json"
    said.write_text(said.read_text().replace("elsewhere", "nowhere"))
    done = command_here("dpt_train", "--resume", "run", folder=tmp_path, check=1)
    assert "which is not there: say where (--data-root)" in done.stderr
    command_here("dpt_train", "--resume", "run", "--data-root", home / "elsewhere" / "data", folder=tmp_path, check=0)
    assert json.loads(said.read_text())["data_root"] == str(home / "elsewhere" / "data")  # kept for the next time
    said.unlink()  # an older run
    words = ["--data-root", home / "elsewhere" / "data", "--workers", "0", "--cpu"]
    command_here("dpt_train", "--resume", "run", *words, folder=tmp_path, check=0)
    same_end(home / "six", tmp_path / "run")


def test_a_sweep_that_is_ended_goes_on_and_compares(home, tmp_path):
    words = [
        "rooms_tiny",
        "--out",
        tmp_path / "rates",
        "--data-root",
        home / "elsewhere" / "data",
        "--workers",
        "0",
        "--cpu",
    ]
    words += [*QUICK, "--set", "optimizer.clip=1e9", "--sweep", "optimizer.lr=1e-4,1.5e-3", "--sweep", "seed=1"]
    code, said = stopped(5, "SIGKILL", "dpt_train", *words, folder=home)
    begun = tmp_path / "rates" / "lr=1e-4,seed=1"
    assert code != 0 and [path.name for path in (tmp_path / "rates").iterdir()] == [begun.name], said
    done = command_here("dpt_train", *words, folder=home, check=0)
    assert "2 of 2: lr=1.5e-3,seed=1 has ended" in done.stdout
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "rates").rglob("*.json")}
    again = command_here("dpt_train", *words, folder=home, check=0)
    assert again.stdout.count("was there already") == 2
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "rates").rglob("*.json")}
    compared = compare_runs(begun, tmp_path / "rates")  # in the order of the sweep
    assert compared.differing() == ["optimizer.lr"] and not compared.troubles()
    assert str(compared) in again.stdout
    straight = command_here("dpt_runs", tmp_path / "rates" / "lr=1.5e-3,seed=1", home / "six", folder=home, check=0)
    assert "optimizer.clip" in straight.stdout and "1000000000.0" in straight.stdout


def test_scripts_for_a_sweep_and_files_of_others_in_the_way(home, tmp_path):
    words = ["rooms_tiny", "--out", "rates", "--sweep", "seed=0,1", "--slurm", "--cpu", "--data-root", "data"]
    done = command_here("dpt_train", *words, folder=tmp_path, check=0)
    scripts = sorted((tmp_path / "rates").glob("*.sbatch"))
    assert [path.name for path in scripts] == ["seed=0.sbatch", "seed=1.sbatch"] and "--set seed=1" in scripts[
        1
    ].read_text()
    assert done.stdout.count("is written") == 2
    scripts[1].write_text("mine")
    done = command_here("dpt_train", *words, folder=tmp_path, check=1)
    assert "was left as it is" in done.stderr and scripts[1].read_text() == "mine"


def test_a_comparison_names_what_is_damaged_and_shows_the_rest(home, longer, tmp_path):
    for name in ("whole", "cut"):
        shutil.copytree(home / "six", tmp_path / name)
    (tmp_path / "cut" / "report.json").unlink()
    (tmp_path / "cut" / "config.json").write_bytes(b"\xff")
    (tmp_path / "plain").mkdir()
    words = [tmp_path / "whole", tmp_path / "cut", tmp_path / "plain", longer]
    done = command_here("dpt_runs", *words, "--out", tmp_path / "curves.png", folder=home, check=0)
    for sentence in (
        "cut/config.json is not a recipe",
        f"There is no run in {tmp_path / 'plain'}",
        "| whole  | 6 ",
        "| longer | 11 ",
    ):
        assert sentence in done.stdout, done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (tmp_path / "mine.png").write_text("mine")
    done = command_here("dpt_runs", longer, "--out", tmp_path / "mine.png", folder=home, check=1)
    assert "was left as it is" in done.stderr and (tmp_path / "mine.png").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_go_on_as_two(home, tmp_path):
    words = ["rooms_tiny", "--out", "two", "--data-root", home / "elsewhere" / "data", "--workers", "0", "--cpu"]
    command_forked("dpt_train", *words, "--num-processes", "2", *QUICK, folder=tmp_path, check=0)
    command_forked("dpt_train", "two", "--extend", "2", folder=tmp_path, check=0)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["processes"], report["steps"]) == (2, 8)
