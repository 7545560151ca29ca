"""What token merging costs, on our trained weights, and what it saves, on DPT-Base.

    python benchmarks/token_merging.py [--scenes 60] [--repeats 9]

Errors: `dpt_tiny_scenes` on rooms that it was not trained on, at the size that it was trained at and at twice that, in
metres as it says them and with a scale and a shift fitted to each image. Time: whole forward passes of `dpt_base` with
random weights at 384×384, one thread, all shares called in turn; medians, and what each share leaves of the whole and
of the trunk alone.
"""

import argparse
import statistics
import tempfile
import time

import torch

from dpt_nb.data.registry import open_dataset
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.token_merging import TokenMerging
from dpt_nb.network.zoo import create_model
from dpt_nb.objective.alignment import align_scale_shift
from dpt_nb.objective.metrics import depth_errors

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def scores(predictor, scenes):
    "AbsRel and δ1 in metres as they are predicted, and with a scale and a shift fitted to each image."
    rows = []
    for scene in scenes:
        truth = scene["depth"][None]
        metres = predictor.predict(scene["image"][None])["depth"]
        fitted = align_scale_shift(metres, truth, truth > 0)
        both = [depth_errors(each, truth, max_depth=10.0) for each in (metres, fitted)]  # as the protocol of rooms
        rows.append([each[name].item() for each in both for name in ("abs_rel", "delta1")])
    return [statistics.mean(column) for column in zip(*rows)]


def errors(count, folder):
    "(height, width) → share → what `scores` gives."
    model, found = create_model("dpt_tiny_scenes", pretrained=True), {}
    for size in ((96, 128), (192, 256)):
        scenes = open_dataset("rooms", folder, "held_out", count=count, size=size, progress=False)
        found[size] = {
            share: scores(Predictor(model, "cpu", size=size, merge_tokens=share), scenes) for share in SHARES
        }
    return found


def span(call):
    "Seconds that pass, and the processor's."
    begin, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - used


@torch.inference_mode()
def seconds(repeats):
    "Share → median seconds of a forward pass and of its trunk, each passed and the processor's."
    torch.manual_seed(0)
    model, image = create_model("dpt_base").eval(), torch.rand(1, 3, 384, 384)
    spans = {share: ([], []) for share in SHARES}
    for turn in range(repeats + 1):  # the first warms up
        for share, (whole, trunk) in spans.items():
            merging = TokenMerging(model, share)
            found = span(lambda: merging(image)), span(lambda: merging.taps_of(image))
            if turn:
                whole.append(found[0]), trunk.append(found[1])
    middle = lambda found: [statistics.median(column) for column in zip(*found)]
    return {share: (middle(whole), middle(trunk)) for share, (whole, trunk) in spans.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for size, rows in errors(given.scenes, folder).items():
            print(f"\n{size[0]}×{size[1]}\n| merged | AbsRel | δ < 1.25 | AbsRel, fitted | δ < 1.25, fitted |")
            print("|---|---|---|---|---|")
            for share, row in rows.items():
                print(f"| {share:.0%} | {' | '.join(f'{each:.4f}' for each in row)} |", flush=True)
    found = seconds(given.repeats)
    (_, whole), (_, trunk) = found[0.0]
    print("\n| merged | seconds | processor seconds | of unmerged | trunk of unmerged |\n|---|---|---|---|---|")
    for share, ((passed, used), (_, inner)) in found.items():
        print(f"| {share:.0%} | {passed:.2f} | {used:.2f} | {used / whole:.2f} | {inner / trunk:.2f} |")


if __name__ == "__main__":
    main()
