"""Run notebooks as `nbdev_test` does, each in a fork of a process that has imported what they all import and computed
nothing: `python tests/run_notebooks.py [--workers N] [NOTEBOOK or folder …]`, all of nbs/ but the stories without any.
A notebook that launches finds a process that can be forked, as a reader's kernel is. With `--slow`, what is left out
otherwise: the stories, and the notebooks that have cells flagged `#| slow`, with these.

Prints the seconds of computing that each took as it ends, and the output of those that fail."""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from drawn_once import draw_views_once
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "nbs" / "stories"  # whole experiments
LONGEST = (  # begun first, or one process ends long after the other
    "training/run",
    "training/17_launch",
    "network/zoo",
    "workbench/training_room",
    "deploy/engines",
    "network/inside",
    "commands",
    "deploy/export",
    "weights/load",
    "workbench/comparison",
    "data/checks",
    "workbench/scene_maker",
)


def is_slow(path: Path) -> bool:
    return STORIES in path.parents or '"#| slow' in path.read_text(encoding="utf-8")


def find_notebooks(places: list[str], slow: bool) -> list[Path]:
    "Those named, those in the folders named, or all that a quick or a slow test has; the longest first."
    places = list(map(Path, places)) or [ROOT / "nbs"]
    found = [path.resolve() for place in places for path in (sorted(place.rglob("*.ipynb")) or [place])]
    if slow:
        found = [path for path in found if is_slow(path)]
    elif places == [ROOT / "nbs"]:
        found = [path for path in found if STORIES not in path.parents]
    found = [path for path in found if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]
    names = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in found]
    rank = lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST)
    return [path for _, path in sorted(zip(map(rank, names), found), key=lambda pair: pair[0])]


class Shell(CaptureShell):
    "Figures are drawn, with few pixels: nobody looks at them here."

    def __init__(self, path):
        super().__init__(path, mpl_format="png")
        self._run("set_matplotlib_formats('png', dpi=20, bbox_inches=None)")


def begin(path: Path, place: Path, slow: bool) -> int:
    """Run a notebook in a fork; the fork's number. It ends with 0 where every cell ran. Its output, and what it leaves
    in the folder for temporary files, are in `place`."""
    place.mkdir()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["TMPDIR"], tempfile.tempdir = str(place), None
        written = os.open(place / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(written, 1), os.dup2(written, 2)
        from nbdev import test

        test.CaptureShell = Shell
        code = int(not test.test_nb(path, skip_flags=[] if slow else ["slow"], basepath=ROOT)[0])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def run_all(paths: list[Path], workers: int, slow: bool) -> dict:
    "A few at a time. Returns the seconds of computing of each, negative where it failed."
    waiting, running, seconds = list(paths), {}, {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as views:
        draw_views_once(views)
        while waiting or running:
            while waiting and len(running) < workers:
                path = waiting.pop(0)
                place = Path(folder, str(len(waiting)))
                running[begin(path, place, slow)] = path, place
            child, status, used = os.wait4(-1, 0)
            if child not in running:
                continue
            path, place = running.pop(child)
            seconds[path] = (used.ru_utime + used.ru_stime) * (-1 if status else 1)
            failed = "  FAILED" if status else ""
            print(f"{abs(seconds[path]):6.1f} s  {path.relative_to(ROOT)}{failed}", flush=True)
            if status:
                print(f"{path}:\n{(place / 'output').read_text(errors='replace')}", file=sys.stderr, flush=True)
            shutil.rmtree(place, ignore_errors=True)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slow", action="store_true")
    given = parser.parse_args()
    os.environ["IN_TEST"] = "1"  # as nbdev_test says it
    sys.path.insert(0, str(ROOT))
    paths, begun = find_notebooks(given.places, given.slow), time.monotonic()
    gc.disable()  # importing makes objects that stay: looking for others among them takes a sixth of its time
    import fastcore.test  # noqa: F401  what the forks need
    import matplotlib_inline.backend_inline  # noqa: F401
    import nbdev.test  # noqa: F401
    from forked import import_everything

    import_everything()
    gc.freeze(), gc.enable()
    seconds = run_all(paths, given.workers, given.slow)
    print(f"{sum(map(abs, seconds.values())):6.0f} s of computing in {time.monotonic() - begun:.0f} s")
    return int(any(used < 0 for used in seconds.values()))


if __name__ == "__main__":
    sys.exit(main())
