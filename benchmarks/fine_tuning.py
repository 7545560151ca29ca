"""Four ways to fine-tune one network on one task: error, processor seconds, memory, size of the file.

    python benchmarks/fine_tuning.py [IMAGES] [STEPS] [--short]

The network that comes along knows depth and classes of rendered scenes. It learns which way surfaces face from a few
rooms (64 by default, 200 steps of 8 images) without random augmentation, so that `decoder` asks
its trunk once an image. --short is 32 rooms and 60 steps: a few minutes of one core.
Memory is what weights, gradients, the optimizer's state and the activations of one step come to, see dry_run.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

from dpt_nb.training.distributed import open_accelerator
from dpt_nb.training.dry_run import way_cost
from dpt_nb.training.recipe_fields import WAYS, change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.train_state import open_run

NETWORK = ["model.weights=dpt_tiny_scenes", "model.name=dpt_tiny_scenes", 'losses={"normal": {}}', "data.transforms=[]"]
NETWORK += [
    'model.changes={"heads": {"normal": {"hidden": 16}}}',
    "data.train.normals=true",
    "data.held_out.normals=true",
]


def recipe_for(way, images, steps):
    "Normals on the network that comes along."
    rate = 5e-4 if way in ("full", "layer_decay") else 1.5e-3
    length = [f"loop.steps={steps}", "data.batch_size=8", f"optimizer.lr={rate}", f"keep.validate_every={steps}"]
    size = [f"data.train.count={images}", "data.held_out.count=64", "keep.pictures=0", "keep.best=false"]
    size.append("keep.report_images=0")
    return change_recipe(
        get_recipe("rooms_tiny"), [*NETWORK, *length, *size, f"tune.way={way}", "keep.save_steps=10000"]
    )


def row(way, home, images, steps, state):
    "Train once in a way."
    cost, out, begin = way_cost(state, way), Path(home) / way, time.process_time()
    report = train(recipe_for(way, images, steps), out, Path(home) / "data", cpu=True, workers=0, progress=False)
    seconds = time.process_time() - begin
    size = sum(path.stat().st_size for path in (out / "model").glob("*.safetensors"))
    print(
        f"{way:12} {report['mean_angle']:9.2f}° {seconds:8.1f} s {cost.bytes / 2**20:7.1f} MiB "
        f"{size / 1e6:6.1f} MB {cost.trained:11,}",
        flush=True,
    )


def main():
    given = [int(word) for word in sys.argv[1:] if word != "--short"]
    images, steps = given + [32, 60][len(given) :] if "--short" in sys.argv else given + [64, 200][len(given) :]
    warnings.filterwarnings("ignore")
    print(f"{'way':12} {'mean angle':>10} {'processor':>10} {'memory':>11} {'file':>9} {'learn':>11}")
    with tempfile.TemporaryDirectory() as home:
        accelerator = open_accelerator(True, "no")
        state = open_run(recipe_for("full", images, steps), Path(home) / "data", accelerator, progress=False)
        for way in WAYS:
            row(way, home, images, steps, state)


if __name__ == "__main__":
    main()
