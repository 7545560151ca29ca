"Data that several processes want at once, that was left half written, does not fit on the disk, or means harm."

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import command_forked

from dpt_nb import commands
from dpt_nb.data.checks import check_dataset
from dpt_nb.data.datasets import DatasetError
from dpt_nb.data.folder import Folder, make_folder
from dpt_nb.data.registry import make_miniature
from dpt_nb.data.scene_sets import Scenes, render_scenes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are tried in forked processes")
SIZE = (16, 24)


def begin(function, log: Path) -> int:  # number of the process
    "Start a function in a forked process whose output goes to a file; exit code 3 for a traceback."
    if number := os.fork():
        return number
    code = 3
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    try:
        with (
            open(log, "w", errors="backslashreplace") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                code = function() or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(
    number: int, seconds: float = 120
) -> SimpleNamespace:  # code: negative for a signal; bytes: the most memory it had
    "The end of a process; one that takes too long is killed, and its code is -9."
    until = time.monotonic() + seconds
    while True:
        ended, status, used = os.wait4(number, os.WNOHANG)
        if ended:
            return SimpleNamespace(code=os.waitstatus_to_exitcode(status), bytes=used.ru_maxrss * 1024)
        if time.monotonic() > until:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.005)


def attempt(function, log: Path, seconds: float = 120) -> SimpleNamespace:  # with `text`, what it said
    ended = wait(begin(function, log), seconds)
    return SimpleNamespace(**vars(ended), text=log.read_text(errors="replace"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small_scenes(root: Path, count: int = 3) -> Scenes:
    return Scenes(root, "rooms", count=count, size=SIZE, progress=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "What a set of three scenes looks like that nobody disturbed."
    return content(small_scenes(tmp_path_factory.mktemp("undisturbed")).folder)


# Several processes


def render_together(root: Path, processes: int, undisturbed: dict) -> None:
    started = [begin(lambda: len(small_scenes(root)) - 3, root.parent / f"log-{index}") for index in range(processes)]
    codes = [wait(number).code for number in started]
    said = [(root.parent / f"log-{index}").read_text() for index in range(processes)]
    assert codes == [0] * processes, said
    assert content(root) == {
        f"{next(root.iterdir()).name}/{name}": value for name, value in undisturbed.items()
    }  # nothing else, no lock


def test_scenes_are_rendered_by_one_of_twelve_processes(tmp_path, undisturbed):
    render_together(tmp_path / "data", 12, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(7))
def test_scenes_are_rendered_by_one_of_twelve_processes_again_and_again(round_, tmp_path, undisturbed):
    render_together(tmp_path / "data", 12, undisturbed)


def test_a_waiting_process_says_for_whom_and_takes_over_from_a_killed_one(tmp_path, undisturbed):
    def slowly():
        from dpt_nb.data import scene_sets

        scene_sets.write_scene = lambda *scene: time.sleep(60)
        small_scenes(tmp_path / "data")

    drawing = begin(slowly, tmp_path / "drawing")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("data/*.part/scenes.json")):
        assert time.monotonic() < until
        time.sleep(0.01)
    waiting = begin(lambda: len(small_scenes(tmp_path / "data")) - 3, tmp_path / "waiting")
    until = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() or not (tmp_path / "waiting").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert f"Waits for process {drawing} " in (tmp_path / "waiting").read_text()
    os.kill(drawing, signal.SIGKILL)
    assert wait(drawing).code == -9 and wait(waiting).code == 0
    assert content(next((tmp_path / "data").iterdir())) == undisturbed


# Killed


FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def killed_at(place: int, root: Path):
    "Render, and end silently before the file operation of that number below `root`."
    left = [place]

    def hook(event, arguments):
        if event in FILE_OPERATIONS and str(root) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    small_scenes(root)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_scenes_survive_a_kill_at_any_file_operation(step, tmp_path, undisturbed):
    tried = 0
    for place in range(0, 1000, step):
        root = tmp_path / str(place)
        ended = attempt(lambda: killed_at(place, root), tmp_path / "log")
        if ended.code == 0:
            break
        assert ended.code == -9, ended.text
        tried += 1
        assert content(small_scenes(root).folder) == undisturbed, place
        assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == [small_scenes(root).folder.name]
    assert ended.code == 0 and tried > 30 / step


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_scenes_survive_kills_at_random_moments(times, tmp_path):
    moment, root = random.Random(times), tmp_path / "data"
    whole = content(small_scenes(tmp_path / "whole", count=12).folder)
    took = time.monotonic()
    small_scenes(tmp_path / "timed", count=12)
    took = time.monotonic() - took
    for _ in range(times):
        number = begin(lambda: len(small_scenes(root, count=12)) - 12, tmp_path / "log")
        time.sleep(moment.uniform(0, took))
        os.kill(number, signal.SIGKILL)
        wait(number)
        for path in root.glob("*/*/*.png"):  # and a power cut on top of it
            if moment.random() < 0.05:
                path.write_bytes(path.read_bytes()[: moment.randrange(path.stat().st_size)])
    assert content(small_scenes(root, count=12).folder) == whole


# Read-only, and full


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_complete_set_is_used_where_nothing_can_be_written(tmp_path, undisturbed):
    folder = small_scenes(tmp_path / "data").folder

    def as_nobody():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return len(small_scenes(tmp_path / "data")) - 3

    for place in (*tmp_path.parents, tmp_path):
        if place.stat().st_uid == os.geteuid() and place != Path("/") and "pytest" in str(place):
            place.chmod(0o755)
    assert attempt(as_nobody, tmp_path / "log").code == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "data") == {f"{folder.name}/{name}": value for name, value in undisturbed.items()}
    (folder / "rgb" / "000001.png").unlink()
    ended = attempt(as_nobody, tmp_path / "log")
    assert ended.code == 3 and "DatasetError" in ended.text and "could not be written (Permission denied)" in ended.text
    small_scenes(tmp_path / "data")
    assert content(folder) == undisturbed


def on_a_full_disk(function, limit: int):
    "Run a function that can write no file larger than the limit."

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.dont_write_bytecode = True  # half of one would be written, and read by every later process
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            function()
        except DatasetError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            print(error)
            return 1

    return run


MAKERS = {
    "folder": dict(count=2),
    "kitti": dict(count=2),
    "nyu": dict(count=2),
    "ade20k": dict(count=4),
    "pascal_context": dict(count=4),
}


@pytest.mark.parametrize(
    ("name", "limit"), [*((name, limit) for name in MAKERS for limit in (100, 20_000)), ("folder", 0)]
)
def test_a_miniature_that_does_not_fit_says_so_and_leaves_nothing(name, limit, tmp_path):
    ended = attempt(
        on_a_full_disk(lambda: make_miniature(name, tmp_path / "own", **MAKERS[name]), limit), tmp_path / "log"
    )
    if ended.code == 0:
        assert limit == 20_000 and name not in ("kitti", "nyu"), "it does not fit"
        return
    assert (
        ended.code == 1
        and ended.text
        == f"{tmp_path / 'own'} could not be written (File too large): make room, or choose another folder.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_labeled_file_that_does_not_fit_says_so_and_leaves_nothing(tmp_path):
    "In a process of its own: HDF5's locks do not survive a fork of a process that has used them."
    program = (
        "import resource, signal, sys\n"
        "from dpt_nb.data.datasets import DatasetError\n"
        "from dpt_nb.data.registry import make_miniature\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.dont_write_bytecode = True\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))\n"
        "try: make_miniature('nyu', sys.argv[1], count=2)\n"
        "except DatasetError as error: print(error)"
    )  # all the other files fit
    done = command_forked(sys.executable, "-c", program, tmp_path / "own", folder=tmp_path)
    assert (
        done.stdout
        == f"{tmp_path / 'own'} could not be written (File too large): make room, or choose another folder.\n"
    ), done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("limit", [0, 700])
def test_own_files_outlive_a_full_disk(limit, tmp_path, undisturbed):
    make_folder(tmp_path / "own", count=1, size=SIZE)
    before = content(tmp_path / "own")
    ended = attempt(
        on_a_full_disk(lambda: make_folder(tmp_path / "own", count=3, size=(16, 24)), limit), tmp_path / "log"
    )
    assert (
        ended.code == 1
        and "could not be written (File too large)" in ended.text
        and content(tmp_path / "own") == before
    )
    root = tmp_path / "data"
    ended = attempt(on_a_full_disk(lambda: small_scenes(root), limit), tmp_path / "log")
    assert ended.code == 1 and "could not be written (File too large)" in ended.text and ended.text.count("\n") == 1
    assert not [path for path in root.rglob("*") if path.name.startswith(".") and path.suffix != ".lock"]
    assert content(small_scenes(root).folder) == undisturbed
    assert [path.name for path in root.iterdir()] == [small_scenes(root).folder.name]


# Hostile


def test_names_of_every_kind_are_read_and_printed(tmp_path):
    folder = make_folder(tmp_path / "own", count=3, size=SIZE)
    names = [os.fsencode("zwei\nZeilen"), b"caf\xe9", "日本 \x1b[31m".encode()]
    for index, name in enumerate(names):
        for part in ("rgb", "depth", "label"):
            place = os.fsencode(folder / part)
            os.rename(place + f"/{index:06d}.png".encode(), place + b"/" + name + b".png")
    dataset = Folder(folder, held_out=0.0)
    assert len(dataset) == 3 and dataset.missing() == []
    (Path(os.fsdecode(os.fsencode(folder / "rgb") + b"/caf\xe9.png"))).write_bytes(b"damaged")
    check = check_dataset(dataset, workers=1, progress=False)
    assert "caf\\udce9.png" in str(check) and str(check).encode()
    ended = attempt(
        lambda: commands.main(["dpt_data", "check", "folder", str(folder), "--workers", "0"]), tmp_path / "log"
    )
    assert ended.code == 1 and "Traceback" not in ended.text


def test_pipes_and_devices_in_a_folder_do_not_hang(tmp_path):
    folder = make_folder(tmp_path / "own", count=4, size=SIZE)
    for index, part in enumerate(("rgb", "depth", "label")):
        path = folder / part / f"{index:06d}.png"
        path.unlink()
        os.mkfifo(path)
    (folder / "depth" / "000003.png").unlink()
    os.symlink("/dev/zero", folder / "depth" / "000003.png")
    check = check_dataset(Folder(folder, held_out=0.0), progress=False)
    assert [problem.index for problem in check.problems] == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    folder = make_folder(tmp_path / "own", count=2, size=SIZE)
    (folder / "rgb" / "more").mkdir()
    (folder / "rgb" / "more").chmod(0)
    tmp_path.chmod(0o755)

    def as_nobody():
        for place in (tmp_path, *tmp_path.parents):
            if "pytest" in place.name:
                place.chmod(0o755)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        Folder(folder)

    ended = attempt(as_nobody, tmp_path / "log")
    (folder / "rgb" / "more").chmod(0o755)
    assert ended.code == 3 and "more cannot be listed (Permission denied)" in ended.text


def mutated(data: bytes, generator: random.Random) -> bytes:
    "A file after an accident: bytes changed, cut, doubled, or replaced by something extreme."
    data, kind = bytearray(data), generator.randrange(6)
    place = generator.randrange(max(1, len(data)))
    if kind == 0:
        for _ in range(generator.choice((1, 8, 64))):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + 4] = generator.choice((b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    elif kind == 3:
        data[place:place] = data[: generator.randrange(len(data))]
    elif kind == 4:
        data[place:place] = generator.choice(
            (b"\x00", b"nan ", b"1e999 ", b"../" * 50, b",", b'"', b"\n" * 1000, b"9" * 5000, b"[" * 5000)
        )
    else:
        data[: min(len(data), 200)] = generator.randbytes(min(len(data), 200))
    return bytes(data)


@pytest.fixture(scope="module")
def sound_sets(tmp_path_factory):
    "A small set of each kind, and the commands that read it."
    home = tmp_path_factory.mktemp("sound")
    make_folder(home / "folder", count=4, size=SIZE)
    arrays = make_folder(home / "arrays", count=4, size=SIZE)
    rows = ["image,depth,label,split,fx,fy,cx,cy"]
    for index in range(4):
        depth = torch.full(SIZE, 2.0 + index).numpy()
        np.save(arrays / "depth" / f"{index:06d}.npy", depth)
        (arrays / "depth" / f"{index:06d}.png").unlink()
        split = ("train", "held_out")[index % 2]
        rows.append(f"rgb/{index:06d}.png,depth/{index:06d}.npy,label/{index:06d}.png,{split},20,20,11.5,7.5")
    (arrays / "files.csv").write_text("\n".join(rows) + "\n")
    make_miniature("kitti", home / "kitti", count=4)
    make_miniature("nyu", home / "nyu", count=2)
    make_miniature("ade20k", home / "ade20k", count=4, size=SIZE)
    make_miniature("pascal_context", home / "pascal_context", count=4, size=SIZE)
    render_scenes(home / "rooms" / small_scenes(home / "rooms").folder.name, "rooms", 3, size=SIZE, progress=False)
    return home


COMMANDS = {
    "folder": ["folder", "{}", "--set", "held_out=0.5"],
    "arrays": ["folder", "{}"],
    "kitti": ["kitti", "{}"],
    "nyu": ["nyu", "{}"],
    "labeled": ["nyu", "{}", "--set", "layout=labeled"],
    "ade20k": ["ade20k", "{}"],
    "pascal_context": ["pascal_context", "{}"],
    "rooms": ["rooms", "{}", "--set", "count=3", "--set", "size=[16,24]", "--split", "train"],
}


def read_damaged(sound: Path, seed: int, home: Path) -> None:
    "Damage one file of a set and have it read by the commands."
    generator = random.Random(seed)
    name = generator.choice(list(COMMANDS))
    folder = home / f"set-{seed}"
    shutil.copytree(sound / ("nyu" if name == "labeled" else name), folder, symlinks=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix not in (".png", ".jpg")]
    path = generator.choice(texts if texts and generator.random() < 0.6 else files)
    path.write_bytes(mutated(path.read_bytes(), generator))
    before = {place.name for place in home.iterdir()}
    words = [word.format(folder) for word in COMMANDS[name]]
    for action in (
        ["check", *words, "--workers", "0"],
        ["show", *words, "--count", "1", "--out", str(folder / "shown.png")],
    ):
        ended = attempt(lambda: commands.main(["dpt_data", *action]), home / "log", 30)
        where = f"seed {seed}: {action}, {path.relative_to(folder)}: {ended.text[-1500:]}"
        assert ended.code in (0, 1) and "Traceback" not in ended.text, where
        assert ended.bytes < 4 * 2**30, where
    assert {place.name for place in home.iterdir()} - before <= {"log"}
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "seeds",
    [
        range(6),
        pytest.param(range(6, 12), marks=pytest.mark.slow),
        *(pytest.param(range(first, first + 20), marks=pytest.mark.slow) for first in range(12, 212, 20)),
    ],
)
def test_damaged_files_are_named_and_do_no_harm(seeds, sound_sets, tmp_path):
    for seed in seeds:
        read_damaged(sound_sets, seed, tmp_path)
