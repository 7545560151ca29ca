"""Bins against plain regression, and heads that say how sure depth is, trained alike on rooms
(nbs/stories/bins_and_confidence.ipynb).

    python benchmarks/bins_and_confidence.py                 # what is there of each grid; trains nothing
    python benchmarks/bins_and_confidence.py --grid small    # on a CPU: 15 runs of one to five minutes

All cases have the same trunk, rooms, order, augmentation, steps, schedule, loss of depth and seeds; what differs is the
head. A run that is finished is not repeated, and one that was interrupted goes on; the figures of all are in
`runs/bins_and_confidence/GRID/results.json`, written anew after every run.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from dpt_nb.data.registry import open_dataset
from dpt_nb.evaluation.evaluate import ConstantPredictor, evaluate, median_depth, write_report
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.confidence import stated_error
from dpt_nb.network.dpt import DPT
from dpt_nb.objective.uncertainty import SparsificationMetrics, calibration_table
from dpt_nb.training.course_recipes import TINY_BINS, TINY_DEPTH
from dpt_nb.training.recipe_fields import Recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train

ROOT = Path(__file__).resolve().parent.parent
RUNS, DATA = ROOT / "runs" / "bins_and_confidence", ROOT / "data"
DEPTH_LOSS = dict(variance_focus=0.85, gradient=0.5)  # of `rooms_tiny`
CASES = {  # name → heads, losses
    "regression": ({"depth": TINY_DEPTH}, {"depth": DEPTH_LOSS}),
    "log bins": ({"depth": TINY_BINS, "entropy": {}}, {"depth": DEPTH_LOSS}),
    "confidence": (
        {"depth": TINY_DEPTH, "confidence": {}},
        {"depth": DEPTH_LOSS, "confidence": dict(alpha=0.2, relative=True)},
    ),
    "Laplace": (
        {"depth": TINY_DEPTH, "confidence": dict(output="exp")},
        {"depth": DEPTH_LOSS, "confidence": dict(alpha=1.0, relative=True, teaches_depth=False)},
    ),
    "linear bins": ({"depth": TINY_BINS | dict(spacing="linear"), "entropy": {}}, {"depth": DEPTH_LOSS}),
}


@dataclass(frozen=True)
class Grid:
    "What is the same for all runs, and how often they are made."

    rooms: int  # that are trained on
    judging: int  # held-out rooms
    seeds: tuple[int, ...]  # of the weights, the order and the augmentation
    steps: int
    batch_size: int
    size: tuple[int, int]  # height and width, pixels


GRIDS = {
    "tiny": Grid(24, 16, (0,), steps=12, batch_size=4, size=(48, 64)),
    "small": Grid(800, 96, (0, 1, 2), steps=240, batch_size=4, size=(48, 64)),
    "full": Grid(3000, 200, (0, 1, 2, 3, 4), steps=6000, batch_size=16, size=(96, 128)),
}


def jobs(grid: Grid) -> list[tuple[int, str]]:  # seed and case
    "Regression, bins and confidence first, seed after seed: an interrupted grid can then be read already."
    first, then = list(CASES)[:3], list(CASES)[3:]
    return [*product(grid.seeds, first), *product(grid.seeds, then)]


def recipe_of(grid: Grid, case: str, seed: int) -> Recipe:
    "`rooms_tiny` but for the heads, and the size of everything."
    heads, losses = CASES[case]
    return get_recipe(
        "rooms_tiny",
        seed=seed,
        losses=losses,
        model=dict(changes=dict(heads=heads, image_size=list(grid.size))),
        data=dict(
            train=dict(count=grid.rooms, size=list(grid.size)),
            held_out=dict(count=16, size=list(grid.size)),
            batch_size=grid.batch_size,
        ),
        loop=dict(steps=grid.steps),
        keep=dict(
            validate_every=grid.steps, validate_on=1, save_steps=max(50, grid.steps // 4), save_total_limit=1,
            best=False, pictures=0,
        ),
    )  # fmt: skip


def folder_of(name: str, case: str, seed: int) -> Path:
    return RUNS / name / f"{case.replace(' ', '-')}-seed{seed}"


@cache
def held_out(grid: Grid) -> Subset:
    "The rooms that judge; the first sixteen are those that a run looks at."
    data = open_dataset("rooms", DATA, "held_out", count=16 + grid.judging, size=grid.size, progress=False)
    return Subset(data, range(16, 16 + grid.judging))


def doubts(grid: Grid, case: str, predictor: Predictor) -> dict:  # `curves` and `calibration`, where there are any
    "What a head says of depth, against the errors of depth, over the rooms that judge."
    heads, losses = CASES[case]
    kind = next((head for head in ("confidence", "entropy") if head in heads), None)
    if kind is None:
        return {}
    metric, stated, errors = SparsificationMetrics("surer" if kind == "confidence" else "less sure"), [], []
    for sample in held_out(grid):
        maps, target = predictor.predict(sample["image"][None]), sample["depth"][None]
        metric.update(maps[kind], target, partner=maps["depth"])
        stated.append(maps[kind].flatten())
        errors.append((maps["depth"] / target).log().abs().flatten())
    found = dict(curves={curve: values.tolist() for curve, values in metric.curves().items()})
    if kind == "confidence":
        widths = stated_error(torch.cat(stated), losses["confidence"]["alpha"])
        found["calibration"] = calibration_table(widths, torch.cat(errors)).tolist()
    return found


def run(name: str, case: str, seed: int, progress: bool = False) -> dict:  # figures
    "Train and judge once; a finished run is read, an interrupted one goes on."
    grid, folder = GRIDS[name], folder_of(name, case, seed)
    if not (folder / "judged.json").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not (folder / "report.json").exists():
            begun = (folder / "config.json").exists()
            train(recipe_of(grid, case, seed), folder, DATA, resume=begun, workers=0, progress=progress)
        report = json.loads((folder / "report.json").read_text())
        facts = {key: report[key] for key in ("train_seconds", "device", "parameters", "steps")}
        predictor = Predictor(DPT.from_pretrained(folder / "model"), device)
        errors = evaluate(predictor, held_out(grid), PROTOCOLS["rooms"], progress=False)
        judged = dict(case=case, seed=seed) | facts | errors | doubts(grid, case, predictor)
        write_report(folder / "judged.json", judged)
    return json.loads((folder / "judged.json").read_text())


def collect(name: str) -> dict:  # `runs`, `baselines`, `missing`
    "All figures there are of a grid, written to its results.json."
    wanted = jobs(GRIDS[name])
    paths = [folder_of(name, case, seed) / "judged.json" for seed, case in wanted]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    path = RUNS / name / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    results = dict(
        grid=name,
        setting=vars(GRIDS[name]),
        missing=len(wanted) - len(found),
        baselines=before.get("baselines", {}),
        runs=found,
    )
    if path.parent.exists():
        write_report(path, results)
    return results


def finish(name: str, progress: bool = True) -> dict:  # of `collect`
    "Run what is missing of a grid."
    grid = GRIDS[name]
    for seed, case in tqdm(jobs(grid), desc=f"{name} grid", disable=not progress):
        run(name, case, seed)
        collect(name)
    results = collect(name)
    if not results["baselines"]:
        rooms = open_dataset("rooms", DATA, "train", count=grid.rooms, size=grid.size, progress=False)
        median = ConstantPredictor(median_depth(rooms, progress=False))
        results["baselines"] = {"median map": evaluate(median, held_out(grid), PROTOCOLS["rooms"], progress=False)}
        write_report(RUNS / name / "results.json", results)
    return results


COLUMNS = dict(abs_rel="AbsRel", silog="SILog", delta1="δ < 1.25", ause="AUSE", random_ause="of a random order")


def values(results: dict, case: str, key: str) -> list[float]:  # one a seed; empty where there are none
    "A figure of a case's runs; the area is that of the head which the case has."
    rows = [row for row in results["runs"] if row["case"] == case]
    names = [f"{head}_{key}" for head in ("confidence", "entropy")] if key.endswith("ause") else [key]
    return [row[name] for row in rows for name in names if name in row]


def summary(results: dict) -> str:  # text
    "Mean and standard deviation over seeds, a line a case."
    lines = [f"{'':18}" + "".join(f"{title:>18}" for title in COLUMNS.values())]
    for name, row in results["baselines"].items():
        cells = [f"{row[key]:.4f}" if key in row else "–" for key in COLUMNS]
        lines.append(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells))
    for case in CASES:
        cells = []
        for key in COLUMNS:
            some = values(results, case, key)
            digits = 2 if key == "silog" else 4
            spread = f" ± {stdev(some):.{digits}f}" if len(some) > 1 else ""
            cells.append(f"{mean(some):.{digits}f}{spread}" if some else "–")
        lines.append(f"{case:18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, help="which one; none: say what is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.grid is None:
        for each in GRIDS:
            print(f"{each}: {collect(each)['missing']} of {len(CASES) * len(GRIDS[each].seeds)} runs are missing")
    else:
        print(summary(finish(asked.grid)))
