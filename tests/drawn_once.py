"""Miniatures of KITTI and NYUv2 are drawn at the size of the real sets, a second an image, and many notebooks and tests
ask for the same ones: in a run of the tests each view is drawn once and kept in a folder for the others."""

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from functools import wraps
from pathlib import Path

import torch


def kept_in(folder: Path, draw):
    "`draw`, with what it draws kept in a folder under what it was asked for."

    @wraps(draw)
    def view(*words, **named):
        asked = [words, sorted(named.items())]
        path = folder / f"{hashlib.sha256(repr(asked).encode()).hexdigest()}.pt"
        if path.exists():
            return torch.load(path)
        drawn = draw(*words, **named)
        with suppress(OSError, RuntimeError), tempfile.TemporaryDirectory(dir=folder) as unfinished:
            torch.save(drawn, f"{unfinished}/view.pt")  # a process that may write no large files keeps nothing
            os.replace(f"{unfinished}/view.pt", path)
        return drawn

    return view


def draw_views_once(folder: str | Path) -> None:
    "From here on `render_view` is asked once for each view, in this process and its forks, wherever it was imported."
    from dpt_nb.data import scene_sets

    draw = scene_sets.render_view
    keeping = kept_in(Path(folder), draw)
    for name, module in list(sys.modules.items()):
        if name.startswith("dpt_nb.") and vars(module).get("render_view") is draw:
            module.render_view = keeping
