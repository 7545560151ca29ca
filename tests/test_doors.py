"Who is let in: a page of its own, the processes of a launch, and what a script for a scheduler makes of names."

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from urllib.parse import urlsplit

import psutil
import pytest
from conftest import hear_signals, stop, wait_until
from PIL import Image

CELL = "from IPython.display import HTML; HTML('<p>the notebook says: ' + 'well' + '</p>')"


def test_what_is_started_hears_every_signal():
    "Also from a process that was told to ignore them, which is the next test."
    asks = """import json, signal
names = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT', 'SIGCHLD')
ignored = [name for name in names if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN]
print(json.dumps([ignored, [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]]))"""
    assert json.loads(subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True).stdout) == [[], []]
    assert (
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3
    )  # unknown where SIGCHLD is ignored
    running = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) in (-signal.SIGINT, 130)
    running.stdout.close()


def test_also_under_nohup_in_the_background_with_signals_blocked():
    def deafen():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        test_what_is_started_hears_every_signal.__name__,
    ]
    done = subprocess.run(words, preexec_fn=deafen, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert hear_signals() is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A small notebook as a page, with a picture beside it: where it is, its token, its process."
    pytest.importorskip("voila", reason="voila is not installed: pip install 'dpt_nb[page]'")
    folder, token = tmp_path_factory.mktemp("page"), uuid.uuid4().hex
    cell = dict(cell_type="code", id="a", metadata={}, source=CELL, outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (folder / "small.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    Image.new("RGB", (3, 2), "red").save(folder / "mine.png")
    words = [
        sys.executable,
        "-m",
        "dpt_nb.workbench.serve",
        "small.ipynb",
        "--no-browser",
        "--port=8901",
        "--token=",
        "--Voila.tornado_settings={'allow_remote_access': True}",
    ]
    environment = os.environ | dict(
        JUPYTER_TOKEN=token,
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        JUPYTER_CONFIG_DIR=str(folder / "config"),
        JUPYTER_RUNTIME_DIR=str(folder / "runtime"),
        IPYTHONDIR=str(folder / "ipython"),
    )
    with open(folder / "log", "w") as log:
        running = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        printed = wait_until(
            lambda: re.search(r"(http://\S+token=\w+)\n", (folder / "log").read_text()), running, folder / "log"
        )[1]
        yield folder, printed, token, running
    finally:
        stop(running)


def ask(page, path, host=None, token=None, method="GET", **headers):
    "One request: its status and what came, for an upgrade nothing and for a log-in its cookie."
    address = urlsplit(page[1])
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    headers = {"Host": host or address.netloc} | ({"Authorization": f"token {token}"} if token else {}) | headers
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, b"" if answer.status == 101 else answer.getheader("Set-Cookie", "").split(";")[
            0
        ] if method == "HEAD" else answer.read()
    finally:
        connection.close()


KERNEL = "00000000-0000-0000-0000-000000000000"
SOCKET = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
PATHS = [
    "/",
    "/other.ipynb",
    "/voila/files/mine.png",
    "/voila/templates/lab/static/main.js",
    "/voila/static/voila.js",
    "/voila/api/themes/x.css",
    "/voila/labextensions/x.js",
    f"/api/kernels/{KERNEL}",
    f"/voila/api/shutdown/{KERNEL}",
]


def test_the_printed_address_leads_to_the_page(page):
    folder, printed, token, running = page
    assert printed.endswith(f"/?token={token}")
    status, text = ask(page, printed[printed.index("/", 8) :])
    assert status == 200 and b"the notebook says: well" in text
    assert token not in " ".join(psutil.Process(running.pid).cmdline())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_token_nothing_comes(page, path, token):
    for method in ("GET", "HEAD", "POST", "DELETE", "PUT"):
        status, text = ask(page, path, token=token, method=method)
        library = (
            method in ("GET", "HEAD") and "/static/" not in path and path.rsplit("/", 1)[1] in ("x.css", "x.js")
        )  # Jupyter Server's own files of the library, for its page to log in
        assert status in ((404,) if library else (302, 403, 405)), (method, status, text)
        assert "the notebook says" not in str(text) and "PNG" not in str(text)  # bytes, or a cookie


def test_with_the_token_files_come(page):
    status, text = ask(page, "/voila/files/mine.png", token=page[2])
    assert (status, text) == (200, (page[0] / "mine.png").read_bytes())
    for path in (
        "/voila/files/..%2flog",
        "/voila/files/../log",
        "/voila/files/small.ipynb",
        "/voila/files/%2e%2e/%2e%2e/etc/passwd",
    ):
        assert ask(page, path, token=page[2])[0] in (403, 404)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8866",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "[2001:db8::1]",
        "evil.example#localhost",
        "user@evil.example",
    ],
)
def test_a_foreign_host_is_refused_with_the_right_token_too(page, host):
    for path in [*PATHS, "/login", "/logout"]:
        for method in ("GET", "POST"):
            status, text = ask(page, path, host, page[2], method)
            assert status in (400, 403), (path, method, status, text)


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1", "127.0.0.2:1", "[::1]"])
def test_this_machine_by_any_of_its_names(page, host):
    assert ask(page, "/voila/files/mine.png", host, page[2])[0] == 200


def test_a_kernel_is_reached_with_the_token_only(page):
    path = f"/api/kernels/{KERNEL}/channels"
    assert ask(page, path, **SOCKET)[0] == 403
    assert ask(page, path, "evil.example", page[2], **SOCKET)[0] == 403
    status, text = ask(page, "/", token=page[2])
    kernel = re.search(rb'"kernelId": ?"([0-9a-f-]+)"', text)[
        1
    ].decode()  # the page's own, which lives until its page says good-bye
    assert ask(page, f"/api/kernels/{kernel}/channels", **SOCKET)[0] == 403
    cookie = {
        "Cookie": ask(page, f"/login?token={page[2]}", method="HEAD")[1]
    }  # what a browser sends by itself, from the pages of others too
    assert ask(page, f"/api/kernels/{kernel}/channels", **SOCKET | cookie)[0] == 101
    assert ask(page, f"/api/kernels/{kernel}/channels", **SOCKET | cookie | {"Origin": "http://evil.example"})[0] == 403
    assert ask(page, f"/api/kernels/{kernel}", method="DELETE", **cookie)[0] == 403, (
        "without the page's own second token"
    )
    assert ask(page, f"/api/kernels/{kernel}/channels", token=page[2], **SOCKET)[0] == 101
    assert ask(page, f"/api/kernels/{kernel}", method="DELETE")[0] == 403
    assert json.loads(ask(page, f"/api/kernels/{kernel}", token=page[2])[1])["id"] == kernel


def test_a_page_is_not_opened_to_other_machines(page):
    done = subprocess.run(
        [sys.executable, "-m", "dpt_nb.workbench.serve", "small.ipynb", "--Voila.ip=0.0.0.0"],
        cwd=page[0],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr.endswith(
        "A page listens on this machine only, and Voila.ip is '0.0.0.0': "
        "leave it out, and come from elsewhere through ssh -L.\n"
    )


def test_a_page_listens_on_this_machine_only(page):
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(page[3].pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}
