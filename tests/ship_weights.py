"""The library's own weights from a finished run: judged, given a card, and put into the package. From nothing, in
about an hour on two cores:

dpt_train scenes_tiny --out runs/scenes
python tests/ship_weights.py runs/scenes
"""

import json
import sys
from pathlib import Path

import torch

from dpt_nb.data.registry import open_dataset
from dpt_nb.evaluation.evaluate import ConstantPredictor, evaluate, median_depth
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT

SHIPPED = Path(__file__).resolve().parent.parent / "dpt_nb" / "weights" / "dpt_tiny_scenes"
FIGURES = ("abs_rel", "rmse", "delta1", "miou", "pixel_accuracy")
BORN = """
**How it came about.** Recipe `scenes_tiny`, seed {seed}: {steps} steps of {batch} rooms and streets, drawn by
`scenes.scenes`, no other data; {hours:.1f} hours on {device} ({processes} process; torch {torch}). To do it again:
`dpt_train scenes_tiny --out runs/scenes`, then `python tests/ship_weights.py runs/scenes`; another machine adds
numbers in another order and ends with slightly others.

**How it was judged.** 200 rooms and 200 streets that it has not seen, depth by the protocols `rooms` (to 10 m) and
`streets` (to 80 m). "median map" is a map that never looks at the picture: the median depth of 1000 training scenes
at each pixel. It knows these scenes and nothing else: on photographs it is at a loss.

Licence: Apache 2.0.
"""


def judge(model: DPT, data_root: str = "data", progress: bool = True) -> dict:
    "Held-out figures on each kind of scene, beside the median map's."
    figures = {}
    for kind in ("rooms", "streets"):
        held_out = open_dataset(kind, data_root, "held_out", progress=progress, count=200, joint=True)
        seen = evaluate(Predictor(model, "cpu"), held_out, PROTOCOLS[kind], progress=progress)
        train = open_dataset(kind, data_root, "train", progress=progress, count=1000)
        blind = evaluate(
            ConstantPredictor(median_depth(train, progress=progress)),
            open_dataset(kind, data_root, "held_out", progress=progress, count=200),
            PROTOCOLS[kind],
            progress=progress,
        )
        figures |= {
            kind: {name: seen[name] for name in FIGURES},
            f"{kind}, median map": {name: blind[name] for name in FIGURES if name in blind},
        }
    return figures


def ship(run: Path, data_root: str) -> None:
    "Judge, write folder and card."
    report, recipe = (
        json.loads((run / "report.json").read_text(encoding="utf-8")),
        json.loads((run / "config.json").read_text(encoding="utf-8"))["recipe"],
    )
    if recipe["name"] != "scenes_tiny":
        sys.exit(f"{run} is a run of {recipe['name']}, not of scenes_tiny.")
    model = DPT.from_pretrained(run / "model")
    model.save_pretrained(SHIPPED, figures=judge(model, data_root))
    card = SHIPPED / "README.md"
    text = card.read_text(encoding="utf-8").replace(
        'load_checkpoint("this folder")', 'create_model("dpt_tiny_scenes", pretrained=True)'
    )
    card.write_text(
        text.rstrip()
        + "\n"
        + BORN.format(
            seed=recipe["seed"],
            steps=f"{recipe['loop']['steps']:,}",
            batch=recipe["data"]["batch_size"],
            hours=report["train_seconds"] / 3600,
            device=report["device"],
            processes=report["processes"],
            torch=torch.__version__,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    ship(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "data")
