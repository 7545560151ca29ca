"""Exact depth of few rooms, or a teacher's labels of many: which makes the better small network?

    python benchmarks/distillation.py [STEPS] [SEED ...]

A student of half the teacher's size that sees a quarter of its pixels learns from the renderer's depth of 24 rooms, or
from what the network that comes along says of 240 images of other rooms: the same number of steps (1000 by default,
seeds 0 to 2), recipe, augmentation and loss. AbsRel, scale and shift fitted to each image, over 60 rooms that neither
has seen; every network is evaluated once, when its training has ended.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dpt_nb.data.image_streams import StoredImage
from dpt_nb.data.pseudo_labels import MANIFEST, PseudoLabel, finish_labels, write_facts, write_shard
from dpt_nb.data.registry import open_dataset
from dpt_nb.data.scene_sets import DEPTH_SCALE, render_scenes
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.images.images import read_depth
from dpt_nb.inference.predictor import Predictor
from dpt_nb.objective.losses import to_inverse_depth
from dpt_nb.training.distillation import distillation_recipe, label_images
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.load import load_checkpoint

FEW, MANY = 24, 240
STUDENT = dict(
    taps=["stages.0", "stages.1", 0, 1],
    channels=[32, 64, 192, 192],
    features=16,
    image_size=[48, 64],
    backbone_arguments=dict(depth=2, resnet=dict(layers=[1, 1, 1], channels=[32, 64, 128])),
    heads={"inverse_depth": dict(hidden=16)},
)


def student_recipe(seed, steps):
    "The same for both ways."
    changes = dict(model=dict(changes=STUDENT), data=dict(batch_size=8), loop=dict(steps=steps))
    base = get_recipe("rooms_tiny", **changes, seed=seed)
    rarely = replace(base.keep, validate_every=steps, validate_on=1, save_steps=steps, pictures=0, best=False)
    return distillation_recipe(replace(base, keep=rarely))


def exact_labels(scenes, folder):
    "The renderer's depth as labels."
    folder.mkdir()
    samples = []
    for path in sorted((scenes / "rgb").iterdir()):
        depth = read_depth(scenes / "depth" / path.name, DEPTH_SCALE["rooms"])
        stored = StoredImage(path.stem, path.suffix, path.read_bytes())
        samples.append((path.stem, stored, PseudoLabel(to_inverse_depth(depth))))
    write_facts(folder / MANIFEST, dict(teacher="the renderer"))
    write_shard(folder, 0, samples)
    finish_labels(folder)


def make_labels(folder):
    "Both sets of labels; a folder for each."
    for name, count, seed in (("measured", FEW, 5_000_000), ("photographed", MANY, 3_000_000)):
        render_scenes(folder / name, "rooms", count, seed=seed, progress=False)
    exact_labels(folder / "measured", folder / "exact")
    options = dict(cpu=True, shard_size=60, progress=False)
    label_images("dpt_tiny_scenes", folder / "photographed/rgb", folder / "teacher", **options)


def main():
    steps, *seeds = [int(word) for word in sys.argv[1:]] or [1000]
    seeds = seeds or [0, 1, 2]
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        make_labels(folder)
        held_out = open_dataset("rooms", folder, "held_out", count=60, joint=True, progress=False)
        found = {f"exact depth of {FEW} rooms": [], f"teacher's labels of {MANY}": []}
        print(f"{steps} steps of 8 images")
        for seed in seeds:
            for (way, errors), labels in zip(found.items(), ("exact", "teacher")):
                begin, run = time.process_time(), folder / f"{labels}-{seed}"
                train(student_recipe(seed, steps), run, folder / labels, cpu=True, workers=0, progress=False)
                student = Predictor(load_checkpoint(run / "model"), "cpu")
                errors.append(evaluate(student, held_out, PROTOCOLS["zero_shot"], progress=False)["abs_rel"])
                seconds = time.process_time() - begin
                print(f"{way:30} seed {seed}  AbsRel {errors[-1]:.3f} {seconds:6.0f} processor seconds", flush=True)
        for way, errors in found.items():
            print(f"{way:30} mean    AbsRel {mean(errors):.3f}")


if __name__ == "__main__":
    main()
