"""Before and after fine-tuning: what a run leaves, what the command says, the causes on real runs; and the agreement
with the frozen original, alone, in pieces, in two processes and resumed."""

import json
import shutil
import sys

import pytest
import torch
from conftest import changes, command_here
from forked import end_together, forked_ranks

from dpt_nb.images.images import write_depth, write_image
from dpt_nb.scenes.raycast import lidar, render
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.distributed import open_accelerator
from dpt_nb.training.dry_run import dry_run
from dpt_nb.training.recipe_fields import RecipeError, change_recipe, settings_without_effect
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.report import report
from dpt_nb.training.run import train
from dpt_nb.training.train_state import prepare
from dpt_nb.weights.load import load_checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")
TINY = [
    "data.batch_size=2",
    "data.transforms=[]",
    "keep.validate_every=100",
    "keep.save_steps=2",
    "keep.best=false",
    "keep.pictures=0",
    "model.weights=dpt_tiny_scenes",
    "model.name=dpt_tiny_scenes",
    'model.changes={"heads": {"depth": {"output": "exp", "hidden": 16}}}',
]
ROOMS = [*TINY, "loop.steps=4", "data.train.count=4", "data.held_out.count=2", "optimizer.lr=1e-3"]


def asked(*more):
    return change_recipe(get_recipe("rooms_tiny"), [*ROOMS, *more])


def ran(out, data, *more, resume=False):
    train(asked(*more), out, data, cpu=True, workers=0, progress=False, resume=resume)
    return load_checkpoint(out / "model").state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("reported")


def lower_half(depth):
    return torch.where(torch.arange(depth.shape[-2])[:, None] < depth.shape[-2] // 2, 0.0, depth)


def write_folder(root, kind, change, train_images, size=(64, 96)):
    "Scenes as a folder of one's own, with another depth than they have."
    for split, first, count in (("train", 0, train_images), ("held_out", 10_000, 6)):
        for number in range(count):
            scene = render(random_scene(kind, first + number, size))
            for part in ("rgb", "depth"):
                (root / split / part).mkdir(parents=True, exist_ok=True)
            write_image(root / split / "rgb" / f"{number}.png", scene["image"])
            write_depth(root / split / "depth" / f"{number}.png", change(scene), 256.0)


def tuned(home, name, kind, change, *more, train_images=12):
    "A run on such a folder."
    if not (home / kind / name).exists():
        write_folder(home / kind / name, kind, change, train_images)
    data = ["data.name=folder", "data.train.depth_scale=256", "data.batch_size=4", "data.protocol=streets"]
    words = [*TINY, 'data.train={"depth_scale": 256}', "data.held_out={}", *data, "keep.save_steps=1000", *more]
    out = home / f"{name}-{len(list(home.iterdir()))}"
    train(change_recipe(get_recipe("rooms_tiny"), words), out, home / kind / name, cpu=True, workers=0, progress=False)
    return report(out, cpu=True, progress=False)


def causes(found):
    return [cause.name for cause in found.causes]


def test_a_run_from_given_weights_leaves_a_page_and_the_command_makes_it_anew(home):
    ran(home / "run", home / "data", *SMALL[:2], "loop.steps=2")
    out, before = home / "run", {path.name for path in (home / "run").iterdir()}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "run: before and after" in page and "By depth" in page and page.count("data:image/png;base64,") == 10
    numbers = json.loads((out / "report.json").read_text())
    assert f"{numbers['abs_rel']:.4f}" in page, "the same images, the same metric"
    (out / "report.html").unlink()
    done = command_here("dpt_report", out, "--cpu", folder=home, check=0)
    assert "On the same 2 validation images abs_rel went from" in done.stdout and "report.html" in done.stdout
    assert (out / "report.html").read_text(encoding="utf-8") == page
    assert {path.name for path in out.iterdir()} == before | {"report.html"}


def test_what_has_no_before_is_said(home):
    if not (home / "run").exists():
        ran(home / "run", home / "data", *SMALL[:2], "loop.steps=2")
    out = home / "random"
    shutil.copytree(home / "run", out)
    config = json.loads((out / "config.json").read_text())
    config["recipe"]["model"]["weights"] = ""
    (out / "config.json").write_text(json.dumps(config))
    done = command_here("dpt_report", out, folder=home, check=1)
    assert "begins with random weights" in done.stderr and "Traceback" not in done.stderr
    done = command_here("dpt_report", home, folder=home, check=1)
    assert "There is no run in" in done.stderr


@pytest.mark.slow
def test_a_wrong_scale_is_found_on_a_real_run(home):
    off = lambda scene: scene["depth"] * 1000 / 256
    found = tuned(home, "millimetres", "rooms", off, "loop.steps=8", "optimizer.lr=1e-4")
    assert causes(found)[0] == "wrong scale" and "1000 / 256" in found.causes[0].sentence
    (told,) = found.causes[0].changes
    assert abs(float(told.partition("=")[2]) / 1000 - 1) < 0.05, "so it is stored: 256 as the folder says, times 3.9"
    assert "wrong scale" not in causes(tuned(home, "metres", "rooms", lambda scene: scene["depth"], "loop.steps=8"))


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_found_on_a_real_run(home):
    plain, often = lambda scene: scene["depth"], ("loop.steps=24", "keep.validate_every=6")
    assert "learning rate too high" in causes(tuned(home, "metres", "rooms", plain, *often, "optimizer.lr=1e-2"))
    assert "learning rate too high" not in causes(tuned(home, "metres", "rooms", plain, *often, "optimizer.lr=1e-4"))


@pytest.mark.slow
def test_forgetting_above_the_lidar_is_found_and_the_agreement_lowers_it(home):
    street = lambda scene: 2 * lower_half(lidar(scene["depth"], scene["intrinsics"], lines=24))
    words = ("loop.steps=30", "optimizer.lr=1e-3")
    naive = tuned(home, "above", "streets", street, *words)
    held = tuned(home, "above", "streets", street, *words, "tune.agreement_weight=1")
    assert "sparse top" in causes(naive)
    assert held.numbers.change.uncovered < 0.7 * naive.numbers.change.uncovered
    assert held.found.after["abs_rel"] < 1.1 * naive.found.after["abs_rel"], "the measured part is learned all the same"


SMALL = ("data.train.size=[48,64]", "data.held_out.size=[48,64]", "keep.report_images=0")
SPARSE = ("tune.agreement_weight=0.5", "tune.agreement_pixels=all")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "layer_decay", "decoder", "lora"])
def test_held_to_the_original_resume_is_exact(way, home, tmp_path):
    words = [*SPARSE, *SMALL, f"tune.way={way}", "loop.steps=3"]
    straight = ran(tmp_path / "straight", home / "data", *words)
    kept = torch.load(tmp_path / "straight" / "checkpoints" / "step-00000003.pt", weights_only=True)
    assert not any("original" in name for name in [*kept, *kept["model"]]), "it is opened again, not stored"
    (tmp_path / "straight" / "checkpoints" / "step-00000003.pt").unlink()
    shutil.rmtree(tmp_path / "straight" / "model")
    assert same(straight, ran(tmp_path / "straight", home / "data", *words, resume=True))
    free = ran(tmp_path / "free", home / "data", *words, "tune.agreement_weight=0")
    assert not same(straight, free), "the weight does something"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora", "decoder"])
def test_two_processes_follow_one(way, home, tmp_path):
    words = [*SPARSE, f"tune.way={way}", "optimizer.name=sgd", "optimizer.lr=0.01"]
    one = ran(tmp_path / "one", home / "data", *words)
    start = ["rooms_tiny", "--cpu", "--workers", 0, "--out", tmp_path / "two", "--data-root", home / "data"]
    told = map(str, [*start, *changes(*ROOMS, *words)])
    end_together(forked_ranks(2, sys.executable, "-m", "dpt_nb.training.run", *told, folder="."))
    two = load_checkpoint(tmp_path / "two" / "model").state_dict()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert "two: before and after" in (tmp_path / "two" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_batch_in_pieces_follows_the_whole(home, tmp_path):
    mean = 'losses={"depth": {"loss": "regression"}}'  # which is put together from its parts exactly
    words = [*SPARSE, *SMALL, mean, "optimizer.name=sgd", "optimizer.lr=0.01"]
    whole = ran(tmp_path / "whole", home / "data", *words)
    pieces = ran(tmp_path / "pieces", home / "data", *words, "loop.gradient_accumulation_steps=2")
    assert max(float((whole[name] - pieces[name]).abs().max()) for name in whole) < 1e-5
    free = ran(tmp_path / "free", home / "data", *words, "tune.agreement_weight=0")
    assert max(float((whole[name] - free[name]).abs().max()) for name in whole) > 1e-4, "the weight does something"


def test_what_cannot_be_held_is_refused():
    for words, sentence in (
        (["model.weights="], "begins with random weights"),
        (['losses={"label": {}}', 'model.changes={"heads": {"label": {"num_classes": 12}}}'], "predicts depth (label)"),
    ):
        with pytest.raises(RecipeError) as refused:
            prepare(asked("tune.agreement_weight=0.1", *words), open_accelerator(True, "no"))
        assert sentence in str(refused.value)
    with pytest.raises(RecipeError, match="loop.fsdp does not go together with tune.agreement_weight"):
        asked("tune.agreement_weight=0.1", "loop.fsdp=true")
    assert any("agreement_pixels has no effect" in each for each in settings_without_effect(asked(SPARSE[1])))
    assert not any("agreement" in each for each in settings_without_effect(asked(*SPARSE)))


@pytest.mark.slow
def test_a_dry_run_tells_what_the_original_takes(home):
    told = dry_run(asked("tune.agreement_weight=0.1", "loop.steps=4"), home / "data", cpu=True, workers=0, tried=1)
    assert "agreement with the frozen original (tune.agreement_weight=0.1):" in told
    assert "agreement with" not in dry_run(asked("loop.steps=4"), home / "data", cpu=True, workers=0, tried=1)
