"""How long each notebook takes, in the front door's table: minutes of reading, counted, and seconds of running,
measured.

`python tests/chapter_times.py` counts the reading again and leaves the running as it stands.
`python tests/chapter_times.py objective/09_losses` runs that one as well, as `make test` does, and `all` runs every
one (half an hour and more).
Reading: 200 words of prose a minute, and 20 lines of code a minute; hidden cells and buttons are not read.
Running: processor time of the chapter and all that it starts, in one thread. A busy machine stretches the clock,
and this much less.
"""

import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from dpt_nb.images.files import atomic_write

HERE = Path(__file__).resolve().parent.parent
INDEX = HERE / "nbs" / "index.ipynb"
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 20
ROW = re.compile(
    r"^(\|[^|\n]*\| \[\w+\]\(([\w/]+)\.ipynb\) \|[^|\n]*\|)([^|\n]*\|)?([^|\n]*\|)?$", re.M
)  # wing, notebook, what it is about; then read and run


def reading_minutes(notebook: str) -> int:
    "At the pace above: at least one, and from twenty on in fives, because no two readers are alike."
    cells = json.loads((HERE / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = {
        kind: ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind] for kind in ("markdown", "code")
    }
    prose = [text for text in sources["markdown"] if not text.startswith("[![")]  # buttons are not
    words = sum(len(re.findall(r"\w[\w'’-]*", text)) for text in prose)
    lines = sum(
        bool(line.strip()) and not line.startswith("#|")
        for text in sources["code"]
        if not re.match(r"#\|\s*hide", text)
        for line in text.splitlines()
    )
    minutes = words / WORDS_A_MINUTE + lines / LINES_A_MINUTE
    return max(1, round(minutes)) if minutes < 20 else 5 * round(minutes / 5)


def running_seconds(notebook: str) -> float:
    """Processor seconds of one run from top to bottom, in a process of its own. Raises `SystemExit` for a chapter that
    fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).with_name("nbdev_test")), "--path", f"nbs/{notebook}.ipynb", "--n_workers", "0"]
    ended = subprocess.run(
        command,
        cwd=HERE,
        env=os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"),
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise SystemExit(f"{notebook} failed, and has no time:\n{ended.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_words(seconds: float) -> str:
    "Two digits are more than a run time is worth: tens of seconds, then minutes."
    return f"{math.ceil(seconds / 10) * 10} s" if seconds <= 90 else f"{round(seconds / 60)} min"


def with_times(table: str, measured: dict[str, float]) -> str:
    "The table with its two last columns filled: reading counted anew, running from `measured`, or as it stood."
    table = re.sub(
        r"^\| wing \| notebook \| what it is about \|.*\n\|[-|]+$",
        "| wing | notebook | what it is about | read | run |\n|---|---|---|---|---|",
        table,
        flags=re.M,
    )
    return ROW.sub(
        lambda row: (
            f"{row[1]} {reading_minutes(row[2])} min | "
            f"{in_words(measured[row[2]]) if row[2] in measured else (row[4] or '–').strip(' |')} |"
        ),
        table,
    )


def with_sums(text: str) -> str:
    """Every *(… min)* and *(… of reading)* anew: the sum over the chapters linked in its line, or, in a heading, over
    those of the numbered lines below."""

    def said(line: str, linked: str) -> str:
        minutes = sum(
            reading_minutes(notebook) for notebook in dict.fromkeys(re.findall(r"\(([\w/]+)\.ipynb\)", linked))
        )
        words = f"{minutes} min" if minutes < 90 else f"{round(minutes / 30) / 2:g} hours"
        return re.sub(r"\*\([\d.?]+ (?:min|hours)( of reading)?\)\*", lambda old: f"*({words}{old[1] or ''})*", line)

    sections = [part.splitlines(keepends=True) for part in re.split(r"(?m)^(?=#)", text)]
    return "".join(
        said(line, "".join(below for below in part if re.match(r"\d+\. ", below)) if line.startswith("#") else line)
        for part in sections
        for line in part
    )


def write_times(measured: dict[str, float]) -> None:
    "Into the front door's notebook, and nothing else of it."
    front = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in front["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_sums(with_times("".join(cell["source"]), measured)).splitlines(keepends=True)
    with atomic_write(INDEX) as temporary:
        temporary.write_text(json.dumps(front, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_times({})
    for _, notebook, _, _ in ROW.findall(
        "".join("".join(cell["source"]) for cell in json.loads(INDEX.read_text(encoding="utf-8"))["cells"])
    ):
        if "all" in sys.argv[1:] or notebook in sys.argv[1:]:
            seconds = running_seconds(notebook)
            print(f"{notebook}: {seconds:.0f} s", flush=True)
            write_times({notebook: seconds})
