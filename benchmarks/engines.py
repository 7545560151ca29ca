"""Engines and precisions behind a predictor, on the CPU: time, memory, error. `python benchmarks/engines.py [--models
dpt_tiny_scenes dpt_base] [--folder 100] [--out engines.json]`.

For each model and each pair of engine and precision a row: the median time for an image of the network's own size,
called in turn with torch in float32, and the ratio (above 1: faster than torch); peak memory of a process that opens
the predictor and predicts, above what importing the library takes; and the error.
The error of weights that come along: AbsRel and δ < 1.25 on rendered rooms that were not seen in training, and how
much larger AbsRel is than torch's in float32. A model without weights here gets random ones, and there is no metric
without weights: the largest difference to torch in float32 is given, as a fraction of the range of its answer.
int8 is calibrated on other rooms, and chosen as in nbs/deploy/quantization.ipynb; of random weights, which say nothing
of errors, everything is rounded.
`--folder N`: a folder of N photographs (rendered, 240×320, JPEG) to 16-bit PNGs, images a second of processor time;
opening the predictor, to its first answer, counts apart.
Each row is a process, and is saved when it is there: started again with the same --out, only what is missing, or was
measured with other options or versions, is measured. Files of engines are kept in --cache.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path

WAYS = [
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("onnx", "float32"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
]


def is_trained(name):
    "Whether weights come along, or are in a folder of that name."
    from dpt_nb.network.named import SHIPPED

    return Path(name).exists() or (SHIPPED / name).is_dir()


def opened_model(job):
    "With the weights that are here, or with random ones, the same at each call."
    import torch

    from dpt_nb.network.zoo import create_model
    from dpt_nb.weights.load import load_checkpoint

    if is_trained(job["model"]):
        return load_checkpoint(job["model"]).eval()
    torch.manual_seed(0)
    return awake(create_model(job["model"]).eval(), Path(job["cache"]) / f"{job['model']}-answer.json")


def awake(model, kept):
    "Random weights whose answer varies: untrained depth heads mostly end at ReLU's 0."
    import torch

    last = next(iter(model.heads.values())).convolution3
    if not kept.exists():  # in a process that measures memory it does: a pass in float32 would be what it finds
        kept.parent.mkdir(parents=True, exist_ok=True)
        save(kept, answer_of(model, last))
    mean, deviation = json.loads(kept.read_text(encoding="utf-8"))
    with torch.no_grad():
        last.weight.div_(deviation)
        last.bias.sub_(mean).div_(deviation).add_(2)
    return model


def answer_of(model, last):
    "Mean and standard deviation of what the last convolution says of noise."
    import torch

    found = []
    hook = last.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(torch.rand(1, 3, *model.config.image_size, generator=torch.Generator().manual_seed(0)))
    hook.remove()
    return [found[0].mean().item(), found[0].std().item()]


def rooms(job, split, count):
    "Rendered rooms, kept in the cache."
    from dpt_nb.data.scene_sets import Scenes

    return Scenes(job["cache"], "rooms", count, split, joint=True)  # as the network that comes along numbers them


def calibrated(job, model):
    "What int8 is opened with; None for other precisions. Made at the first time."
    if job["precision"] != "int8":
        return None
    from dpt_nb.deploy.quantization import Choice, quantize

    split = rooms(job, "train", job["calibration"])
    images = [split[place]["image"] for place in range(len(split))]
    choice = Choice() if is_trained(job["model"]) else Choice(tolerance=inf, left_out=((),))
    return quantize(model, images, job["engine"], job["cache"], choice)


def opened(job, model, engine=None, precision=None, calibration=None):
    "The predictor of a row, or that of another engine."
    from dpt_nb.inference.predictor import Predictor

    if engine is None and calibration is None:
        calibration = calibrated(job, model)
    options = dict(engine=engine or job["engine"], precision=precision or job["precision"], cache=job["cache"])
    return Predictor(model, "cpu", calibration=calibration, **options)


def picture(model):
    "An image of the network's own size."
    from dpt_nb.scenes.raycast import render
    from dpt_nb.scenes.scenes import random_scene

    return render(random_scene("rooms", 12, tuple(model.config.image_size)))["image"][None]


def prepare(job):
    "Write what the engine needs."
    model = opened_model(job)
    calibration = calibrated(job, model)
    opened(job, model, calibration=calibration).predict(picture(model))
    return {} if calibration is None else dict(chosen=calibration.facts["chosen"])


def memory(job):
    "Peak bytes above importing."
    import torch

    import dpt_nb.deploy.predictor_engines
    import dpt_nb.deploy.quantization
    import dpt_nb.weights.load  # noqa: F401
    from dpt_nb.training.dry_run import peak_memory

    if job["engine"] != "torch":
        __import__({"onnx": "onnxruntime"}.get(job["engine"], job["engine"]))
    before = peak_memory(torch.device("cpu"))
    model = opened_model(job)
    predictor, image = opened(job, model), picture(model)
    for _ in range(3):
        predictor.predict(image)
    return dict(memory=peak_memory(torch.device("cpu")) - before)


def speed(job):
    "Milliseconds of the row and of torch in float32, in turn."
    model = opened_model(job)
    predictors, image = [opened(job, model, "torch", "float32"), opened(job, model)], picture(model)
    spans = [[], []]
    for turn in range(job["repeats"] + 2):
        for own, predictor in zip(spans, predictors):
            begun = time.perf_counter()
            predictor.predict(image)
            if turn >= 2:
                own.append(1000 * (time.perf_counter() - begun))
    torch_time, own_time = map(statistics.median, spans)
    return dict(torch_milliseconds=torch_time, milliseconds=own_time, size=list(image.shape[-2:]))


def error(job):
    "The metrics on unseen rooms, or the largest difference to torch in float32."
    model = opened_model(job)
    plain, own = opened(job, model, "torch", "float32"), opened(job, model)
    if not is_trained(job["model"]):
        return dict(difference=max(largest_difference(plain, own, picture(model)).values()))
    from dpt_nb.deploy.quantization import quantization_error, usual_protocol
    from dpt_nb.evaluation.protocols import PROTOCOLS

    metric = usual_protocol(model).align is None
    protocol = PROTOCOLS["rooms"] if metric else usual_protocol(model)
    rows = quantization_error(plain, own, rooms(job, "held_out", job["scenes"]), protocol)
    return dict(
        abs_rel=rows["after"]["abs_rel"], delta1=rows["after"]["delta1"], abs_rel_change=rows["change"]["abs_rel"]
    )


def largest_difference(plain, own, image):
    "For each head, as a fraction of the range."
    from dpt_nb.deploy.engines import share_of_range

    wanted, found = plain.predict(image), own.predict(image)
    return {head: share_of_range(found[head], values) for head, values in wanted.items()}


def folder(job):
    "Photographs in, 16-bit PNGs out."
    from dpt_nb.images.images import write_image
    from dpt_nb.inference.folders import RunOptions, predict_files
    from dpt_nb.scenes.raycast import render
    from dpt_nb.scenes.scenes import random_scene

    photographs = Path(job["cache"]) / f"photographs-{job['folder']}"
    photographs.mkdir(parents=True, exist_ok=True)
    for seed in range(job["folder"]):
        if not (photographs / f"{seed:04}.jpg").exists():
            write_image(photographs / f"{seed:04}.jpg", render(random_scene("rooms", 9000 + seed, (240, 320)))["image"])
    calibration = calibrated(job, opened_model(job))
    begun = time.process_time()
    predictor = opened(job, opened_model(job), calibration=calibration)
    predictor(photographs / "0000.jpg")  # engines open their file at the first image
    ready = time.process_time()
    with tempfile.TemporaryDirectory() as results:
        written, bad = predict_files(predictor, [photographs], results, RunOptions(outputs=("png",)), left=[])
        done = time.process_time()
    if bad or len(written) != job["folder"]:
        raise RuntimeError(f"{len(written)} of {job['folder']} photographs were predicted: {bad[:1]}")
    return dict(opening_seconds=ready - begun, images_a_second=job["folder"] / (done - ready))


TASKS = dict(prepare=prepare, memory=memory, speed=speed, error=error, folder=folder)


def ask(task, job, threads):
    "What a process of its own finds; raises with its last words."
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    here = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    words = [sys.executable, __file__, "--task", task, "--job", json.dumps(job)]
    environment = os.environ | variables | dict(PYTHONPATH=paths, OMP_WAIT_POLICY="PASSIVE")
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} ended with code {done.returncode}; what it printed stands above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def save(path, rows):
    "Whole or not at all."
    from dpt_nb.images.files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(chosen):
    "Every row that is not there, saved as it comes."
    rows = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    tasks = ["prepare", "memory", "speed", "error"] + (["folder"] if chosen.folder else [])
    setting = {name: getattr(chosen, name) for name in ("threads", "repeats", "scenes", "calibration", "folder")}
    setting |= dict(versions=versions(), machine=platform.processor() or platform.machine(), cores=os.cpu_count())
    wanted = [
        (model, *way) for model in chosen.models for way in WAYS if not chosen.engines or way[0] in chosen.engines
    ]
    for number, (model, engine, precision) in enumerate(wanted, 1):
        key = f"{model} {engine} {precision}"
        if rows.get(key, {}).get("setting") != setting:
            rows[key] = dict(model=model, engine=engine, precision=precision, setting=setting)
        row = rows[key]
        job = dict(model=model, engine=engine, precision=precision, cache=str(chosen.cache.absolute()))
        job |= dict(repeats=chosen.repeats, scenes=chosen.scenes, calibration=chosen.calibration, folder=chosen.folder)
        for task in tasks:
            if task in row.get("done", []):
                continue
            begun = time.time()
            try:
                row |= ask(task, job, chosen.threads)
            except RuntimeError as reason:
                row["failed"] = f"{task}: {reason}"
                save(chosen.out, rows)
                print(f"{number} of {len(wanted)}: {model} {engine} {precision}: {row['failed']}", file=sys.stderr)
                break
            row["done"] = [*row.get("done", []), task]
            row.pop("failed", None)
            save(chosen.out, rows)
            told = f"{number} of {len(wanted)}: {model} {engine} {precision}: {task} in {time.time() - begun:.0f} s"
            print(told, file=sys.stderr, flush=True)
    return [rows[" ".join(key)] for key in wanted]


def cell(row, name, form, factor=1.0):
    "A number, or a dash."
    return form.format(factor * row[name]) if name in row else "–"


def error_words(row):
    "The metrics, or the difference."
    if "abs_rel" in row:
        return f"AbsRel {row['abs_rel']:.4f} ({row['abs_rel_change']:+.2%}), δ1 {row['delta1']:.4f}"
    return f"{row['difference']:.1e} of the range, random weights" if "difference" in row else row.get("failed", "–")


def left_words(row):
    "What stays in floats."
    if "chosen" not in row:
        return ""
    chosen = row["chosen"]
    return f" ({', '.join(chosen['left_out']) or 'nothing'} in {chosen['rest']})"


def print_table(rows, with_folder):
    "Markdown."
    heads = ["model", "engine, precision", "ms", "torch / engine", "memory, MiB", "error"]
    heads += ["folder: images a processor second", "opening, s"] if with_folder else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        ratio = row["torch_milliseconds"] / row["milliseconds"] if "milliseconds" in row else None
        cells = [
            row["model"],
            f"{row['engine']} {row['precision']}{left_words(row)}",
            cell(row, "milliseconds", "{:.1f}"),
        ]
        cells += ["–" if ratio is None else f"{ratio:.2f}", cell(row, "memory", "{:.0f}", 2**-20), error_words(row)]
        cells += [cell(row, "images_a_second", "{:.2f}"), cell(row, "opening_seconds", "{:.1f}")] if with_folder else []
        print(f"| {' | '.join(cells)} |")


def versions():
    "Of what computes."
    found = []
    for name in ("torch", "onnxruntime", "openvino", "nncf"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dpt_tiny_scenes"], help="names of the zoo, or saved models")
    parser.add_argument("--engines", nargs="+", choices=["torch", "onnx", "openvino"], help="default: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=60, help="unseen rooms for the error")
    parser.add_argument("--calibration", type=int, default=32, help="rooms that int8 is calibrated on")
    parser.add_argument("--folder", type=int, default=0, help="photographs in a folder, 0: none")
    parser.add_argument("--cache", type=Path, default=Path("runs/engines"), help="for files of engines and scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/engines.json"), help="rows, as they come")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.task:
        print(json.dumps(TASKS[chosen.task](chosen.job)))
        sys.exit()
    print(f"CPU, {chosen.threads} threads, {versions()}; median of {chosen.repeats} calls in turn with torch float32\n")
    print_table(measure(chosen), chosen.folder)
