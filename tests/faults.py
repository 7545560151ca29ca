"""Runs that are killed, at their n-th file operation or at a random moment; runs whose disk is full from their n-th
file operation on; and pairs of launches in one folder; and what became of them.
`python tests/faults.py FOLDER SEED OPERATIONS MOMENTS PAIRS WRITERS FULL` tries that many of each and prints a table.

Everything is imported once; each try is a fork of a process that has computed nothing yet, so that it takes seconds."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from forked import free_port, quick_figures

STEPS = 4
WORDS = [
    f"loop.steps={STEPS}",
    "data.batch_size=2",
    "keep.validate_every=2",
    "keep.save_steps=1",
    "keep.save_total_limit=2",
    "keep.pictures=1",
    "data.train.count=4",
    "data.held_out.count=2",
    "loop.ema=0.5",
]
COUNTED = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
)


class Fault:
    "Counts the file operations below a folder; kills the process before the n-th, or has the disk full from there on."

    def __init__(self, folder, at=None, full=False):
        self.folder, self.at, self.full, self.count = f"{folder}{os.sep}", at, full, 0
        fsync = os.fsync
        os.fsync = lambda file: (self.note(True), fsync(file))[1]  # is no audit event
        sys.addaudithook(self.intermediates)

    def intermediates(self, event, words):
        if event in COUNTED and any(
            isinstance(word, (str, Path)) and f"{word}{os.sep}".startswith(self.folder) for word in words
        ):
            writing = event == "os.mkdir" or (event == "open" and bool(words[2] & (os.O_WRONLY | os.O_RDWR)))
            self.note(writing and not str(words[0]).endswith(".lock"))

    def note(self, writing):
        self.count += 1
        if self.at and self.full and self.count >= self.at and writing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.at and not self.full and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(out, end, at=None, environment=None, full=False, **options):
    "In a fork: train, and leave in a file how it ended and how many file operations it took."
    from dpt_nb.training.recipe_fields import change_recipe
    from dpt_nb.training.recipes import get_recipe
    from dpt_nb.training.run import train

    child = os.fork()
    if child:
        return child
    said, fault = "done", None
    try:
        os.environ.update(environment or {})
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        fault = Fault(out, at, full)
        options = dict(cpu=True, workers=0, progress=False) | options
        train(change_recipe(get_recipe("rooms_tiny"), WORDS), out, out.parent / "data", **options)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    if fault:
        fault.at = None  # what follows is not the run's
    end.write_text(json.dumps([said, fault.count if fault else 0]))
    os._exit(0)


def ended(child, end):
    "Wait for a fork: how it ended, and its file operations; after a kill nothing."
    os.waitpid(child, 0)
    found = json.loads(end.read_text()) if end.exists() else ("killed", 0)
    end.unlink(missing_ok=True)
    return found


def launch(out, processes, at=None, after=None, **options):
    """As many processes as one launch has, killed at a file operation of the first or after some seconds: how the first
    ended."""
    port, children = str(free_port()), []
    for rank in range(processes):
        own = dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=processes,
            LOCAL_WORLD_SIZE=processes,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        environment = {name: str(value) for name, value in own.items()} if processes > 1 else {}
        children.append(run(out, out.with_suffix(f".{rank}"), at if rank == 0 else None, environment, **options))
    if after is not None:
        time.sleep(after)
        for child in children:
            os.kill(child, signal.SIGKILL)
    first = ended(children[0], out.with_suffix(".0"))
    for rank, child in enumerate(children[1:], 1):
        if first[0] != "done":
            os.kill(child, signal.SIGKILL)
        ended(child, out.with_suffix(f".{rank}"))
    return first


def left(out):
    "What a run left that has to be the same however often it was killed."
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text())
    files = {name: (out / name / "model.safetensors").read_bytes() for name in ("best", "model")}
    strange = sorted(
        path.name for path in [*out.glob(".*"), *out.glob("*/.*"), *out.glob("**/*.aside")] if path.name != ".lock"
    )
    return dict(
        rows=[{name: value for name, value in row.items() if name != "images_per_second"} for row in rows],
        report={name: value for name, value in report.items() if name != "train_seconds"},
        files=files,
        leftovers=strange,
        names=sorted(path.name for path in out.iterdir()),
        states=sorted(path.name for path in (out / "checkpoints").iterdir()),
    )


def compared(out, reference):
    "What is not as in the undisturbed run; empty where all is."
    try:
        found = left(out)
    except (OSError, ValueError) as error:
        return f"lost: {error}"
    return ", ".join(f"{name} differ" for name in reference if found[name] != reference[name])


def go_on(out, processes):
    "Resume, or start anew where there is nothing to go on with."
    said, _ = launch(out, processes, resume=True)
    if said.startswith("TrainingError: There is no run"):
        return "started anew", launch(out, processes)[0]
    return "resumed", said


def killed(folder, name, reference, processes, kills):
    "A run with one kill after the other, each `dict(at=…)` or `dict(after=…)`, and then none."
    out, ways = folder / name, []
    for number, kill in enumerate(kills):
        exists = (out / "config.json").exists()
        said, _ = launch(out, processes, **kill, resume=exists)
        ways.append(said if said in ("killed", "done") else f"at kill {number}: {said}")
    way, said = go_on(out, processes)
    wrong = compared(out, reference) if said == "done" else said
    shutil.rmtree(out, ignore_errors=True)
    return dict(
        kind=f"killed, {processes} process{'es' if processes > 1 else ''}", kills=kills, ways=ways, way=way, wrong=wrong
    )


def full_disk(folder, name, reference, at):
    """A run whose disk is full from an operation on: one sentence, nothing damaged, nothing left over; then the disk
    has room again."""
    out = folder / name
    said, _ = launch(out, 1, at, full=True)
    wrong = (
        ""
        if said.startswith("TrainingError: ") and "No space left on device" in said and "\n" not in said
        else f"it ended with {said}"
    )
    strange = [path.name for path in [*out.glob(".*"), *out.glob("*/.*")] if path.name != ".lock"]
    way, ended_with = go_on(out, 1)
    wrong += f" left over: {strange}" * bool(strange) + (
        compared(out, reference) if ended_with == "done" else ended_with
    )
    shutil.rmtree(out, ignore_errors=True)
    return dict(kind="full disk", kills=[dict(at=at)], ways=[said], way=way, wrong=wrong)


def two_writers(folder, name, reference, way):
    "Two launches at once in a new folder; or one that comes while the other is at work, to resume or to replace."
    out, later = folder / name, {} if way == "both new" else {way: True}
    children = [run(out, out.with_suffix(".0"))]
    if later:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    children.append(run(out, out.with_suffix(".1"), **later))
    ends = [ended(child, out.with_suffix(f".{number}"))[0] for number, child in enumerate(children)]
    refused = [said for said in ends if said != "done"]
    wrong = compared(out, reference)
    if len(refused) != 1 or "is being written by process" not in refused[0]:
        wrong = f"{wrong}; ended with {ends}"
    shutil.rmtree(out, ignore_errors=True)
    return dict(kind="two writers", kills=[way], ways=ends, way="one refused", wrong=wrong)


def try_all(folder, seed, operations, moments, pairs, writers, full):
    "All tries, the undisturbed runs first."
    generator, folder = random.Random(seed), Path(folder).resolve()
    launch(folder / "first", 1)  # draws the scenes
    references, counts, seconds = {}, {}, {}
    for processes in (1, 2)[: 1 + bool(pairs)]:
        out, begun = folder / f"straight{processes}", time.monotonic()
        said, counts[processes] = launch(out, processes)
        assert said == "done", said
        references[processes], seconds[processes] = left(out), time.monotonic() - begun
        assert not references[processes]["leftovers"] and len(references[processes]["rows"]) == STEPS
    places = [1 + place * counts[1] // operations for place in range(operations)] if operations else []
    kills = [(1, [dict(at=place)]) for place in places]
    moment = lambda processes: dict(after=generator.uniform(0, seconds[processes]))
    kills += [(1, [moment(1) for _ in range(generator.choice((1, 1, 2)))]) for _ in range(moments)]
    kills += [
        (2, [moment(2) if number % 2 else dict(at=generator.randrange(1, counts[2] + 1))]) for number in range(pairs)
    ]
    for number, (processes, each) in enumerate(kills):
        yield killed(folder, f"killed{number}", references[processes], processes, each)
    for number in range(full):
        yield full_disk(folder, f"full{number}", references[1], 2 + number * (counts[1] - 2) // full)
    for number in range(writers):
        yield two_writers(
            folder, f"writers{number}", references[1], ("both new", "resume", "both new", "replace")[number % 4]
        )


def table(tries):
    "Tries and outcomes, a line a kind."
    lines = []
    for kind in dict.fromkeys(each["kind"] for each in tries):
        own = [each for each in tries if each["kind"] == kind]
        ways = {way: sum(each["way"] == way for each in own) for way in dict.fromkeys(each["way"] for each in own)}
        lines.append(
            f"{kind:22} {len(own):3} tries: {', '.join(f'{count} {way}' for way, count in ways.items())}; "
            f"{sum(bool(each['wrong']) for each in own)} not as undisturbed"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    found = []
    with quick_figures():  # imports what the forks need
        for one in try_all(sys.argv[1], *map(int, sys.argv[2:8])):
            found.append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
    print(table(found))
    sys.exit(any(one["wrong"] for one in found))
