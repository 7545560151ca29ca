"""What a fresh process has imported once it has what it asked for: nothing that others need. By the modules that are
there, not by the clock; `benchmarks/startup.py` has the seconds."""

import json
import os
import subprocess
import sys

import pytest

from dpt_nb.all import ROOMS

# Packages that draw, evaluate, train, deploy or show, beside those that torch and timm import themselves
LATE = {
    "accelerate",
    "av",
    "h5py",
    "IPython",
    "ipyevents",
    "ipywidgets",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pandas",
    "peft",
    "scipy",
    "tensorboard",
    "torchmetrics",
    "transformers",
}


def imported(program, **environment):
    "The packages and the rooms of this library that a fresh process has after a program, and what it printed."
    program += (
        "\nimport json, sys\n"
        "print(json.dumps([[name for name in sys.modules if '.' not in name], "
        "[name[7:] for name in sys.modules if name.startswith('dpt_nb.')]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
    )
    *printed, found = done.stdout.splitlines()
    packages, rooms = json.loads(found)
    return set(packages), set(rooms), printed


@pytest.fixture(scope="module")
def base():
    "What torch and timm are, in this environment."
    return imported("import torch, timm")[0]


def test_the_predictor_imports_what_predicts(base):
    packages, rooms, _ = imported("from dpt_nb.inference import Predictor")
    assert not (packages - base) & LATE
    above = {"registry", "images", "scenes", "network", "weights", "objective", "data", "inference"}
    assert {room.split(".")[0] for room in rooms} <= above


def test_a_prediction_and_its_colors_import_nothing_that_evaluates_or_trains(base, tmp_path):
    program = f"""
import torch
from dpt_nb.inference import Predictor
from dpt_nb.network import create_model
model = create_model("dpt_tiny")
prediction = Predictor(model)(torch.rand(3, 64, 96))
prediction.save({str(tmp_path)!r})
"""
    packages, _, _ = imported(program)
    assert any(tmp_path.iterdir())
    assert (packages - base) & LATE == {"matplotlib"}, "for the colors"


def test_the_figure_of_a_prediction_draws_where_pyplot_was_not_imported_before():
    program = """
import sys, torch
from dpt_nb.images.colors import show_images
assert "matplotlib.pyplot" not in sys.modules
print(type(show_images([torch.rand(3, 8, 8)])).__name__, "matplotlib.pyplot" in sys.modules)
"""
    assert imported(program, MPLBACKEND="agg")[2] == ["Figure True"]


def test_all_imports_no_room_before_it_is_asked_for_a_name():
    packages, rooms, printed = imported(
        "import dpt_nb.all\nprint(sorted(dir(dpt_nb.all)) == sorted(dpt_nb.all.__all__))"
    )
    assert printed == ["True"] and rooms == {"all"}
    assert not packages & (LATE | {"torch", "timm", "numpy"})


def test_all_imports_the_room_of_a_name_alone(base):
    packages, rooms, printed = imported("from dpt_nb.all import random_scene\nprint(random_scene.__module__)")
    assert printed == ["dpt_nb.scenes.scenes"]
    assert {room.split(".")[0] for room in rooms} <= {"all", "scenes", "images"}
    assert not (packages - base) & LATE


def test_the_star_gives_every_name():
    program = "from dpt_nb.all import *\nimport dpt_nb.all\nprint(set(dpt_nb.all.__all__) - set(globals()))"
    _, rooms, printed = imported(program)
    assert printed == ["set()"] and set(ROOMS) <= rooms


def test_all_says_what_it_does_not_have():
    with pytest.raises(ImportError, match="cannot import name 'Predicter'"):
        exec("from dpt_nb.all import Predicter")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a folder that is in use cannot be removed")
def test_what_is_imported_late_is_imported_where_no_file_can_be_written(tmp_path):
    """Under a limit on files, in a folder that is gone: as long as the package can be read. Bytecode is not written:
    Python before 3.13 leaves half a file there, which every later process would read."""
    program = f"""
import os, resource, torch
from dpt_nb.inference import Predictor
from dpt_nb.images.colors import color_depth, show_images
os.mkdir({str(tmp_path / "gone")!r}); os.chdir({str(tmp_path / "gone")!r}); os.rmdir({str(tmp_path / "gone")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
show_images([color_depth(torch.rand(1, 8, 8))])
print("drawn", os.path.exists({str(tmp_path / "gone")!r}))
"""
    environment = dict(MPLCONFIGDIR=str(tmp_path / "matplotlib"), MPLBACKEND="agg", PYTHONDONTWRITEBYTECODE="1")
    _, _, printed = imported(program, **environment)
    assert printed == ["drawn False"]
