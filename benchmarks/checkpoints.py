"""What a conversion of DPT-Large costs, beside reading its file with torch.load: `python benchmarks/checkpoints.py
[--model dpt_large]`.

A file with isl-org's names and random weights is written first. Each step runs in a process of its own; the time is
taken after the imports, the memory is the largest resident set of the process, imports included. Pages of a file that
is mapped count as resident.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = {
    "torch.load": "torch.load(home / 'source.pt', weights_only=True, map_location='cpu')",
    "isl-org → dpt_nb": "convert(home / 'source.pt', home / 'own', force=True)",
    "dpt_nb → isl-org": "convert(home / 'own', home / 'back.pt', to='isl-org', force=True)",
    "dpt_nb → transformers": "convert(home / 'own', home / 'hf', to='transformers', force=True)",
    "transformers → dpt_nb": "convert(home / 'hf', home / 'again', force=True)",
    "load_checkpoint": "load_checkpoint(home / 'source.pt', variant=name)",
}


def one_step(step, name, home):
    "Run in a child: seconds and largest resident set in bytes."
    import torch

    from dpt_nb.training.dry_run import peak_memory
    from dpt_nb.weights.load import load_checkpoint
    from dpt_nb.weights.write import convert

    start = time.perf_counter()
    kept = eval(STEPS[step], dict(torch=torch, convert=convert, load_checkpoint=load_checkpoint, home=home, name=name))
    spent = time.perf_counter() - start
    print(json.dumps(dict(seconds=spent, bytes=peak_memory(torch.device("cpu")))))
    del kept


def write_source(name, home):
    "A published model's file with random weights."
    import torch

    from dpt_nb.network.zoo import create_model
    from dpt_nb.weights.write import export_state_dict

    model = create_model(name)
    theirs, filled = export_state_dict("isl-org", model.config, model.state_dict())
    torch.save(theirs | filled, home / "source.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dpt_large")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written; default: the system's temporary folder")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        one_step(chosen.step[0], chosen.model, Path(chosen.step[1]))
        sys.exit()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        home = Path(folder)
        write_source(chosen.model, home)
        size = (home / "source.pt").stat().st_size
        measured = {step: [] for step in STEPS}
        for _ in range(chosen.repeats):
            for step in STEPS:
                words = [sys.executable, __file__, "--model", chosen.model, "--step", step, folder]
                measured[step].append(
                    json.loads(
                        subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                    )
                )
        read = statistics.median(each["seconds"] for each in measured["torch.load"])
        print(
            f"{chosen.model}, {size / 1e9:.2f} GB, medians of "
            f"{chosen.repeats}\n{'':24}{'seconds':>9}{'of torch.load':>15}{'peak memory of the file':>25}"
        )
        for step, found in measured.items():
            seconds, peak = (statistics.median(each[key] for each in found) for key in ("seconds", "bytes"))
            print(f"{step:24}{seconds:9.2f}{seconds / read:15.2f}{peak / size:25.2f}")
