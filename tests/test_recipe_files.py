"A recipe file does what its words as `--set` would do, wherever a recipe's name could stand."

import json
from dataclasses import asdict

import pytest
import yaml
from conftest import changes, command_here
from forked import command_forked

from dpt_nb.training.processes import recipe_words
from dpt_nb.training.recipe_fields import RecipeError, change_recipe
from dpt_nb.training.recipe_files import open_recipe, read_recipe, recipe_schema, write_recipe
from dpt_nb.training.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.usefixtures("no_figures")
SMALL = """# four steps on the kitchen table
extends: rooms_tiny
loop: {steps: 4}
data:
  batch_size: 4          # of the few that there are
  train.count: 8
  held_out.count: 2
keep: {pictures: 0, best: false, validate_every: 4, save_steps: 2}
optimizer.lr: 5e-4
"""
SAME = [
    "loop.steps=4",
    "data.batch_size=4",
    "data.train.count=8",
    "data.held_out.count=2",
    "keep.pictures=0",
    "keep.best=false",
    "keep.validate_every=4",
    "keep.save_steps=2",
    "optimizer.lr=5e-4",
]
HERE = ["--cpu", "--workers", "0", "--data-root", "data"]


@pytest.fixture(scope="module")
def folder(no_figures, tmp_path_factory):
    "A folder with a recipe file, and two runs: by the file, and by the words that say the same."
    folder = tmp_path_factory.mktemp("files")
    (folder / "table.yaml").write_text(SMALL)
    command_here("dpt_train", "table.yaml", *HERE, folder=folder, check=0)
    command_here("dpt_train", "rooms_tiny", "--out", "runs/words", *changes(*SAME), *HERE, folder=folder, check=0)
    return folder


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_file_trains_what_the_same_words_train_and_stays_as_it_was(folder):
    assert losses(folder / "runs/table") == losses(folder / "runs/words")
    assert (folder / "table.yaml").read_text() == SMALL
    one, other = (
        json.loads((folder / "runs" / name / "config.json").read_text())["recipe"] for name in ("table", "words")
    )
    assert (one.pop("name"), other.pop("name")) == ("table", "rooms_tiny")
    assert one.pop("sources")["optimizer.lr"] == "table.yaml" and other.pop("sources")
    assert one == other


def test_a_run_is_a_recipe_by_its_folder_and_by_its_config(folder):
    for named in ("runs/table", "runs/table/config.json"):
        out = f"runs/again-{named.count('/')}"
        command_here("dpt_train", named, "--out", out, *HERE, folder=folder, check=0)
        assert losses(folder / out) == losses(folder / "runs/table")
    taken = command_here("dpt_train", "runs/table", *HERE, folder=folder, check=1)  # a new run, and not that one
    assert "runs/table holds a run already" in taken.stderr and taken.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_launcher_a_script_and_a_dry_run_take_a_file(folder):
    words = ["-m", "dpt_nb.training.run", "table.yaml", "--out", "runs/module", *HERE]
    command_forked("python", *words, folder=folder, check=0)
    assert losses(folder / "runs/module") == losses(folder / "runs/table")
    command_here("dpt_train", "table.yaml", "--out", "runs/job", "--slurm", *HERE, folder=folder, check=0)
    script = (folder / "runs/job.sbatch").read_text()
    assert "-m dpt_nb.training.run rooms_tiny" in script and "optimizer.lr=0.0005" in script
    dry = command_here("dpt_train", "table.yaml", "--dry-run", *HERE, folder=folder, check=0)
    assert "0.0005   ← table.yaml" in dry.stdout and "steps: 4 of 4 samples" in dry.stdout


def test_a_recipe_from_a_file_travels_to_other_processes(folder):
    recipe = read_recipe(folder / "table.yaml")
    name, words = recipe_words(recipe)
    assert asdict(change_recipe(get_recipe(name), words)) | {"optimizer": asdict(recipe)["optimizer"]} == asdict(recipe)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_every_recipe_comes_back_from_its_file(suffix, tmp_path):
    for name, recipe in RECIPES.items():
        path = write_recipe(recipe, tmp_path / f"{name}{suffix}")
        assert read_recipe(path) == recipe or asdict(read_recipe(path)) == json.loads(json.dumps(asdict(recipe)))
        read = yaml.safe_load(path.read_text()) if suffix == ".yaml" else json.loads(path.read_text())
        assert read["name"] == name and read["model"]["name"] == recipe.model.name  # also by another reader


def test_a_mistake_in_a_file_is_one_line_with_its_place(tmp_path):
    for text, sentence in [
        (
            "extends: rooms_tiny\nloop:\n  steps: many\n",
            "mine.yaml, line 3: loop.steps is 'many', and has to be a whole number.",
        ),
        ("extends: rooms_tiny\nlr: 1e-4\n", "mine.yaml, line 2: A recipe has no 'lr'. Did you mean 'optimizer.lr'?"),
        ("extends: nyu_vit\n", "Did you mean 'nyu_vitb'?"),
        ("extends: mine.yaml\n", "mine.yaml extends mine.yaml, and so there is no first one."),
        ("loop: [", "mine.yaml is not a recipe in YAML or JSON"),
        ("", "mine.yaml: it holds 'None', and fields such as extends: rooms_tiny were expected."),
    ]:
        (tmp_path / "mine.yaml").write_text(text)
        done = command_here("dpt_train", "mine.yaml", *HERE, folder=tmp_path, check=1)
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_file_may_hold_anything(tmp_path):
    contents = [
        b"\xff\xfe\x00",
        b"[[[",
        b"a: &a [*a]",
        b"x: " + b"[" * 3_000,
        b"- 1",
        b"null",
        b"\x00",
        b"a: b: c",
        b"? {a: b}\n: c",
    ]
    contents += [
        b"extends: rooms_tiny\n" + field for field in (b"loop: &l {steps: *l}", b"losses: 3", b"data: {train: [1]}")
    ]
    contents += [
        b"extends: rooms_tiny\n" + field
        for field in (b"seed: 1e999", b"loop.steps.x: 3", b"'': 3", b"model.: 3", b".: 3")
    ]
    for content in contents:
        for name in ("odd.yaml", "odd.json"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RecipeError):
                read_recipe(tmp_path / name)
    with pytest.raises(RecipeError, match="There is no recipe file"):
        open_recipe(tmp_path / "none.yaml")


def test_the_schema_says_of_each_field_what_it_takes():
    def leaves(schema, path=""):
        for name, inner in schema["properties"].items():
            whole = f"{path}{name}"
            yield from leaves(inner, f"{whole}.") if "properties" in inner else [(whole, inner)]

    found = dict(leaves(recipe_schema()))
    assert found["optimizer.lr"] == dict(type="number", description="a number, above 0")
    assert found["loop.ema"]["description"] == "a number, from 0 to below 1"
    assert found["data.name"]["type"] == "string" and found["keep.best"]["type"] == "boolean"
    assert all(inner["description"] for inner in found.values()) and len(found) > 40
