"""Commands and scripts in processes of their own that have torch and the library already: forks of one process that
has imported them and computed nothing. They are for tests of what a process does, of its end and of what it leaves;
how one starts from nothing is tested where a test starts it as a shell does."""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from dpt_nb.all import ROOMS

# `dpt_nb.all` imports a room when it is asked for a name, and a figure imports pyplot when it is drawn: what is named
# here is in the process that forks, and no fork imports it again, into memory of its own, under a limit or on a full
# disk.
EVERYTHING = [
    *(f"dpt_nb.{room}" for room in ROOMS),
    "dpt_nb.commands",
    "dpt_nb.training.processes",
    "matplotlib.pyplot",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(EVERYTHING)


def import_everything():
    "For a process that forks by itself."
    for name in EVERYTHING:
        importlib.import_module(name)


@contextmanager
def quick_figures():
    """Drawing takes most of the time of a short run: figures are not drawn for tests that do not look at them. Their
    files are written all the same."""
    figure = SimpleNamespace(savefig=lambda path, **options: Path(path).write_bytes(b"a figure"))
    with ExitStack() as stack:
        for name in ("training.plots.validation_figure", "evaluation.evaluate.depth_panel"):
            stack.enter_context(mock.patch(f"dpt_nb.{name}", lambda *words, **options: figure))
        yield


def run_words(words, folder, environment, output, own_session, figures, merged):
    "In the fork: what a shell would have started, with its output in files."
    import torch

    if own_session:
        os.setsid()
    for descriptor, name in ((1, "out"), (2, "out" if merged else "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew, from this environment
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with nullcontext() if figures else quick_figures():
        run_program(*words)


def run_program(program, *rest):
    "A script, a module or one of our commands."
    if rest[:1] == ("-c",):
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    elif rest[:1] == ("-m",):
        sys.argv = list(rest[1:])
        sys.modules.pop(rest[1], None)  # or it is told to be there already
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        from dpt_nb.commands import main

        sys.argv = [program, *rest]
        sys.exit(main())


@cache
def import_once():
    "Wait until the process that is forked has imported everything, so that nobody's patience has to last for that."
    first = FORKS.Process(target=os.getpid)
    first.start(), first.join()


@cache
def outputs():
    "Where what they print lies, until this process ends."
    return tempfile.TemporaryDirectory(prefix="forked-")


class Forked:
    "A process begun so, with what tests ask of a `subprocess.Popen`."

    def __init__(self, *words, folder, own_session=False, figures=False, merged=False, **environment):
        import_once()
        self.output = Path(tempfile.mkdtemp(dir=outputs().name))
        environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | environment
        environment = {name: str(value) for name, value in environment.items()}
        given = (list(map(str, words)), str(folder), environment, self.output, own_session, figures, merged)
        self.process = FORKS.Process(target=run_words, args=given)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.poll()

    def communicate(self, timeout=None):
        self.wait(timeout)
        paths = [self.output / name for name in ("out", "err")]
        return [path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in paths]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def command_forked(*words, folder, check=None, **environment):
    "Run one of our commands to its end; `check` is the exit code expected."
    running = Forked(*words, folder=folder, **environment)
    try:
        stdout, stderr = running.communicate(600)
    finally:
        running.kill()
    done = SimpleNamespace(returncode=running.returncode, stdout=stdout, stderr=stderr)
    assert check is None or done.returncode == check, (
        f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
    )
    return done


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked_ranks(processes, *words, folder):
    "The processes of one launch, with the environment that torchrun gives them."
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    ranks = range(processes)
    return [Forked(*words, folder=folder, **place, RANK=rank, LOCAL_RANK=rank) for rank in ranks]


def end_together(started, seconds=300):
    "Wait for all of several processes, and kill the others where one fails. Returns what each said."
    deadline = time.monotonic() + seconds
    try:
        while any(each.poll() is None for each in started) and not any(each.poll() for each in started):
            assert time.monotonic() < deadline, "the processes did not end"
            time.sleep(0.02)
        failed = [each for each in started if each.poll()]
    finally:
        for each in started:
            each.kill()
    said = [each.communicate(60)[1] for each in started]
    assert not failed, "\n".join(text[-3000:] for text in said)
    return said
