"""Store what a reader sees, and no more: no widget state, no bars that stand still, figures as JPEG where that is much
smaller than PNG, and answers folded together with what they print, which often says the answer. In the order in which
JupyterLab writes, so that a notebook that it saves unchanged is the same file.

`python tests/static_outputs.py [NOTEBOOK …]` (all of nbs/ without any), after notebooks were executed and cleaned.
A widget's view shows nothing without a kernel, and its state holds every figure once more, as base64 in the metadata.
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
from PIL import Image

ANSWER = re.compile(r"(#\|.*\n)*# answer\b")
VIEW = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"[^\n]*\d%\|[ #\d]*\| \d+/\d+ \[00:00<\?,[^\n]*\s*")  # of a live widget, as it began


def drop_views(output: dict) -> bool:  # changed in place; whether there was one
    "Leave out a widget's view. Raises `ValueError` where nothing else is stored beside it."
    if VIEW not in output["data"]:
        return False
    if len(output["data"]) == 1:
        raise ValueError(
            "An output holds a widget's view and neither figure nor text: give the widget a figure to show."
        )
    del output["data"][VIEW]
    return True


def is_bar(output: dict) -> bool:
    "Whether an output is nothing but a progress bar that once moved."
    data = output.get("data", {})
    return set(data) == {"text/plain"} and BAR.fullmatch("".join(data["text/plain"])) is not None


def drop_bars(cell: dict) -> bool:  # changed in place; whether it was
    "No bars, once their widgets are gone; what was printed before and after one is one piece again."
    outputs, kept = cell.get("outputs", []), []
    for output in outputs:
        if is_bar(output):
            continue
        if kept and "stream" == output["output_type"] == kept[-1]["output_type"] and output["name"] == kept[-1]["name"]:
            kept[-1]["text"] = "".join([*kept[-1]["text"], *output["text"]]).splitlines(keepends=True)
        else:
            kept.append(output)
    if len(kept) == len(outputs):
        return False
    cell["outputs"] = kept
    return True


def to_jpeg(
    png: bytes,
    quality: int = 88,
) -> bytes:
    "The same figure as JPEG, on white."
    figure, file = Image.open(io.BytesIO(png)).convert("RGBA"), io.BytesIO()
    white = Image.new("RGBA", figure.size, "white")
    Image.alpha_composite(white, figure).convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def shrink_figure(output: dict, worth: float = 0.6) -> bool:  # changed in place; worth: of the PNG's bytes
    "A figure as JPEG where that takes much less; drawings of lines stay as they are."
    stored = output["data"].get("image/png")
    if stored is None:
        return False
    png = base64.b64decode("".join(stored))
    jpeg = to_jpeg(png)
    if len(jpeg) > worth * len(png):
        return False
    del output["data"]["image/png"]
    output["data"]["image/jpeg"] = base64.b64encode(jpeg).decode() + "\n"
    sizes = output.get("metadata", {})
    if "image/png" in sizes:
        sizes["image/jpeg"] = sizes.pop("image/png")
    return True


def fold_answer(cell: dict) -> bool:  # changed in place; whether it was
    "JupyterLab opens an answer's code and outputs when they are clicked."
    folded = {"source_hidden": True, "outputs_hidden": True}
    if cell["cell_type"] != "code" or not ANSWER.match("".join(cell["source"])):
        return False
    changed = cell["metadata"].get("jupyter") != folded
    cell["metadata"]["jupyter"] = folded
    return changed


def make_static(notebook: dict) -> bool:  # changed in place; whether anything was
    "All outputs of a notebook."
    changed = notebook["metadata"].pop("widgets", None) is not None
    for cell in notebook["cells"]:
        changed = fold_answer(cell) or changed
        for output in cell.get("outputs", []):
            if "data" in output:
                changed = drop_views(output) or changed
                changed = shrink_figure(output) or changed
        changed = drop_bars(cell) or changed
    return changed


def as_saved(notebook: dict) -> str:  # notebook: as JSON
    "The text of its file, as JupyterLab writes it."
    return nbformat.writes(nbformat.from_dict(notebook), version=4).rstrip("\n") + "\n"


def main(paths: list[str]) -> None:
    "Write the notebooks that change."
    root = Path(__file__).parents[1] / "nbs"
    for path in map(Path, paths or sorted(root.rglob("*.ipynb"))):
        stored = path.read_text(encoding="utf-8")
        notebook = json.loads(stored)
        before = path.stat().st_size
        make_static(notebook)
        if (text := as_saved(notebook)) != stored:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {before / 1e6:.2f} → {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
