"""Store what a reader sees, and no more: no widget state, no bars that stand still, figures as JPEG where that is much
smaller than PNG, and code folded that a reader does not need: answers together with what they print, which often says
the answer; checks of exercises, cells for nbdev alone and the code of a lesson's opening picture without outputs. In
the order in which JupyterLab writes, so that a notebook that it saves unchanged is the same file.

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

from dpt_nb.workbench.exercises import source_of
from dpt_nb.workbench.student import belongs_to_answer

ASIDE = re.compile(r"#\|\s*hide\b|(#\|.*\n)*# checks?\b")
OPENS = re.compile(r"(.*/)?\d\d_.*|stories/.*")  # notebooks that begin with a question and a picture of the answer
FIRST_SCREEN = (
    12  # lines of code: with title, buttons and question a picture below more of them is off a laptop's screen
)
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
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


def shows_picture(cell: dict) -> bool:
    "Whether a cell's text or its outputs have one; buttons are none."
    if cell["cell_type"] == "markdown":
        return re.search(r"(?<!\[)!\[", source_of(cell)) is not None
    return any(PICTURES & set(output.get("data", {})) for output in cell.get("outputs", []))


def opening(cells: list[dict]) -> list[dict]:
    "The cells of code that a reader passes on the way to the first picture, and the one that draws it."
    drawn = next((place for place, cell in enumerate(cells) if shows_picture(cell)), len(cells) - 1)
    passed = [cell for cell in cells[: drawn + 1] if cell["cell_type"] == "code"]
    return [cell for cell in passed if not ASIDE.match(source_of(cell))]


def code_lines(cells: list[dict]) -> int:
    return sum(bool(line.strip()) for cell in cells for line in source_of(cell).splitlines())


def too_long(cells: list[dict]) -> list[dict]:
    "The longest cells of an opening, as many as it takes until the others leave room on the first screen."
    longest, left = sorted(cells, key=lambda cell: -code_lines([cell])), code_lines(cells)
    folded = []
    while left > FIRST_SCREEN:
        folded.append(longest[len(folded)])
        left -= code_lines(folded[-1:])
    return folded


def folds(
    notebook: dict,
    opens: bool,  # whether it begins with a question and a picture of the answer
) -> dict[str, dict]:  # id of a cell → what JupyterLab opens at a click
    "The cells that are to be folded. Imports that somebody folded by hand are left as they are."
    cells = notebook["cells"]
    first = too_long(opening(cells)) if opens else []
    folded = {cell["id"]: {"source_hidden": True} for cell in first}
    for place, cell in enumerate(cells):
        if belongs_to_answer(cells, place):
            folded[cell["id"]] = {"source_hidden": True, "outputs_hidden": True}
        elif cell["cell_type"] == "code" and ASIDE.match(source_of(cell)):
            folded[cell["id"]] = {"source_hidden": True}
    return folded


def fold(notebook: dict, opens: bool) -> bool:  # changed in place; whether it was
    "JupyterLab opens what is folded at a click."
    changed, folded = False, folds(notebook, opens)
    for cell in notebook["cells"]:
        asked = folded.get(cell["id"])
        changed |= asked is not None and cell["metadata"].get("jupyter") != asked
        cell["metadata"] |= {"jupyter": asked} if asked else {}
    return changed


def make_static(notebook: dict, opens: bool = False) -> bool:  # changed in place; whether anything was
    "All outputs of a notebook, and its folds."
    changed = notebook["metadata"].pop("widgets", None) is not None
    changed = fold(notebook, opens) or changed
    for cell in notebook["cells"]:
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
        make_static(notebook, OPENS.fullmatch(path.resolve().relative_to(root).as_posix()) is not None)
        if (text := as_saved(notebook)) != stored:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {before / 1e6:.2f} → {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
