"""Exported forms beside the model itself, in turn in the same process, on the CPU: `python benchmarks/export.py
[--models dpt_tiny_scenes] [--threads 1]`.

Prints the median time of each form for one picture of the network's own size, and the ratio model / form (above 1:
the form is faster).
Random weights, except for a model whose weights come along.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from dpt_nb.deploy.engines import open_export
from dpt_nb.deploy.export import export, export_facts
from dpt_nb.network.zoo import create_model, list_models

FORMS = {
    "onnx, any size": ("onnx", False),
    "onnx, one size": ("onnx", True),
    "torch_export, one size": ("torch_export", True),
    "compiled, one size": ("compiled", True),
}


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def opened(path, threads):
    "The form as a function; ONNX Runtime with as many threads as torch has."
    if path.suffix != ".onnx":
        return open_export(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()})


def measure(name, forms, repeats, threads):
    "Median seconds of the model and of each form, called in turn."
    torch.manual_seed(0)
    model = create_model(name, pretrained=name == "dpt_tiny_scenes").eval()
    size = tuple(model.config.image_size)
    image = torch.rand(1, 3, *size)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"the model": model}
        for label in forms:
            form, fixed = FORMS[label]
            start = time.perf_counter()
            path = export(
                model,
                Path(folder) / (label.replace(", ", "-").replace(" ", "-") + (".onnx" if form == "onnx" else ".pt2")),
                form,
                size if fixed else "any",
                1 if fixed else None,
            )
            print(
                f"  {label}: written in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB, "
                f"for {export_facts(path)['sizes']}",
                flush=True,
            )
            runs[label] = opened(path, threads)
        spans = {label: [] for label in runs}
        with torch.inference_mode():
            for round in range(repeats + 2):
                for label, run in runs.items():
                    span = seconds(lambda: run(image))
                    if round >= 2:
                        spans[label].append(span)
    return {label: statistics.median(found) for label, found in spans.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dpt_tiny_scenes"], choices=list_models(), metavar="NAME")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"CPU, {chosen.threads} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    for name in chosen.models:
        print(name)
        found = measure(name, chosen.forms, chosen.repeats, chosen.threads)
        for label, span in found.items():
            print(f"{label:26}{1000 * span:10.1f} ms{found['the model'] / span:8.2f}")
