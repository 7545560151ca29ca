"""Damaged and hostile files through every command that reads them: a sentence and an exit code, never a traceback, a
hang, memory without end or a file elsewhere.

`pytest tests/test_fuzz_commands.py --slow` prints a table. The tries are the same every time; DPT_NB_SEED and
DPT_NB_TRIES change them, and the folders of those that failed are kept.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked import import_everything

OTHERS = (
    "home/.cache/Microsoft",
    "home/.cache/matplotlib",
    "home/.config/matplotlib",
    "tmp/.ses",
)  # what other libraries keep for themselves: onnxruntime notes of the machine, matplotlib a list of fonts
# Of one try: seconds of computing, or five times as many of waiting on a busy machine; memory of all its processes
# beyond what the fork began with.
SECONDS, BYTES = 30, 4 << 30
SHORT = [
    "loop.steps=4",
    "data.batch_size=2",
    "data.train.count=4",
    "data.held_out.count=2",
    "keep.validate_every=4",
    "keep.save_steps=2",
]
SETS = [word for assignment in SHORT for word in ("--set", assignment)]
PREDICT = ["dpt_predict", "{file}", "--model", "{model}", "--out", "out", "--device", "cpu"]
MODEL = ["dpt_predict", "{png}", "--model", "{file}", "--out", "out", "--device", "cpu"]
CHECK, SHOW = (
    ["dpt_data", "check", "folder", "{top}", "--workers", "0"],
    ["dpt_data", "show", "folder", "{top}", "--out", "out/shown.png", "--count", "4"],
)
RESUME = [
    "dpt_train",
    "rooms_tiny",
    "--resume",
    "--cpu",
    "--workers",
    "0",
    "--out",
    "out",
    "--data-root",
    "{data}",
    *SETS,
]
OWN = [
    "model.name=dpt_tiny",
    "model.backbone=",
    'model.changes={"heads": {"depth": {"output": "exp", "hidden": 16}}}',
    "data.batch_size=2",
    "loop.epochs=0",
    "loop.steps=2",
    "loop.ema=0",
    "data.transforms=[]",
]
OWN += ["keep.validate_every=2", "keep.save_steps=2", "data.train.depth_scale=1000", "data.held_out.depth_scale=1000"]
DRY = [
    "dpt_train",
    "folder_depth",
    "--dry-run",
    "--cpu",
    "--workers",
    "0",
    "--out",
    "out",
    "--data-root",
    "{top}",
    *(word for assignment in OWN for word in ("--set", assignment)),
]
KINDS = [  # name, what is copied, the file in it that is damaged, how often, the command
    *[
        (f"{kind} picture", f"picture.{kind}", "", times, PREDICT)
        for kind, times in dict(png=14, jpg=12, gif=8, tiff=14, webp=8).items()
    ],
    ("film", "film.mp4", "", 10, PREDICT),
    ("zip of weights", "zipped", "pytorch_model.bin", 14, ["dpt_convert", "{file}", "out/converted"]),
    ("zip of weights", "zipped", "pytorch_model.bin", 8, MODEL),
    ("safetensors", "model", "model.safetensors", 10, MODEL),
    (
        "safetensors",
        "model",
        "model.safetensors",
        6,
        ["dpt_eval", "--model", "{file}", "--data-root", "{data}", "--count", "2", "--out", "out", "--device", "cpu"],
    ),
    ("config.json", "model", "config.json", 16, MODEL),
    (
        "config.json",
        "model",
        "config.json",
        6,
        ["dpt_eval", "--model", "{file}", "--data-root", "{data}", "--count", "2", "--out", "out", "--device", "cpu"],
    ),
    ("config.json", "model", "config.json", 6, ["dpt_convert", "{file}", "out/converted"]),
    (
        "config.json",
        "model",
        "config.json",
        4,
        ["dpt_export", "{file}", "out/model.onnx", "--size", "96x128", "--batch", "1"],
    ),
    ("list", "listed", "files.csv", 10, CHECK),
    ("list", "listed", "files.csv", 6, SHOW),
    ("array", "arrays", "depth/000000.npy", 8, CHECK),
    ("array", "arrays", "depth/000000.npy", 6, SHOW),
    ("depth PNG", "folder", "depth/000000.png", 6, CHECK),
    ("depth PNG", "folder", "depth/000000.png", 4, DRY),
    ("label PNG", "folder", "label/000000.png", 4, SHOW),
    (
        "MATLAB file",
        "nyu",
        "splits.mat",
        5,
        ["dpt_data", "check", "nyu", "{top}", "--workers", "0", "--set", "layout=labeled"],
    ),
    (
        "MATLAB file",
        "nyu",
        "nyu_depth_v2_labeled.mat",
        5,
        ["dpt_data", "check", "nyu", "{top}", "--workers", "0", "--set", "layout=labeled"],
    ),
    ("run: config.json", "run", "config.json", 4, RESUME),
    ("run: metrics", "run", "metrics.jsonl", 3, RESUME),
    ("run: checkpoint", "run", "checkpoints/step-00000002.pt", 3, RESUME),
]


def make_subjects(place: Path) -> None:
    "Whole files of every kind, small."
    import numpy as np
    import torch
    from PIL import Image

    from dpt_nb.commands import main
    from dpt_nb.data.folder import make_folder
    from dpt_nb.data.registry import make_miniature
    from dpt_nb.inference.video import VideoWriter
    from dpt_nb.training.recipe_fields import change_recipe
    from dpt_nb.training.recipes import get_recipe
    from dpt_nb.training.run import train
    from dpt_nb.weights.load import load_checkpoint

    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    )
    for kind in ("png", "jpg", "gif", "tiff", "webp"):
        photo.save(place / f"picture.{kind}")
    with VideoWriter(place / "film.mp4", 10) as film:
        for _ in range(3):
            film.add(np.asarray(photo))
    model = load_checkpoint("dpt_tiny_scenes")
    model.save_pretrained(place / "model")
    (place / "zipped").mkdir()
    torch.save(model.state_dict(), place / "zipped" / "pytorch_model.bin")
    shutil.copy(place / "model" / "config.json", place / "zipped")
    make_folder(place / "folder", count=4)
    shutil.copytree(place / "folder", place / "arrays")
    shutil.copytree(place / "folder", place / "listed")
    for depth in sorted((place / "arrays" / "depth").iterdir()):
        np.save(depth.with_suffix(".npy"), np.asarray(Image.open(depth), dtype=np.float32) / 1000)
        depth.unlink()
    rows = [
        ",".join(f"{kind}/{index:06}.png" for kind in ("rgb", "depth", "label"))
        + f",{'held_out' if index == 3 else 'train'},100,100,64,48"
        for index in range(4)
    ]
    (place / "listed" / "files.csv").write_text("\n".join(["image,depth,label,split,fx,fy,cx,cy", *rows]) + "\n")
    make_miniature("nyu", place / "nyu", count=4)
    train(
        change_recipe(get_recipe("rooms_tiny"), SHORT),
        place / "run",
        place / "data",
        cpu=True,
        workers=0,
        progress=False,
    )
    for later in (
        "checkpoints/step-00000004.pt",
        "report.json",
        "panel.png",
    ):  # as if it had been stopped after two steps
        (place / "run" / later).unlink(missing_ok=True)
    for later in ("model", "best"):
        shutil.rmtree(place / "run" / later, ignore_errors=True)
    main(
        [
            "dpt_eval",
            "--model",
            str(place / "model"),
            "--data-root",
            str(place / "data"),
            "--count",
            "2",
            "--device",
            "cpu",
        ]
    )  # draws the scenes


def flip(data: bytearray, generator: random.Random) -> bytearray:
    "Some bits turned, half of the time near the start, where headers are."
    reach = len(data) if generator.random() < 0.5 else min(len(data), 512)
    for _ in range(generator.choice((1, 4, 16))):
        data[generator.randrange(reach)] ^= 1 << generator.randrange(8)
    return data


def cut(data: bytearray, generator: random.Random) -> bytearray:
    return data[: generator.choice((0, 1, 8, 100, len(data) // 2, len(data) - 1))]


def boast(data: bytearray, generator: random.Random) -> bytearray:
    "A number in the header that is much too large."
    at, size = generator.randrange(min(len(data), 300)), generator.choice((2, 4, 8))
    data[at : at + size] = generator.choice((b"\xff", b"\x7f", b"\x00"))[:1] * size
    return data


def insert(data: bytearray, generator: random.Random) -> bytearray:
    at = generator.randrange(len(data))
    data[at:at] = generator.randbytes(generator.choice((1, 100, 5000)))
    return data


def another(data: bytearray, generator: random.Random) -> bytearray:
    "Something else altogether under this name."
    heads = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999)}\n",
        b"\x80\x04\x95",
        b"GIF89a\xff\xff\xff\xff",
        b"<svg/>",
        b"RIFF",
        b"\x00" * 4096,
    )
    return bytearray(generator.choice(heads)) + data[: generator.choice((0, 1000))]


def of_text(data: bytearray, generator: random.Random) -> bytearray:
    "A value in a text replaced by one that nobody expects."
    odd = (
        "null",
        "-1",
        "0",
        "1e308",
        "NaN",
        "99999999999999999999",
        "true",
        '""',
        "[]",
        "{}",
        '"../../../sentinel/mine"',
        '"\\u0000"',
        '"' + "x" * 300_000 + '"',
        "[" * 20_000,
        '{"a": ' * 2_000,
        '"/etc/passwd"',
        "[1e9, 1e9]",
    )
    text = data.decode("utf-8", "replace")
    ends = [at for at, character in enumerate(text) if character in ":,\n"]
    at = generator.choice(ends or [0])
    after = next((end for end in ends if end > at), len(text))
    return bytearray((text[: at + 1] + generator.choice(odd) + text[after:]).encode())


def of_json(data: bytearray, generator: random.Random) -> bytearray:
    "A value of a file of settings replaced, so that the file still reads as JSON."
    try:
        settings = json.loads(data)
        assert isinstance(settings, dict) and settings
    except (ValueError, AssertionError):
        return of_text(data, generator)
    odd = (
        None,
        -1,
        0,
        10**9,
        1e308,
        True,
        "",
        "x",
        "../../sentinel/mine",
        [],
        {},
        [[]],
        [10**9] * 4,
        ["a"],
        {"depth": None},
        {"a": {"b": 1}},
        "x" * 100_000,
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained": True},
    )
    inner = [value for value in settings.values() if isinstance(value, dict) and value]
    target = generator.choice([settings, *inner])
    target[generator.choice([*target, "unheard_of", "__class__"])] = generator.choice(odd)
    return bytearray(json.dumps(settings).encode())


def damage(path: Path, generator: random.Random) -> str:
    "Damage a file, by the seed; how is returned."
    ways = [flip, flip, cut, boast, insert, another]
    if path.suffix == ".json":
        ways += [of_json] * 8
    if path.suffix in (".json", ".csv", ".jsonl"):
        ways += [of_text] * 4
    way = generator.choice(ways)
    path.write_bytes(way(bytearray(path.read_bytes()), generator))
    return way.__name__


def listing(place: Path) -> dict:
    "All below a folder but what a command may write, with sizes and times."
    found = {}
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if Path(folder, name) != place / "work" / "out"]
        alone = [] if files or folders or folder == str(place) else [folder]  # an empty folder counts as well
        for path in (*alone, *(os.path.join(folder, name) for name in files)):
            state = os.lstat(path)
            found[os.path.relpath(path, place)] = () if path in alone else (state.st_size, state.st_mtime_ns)
    return found


def prepare(subjects: Path, place: Path, number: int, seed: int | None, kind: tuple) -> tuple[list[str], str]:
    "The folder of a try, its file damaged where there is a seed; the words of its command, and how it was damaged."
    _, copied, inner, _, command = kind
    for part in ("work", "sentinel", "home", "tmp"):
        (place / part).mkdir(parents=True)
    (place / "sentinel" / "mine").write_text("untouched")
    top = place / "work" / ("out" if copied == "run" else copied)
    (shutil.copytree if (subjects / copied).is_dir() else shutil.copy)(subjects / copied, top)
    how = "whole" if seed is None else damage(top / inner if inner else top, random.Random(seed * 100_003 + number))
    known = dict(
        file=top,
        top=top,
        inner=top / inner,
        model=subjects / "model",
        png=subjects / "picture.png",
        data=subjects / "data",
    )
    return [str(known.get(word.strip("{}"), word)) if word.startswith("{") else word for word in command], how


def run_forked(words: list[str], place: Path, log: Path) -> None:
    "Run in a fork: the command, as from a shell in the try's folder."
    os.setsid()
    os.chdir(place / "work")
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ |= dict(HOME=str(place / "home"), TMPDIR=str(place / "tmp"), HF_HUB_OFFLINE="1")
    import tempfile

    tempfile.tempdir = None
    from dpt_nb.commands import main

    try:
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def used(session: int) -> tuple[int, float]:
    "Bytes that the processes of a try hold, and the seconds that they have computed."
    import psutil

    held, seconds = 0, 0.0
    try:
        leader = psutil.Process(session)
        for process in (leader, *leader.children(recursive=True)):
            held += process.memory_info().rss
            seconds += sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        pass
    return held, seconds


def follow(pid: int, log: Path) -> tuple[str, float, int]:
    "Wait for a try: how it ended, its seconds, the most memory seen."
    began, most, start, status = time.monotonic(), 0, used(pid)[0], None
    while status is None:
        done, state = os.waitpid(pid, os.WNOHANG)
        status = state if done else None
        held, computed = used(pid)
        most = max(most, held - start)
        hangs = computed > SECONDS or time.monotonic() - began > 5 * SECONDS
        end = "hang" if hangs else "memory" if most > BYTES else ""
        if end and status is None:
            os.killpg(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return end, time.monotonic() - began, most
        time.sleep(0.01)
    try:
        os.killpg(pid, signal.SIGKILL)
        left = True
    except ProcessLookupError:
        left = False
    text, seconds = log.read_text(errors="replace") if log.exists() else "", time.monotonic() - began
    if os.WIFSIGNALED(status):
        return f"killed by {os.WTERMSIG(status)}", seconds, most
    if "Traceback (most recent call last)" in text or os.WEXITSTATUS(status) == 70:
        return "traceback", seconds, most
    return "process left" if left else "said" if os.WEXITSTATUS(status) else "worked", seconds, most


def work(subjects: Path, home: Path) -> None:
    "A process that has read everything once, and forks for each try that it is told of on stdin."
    import torch

    torch.set_num_threads(1)
    import_everything()

    print("ready", flush=True)
    for line in sys.stdin:
        number, seed, chosen = json.loads(line)
        place, log = home / f"try{number}", home / f"log{number}"
        words, how = prepare(subjects, place, number, seed, KINDS[chosen])
        before = listing(place)
        pid = os.fork()
        if not pid:
            run_forked(words, place, log)
        end, seconds, most = follow(pid, log)
        after = listing(place)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        strays = [
            path for path in changed if not path.startswith(OTHERS) and path not in ("home", "tmp")
        ]  # which were empty folders
        said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        print(
            json.dumps(
                dict(
                    number=number,
                    kind=KINDS[chosen][0],
                    command=words[0],
                    how=how,
                    end=end,
                    seconds=seconds,
                    most=most,
                    strays=strays,
                    said=said,
                )
            ),
            flush=True,
        )
        if end in ("said", "worked") and not strays:
            shutil.rmtree(place)


def served(subjects: Path, home: Path, tries: list) -> list[dict]:
    "The outcomes of some tries, by one such process."
    environment = os.environ | dict(
        CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="agg"
    )
    with subprocess.Popen(
        [sys.executable, __file__, subjects, home],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as worker:
        assert worker.stdout.readline() == "ready\n"
        found = []
        for each in tries:
            worker.stdin.write(json.dumps(each) + "\n"), worker.stdin.flush()
            found.append(json.loads(worker.stdout.readline()))
        worker.stdin.close()
    return found


def table(found: list[dict]) -> str:
    "Tries and outcomes, a row for each kind of file and command."
    columns = ("tries", "worked", "said", "traceback", "killed", "hang", "memory", "left", "strays", "longest", "most")
    rows = [f"{'file':20}{'command':14}" + "".join(f"{column:>10}" for column in columns)]
    groups = sorted({(each["kind"], each["command"]) for each in found})
    for group in [*groups, None]:
        of = [each for each in found if group in (None, (each["kind"], each["command"]))]
        ends = Counter(each["end"].split()[0].replace("process", "left") for each in of)
        numbers = [len(of), *(ends[column] for column in columns[1:8]), sum(bool(each["strays"]) for each in of)]
        name, command = group or ("all", "")
        rows.append(
            f"{name:20}{command:14}"
            + "".join(f"{number:>10}" for number in numbers)
            + f"{max(each['seconds'] for each in of):>9.1f}s{max(each['most'] for each in of) / 2**30:>8.2f}GB"
        )
    return "\n".join(rows)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each try is a fork")
def test_no_damaged_file_is_more_than_a_sentence(tmp_path, capsys):
    seed, wanted = int(os.environ.get("DPT_NB_SEED", 0)), int(os.environ.get("DPT_NB_TRIES", 200))
    chosen = [number for number, kind in enumerate(KINDS) for _ in range(kind[3])]
    random.Random(seed).shuffle(chosen)
    tries = [(number, seed, chosen[number % len(chosen)]) for number in range(wanted)]
    tries += [(wanted + number, None, number) for number in range(len(KINDS))]  # a whole file of each kind works
    subjects, home = tmp_path / "subjects", tmp_path / "tries"
    subjects.mkdir(), home.mkdir()
    make_subjects(subjects)
    before = listing(subjects)
    with ThreadPoolExecutor(2) as pool:
        found = [
            each
            for part in pool.map(lambda part: served(subjects, home, part), (tries[::2], tries[1::2]))
            for each in part
        ]
    fine = lambda each: each["end"] == "worked" or each["end"] == "said" and each["how"] != "whole"
    bad = [each for each in found if not fine(each) or each["strays"]]
    with capsys.disabled():
        print(
            "\n" + table(found),
            *(
                f"try {each['number']}: {each['kind']}, {each['how']}, {each['command']}: {each['end']} "
                f"{each['strays']} {' '.join(each['said'])[:200]}"
                for each in bad
            ),
            sep="\n",
        )
    assert len(found) == len(tries) and listing(subjects) == before
    assert not bad, f"{len(bad)} of {len(tries)} tries; their folders are in {home}"


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
