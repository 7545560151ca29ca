"The launch cell in a kernel of a running JupyterLab: progress arrives in it, and the stop button ends every process."

import asyncio
import json
import re
import uuid
from urllib.request import Request, urlopen

import psutil
import pytest
from conftest import SHORT, alive, wait_until
from tornado.websocket import websocket_connect

CELL = """
from dpt_nb.all import *
recipe = change_recipe(get_recipe("rooms_tiny"), {assignments})
report = launch(recipe, "run", "data", num_processes=2, cpu=True, workers=1)
"""


def ask(server, method, path, body=None):
    "One request to the server."
    _, address, token = server
    request = Request(
        f"http://{address}/api/{path}",
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={"Authorization": f"token {token}"},
    )
    with urlopen(request, timeout=300) as answer:
        return json.loads(answer.read() or "null")


async def run_cell(server, kernel, code, seen=None):
    "Execute a cell; every message it caused, to its end. `seen` is called with each."
    _, address, token = server
    socket, message, messages = (
        await websocket_connect(f"ws://{address}/api/kernels/{kernel}/channels?token={token}"),
        uuid.uuid4().hex,
        [],
    )
    header = dict(msg_id=message, username="", session=uuid.uuid4().hex, msg_type="execute_request", version="5.3")
    content = dict(
        code=code, silent=False, store_history=True, user_expressions={}, allow_stdin=False, stop_on_error=True
    )
    await socket.write_message(
        json.dumps(dict(channel="shell", header=header, parent_header={}, metadata={}, content=content, buffers=[]))
    )
    ended = set()
    while len(ended) < 2:  # the reply, and the kernel at rest
        given = json.loads(await asyncio.wait_for(socket.read_message(), 600))
        if given["parent_header"].get("msg_id") != message:
            continue
        messages.append(given)
        if given["msg_type"] == "execute_reply" or (
            given["msg_type"] == "status" and given["content"]["execution_state"] == "idle"
        ):
            ended.add(given["msg_type"])
        if seen:
            seen(given)
    socket.close()
    return messages


def kernel_process(folder):
    "The kernel's process, the server's child that runs ipykernel: just started, it may still be a copy of the server."
    found = lambda: [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(folder) and "ipykernel_launcher" in " ".join(process.info["cmdline"] or ())
    ]
    return wait_until(found)[0]


@pytest.mark.slow
def test_the_stop_button_ends_every_process_and_the_kernel_goes_on(server):
    folder, kernel = server[0], ask(server, "POST", "kernels", {"name": "python3"})["id"]
    started, pressed = kernel_process(folder), []

    def press_stop(message):  # the button of the page sends this request
        log = folder / "run" / "metrics.jsonl"
        if not pressed and log.exists() and log.read_text().count("\n") >= 3:
            pressed.extend(started.children(recursive=True))
            ask(server, "POST", f"kernels/{kernel}/interrupt")

    assignments = [*SHORT, "loop.steps=400", "keep.save_steps=400", "keep.validate_every=400"]
    messages = asyncio.run(run_cell(server, kernel, CELL.format(assignments=assignments), press_stop))
    error = [message["content"] for message in messages if message["msg_type"] == "error"]
    assert len(pressed) >= 4, "two processes, each with one that reads samples"
    assert (
        error and error[0]["ename"] == "Stopped" and re.match(r"Stopped after step \d+ of 400", error[0]["evalue"])
    ), error or messages[-1]
    assert any(message["msg_type"] in ("stream", "display_data") for message in messages), (
        "no progress reached the cell"
    )
    wait_until(lambda: not alive(pressed))
    done = int(re.search(r"step (\d+)", error[0]["evalue"])[1])
    assert (folder / "run" / "checkpoints" / f"step-{done:08d}.pt").exists()

    messages = asyncio.run(run_cell(server, kernel, "print('still here', 1 + 1)"))
    assert (
        "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")
        == "still here 2\n"
    )
    ask(server, "DELETE", f"kernels/{kernel}")
