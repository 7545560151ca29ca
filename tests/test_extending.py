"Things of one's own, from a file outside the library: known in every process, refused clearly where they are not."

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import command_here
from forked import command_forked

from dpt_nb.commands import COMMANDS
from dpt_nb.network.dpt import DPT
from dpt_nb.network.heads import HeadError, register_head
from dpt_nb.registry import IMPORTS, RegistryError, import_here
from dpt_nb.training.launch import launch
from dpt_nb.training.recipe_parts import register_loss
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run_folder import TrainingError

MODULE = """
"Ramps: how far right is each pixel?"
import torch
from torch import nn
from torch.utils.data import Dataset

from dpt_nb.data.registry import register_dataset
from dpt_nb.evaluation.protocols import Protocol, register_protocol
from dpt_nb.network.backbone import Backbone, register_backbone
from dpt_nb.network.heads import register_head
from dpt_nb.training.recipe_fields import DataGroup, KeepGroup, LoopGroup, ModelGroup, OptimizerGroup, Recipe
from dpt_nb.training.recipe_parts import register_loss, register_transform
from dpt_nb.training.recipes import register_recipe


@register_dataset("ramps")
class Ramps(Dataset):
    title, targets = "ramps", ("depth", "right")

    def __init__(self, root, split, count=8):
        self.count, self.split = count, split

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index + 1000 * (self.split == "train"))
        right = torch.linspace(0.1, 1, 32).repeat(1, 32, 1)
        image = (right * torch.rand(3, 1, 1, generator=random)).clone()
        return dict(image=image, depth=1 + right, right=right, meta=dict(path=f"ramp {index}"))


@register_transform("Dim")
class Dim:
    def __call__(self, sample, generator):
        return sample | dict(image=sample["image"] * torch.rand((), generator=generator))


@register_head("right", words="to the right")
class RightHead(nn.Module):
    def __init__(self, features, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(features, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, fused, size):
        return nn.functional.interpolate(self.layers(fused[-1]), size=size, mode="bilinear")


@register_loss("far", head="right")
class Far(nn.Module):
    def forward(self, prediction, target):
        return (prediction - target).abs().mean()


@register_backbone
class Steps(Backbone):
    family, patch, dim = "steps", 32, 8

    def __init__(self, name, taps, pretrained=False):
        super().__init__()
        self.steps = nn.ModuleList(nn.Conv2d(less, 8, 2, stride=2) for less in (3, 8, 8, 8, 8))
        self.choose_taps(name, taps)

    @classmethod
    def opens(cls, name, **arguments):
        return name == "steps"

    @classmethod
    def usual(cls, name, **arguments):
        taps = [f"stages.{number}" for number in range(4)]
        return dict(taps=taps, channels=[8] * 4, image_size=[32, 32], mean=[0.5] * 3, std=[0.5] * 3)

    def places(self):
        return {f"stages.{number}": dict(kind="map", channels=8, stride=4 * 2**number) for number in range(4)}

    def intermediates(self, image):
        features, found = self.steps[0](image), {}
        for number, step in enumerate(self.steps[1:]):
            features = found[f"stages.{number}"] = step(features).relu()
        return found


register_protocol("near", Protocol(max_depth=3.0), data=["ramps"])
register_recipe(
    Recipe(
        "ramps",
        ModelGroup("steps", changes=dict(heads={"depth": dict(output="exp"), "right": {}}, features=8)),
        DataGroup("ramps", batch_size=4, transforms=[["Dim", {}]]),
        losses={"depth": {}, "right": {}},
        optimizer=OptimizerGroup(lr=1e-3),
        loop=LoopGroup(steps=4),
        keep=KeepGroup(validate_every=4, save_steps=2, pictures=0),
    )
)
"""
BROKEN = {
    "divides": ("size = 1\nside = size / 0\n", "divides.py, line 2): ZeroDivisionError: division by zero"),
    "leaves": ("raise SystemExit(7)\n", "leaves.py, line 1): SystemExit: 7"),
    "lacks": ("import no_such_package\n", "lacks.py, line 1): ModuleNotFoundError: No module named 'no_such_package'"),
    "unclear": ("def draw(:\n", "unclear.py, line 1): SyntaxError: invalid syntax"),
    "takes": (
        "from dpt_nb.data.registry import register_dataset\nregister_dataset('kitti')(dict)\n",
        "takes.py, line 2): The data set 'kitti' is that of dpt_nb, and takes wants to register another",
    ),
}
NO_MODULES = ["os;rm", "../mine", "mine.py/", "a b", "$(touch pwned)", "mine,", ".mine", "--help"]
ARGUMENTS = {
    "dpt_predict": ["photo.jpg", "--model", "nowhere"],
    "dpt_convert": ["nowhere", "converted"],
    "dpt_export": ["nowhere", "network.onnx"],
    "dpt_data": ["check", "kitti", "nowhere"],
    "dpt_runs": ["nowhere"],
    "dpt_report": ["nowhere"],
    "dpt_distill": ["--teacher", "none", "--student", "none", "--images", "nowhere", "--out", "run"],
}
QUICK = ["--cpu", "--workers", 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a module that works, and some that do not."
    folder = tmp_path_factory.mktemp("place")
    (folder / "my_ramps.py").write_text(MODULE)
    for name, (text, _) in BROKEN.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    "A run of the recipe that the module registers, by a process that has read nothing but `--import`."
    words = ["dpt_train", "ramps", "--import", "my_ramps", "--cpu", "--workers", 1, "--out", "trained"]
    command_forked(*words, folder=place, check=0)
    return place / "trained"


def saved(run):
    return json.loads((run / "config.json").read_text())["recipe"]


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_script(text, folder, check=0, **environment):
    return command_forked(sys.executable, "-c", text, folder=folder, check=check, **environment)


def test_a_command_trains_with_a_module_and_the_run_and_the_model_name_it(trained):
    assert saved(trained)["imports"] == ["my_ramps"]
    described = json.loads((trained / "model/config.json").read_text())
    assert described["imports"] == ["my_ramps"] and described["backbone"] == "steps"
    assert json.loads((trained / "report.json").read_text())["abs_rel"] < 1
    assert (trained / "model/README.md").read_text().count("to the right") == 1


def test_a_run_goes_on_without_being_told_the_module_again(place, trained):
    copy = place / "resumed"
    subprocess.run(["cp", "-r", trained, copy], check=True)
    last = sorted((copy / "checkpoints").iterdir())[-1]
    last.unlink()  # steps to make
    recipe = ["dpt_train", "rooms_tiny", "--out", "resumed", "--resume", *QUICK]
    refused = command_forked(*recipe, folder=place, check=1)
    assert "follows another recipe" in refused.stderr and "Traceback" not in refused.stderr
    command_forked("dpt_train", "ramps", "--out", "resumed", "--resume", *QUICK, folder=place, check=0)
    assert last.exists() and losses(copy) == losses(trained) and saved(copy)["imports"] == ["my_ramps"]


@pytest.mark.parametrize("wrong", [*NO_MODULES, 3, None])
def test_a_run_that_names_no_module_is_refused(place, trained, tmp_path, wrong):
    described = json.loads((trained / "config.json").read_text())
    described["recipe"]["imports"] = [wrong]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    with mock.patch.dict(os.environ), mock.patch("dpt_nb.registry.import_one") as importing:
        with pytest.raises(TrainingError, match="names of modules were expected: nothing was imported"):
            launch("rooms_tiny", tmp_path / "run", resume=True, cpu=True, progress=False)
    assert not importing.called


def test_two_forks_know_a_module_and_also_what_a_cell_registered(place, trained):
    script = f"""
import sys
sys.path.append({str(place)!r})
import my_ramps
from dpt_nb.training.launch import launch
from dpt_nb.training.recipe_parts import register_loss
from dpt_nb.training.recipes import get_recipe
given = dict(cpu=True, workers=0, progress=False, num_processes=2, method="fork")
launch("ramps", "two", **given)

@register_loss("cell", head="right")
def cell():
    return lambda prediction, target: (prediction - target).abs().mean()

launch(get_recipe("ramps", losses=dict(depth={{}}, right=dict(loss="cell"))), "celled", **given)
"""
    run_script(script, place)
    assert losses(place / "two") == pytest.approx(losses(trained), rel=1e-4)
    assert losses(place / "celled") == losses(place / "two")  # the same loss under another name
    assert saved(place / "two")["imports"] == saved(place / "celled")["imports"] == ["my_ramps"]


@pytest.mark.slow
def test_two_fresh_processes_import_a_module_from_wherever_it_lies(place, trained, tmp_path):
    script = f"""
import sys
sys.path.append({str(place)!r})
import my_ramps
from dpt_nb.training.launch import launch
launch("ramps", "two", cpu=True, workers=1, progress=False, num_processes=2, method="fresh")
"""
    run_script(script, tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-4)


@pytest.mark.slow
def test_workers_that_are_spawned_read_samples_of_ones_own(place):
    script = """
import my_ramps
from torch.utils.data import DataLoader
if __name__ == "__main__":
    loader = DataLoader(my_ramps.Ramps("", "train"), 4, num_workers=1, multiprocessing_context="spawn")
    print([len(batch["right"]) for batch in loader])
"""
    (place / "spawns.py").write_text(script)
    done = subprocess.run([sys.executable, "spawns.py"], cwd=place, capture_output=True, text=True)
    assert done.stdout == "[4, 4]\n", done.stderr


def test_a_process_that_a_launcher_starts_imports_what_it_is_told(place, trained):
    loop = [sys.executable, "-m", "dpt_nb.training.run"]
    command_forked(*loop, "ramps", "--import", "my_ramps", *QUICK, "--out", "told", folder=place, check=0)
    assert losses(place / "told") == losses(trained)
    inherits = {IMPORTS: "my_ramps"}
    command_forked(*loop, "ramps", *QUICK, "--out", "inherited", folder=place, check=1)  # the name is not known yet
    words = ["rooms_tiny", "--set", "data.name=ramps", "--set", "data.train={}", "--set", "data.held_out={}"]
    words += ["--set", "loop.steps=2", "--set", "schedule.warm_up=0", "--set", "data.batch_size=4"]
    words += ["--set", "keep.pictures=0", *QUICK, "--out", "inherited"]
    command_forked(*loop, *words, folder=place, check=0, **inherits)
    assert saved(place / "inherited")["imports"] == ["my_ramps"]


def test_a_script_for_slurm_imports_the_modules(place, tmp_path):
    odd = tmp_path / "it's $(touch pwned)"
    odd.mkdir()
    (odd / "my_slurm_ramps.py").write_text(MODULE.replace('"ramps"', '"ramps2"').replace('"far"', '"far2"'))
    script = f"""
import sys
sys.path.append({str(odd)!r})
import importlib
from dpt_nb.training.launch import launch
importlib.import_module("my_slurm_ramps")
launch("ramps2", "queued", cpu=True, workers=0, scheduler="slurm")
"""
    run_script(script, tmp_path)
    text = (tmp_path / "queued.sbatch").read_text()
    words = shlex.split(next(line for line in text.splitlines() if "dpt_nb.training.run" in line).rstrip("& "))
    assert words[words.index("--import") + 1] == "my_slurm_ramps"
    assert not any(word.startswith("imports=") for word in words)
    (exported,) = [line for line in text.splitlines() if line.startswith("export PYTHONPATH=")]
    found = subprocess.run(
        ["bash", "-c", f'{exported}; printf %s "$PYTHONPATH"'],
        env=dict(PYTHONPATH="before"),
        capture_output=True,
        text=True,
    )
    assert found.stdout == f"{odd}:before" and not Path("pwned").exists()


def test_what_a_cell_registered_is_refused_where_nobody_could_know_it(tmp_path):
    with mock.patch.dict("dpt_nb.training.recipe_parts.LOSSES"):
        cell = dict(__name__="__main__", register_loss=register_loss)
        exec("register_loss('cell', head='sound')(dict)", cell)
        recipe = get_recipe("rooms_tiny", losses=dict(sound={}))
        for way in (dict(method="fresh"), dict(scheduler="slurm")):
            with pytest.raises(TrainingError, match="was registered in a notebook cell .* write it into a module"):
                launch(recipe, tmp_path / "run", cpu=True, **way)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused_and_a_module_may_register_again(place):
    script = """
import importlib, sys
sys.path.insert(0, "")
import my_ramps
importlib.reload(my_ramps)
from pathlib import Path
Path("yours.py").write_text(Path("my_ramps.py").read_text())
from dpt_nb.registry import import_modules
import_modules(["yours"])
"""
    done = run_script(script, place, check=1)
    assert "The data set 'ramps' is that of my_ramps, and yours wants to register another" in done.stderr
    for name in ("image", "path", "height", "file", "x_auxiliary", "a b"):
        with pytest.raises(HeadError, match="cannot be called"):
            register_head(name, words="x")


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_cannot_be_imported_is_named_in_one_sentence(place, name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = command_here("dpt_predict", "photo.jpg", "--model", "nowhere", "--import", name, folder=place, check=1)
    assert done.stderr.startswith(f"The module {name!r} cannot be imported (") and BROKEN[name][1] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_imports_before_anything_else(place, name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = [name, *ARGUMENTS.get(name, [])]
    done = command_here(*words, "--import", "no_such_module", folder=place, check=1)
    assert done.stderr.startswith("There is no module 'no_such_module'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", NO_MODULES)
def test_what_is_no_name_of_a_module_is_not_imported(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch("dpt_nb.registry.import_one") as importing:
        done = command_here("dpt_eval", f"--import={wrong}", folder=tmp_path, check=1)
        with pytest.raises(RegistryError, match="is not the name of a module"):
            import_here([wrong])
        monkeypatch.setenv(IMPORTS, wrong.replace(",", "+"))
        assert "is not the name of a module" in command_here("dpt_eval", folder=tmp_path, check=1).stderr
    assert "is not the name of a module" in done.stderr and not importing.called
    assert not list(tmp_path.iterdir())


def test_a_saved_model_says_which_module_it_needs_and_imports_none(place, trained, photographs):
    words = ["dpt_predict", photographs / "gray.png", "--model", "trained/model", "--device", "cpu", "--outputs", "npy"]
    done = command_forked(*words, "--out", "with", "--import", "my_ramps", folder=place, check=0)
    assert (place / "with/gray-right.npy").exists() and (place / "with/gray-depth.npy").exists(), done.stdout
    refused = command_forked(*words, "--out", "without", folder=place, check=1)
    assert "is registered by my_ramps, which was not imported" in refused.stderr
    assert "--import my_ramps" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (place / "without").exists()
    script = (
        "import sys; from dpt_nb.all import *\ntry: DPT.from_pretrained('trained/model')\nexcept ValueError: pass\n"
    )
    run_script(script + "assert 'my_ramps' not in sys.modules", place)


@pytest.mark.parametrize("wrong", [[name] for name in NO_MODULES] + [["a", 3], "my_ramps", {"a": 1}])
def test_a_model_that_names_no_module_is_refused(trained, tmp_path, wrong):
    subprocess.run(["cp", "-r", trained / "model", tmp_path], check=True)
    described = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(described | dict(imports=wrong)))
    with mock.patch("dpt_nb.registry.import_one") as importing:
        with pytest.raises(ValueError, match="imports is .* and has to be a list of names of modules"):
            DPT.from_pretrained(tmp_path / "model")
    assert not importing.called


def test_a_model_is_evaluated_by_a_protocol_of_ones_own(place, trained):
    words = ["dpt_eval", "--model", "trained/model", "--data", "ramps", "--device", "cpu", "--import", "my_ramps"]
    done = command_forked(*words, folder=place, check=0)
    reported = json.loads((trained / "report.json").read_text())
    assert f"{reported['abs_rel']:.4f}" in done.stdout and "8 images evaluated" in done.stdout
