"A run folder has one writer, survives every kill and a full disk, and says what is wrong with it in a sentence."

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from unittest import mock

import psutil
import pytest
import torch
from conftest import REPOSITORY, SHORT
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import dpt_nb.training.distributed
import dpt_nb.training.loop
import dpt_nb.training.run
import dpt_nb.training.train_state
import dpt_nb.training.validation
from dpt_nb.data.checks import looked_at
from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.images.files import InUse
from dpt_nb.images.images import write_depth, write_label
from dpt_nb.training.dry_run import dry_run
from dpt_nb.training.recipe_fields import RecipeError, change_recipe
from dpt_nb.training.recipe_parts import LOSSES
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.run_folder import RunInUse, TrainingError, TrainingWarning, clear_leftovers
from dpt_nb.training.run_log import RunLog

pytestmark = pytest.mark.usefixtures("no_figures")
OWN = [*SHORT[:4], "data.name=folder", "data.train={}", "data.held_out={}", "data.protocol=rooms", "keep.pictures=0"]
QUICK = [*SHORT, "keep.pictures=0"]


def tries(folder, *counts):
    "What `faults.py` tried; its table is printed."
    words = [sys.executable, REPOSITORY / "tests" / "faults.py", folder, *counts]
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    print(done.stdout)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    wrong = [each for each in found if each["wrong"]]
    assert done.returncode == 0 and len(found) == sum(counts[1:]) and not wrong, f"{wrong}\n{done.stderr[-3000:]}"
    return found


@pytest.mark.slow
def test_kills_and_a_second_writer_change_nothing(tmp_path):
    found = tries(tmp_path, 0, 2, 0, 0, 1, 0)
    assert {each["way"] for each in found} >= {"resumed", "started anew"}


@pytest.mark.slow
def test_fifty_kills_of_one_process_and_ten_of_two_and_twenty_pairs_of_writers_change_nothing(tmp_path):
    tries(tmp_path, 1, 25, 25, 10, 20, 12)


@pytest.fixture(scope="module")
def straight(no_figures, tmp_path_factory):
    "A folder with a run that was never stopped, and its data."
    folder = tmp_path_factory.mktemp("straight")
    train(
        change_recipe(get_recipe("rooms_tiny"), QUICK),
        folder / "run",
        folder / "data",
        cpu=True,
        workers=0,
        progress=False,
    )
    return folder


def resumed(straight, out, *changes):
    return train(
        change_recipe(get_recipe("rooms_tiny"), [*QUICK, *changes]),
        out,
        straight / "data",
        resume=True,
        cpu=True,
        workers=0,
        progress=False,
    )


def copied(straight, out):
    "A run that was killed before it made its report."
    shutil.copytree(straight / "run", out)
    (out / "report.json").unlink()
    return out


def same_weights(one, other):
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_flipped_bit_costs_the_steps_since_the_state_before_and_nothing_else(straight, tmp_path):
    out = copied(straight, tmp_path / "run")
    last = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    spoilt = bytearray(last.read_bytes())
    spoilt[len(spoilt) * 2 // 3] ^= 1
    last.write_bytes(spoilt)
    with pytest.warns(TrainingWarning, match=f"{last.name} is damaged .*set aside"):
        resumed(straight, out)
    assert (
        same_weights(straight / "run", out)
        and last.exists()
        and last.with_name(f"{last.name}.aside").read_bytes() == spoilt
    )
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == list(range(1, 7))


def test_files_of_a_run_with_any_content_are_told_in_a_sentence(straight, tmp_path):
    contents = [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[[[]]]",
        b"[" * 50_000,
        b'{"recipe": {"data": []}, "data": 3}',
        b'{"recipe": 3}',
    ]
    out = copied(straight, tmp_path / "run")
    config = (out / "config.json").read_bytes()
    for content in contents:
        (out / "config.json").write_bytes(content)
        with pytest.raises(TrainingError, match=r"config\.json|follows another recipe"):
            resumed(straight, out)
    (out / "config.json").write_bytes(config)
    for name, content in (
        ("samples.json.gz", b"null"),
        ("metrics.jsonl", b"\xff\n[]\n"),
        ("report.json", b"\xff"),
        ("best", b""),
        ("model", b""),
    ):
        shutil.rmtree(out / name) if (out / name).is_dir() else None
        (out / name).write_bytes(content)
    (out / "checkpoints" / "step-00000006.pt").unlink()  # steps to make, and a network to save
    with pytest.warns(TrainingWarning, match="metrics.jsonl is damaged in line 1, 2"):
        resumed(straight, out)
    assert same_weights(straight / "run", out) and (out / "metrics.jsonl.aside").read_bytes() == b"\xff\n[]\n"


@pytest.mark.slow
def test_a_validation_that_was_killed_is_made_up_for(straight, tmp_path):
    out, evaluate = tmp_path / "run", dpt_nb.training.run.evaluate_and_keep

    def die(run, step):
        if step == 6:
            raise KeyboardInterrupt
        return evaluate(run, step)

    recipe = change_recipe(get_recipe("rooms_tiny"), QUICK)
    with mock.patch("dpt_nb.training.run.evaluate_and_keep", die), pytest.raises(KeyboardInterrupt):
        train(recipe, out, straight / "data", cpu=True, workers=0, progress=False)
    assert (out / "checkpoints" / "step-00000006.pt").exists(), "the state was not saved before the validation"
    with mock.patch("dpt_nb.training.loop.optimizer_step", side_effect=AssertionError("a step was made again")):
        resumed(straight, out)
    strip = lambda folder: [
        {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert strip(out) == strip(straight / "run") and same_weights(straight / "run", out)


def test_a_living_run_is_neither_resumed_nor_replaced_nor_cleared(straight, tmp_path):
    recipe, out, refused = change_recipe(get_recipe("rooms_tiny"), QUICK), tmp_path / "run", []
    write = RunLog.write

    def meanwhile(self, row):
        write(self, row)
        if row["step"] == 3:
            (out / ".model.new").mkdir()
            for options in (dict(), dict(resume=True), dict(replace=True)):
                with pytest.raises(TrainingError) as said:
                    train(recipe, out, straight / "data", cpu=True, workers=0, progress=False, **options)
                refused.append(said.value)
            with pytest.raises(RunInUse):
                clear_leftovers(out)
            assert (out / ".model.new").exists()

    with mock.patch.object(RunLog, "write", meanwhile):
        train(recipe, out, straight / "data", cpu=True, workers=0, progress=False)
    assert [isinstance(error, InUse) for error in refused] == [False, True, True], (
        refused
    )  # the first sees that there is a run
    assert all(f"this process ({os.getpid()})" in str(error) for error in refused[1:])
    assert same_weights(straight / "run", out)


def test_a_reader_that_is_killed_is_named_also_during_a_validation(straight, tmp_path):
    recipe = change_recipe(get_recipe("rooms_tiny"), [*QUICK, "keep.validate_every=1", "loop.steps=40"])
    loop, run, validation = dpt_nb.training.loop, dpt_nb.training.run, dpt_nb.training.validation
    for module, moment in ((validation, "evaluate"), (run, "save_checkpoint"), (loop, "optimizer_step")):
        original, before = getattr(module, moment), set(psutil.Process().children())

        def kill_first(*words, **options):
            for child in set(psutil.Process().children()) - before:
                child.kill()
            time.sleep(1)
            return original(*words, **options)

        with mock.patch.object(module, moment, kill_first):
            with pytest.raises(
                TrainingError,
                match=r"A process that reads samples died .*Killed.* at one of: \S+/rgb/\d{6}\.png.*--resume",
            ):
                train(recipe, tmp_path / moment, straight / "data", cpu=True, workers=1, progress=False)


@pytest.fixture
def own(tmp_path):
    "A folder of photographs of somebody's."
    return make_folder(tmp_path / "own", count=30)


def started(own, *changes, workers=0, name="run"):
    return train(
        change_recipe(get_recipe("rooms_tiny"), [*OWN, *changes]),
        own.parent / name,
        own,
        cpu=True,
        workers=workers,
        progress=False,
    )


def test_what_can_be_known_is_refused_before_the_first_step_and_in_a_dry_run(own):
    dataset = open_dataset("folder", own, "train")
    entries, first = dataset.entries, looked_at(dataset, 16, get_recipe("rooms_tiny").seed)[0]
    spoilt = entries[first]

    def refused(words, *changes, error=TrainingError):
        recipe = change_recipe(get_recipe("rooms_tiny"), [*OWN, *changes])
        for attempt in (lambda: started(own, *changes), lambda: dry_run(recipe, own, cpu=True, workers=0)):
            with pytest.raises(error) as said:
                attempt()
            assert all(word in str(said.value) for word in words) and "\n" not in str(said.value), said.value
        assert not (own.parent / "run").exists()

    crop = 'data.transforms=[["Crop", {"height": 500, "width": 500}]]'
    refused([str(spoilt.image), "smaller than the crop of 500x500", "16 of the 16", "dpt_data check"], crop)
    write_label(spoilt.label, torch.full((96, 128), 200))
    labels = ['losses={"label": {}}', 'model.changes={"heads": {"label": {"num_classes": 12}}}', "data.transforms=[]"]
    refused([spoilt.image.name, "labels from 200 to 200", "12 classes", "1 of the 16"], *labels)
    picture = Image.open(spoilt.image)
    picture.resize((80, 64)).save(spoilt.image)
    write_depth(spoilt.depth, torch.ones(1, 64, 80), 1000.0)
    write_label(spoilt.label, torch.zeros(64, 80, dtype=torch.int64))
    refused([spoilt.image.name, "64x80", "96x128", "Crop"], "data.transforms=[]")
    read = type(dataset).__getitem__
    for wrong, words in (
        (None, "has no depth"),
        (torch.ones(1, 64, 81), "is 64x80 and its depth 64x81"),
        (torch.full((1, 64, 80), torch.inf), "is not finite everywhere"),
    ):

        def other(self, index):
            sample = read(self, index)
            return (
                {name: value for name, value in (sample | dict(depth=wrong)).items() if value is not None}
                if index == first
                else sample
            )

        with mock.patch.object(type(dataset), "__getitem__", other):
            refused([spoilt.image.name, words, "1 of the 16"], "data.transforms=[]", "data.batch_size=1")
    for entry in entries:
        write_depth(entry.depth, torch.zeros(1, *((64, 80) if entry is spoilt else (96, 128))), 1000.0)
    refused(["no pixel with depth above 0", "16 of the 16"], "data.batch_size=1")


def test_trackers_and_folders_that_cannot_be_are_refused_first(straight, tmp_path):
    recipe = change_recipe(get_recipe("rooms_tiny"), QUICK)
    options = dict(cpu=True, workers=0, progress=False)
    with pytest.raises(TrainingError, match="There is no tracker 'tensorbord'. There are .*tensorboard"):
        train(recipe, tmp_path / "run", straight / "data", trackers=("tensorbord",), **options)
    with (
        mock.patch.object(dpt_nb.training.distributed, "get_available_trackers", lambda: []),
        pytest.raises(TrainingError, match="needs a package that is not installed: pip install tensorboard"),
    ):
        dry_run(recipe, straight / "data", cpu=True, workers=0, trackers=("tensorboard",))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(TrainingError, match="cannot be a folder"):
            train(recipe, out, straight / "data", **options)
        with pytest.raises(TrainingError, match="cannot be a folder"):
            dry_run(recipe, straight / "data", cpu=True, workers=0, out=out)
    with pytest.raises(RecipeError, match="losses.depth is 3"):
        change = change_recipe(recipe, ["losses.depth=3"])
        train(change, tmp_path / "run", straight / "data", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_on_the_way_names_its_file(own, workers):
    entries = open_dataset("folder", own, "train").entries
    picture = Image.open(entries[0].image)
    picture.resize((80, 64)).save(entries[0].image)
    write_depth(entries[0].depth, torch.ones(1, 64, 80), 1000.0)
    write_label(entries[0].label, torch.zeros(64, 80, dtype=torch.int64))
    with mock.patch.object(dpt_nb.training.train_state, "check_before_training", lambda *parts: []):  # one among many
        with pytest.raises(TrainingError) as said:
            started(own, "data.transforms=[]", workers=workers, name="sizes")
        assert (
            entries[0].image.name in str(said.value) and "64x80" in str(said.value) and "died" not in str(said.value)
        ), said.value
        read = type(open_dataset("folder", own, "train")).__getitem__

        def stumble(self, index):
            if str(self.entries[index].image) == str(entries[3].image):
                raise KeyError("focal length")
            return read(self, index)

        with (
            mock.patch.object(type(open_dataset("folder", own, "train")), "__getitem__", stumble),
            pytest.raises(TrainingError) as said,
        ):
            started(own, 'data.transforms=[["Crop", {"height": 64, "width": 64}]]', workers=workers, name="key")
    assert (
        entries[3].image.name in str(said.value)
        and "KeyError: 'focal length'" in str(said.value)
        and "\n" not in str(said.value)
    )


class Plain(nn.Module):
    "A loss as somebody writes it who knows nothing of this library."

    def forward(self, prediction, target):
        return ((prediction - target).abs() * (target > 0)).mean()


@pytest.mark.parametrize(
    "changes",
    [[], pytest.param(["loop.gradient_accumulation_steps=2"], marks=pytest.mark.slow)],
    ids=["whole", "in parts"],
)
def test_a_plain_loss_works_from_the_first_step_to_the_report(straight, tmp_path, changes):
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [*QUICK, 'losses={"depth": {"loss": "plain"}}', "loop.steps=4", "keep.validate_every=2", *changes],
    )
    options = dict(cpu=True, workers=0, progress=False)
    with mock.patch.dict(LOSSES["depth"], plain=Plain):
        report = train(recipe, tmp_path / "whole", straight / "data", **options)
        assert report["steps"] == 4 and "abs_rel" in report and report["without_truth"] == {}
        step = dpt_nb.training.loop.optimizer_step
        with (
            mock.patch(
                "dpt_nb.training.loop.optimizer_step",
                lambda state, number: (_ for _ in ()).throw(KeyboardInterrupt) if number == 4 else step(state, number),
            ),
            pytest.raises(KeyboardInterrupt),
        ):
            train(recipe, tmp_path / "parts", straight / "data", **options)
        train(recipe, tmp_path / "parts", straight / "data", resume=True, **options)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_an_older_run_without_digests_goes_on(straight, tmp_path):
    out = copied(straight, tmp_path / "run")
    (out / "checkpoints" / "step-00000006.pt").unlink()  # steps to make
    for path in (out / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        del state["row"], state["without_truth"]
        torch.save(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        resumed(straight, out)
    assert same_weights(straight / "run", out)


def test_folders_of_the_run_are_left_as_they_are_when_they_are_somebodys(straight, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine").write_text("mine")
    with pytest.raises(TrainingError, match="holds no run"):
        train(
            change_recipe(get_recipe("rooms_tiny"), QUICK),
            tmp_path / "run",
            straight / "data",
            replace=True,
            cpu=True,
            workers=0,
            progress=False,
        )
    assert (tmp_path / "run" / "model" / "mine").read_text() == "mine"


def test_a_run_killed_after_its_last_state_was_written_keeps_no_more_states_than_others(straight, tmp_path):
    "The state before the last two was still there, and nothing was left to be done but the report."
    out = copied(straight, tmp_path / "run")
    states = sorted(path.name for path in (out / "checkpoints").iterdir())
    shutil.copy(out / "checkpoints" / states[0], out / "checkpoints" / "step-00000001.pt")
    resumed(straight, out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == states
