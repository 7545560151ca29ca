"""What does it cost to train the demo's network until its error is 0.45 of the median map's, and what does a change to
its recipe buy?

    python benchmarks/demo.py
    python benchmarks/demo.py --seeds 0 --lines rooms_tiny rooms_fast --out demo.json

Each run is a process of its own with one thread, on rooms that were rendered before. Processor seconds are those of
`train` whole: reading, steps, validation, pictures and report. Runs that are in the file of --out are not made again.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from dpt_nb.images.files import atomic_write
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe

TARGET = 0.45  # AbsRel, as a share of the median map's
ADAMW, MUON = ("rooms_tiny", []), ("rooms_fast", [])
RECOLORED = f"data.transforms={json.dumps(get_recipe('rooms_tiny').data.transforms)}"
PLAIN = f"data.transforms={json.dumps(get_recipe('rooms_fast').data.transforms)}"
VARIANTS = {  # line of the table → recipe, and what is changed in it
    "`rooms_tiny`: AdamW, 1400 steps": ADAMW,
    "the same, 700 steps": ("rooms_tiny", ["loop.steps=700"]),
    "and without recoloring": ("rooms_tiny", ["loop.steps=700", PLAIN]),
    "half of each side for 70 % of 1000 steps": ("rooms_tiny", ["loop.steps=1000", "loop.growth=[[0.7,0.5]]"]),
    "`rooms_fast`: Muon, without recoloring, 500 steps": MUON,
    "the same with recoloring": ("rooms_fast", [RECOLORED]),
    "half of each side for 60 % of 700 steps": ("rooms_fast", ["loop.steps=700", "loop.growth=[[0.6,0.5]]"]),
}


def processor_seconds():
    "Of this process and of those it has waited for."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def one_run(name, words, seed, data_root):
    "Train once, here. A line of JSON."
    import torch

    from dpt_nb.training.run import train

    torch.set_num_threads(1)
    recipe = change_recipe(get_recipe(name, seed=seed), words)
    from accelerate import Accelerator

    from dpt_nb.training.train_state import open_data

    open_data(recipe, data_root, Accelerator(cpu=True))  # what is missing is rendered before the clock runs
    with tempfile.TemporaryDirectory() as folder:
        begun = processor_seconds()
        report = train(recipe, Path(folder) / "run", data_root, cpu=True)
        seconds = processor_seconds() - begun
    ratio = report["abs_rel"] / report["baseline_abs_rel"]
    print(json.dumps(dict(seconds=seconds, abs_rel=report["abs_rel"], ratio=ratio, delta1=report["delta1"])))


def measured(name, words, seed, data_root, known, out):
    "A run in a process of its own, or what is known of it."
    recipe = asdict(change_recipe(get_recipe(name, seed=seed), words))
    key = json.dumps([recipe, version("torch"), version("timm")], default=str)  # what makes another run
    if key not in known:
        one = ["--one", json.dumps([name, words]), "--seeds", str(seed), "--data-root", data_root]
        said = subprocess.run([sys.executable, __file__, *one], check=True, capture_output=True, text=True).stdout
        known[key] = json.loads(said.strip().splitlines()[-1])
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(out)) as temporary:
            temporary.write_text(json.dumps(known, indent=1))
    return known[key]


def show(name, rows):
    "A line of the table: means over seeds."
    seconds, ratios = ([row[key] for row in rows] for key in ("seconds", "ratio"))
    reached = sum(ratio <= TARGET for ratio in ratios)
    spread = f" ± {statistics.stdev(ratios):.3f}" if len(rows) > 1 else ""
    error = f"{statistics.mean(ratios):.3f}{spread}"
    print(f"| {name} | {statistics.mean(seconds):.0f} | {error} | {reached} of {len(rows)} |", flush=True)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", nargs="+", help="only lines of the table that contain one of these")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", default="runs/benchmark_demo.json", help="runs that were made")
    parser.add_argument("--one", help="for its own use")
    asked = parser.parse_args()
    if asked.one is not None:
        return one_run(*json.loads(asked.one), asked.seeds[0], asked.data_root)
    known = json.loads(Path(asked.out).read_text()) if Path(asked.out).exists() else {}
    print("| | processor seconds | AbsRel / the median map's | seeds that reach 0.45 |\n|---|---|---|---|", flush=True)
    for line, (name, words) in VARIANTS.items():
        if not asked.lines or any(part in line for part in asked.lines):
            show(line, [measured(name, words, seed, asked.data_root, known, asked.out) for seed in asked.seeds])


if __name__ == "__main__":
    main()
