"""What several tests share: a small run trained through the command, a folder of every kind of picture, a JupyterLab,
and the table of parity printed at the end."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.cbook
import numpy as np
import psutil
import pytest
from drawn_once import draw_views_once
from forked import quick_figures
from PIL import Image

from dpt_nb.workbench.lab import lab_options

VIEWS = "DPT_NB_VIEWS"
REPOSITORY = Path(__file__).resolve().parent.parent
SHORT = [
    "loop.steps=6",
    "data.batch_size=4",
    "keep.validate_every=3",
    "keep.save_steps=2",
    "data.train.count=12",
    "data.held_out.count=4",
]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def hear_signals():
    """What is started from here hears every signal, whatever this process was started by: `nohup` and a shell's `&`
    hand on ignored signals, a thread may hand on blocked ones. This process itself still survives a hangup."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    own = {
        getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)
    }  # ignored by every Python, and given back to what it starts
    for number in set(signal.valid_signals()) - own:
        if signal.getsignal(number) is signal.SIG_IGN:
            handler = {signal.SIGINT: signal.default_int_handler, getattr(signal, "SIGCHLD", None): signal.SIG_DFL}
            signal.signal(
                number, handler.get(number, lambda *_: None)
            )  # what is caught here is at its default after exec


def pytest_configure(config):
    gc.disable()  # importing makes objects that stay: looking for others among them takes a sixth of its time
    hear_signals()
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    if VIEWS not in os.environ:  # several test processes use the folder of the one that started them
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ[VIEWS] = folder.name


LONGEST = ["distributed", "training", "launch", "export", "run_folder", "browser", "commands", "files_of_users"]


def pytest_collection_modifyitems(config, items):
    longest = [f"test_{name}.py" for name in LONGEST]  # first, or one process ends long after the other
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def pytest_collection_finish():
    if "dpt_nb.data.scene_sets" in sys.modules:
        draw_views_once(os.environ[VIEWS])
    gc.freeze(), gc.enable()


PARITY = []  # rows of (model, size, largest difference, smallest cosine)


@pytest.fixture(scope="session")
def parity_rows():
    "Where a test of parity leaves its figures."
    return PARITY


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several test processes: the rows go to the one that prints
        session.config.workeroutput["parity"] = [list(row) for row in PARITY]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    PARITY.extend(getattr(node, "workeroutput", {}).get("parity", []))


def pytest_terminal_summary(terminalreporter):
    if PARITY:
        terminalreporter.section(
            "the same weights elsewhere: largest difference as a share of the largest value, smallest cosine of "
            "gradients"
        )
        for model, (height, width), difference, cosine in PARITY:
            terminalreporter.write_line(
                f"{model:52}{f'{height}×{width}':>11}  {difference:.1e}" + ("" if cosine is None else f"  {cosine:.6f}")
            )


def command(*words, folder, check=None, timeout=600, **options):
    "Run one of our commands as a shell would, in a folder; `check` is the exit code expected."
    done = subprocess.run(
        [Path(sys.executable).parent / words[0], *map(str, words[1:])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        **options,
    )
    assert check is None or done.returncode == check, (
        f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
    )
    return done


def command_here(*words, folder, check=None):
    """The same in this process, which has torch already: for tests of what a command does, rather than of how it
    starts and ends."""
    from dpt_nb.commands import main

    before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch("torch.cuda.is_available", lambda: False),
        ):
            try:
                code = main(list(map(str, words)))
            except Exception:
                traceback.print_exc()
                code = 1
    finally:
        os.chdir(before)
    done = SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
    assert check is None or done.returncode == check, (
        f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
    )
    return done


def image_of(*size, batch=2):
    "A random batch, the same for each size."
    import torch

    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def folder_of(peer, path):
    peer.save_pretrained(path)
    return path


def gradients_under_our_names(peer, folder):
    "Of a transformers model that was saved in `folder / peer`."
    import torch
    from safetensors.torch import load_file

    from dpt_nb.weights.key_maps import key_rules, remap_state_dict

    values = {parameter: parameter.data for parameter in peer.parameters()}
    for parameter in values:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    peer.save_pretrained(folder / "gradients")
    for parameter, value in values.items():
        parameter.data = value
    gradients = load_file(folder / "gradients" / "model.safetensors")
    config = json.loads((folder / "peer" / "config.json").read_text())
    return remap_state_dict(gradients, key_rules("transformers", gradients, config))[0]


@pytest.fixture(scope="module")
def no_figures():
    "Runs in this process, and in forks of it, write figures without drawing them."
    with quick_figures():
        yield


def changes(*assignments):
    "Assignments as arguments of a command."
    return [word for assignment in assignments for word in ("--set", assignment)]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "A folder in which a very short demo was run."
    folder = tmp_path_factory.mktemp("demo")
    command("dpt_demo", *changes(*SHORT), folder=folder, check=0)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    "One photograph in every kind of file that people have."
    folder = tmp_path_factory.mktemp("photographs")
    photo = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).resize((90, 70))
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 90, dtype=np.uint8), (70, 1)))
    photo.save(folder / "color.jpg")
    photo.convert("L").save(folder / "gray.png")
    Image.merge("LA", (photo.convert("L"), alpha)).save(folder / "gray alpha.png")
    Image.merge("RGBA", (*photo.split(), alpha)).save(folder / "rgba.png")
    photo.convert("P").save(folder / "palette.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (2000, 1), "red").save(folder / "strip.png")
    photo.save(folder / "größe 雪.png")
    return folder


def wait_until(what, running=None, log=None, seconds=300):
    """The first true answer of `what`; fails with the log when the process behind it has ended, or after the time a
    very busy machine needs."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        ended = running is not None and running.poll() is not None
        assert not ended and time.monotonic() < deadline, (
            f"{what} did not come "
            f"true{' while its process ran' * ended}\n{log.read_text(errors='replace') if log else ''}"
        )
        time.sleep(0.02)
    return answer


def answers(url, token=""):
    "Whether a server answers there: a file that describes it, or a line in its log, is written before it listens."
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Authorization": f"token {token}"}), timeout=30
        ) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def alive(processes):
    "Those that still run: one that has ended and was not yet asked after does not."

    def runs(process):
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return list(filter(runs, processes))


def stop(running):
    "End a process that was started here, by force where it does not listen."
    running.terminate()
    try:
        running.wait(60)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


# For a page in a browser, given a selector of its words: those with less contrast than 4.5, with what they have.
FAINT = """words => {
    const paint = getComputedStyle, apart = ".visually-hidden, .headerlink, style, script";
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const drawn = canvas.getContext("2d", {willReadFrequently: true}), seen = {};
    const number = color => seen[color] ??= (() => {
        drawn.clearRect(0, 0, 1, 1); drawn.fillStyle = color; drawn.fillRect(0, 0, 1, 1);
        return [...drawn.getImageData(0, 0, 1, 1).data].map(part => part / 255);
    })();
    const over = (front, back) => front.slice(0, 3).map((part, i) => part * front[3] + back[i] * (1 - front[3]));
    const light = color => {
        const [r, g, b] = color.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) layers.unshift(number(paint(e).backgroundColor));
        return layers.reduce((back, front) => over(front, back), [1, 1, 1]);
    };
    const opacity = element => {
        let all = 1;
        for (let e = element; e; e = e.parentElement) all *= Number(paint(e).opacity);
        return all;
    };
    const found = {};
    for (const element of document.querySelectorAll(words)) {
        const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.checkVisibility() || element.closest(apart)) continue;
        const back = ground(element), ink = number(paint(element).color);
        ink[3] *= opacity(element);
        const [low, high] = [light(over(ink, back)), light(back)].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        const key = `${element.tagName} .${element.className} in .${element.parentElement.className}`;
        const words = element.textContent.trim().slice(0, 40);
        if (ratio < 4.5) found[key] ??= `${ratio.toFixed(2)}: ${words}`;
    }
    return found;
}"""


def darkest_and_brightest(picture):
    "Of a screenshot, as grays from 0 to 255."
    return Image.open(io.BytesIO(picture)).convert("L").getextrema()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A JupyterLab in an empty folder that answers: its folder, address and token."
    folder, token = tmp_path_factory.mktemp("lab"), uuid.uuid4().hex
    words = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        *lab_options(),
    ]
    environment = os.environ | dict(
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        JUPYTER_RUNTIME_DIR=str(folder / "runtime"),
        JUPYTER_CONFIG_DIR=str(folder / "config"),
        IPYTHONDIR=str(folder / "ipython"),  # or what cells do would stand in the user's own history
    )
    with open(folder / "server.log", "w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words], cwd=folder, stdout=log, stderr=log, env=environment
        )

    def described():
        try:
            return [json.loads(path.read_text())["port"] for path in (folder / "runtime").glob("jpserver-*.json")]
        except ValueError:  # half written
            return []

    try:
        address = f"127.0.0.1:{wait_until(described, running, folder / 'server.log')[0]}"
        wait_until(lambda: answers(f"http://{address}/api/status", token), running, folder / "server.log")
        yield folder, address, token
    finally:
        stop(running)
