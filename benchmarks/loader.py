"""How many images a second does one core bring through reader and transforms, beside the bare decoding of the same
files?

    python benchmarks/loader.py

Files in the published layouts and sizes are written to a temporary folder: KITTI (1242×375 PNG and 16-bit PNG), NYUv2
(640×480 JPEG and 16-bit PNG), ADE20K (683×512 JPEG and 8-bit PNG). They show scenes with a camera's grain added, so
that a file is about as large, and as slow to decode, as a photograph. Bare decoding is pillow's, into an array and no
further. The chain is timed as a training runs it (one resampling, from bytes), with one transform more at a time, and
at last step by step on indexed samples, in floats. All steps of a round are timed in turn on one thread, in processor
time;
the figures are medians over the rounds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpt_nb.data.one_resampling import OneResampling
from dpt_nb.data.registry import make_miniature, open_dataset
from dpt_nb.data.sampling import generator, stored_sample
from dpt_nb.data.transforms import NYU_WINDOW, ColorJitter, Compose, Crop, Flip, KBCrop, Pad, Rescale, Rotate

ROUNDS, REPEATS = 9, 4
STEPWISE = "step by step"
PIPELINES = {
    "kitti": (dict(), dict(), [KBCrop(), Rotate(), Flip(), Crop(352, 704), ColorJitter()]),
    "nyu": (
        dict(labeled=False),
        dict(),
        [NYU_WINDOW, Rotate(), Flip(), Crop(416, 544), ColorJitter(brightness=(0.75, 1.25))],
    ),
    "ade20k": (dict(size=(512, 683)), dict(), [Rescale(longer_side=520), Pad(480, 480), Crop(480, 480), Flip()]),
}


def add_grain(path, generator):
    "Noise of about three 8-bit steps, as a photograph has."
    picture = Image.open(path)
    pixels = np.asarray(picture).astype(np.int16) + generator.normal(0, 3, np.asarray(picture).shape).round().astype(
        np.int16
    )
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.save(path, **(dict(quality=90) if path.suffix == ".jpg" else {}))


def decode(entry):
    "The files of a sample, decoded and no more."
    return [np.asarray(Image.open(path)) for path in (entry.image, entry.depth, entry.label) if path]


def steps(dataset, transforms):
    "Everything that is timed: name → function of (round, index)."

    def timed(chain, read):
        return lambda turn, index: chain(read(dataset, index), generator(turn, index))

    tasks = {
        "decode": lambda turn, index: decode(dataset.entries[index]),
        "read": timed(OneResampling(), stored_sample),
    }
    for count in range(1, len(transforms) + 1):
        name = f"+ {type(transforms[count - 1]).__name__}"
        tasks[name] = timed(OneResampling(*transforms[:count]), stored_sample)
    return tasks | {STEPWISE: timed(Compose(*transforms), lambda dataset, index: dataset[index])}


def measure(dataset, transforms):
    "Seconds an image for each step, and of each the ratio of bare decoding to it: medians over rounds."
    tasks, indices = steps(dataset, transforms), range(len(dataset))
    rounds = []
    for turn in range(ROUNDS + 1):  # the first warms up
        taken = {}
        for name, task in tasks.items():
            start = time.thread_time()
            for repeat in range(REPEATS):
                for index in indices:
                    task(turn * REPEATS + repeat, index)
            taken[name] = (time.thread_time() - start) / (REPEATS * len(indices))
        rounds.append(taken)
    middle = lambda figure: {name: statistics.median(figure(taken, name) for taken in rounds[1:]) for name in tasks}
    return middle(lambda taken, name: taken[name]), middle(lambda taken, name: taken["decode"] / taken[name])


def main():
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, median of {ROUNDS} rounds")
    for name, (making, opening, transforms) in PIPELINES.items():
        with tempfile.TemporaryDirectory() as folder:
            root, generator = make_miniature(name, Path(folder) / name, count=8, **making), np.random.default_rng(0)
            dataset = open_dataset(name, root, "train", **opening)
            for entry in dataset.entries:
                add_grain(entry.image, generator)
            sizes = [
                sum(path.stat().st_size for path in (entry.image, entry.depth, entry.label) if path)
                for entry in dataset.entries
            ]
            seconds, ratios = measure(dataset, transforms)
        whole = list(seconds)[-2]
        print(
            f"\n{name}: {statistics.mean(sizes) / 1024:.0f} KiB a sample; {1 / seconds[whole]:.0f} images a second "
            f"and core, {ratios[whole]:.2f} of bare decoding; step by step {ratios[STEPWISE]:.2f}"
        )
        before = 0.0
        for step, taken in seconds.items():
            print(f"  {step:12} {1000 * taken:7.2f} ms" + (f"   ({1000 * (taken - before):+.2f})" if before else ""))
            before = taken if step != whole else 0.0


if __name__ == "__main__":
    main()
