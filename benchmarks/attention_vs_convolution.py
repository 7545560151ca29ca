"""Attention against convolution: `dpt_tiny` and `resnet_tiny`, trained alike on more and more rooms
(nbs/stories/attention_vs_convolution.ipynb).

    python benchmarks/attention_vs_convolution.py                        # what is there of each grid; trains
nothing
    python benchmarks/attention_vs_convolution.py --grid small           # on a CPU
    python benchmarks/attention_vs_convolution.py --grid medium          # on a CPU that has hours
    python benchmarks/attention_vs_convolution.py --grid full            # on a GPU
    python benchmarks/attention_vs_convolution.py --grid full --gpus 4   # on four, each with a part of the runs

First a pilot gives each network its own learning rate, then the grid runs, then the two largest counts once more at
each network's second best
rate: a pilot is one run a rate, and its choice may be chance. A run that is finished is not repeated, and one that
was
interrupted goes on; the figures of all are in `runs/attention_vs_convolution/GRID/results.json`, written anew after
every run.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from dpt_nb.data.registry import open_dataset
from dpt_nb.data.scene_sets import SPLITS
from dpt_nb.evaluation.evaluate import ConstantPredictor, evaluate, median_depth, write_report
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT
from dpt_nb.scenes.camera import unproject
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.course_recipes import TINY_DEPTH
from dpt_nb.training.recipe_fields import Recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train

NETWORKS = ("dpt_tiny", "resnet_tiny")  # with attention, and without
ROOT = Path(__file__).resolve().parent.parent
RUNS, DATA = ROOT / "runs" / "attention_vs_convolution", ROOT / "data"
CHOOSING, JUDGING = 64, 128  # held-out rooms: the first choose the learning rates, those after them judge


@dataclass(frozen=True)
class Grid:
    "What is varied, and what is the same for all runs."

    counts: tuple[int, ...]  # training rooms; `steps * batch_size` of them means that no room is seen twice
    seeds: tuple[int, ...]  # of the weights, the order and the augmentation
    rates: tuple[float, ...]  # tried for each network, on the largest count with a seed that the grid does not use
    steps: int
    batch_size: int
    size: tuple[int, int]  # height and width, pixels


GRIDS = {
    "tiny": Grid((16, 64), (0,), (1e-3,), steps=16, batch_size=4, size=(64, 96)),
    "small": Grid((32, 800), (0, 1, 2), (1e-3, 2e-3), steps=200, batch_size=4, size=(64, 96)),
    "medium": Grid((32, 128, 512, 4800), (0, 1, 2), (5e-4, 1e-3, 2e-3), steps=600, batch_size=8, size=(64, 96)),
    "full": Grid(
        (32, 128, 512, 2048, 8192, 96_000),
        (0, 1, 2, 3, 4),
        (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
        steps=6000,
        batch_size=16,
        size=(96, 128),
    ),
}
PILOT_SEED = 1000


@dataclass(frozen=True)
class Job:
    "One run."

    network: str  # of `NETWORKS`
    count: int  # training rooms
    seed: int
    rate: float  # largest learning rate

    def folder(self, grid: str) -> Path:
        return RUNS / grid / f"{self.network}-{self.count}-seed{self.seed}-{self.rate:g}"


def recipe_of(grid: Grid, job: Job) -> Recipe:
    "`rooms_tiny` but for the network, the rooms and the size of everything."
    return get_recipe(
        "rooms_tiny",
        seed=job.seed,
        model=dict(name=job.network, changes=dict(heads={"depth": TINY_DEPTH}, image_size=list(grid.size))),
        data=dict(
            train=dict(count=job.count, size=list(grid.size)),
            held_out=dict(count=CHOOSING, size=list(grid.size)),
            batch_size=grid.batch_size,
        ),
        optimizer=dict(lr=job.rate),
        loop=dict(steps=grid.steps),
        keep=dict(
            validate_every=grid.steps,
            validate_on=1,
            save_steps=max(50, grid.steps // 10),
            save_total_limit=1,
            best=False,
            pictures=0,
        ),
    )


def pilot(grid: Grid) -> list[Job]:
    "Each network with each learning rate, once; where there is one rate only, nothing is to be chosen."
    return (
        []
        if len(grid.rates) == 1
        else [Job(network, grid.counts[-1], PILOT_SEED, rate) for network in NETWORKS for rate in grid.rates]
    )


def best_rates(grid: Grid, name: str, place: int = 0) -> dict[str, float]:  # network → learning rate
    """What was best in the pilot, on the rooms that choose; `place` 1 is the second best. Raises `FileNotFoundError`
    while it is not finished."""
    if len(grid.rates) == 1:
        return dict.fromkeys(NETWORKS, grid.rates[0])
    error = {job: json.loads((job.folder(name) / "report.json").read_text())["abs_rel"] for job in pilot(grid)}
    return {
        network: sorted((job for job in error if job.network == network), key=error.get)[place].rate
        for network in NETWORKS
    }


def jobs(grid: Grid, rates: dict[str, float]) -> list[Job]:
    "The grid, the fewest and the most rooms first, seed after seed: an interrupted one can then be read already."
    outer, inner = (grid.counts[0], grid.counts[-1]), grid.counts[1:-1]
    return [
        Job(network, count, seed, rates[network])
        for some in (outer, inner)
        for seed in grid.seeds
        for count in some
        for network in NETWORKS
    ]


def second_jobs(grid: Grid, name: str) -> list[Job]:
    "The two largest counts at each network's second best rate."
    if len(grid.rates) == 1:
        return []
    rates = best_rates(grid, name, place=1)
    return [
        Job(network, count, seed, rates[network])
        for count in grid.counts[-2:]
        for seed in grid.seeds
        for network in NETWORKS
    ]


@cache
def held_out(grid: Grid, progress: bool = False) -> Subset:
    "The rooms that judge: nothing was trained on them or chosen by them."
    return Subset(
        open_dataset("rooms", DATA, "held_out", count=CHOOSING + JUDGING, size=grid.size, progress=progress),
        range(CHOOSING, CHOOSING + JUDGING),
    )


@cache
def flat_parts(grid: Grid, index: int, share: float = 0.08) -> list[tuple]:
    """The walls, floor and ceiling of a held-out room, by its number, that fill at least a share of the picture: kind,
    normal, pixels."""
    scene = random_scene("rooms", SPLITS["held_out"] + index, grid.size)
    rotation, true = scene.camera.rotation().double(), held_out(grid).dataset[index]["depth"]
    world = unproject(true.double(), scene.camera.intrinsics()) @ rotation.T + torch.tensor(
        scene.camera.position, dtype=torch.float64
    )
    found = []
    for side in range(2):
        for axis in range(3):
            on = ((world[..., axis] - scene.shell[side, axis]).abs() < 0.02) & (true[0] > 0)
            if on.double().mean() >= share:
                found.append((("floor", "ceiling")[side] if axis == 2 else "wall", rotation[axis], on))
    return found


def planes(grid: Grid, index: int, depth: torch.Tensor) -> list[dict]:
    """What a depth map `(1, H, W)` makes of each of a room's `flat_parts`: `tilt`, the angle in degrees between the
    plane fitted to its
    points and the true one, and `bend`, the points' root mean square distance from the plane fitted to them, in %
    of their mean depth.
    Neither changes when all depths are multiplied by one number.
    """
    intrinsics = held_out(grid).dataset[index]["intrinsics"]
    points, found = unproject(depth.double(), intrinsics), []
    for kind, normal, on in flat_parts(grid, index):
        centred = points[on] - points[on].mean(0)
        spread, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        cosine = (directions[:, 0] @ normal).abs().clamp(max=1)
        bend = spread[0].clamp(min=0).sqrt() / points[on][:, 2].mean()
        found.append(dict(kind=kind, tilt=cosine.arccos().rad2deg().item(), bend=100 * bend.item(), on=on))
    return found


def coherence(grid: Grid, predictor, data: Subset) -> dict:  # `wall_tilt`, `wall_bend`, `floor_tilt`, …
    "Means over the large flat parts of the rooms that judge."
    found = []
    for place, index in enumerate(data.indices):
        depth = predictor.predict(data[place]["image"][None])["depth"][0].cpu()
        found += planes(grid, index, depth)
    kinds = {kind: [plane for plane in found if plane["kind"] == kind] for kind in ("wall", "floor", "ceiling")}
    return {
        f"{kind}_{what}": mean(plane[what] for plane in some)
        for kind, some in kinds.items()
        if some
        for what in ("tilt", "bend")
    } | {f"{kind}s": len(some) for kind, some in kinds.items()}


def judge(grid: Grid, predictor) -> dict:
    "Errors and coherence on the rooms that judge."
    data = held_out(grid)
    numbers = evaluate(predictor, data, PROTOCOLS["rooms"], progress=False)
    return {key: numbers[key] for key in ("abs_rel", "rmse", "silog", "delta1")} | coherence(grid, predictor, data)


def run(name: str, job: Job, progress: bool = False) -> dict:  # figures
    "Train and judge once; a finished run is read, an interrupted one goes on."
    grid, folder = GRIDS[name], job.folder(name)
    if not (folder / "judged.json").exists():
        cuda = torch.cuda.is_available()
        if not (folder / "report.json").exists():
            train(
                recipe_of(grid, job),
                folder,
                DATA,
                resume=(folder / "config.json").exists(),
                workers=4 if cuda else 0,
                progress=progress,
            )
        report = json.loads((folder / "report.json").read_text())
        predictor = Predictor(DPT.from_pretrained(folder / "model"), "cuda" if cuda else "cpu")
        facts = {key: report[key] for key in ("train_seconds", "device", "parameters", "steps")} | dict(
            chosen_by=report["abs_rel"]
        )
        write_report(folder / "judged.json", vars(job) | facts | judge(grid, predictor))
    return json.loads((folder / "judged.json").read_text())


def run_all(name: str, todo: list[Job], share: tuple[int, int] = (0, 1), progress: bool = True) -> None:
    "Every n-th job, one after the other."
    mine = todo[share[0] :: share[1]]
    for job in tqdm(mine, desc=f"{name} grid, {len(mine)} runs", disable=not progress):
        run(name, job)
        collect(name)


def collect(name: str) -> dict:  # `runs`, `pilot`, `second`, `rates`, `baselines`, `missing`
    "All figures there are of a grid, written to its results.json."
    grid = GRIDS[name]
    read = lambda job: (
        json.loads((job.folder(name) / "judged.json").read_text())
        if (job.folder(name) / "judged.json").exists()
        else None
    )
    try:
        rates = best_rates(grid, name)
        wanted, again = jobs(grid, rates), second_jobs(grid, name)
    except FileNotFoundError:
        rates, wanted, again = {}, [], []
    tried, found, second = (
        [figures for job in some if (figures := read(job))] for some in (pilot(grid), wanted, again)
    )
    counts = len(grid.counts) + (2 if len(grid.rates) > 1 else 0)
    missing = len(pilot(grid)) - len(tried) + counts * len(grid.seeds) * len(NETWORKS) - len(found) - len(second)
    path = RUNS / name / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    results = dict(
        grid=name,
        setting=vars(grid),
        rates=rates,
        missing=missing,
        baselines=before.get("baselines", {}),
        pilot=tried,
        runs=found,
        second=second,
    )
    if path.parent.exists():
        write_report(path, results)
    return results


def finish(
    name: str, share: tuple[int, int] | None = None, gpus: int = 1, progress: bool = True
) -> dict:  # of `collect`
    "Run what is missing of a grid."
    grid = GRIDS[name]
    for count in grid.counts:  # drawn once, before several processes read them
        data = open_dataset("rooms", DATA, "train", count=count, size=grid.size, progress=progress)
    held_out(grid, progress)
    open_dataset("rooms", DATA, "held_out", count=CHOOSING, size=grid.size, progress=progress)
    spread(name, "pilot", pilot(grid), gpus, progress)
    spread(name, "grid", jobs(grid, best_rates(grid, name)), gpus, progress)
    spread(name, "second", second_jobs(grid, name), gpus, progress)
    results = collect(name)
    if not results["baselines"]:
        results["baselines"] = {"median map": judge(grid, ConstantPredictor(median_depth(data, progress)))}
        write_report(RUNS / name / "results.json", results)
    return results


def spread(name: str, phase: str, todo: list[Job], gpus: int, progress: bool) -> None:
    "The jobs in this process, or shared out over one process a GPU. Raises `RuntimeError` when one of those failed."
    if gpus == 1:
        return run_all(name, todo, progress=progress)
    command = [sys.executable, __file__, "--grid", name, "--phase", phase]
    workers = [
        subprocess.Popen(
            [*command, "--share", f"{number}/{gpus}"], env=os.environ | dict(CUDA_VISIBLE_DEVICES=str(number))
        )
        for number in range(gpus)
    ]
    if failed := [number for number, worker in enumerate(workers) if worker.wait()]:
        raise RuntimeError(
            f"The runs on GPU {', '.join(map(str, failed))} failed; what they said stands above. Start the same "
            f"command again: finished runs are kept."
        )


def summary(results: dict) -> str:
    "One line a network, rate and count: mean ± standard deviation over the seeds."
    lines = [
        f"{'':12} {'rate':>6} {'rooms':>7} {'runs':>5} {'AbsRel':>16} {'δ<1.25':>16} {'wall tilt °':>14} "
        f"{'wall bend %':>14}"
    ]
    spread_of = lambda values: f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    for network in NETWORKS:
        for kind, count in [("runs", count) for count in results["setting"]["counts"]] + [
            ("second", count) for count in results["setting"]["counts"]
        ]:
            rows = [row for row in results[kind] if (row["network"], row["count"]) == (network, count)]
            if rows:
                columns = [
                    spread_of([row[key] for row in rows]) for key in ("abs_rel", "delta1", "wall_tilt", "wall_bend")
                ]
                lines.append(
                    f"{network:12} {rows[0]['rate']:6g} {count:7} {len(rows):5} {columns[0]:>16} {columns[1]:>16} "
                    f"{columns[2]:>14} {columns[3]:>14}"
                )
    for name, row in results["baselines"].items():
        lines.append(
            f"{name:12} {'':6} {'':7} {'':5} {row['abs_rel']:>16.3f} {row['delta1']:>16.3f} "
            f"{row['wall_tilt']:>14.3f} {row['wall_bend']:>14.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, help="which grid to run; without it nothing is trained")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU of its own")
    parser.add_argument("--phase", choices=("pilot", "grid", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.share:
        grid = GRIDS[asked.grid]
        number, processes = map(int, asked.share.split("/"))
        todo = dict(
            pilot=lambda: pilot(grid),
            grid=lambda: jobs(grid, best_rates(grid, asked.grid)),
            second=lambda: second_jobs(grid, asked.grid),
        )[asked.phase]()
        run_all(asked.grid, todo, (number, processes), progress=number == 0)
    elif asked.grid:
        print(summary(finish(asked.grid, gpus=asked.gpus)))
    else:
        for name in GRIDS:
            results = collect(name)
            print(
                f"{name}: {results['missing']} runs missing"
                + ("; --grid " + name + " runs them" if results["missing"] else "")
            )
            if results["runs"]:
                print(summary(results))
