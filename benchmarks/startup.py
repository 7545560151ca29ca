"""How long, and how much memory, does an import take beside that of torch and timm, which no prediction does without?

    python benchmarks/startup.py [--rounds 7]

Each import in a process of its own, all of them in turn; medians of the seconds that pass, of the processor's, and of
the memory that the process has afterwards. `--bare` makes an environment without packages that are not required: links
to all others, in a folder for temporary files. torchmetrics imports scipy and transformers where they are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CASES = {
    "torch and timm": "import torch, timm",
    "Predictor": "from dpt_nb.inference import Predictor",
    "dpt_nb.all": "import dpt_nb.all",
    "one name of dpt_nb.all": "from dpt_nb.all import Predictor",
    "the star": "from dpt_nb.all import *",
    "torch, timm and torchmetrics": "import torch, timm, torchmetrics",
    "the commands": "import dpt_nb.commands",
}
NOT_REQUIRED = ("scipy", "transformers", "pandas", "sklearn", "datasets", "peft", "onnxscript", "onnx")
PROGRAM = """
import time
begin = time.perf_counter()
{statement}
seconds = time.perf_counter() - begin
import json, os
try:
    memory = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
except OSError:
    import psutil
    memory = psutil.Process().memory_info().rss
print(json.dumps([seconds, time.process_time(), memory]))
"""


def measure(statement, environment, options):
    "Seconds, processor seconds and bytes of a fresh process."
    words = [sys.executable, *options, "-c", PROGRAM.format(statement=statement)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def without(packages, folder):
    "An environment whose packages are links to those of this one, but for some."
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = path.name.lower().replace("-", "_")
        if path.suffix != ".pth" and not any(name == each or name.startswith(f"{each}_") for each in packages):
            if not any(name.startswith(f"{each}.") for each in packages):
                (folder / path.name).symlink_to(path)
    library = Path(__file__).resolve().parent.parent
    return os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, (library, folder))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bare", action="store_true", help="without what is not required")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = without(NOT_REQUIRED, Path(folder)) if given.bare else dict(os.environ)
        options = ["-S"] if given.bare else []
        rounds = {name: [] for name in CASES}
        for turn in range(given.rounds + 1):  # the first warms up
            for name, statement in CASES.items():
                found = measure(statement, environment, options)
                if turn:
                    rounds[name].append(found)
    middle = {name: [statistics.median(column) for column in zip(*found)] for name, found in rounds.items()}
    seconds, processor, memory = middle["torch and timm"]
    print("| | seconds | processor seconds | times torch and timm | memory | more than theirs |")
    print("|---|---|---|---|---|---|")
    for name, (passed, used, held) in middle.items():
        print(
            f"| {name} | {passed:.2f} | {used:.2f} | {used / processor:.2f} | {held / 2**20:.0f} MiB "
            f"| {(held - memory) / 2**20:+.0f} MiB |"
        )


if __name__ == "__main__":
    main()
