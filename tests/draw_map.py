"""The front door's map: one picture of every chapter, taken from the outputs stored in its notebook, in the order of
the course.

`python tests/draw_map.py` writes nbs/figures/map.jpg. Nothing is executed; run it when a chapter is new or draws
something else.
"""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dpt_nb.images.files import atomic_write

HERE = Path(__file__).resolve().parent.parent
MAP = HERE / "nbs" / "figures" / "map.jpg"


@dataclass(frozen=True)
class Pick:
    "Which of a notebook's outputs stands for it, and how it fills its tile."

    title: str  # below the picture
    cell: str  # words that occur in the source of one cell only, the one with the output
    panels: tuple = ()  # which parts of a figure, in reading order from 0; none is the whole of it
    columns: int = 2  # parts side by side
    split: bool = False  # parts that show the same: a strip of each, as one picture
    picture: int = 0  # which of the cell's pictures
    box: tuple = (0, 0, 1, 1)  # left, top, right, bottom of the part of the figure that is looked at, as shares
    fill: bool = True  # cut what stands over, instead of leaving white beside it
    lines: slice | None = None  # for a text: these lines of it, instead of a picture
    words: tuple = ("", "")  # for a text: a pattern and what takes its place, to shorten lines


PICKS = {
    "network/07_dpt": Pick("the network", "if it were linear in the area", fill=False),
    "scenes/01_scenes": Pick("scenes", 'show([render(random_scene("rooms"', box=(0, 0, 0.34, 1)),
    "data/12_datasets": Pick("samples", "depth, as LiDAR", (0, 1, 2, 3)),
    "data/scene_sets": Pick("scene sets", "depth, as LiDAR", (0, 2, 4, 6)),
    "data/kitti": Pick("KITTI", "200×100 pixels of it", (0, 1), columns=1),
    "data/nyu": Pick("NYUv2", "sync: JPEG", (0, 1, 2, 3)),
    "data/ade20k": Pick("ADE20K", "show_label(ade[0]", (0,)),
    "data/pascal_context": Pick("Pascal Context", "show_label(context[3]", (0,)),
    "images/00_images": Pick("image files", "labels: a class", (0, 1, 2, 3, 4, 5), columns=3),
    "network/02_patch_embed": Pick("tokens", "48 patches, 48 tokens", tuple(range(48)), columns=8),
    "network/03_backbone": Pick("four taps", 'create_model("dpt_tiny_scenes", pretrained=True)', (0, 1, 2), columns=1),
    "network/04_reassemble": Pick(
        "four levels", 'create_model("dpt_tiny_scenes", pretrained=True)', (1, 2, 3), columns=1
    ),
    "network/05_fusion": Pick("fusion", 'create_model("dpt_tiny_scenes", pretrained=True)', (1, 2, 3, 4)),
    "network/06_heads": Pick("heads", "invert, KITTI constants", (0,), fill=False),
    "weights/key_maps": Pick(
        "weights", '"heads.inverse_depth.convolution3.bias",', lines=slice(0, 10), words=(r"(?m)^ +(\S+) +", r" \1 ")
    ),
    "network/08_inside": Pick("looking inside", "for name in places for block in range(4)]", (1, 4, 7, 13)),
    "objective/09_losses": Pick("losses", "g (log m)", (3, 6), columns=1),
    "objective/10_metrics": Pick("metrics", "1 − AbsRel", (1,)),
    "data/11_transforms": Pick("augmentation", "def draw(samples, height", (1, 3, 7, 9)),
    "data/sampling": Pick("loading", "epoch {epoch}", (0, 1, 2, 3)),
    "data/checks": Pick("data care", "show_samples(KITTI(kitti_root), [0, 1])", (0, 1), columns=1),
    "inference/13_predictor": Pick("predicting", "street.show()", (0, 1), split=True),
    "evaluation/14_evaluate": Pick("evaluating", "panel(scenes, held_out, [0, 1])", (0, 1, 2, 3)),
    "inference/tiled": Pick("windows", "zip(axes[1:], ways.items())", (1, 3), split=True),
    "inference/outputs": Pick("files", 'overlay_figure(room["image"]', (0,)),
    "inference/point_clouds": Pick("points", "turntable(points, colors)", (0,)),
    "inference/folders": Pick("folders", "after the stop", lines=slice(0, 9), words=(r" (?=[0-9p])", "\n")),
    "inference/films": Pick("video", "show_images(made[::5]", (0, 1, 2), columns=1),
    "evaluation/prediction_files": Pick(
        "others' files",
        "kitti_eigen_crop",
        lines=slice(1, 8),
        words=(r"(?m)^(\w*) +(\S+) +\S+ +(\S+).*$", r"\1\n   \2  \3"),
    ),
    "evaluation/gallery": Pick("best and worst", '"label", count=2)', (0, 1, 2, 3)),
    "training/15_recipes": Pick(
        "recipes",
        'print(recipe_table(get_recipe("kitti_vitb")))',
        lines=slice(12, 21),
        words=(r"(?m) {2,}(.*?)( +←.*)?$", r" \1"),
    ),
    "training/16_loop": Pick("training", "depth along row 30", (0, 1, 2, 3)),
    "training/17_launch": Pick("many processes", "process 0 of 2", box=(0, 0, 0.41, 1), fill=False),
    "training/18_own_data": Pick("your own data", "naive=naive))", (0, 1, 2, 3)),
    "workbench/pages": Pick("pages", "page = SceneByNumber()", (0, 1), columns=1),
    "workbench/maps": Pick("inside, by clicks", "page = MapExplorer()", fill=False),
    "workbench/scene_maker": Pick("scene maker", "page = SceneMaker()", fill=False),
    "workbench/loss_lab": Pick("loss lab", "page = LossLab()", box=(0.55, 0, 1, 1), fill=False),
    "workbench/training_room": Pick("training room", "room_page.press(", fill=False),
    "workbench/comparison": Pick("two networks", "page = Comparison()", (1, 2), columns=1),
    "deploy/19_fast_lane": Pick("a fast lane", "draw_roof(base_operations", fill=False),
    "deploy/engines": Pick("export", "its depth, from ONNX Runtime", (0, 1), columns=1),
    "workbench/workbench": Pick("the workbench", "Workbench()", fill=False),
    "commands": Pick("commands", "--help", lines=slice(0, 9), words=(r"\s+(?=\[|--)", "\n ")),
    "stories/first_depth": Pick("a first depth map", "panel(predictor, held_out, range(6)", (0, 1, 2, 3)),
    "stories/kitti_nyu": Pick("published rows", "truth at", (1, 0, 2, 3)),
    "stories/segmentation": Pick("segmentation", 'show_label(street, prediction["label"]', (0,)),
    "stories/attention_vs_convolution": Pick("attention or convolution", "def looked_at(model, pictures)", (0, 1)),
}


class MapError(Exception):
    "A chapter whose picture cannot be found, in one sentence."


def chapters() -> list[tuple[str, str]]:
    "(notebook, wing) in the order of the front door's table."
    source = "".join("".join(cell["source"]) for cell in read("index"))
    part, found = "", []
    for heading, notebook in re.findall(r"^\| *(?:\*\*(.+?)\*\*)? *\| \[\w+\]\(([\w/]+)\.ipynb\)", source, re.M):
        part = heading or part
        if notebook in PICKS or re.search(r"\d\d_", notebook):  # every lesson, and what else has a picture
            found.append((notebook, part))
    return found


def read(notebook: str) -> list[dict]:
    return json.loads((HERE / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]


def picked(notebook: str) -> Image.Image | list[str]:
    "The chapter's picture, its parts side by side; or its lines of text. Raises `MapError` where it is missing."
    if notebook not in PICKS:
        raise MapError(
            f"{notebook} is in the front door's table and has no picture on its map: name one in PICKS of "
            f"tests/draw_map.py."
        )
    pick = PICKS[notebook]
    kinds = ("text",) if pick.lines else ("image/png", "image/jpeg")
    cells = [
        cell["outputs"]
        for cell in read(notebook)
        if cell["cell_type"] == "code" and pick.cell in "".join(cell["source"])
    ]
    stored = [
        found
        for outputs in cells
        if (found := [output_of(output, kind) for output in outputs for kind in kinds if output_of(output, kind)])
    ]
    if len(stored) != 1:
        raise MapError(
            f"{len(stored)} cells of {notebook} with the words {pick.cell!r} hold a "
            f"{'text' if pick.lines else 'picture'}, and one was expected: "
            "is it executed? Else mend its row in PICKS of tests/draw_map.py."
        )
    if pick.lines:
        return re.sub(*pick.words, "".join(stored[0])).splitlines()[pick.lines]
    if pick.picture >= len(stored[0]):
        raise MapError(
            f"The cell {pick.cell!r} of {notebook} holds {len(stored[0])} pictures, and number {pick.picture} was "
            f"asked for, counted from 0: mend PICKS of tests/draw_map.py."
        )
    figure = Image.open(io.BytesIO(base64.b64decode(stored[0][pick.picture]))).convert("RGB")
    figure = figure.crop(tuple(round(share * side) for share, side in zip(pick.box, figure.size * 2)))
    parts = parts_of(figure, pick, notebook)
    return strips(parts) if pick.split else beside(parts, pick)


def output_of(output: dict, kind: str) -> str:
    return "".join(output.get("text", "") if kind == "text" else output.get("data", {}).get(kind, ""))


def parts_of(figure: Image.Image, pick: Pick, notebook: str) -> list[Image.Image]:
    boxes = panels(figure) if pick.panels else [(0, 0, *figure.size)]
    if pick.panels and max(pick.panels) >= len(boxes):
        raise MapError(
            f"The figure of {notebook} at {pick.cell!r} has {len(boxes)} panels, and number {max(pick.panels)} "
            f"was asked for, counted from 0: mend PICKS of tests/draw_map.py."
        )
    return [figure.crop(boxes[panel]) for panel in pick.panels or (0,)]


def panels(figure: Image.Image, side: int = 40) -> list[tuple]:
    """The boxes of a figure's panels in reading order: cut along white rows and columns until none is left, words and
    color bars left out."""
    boxes = [box for box in cut(np.asarray(figure).min(2) < 245) if min(box[2] - box[0], box[3] - box[1]) >= side]
    return sorted(boxes, key=lambda box: (round(box[1] / side), box[0]))


def cut(ink: np.ndarray, left: int = 0, top: int = 0) -> list[tuple]:
    rows = stretches(ink.any(1))
    found = [(first, start, last, stop) for start, stop in rows for first, last in stretches(ink[start:stop].any(0))]
    if len(found) == 1:
        first, start, last, stop = found[0]
        return [(left + first, top + start, left + last, top + stop)]
    return [
        box for first, start, last, stop in found for box in cut(ink[start:stop, first:last], left + first, top + start)
    ]


def stretches(filled: np.ndarray, gap: int = 1) -> list[tuple]:
    "(first, one past the last) of each stretch of True, those nearer than `gap` as one."
    at = np.flatnonzero(filled)
    breaks = np.flatnonzero(np.diff(at) > gap)
    return [] if not len(at) else list(zip(at[[0, *breaks + 1]].tolist(), (at[[*breaks, len(at) - 1]] + 1).tolist()))


WIDTH, COLUMNS, TILE, CAPTION, GAP, MARGIN = 1500, 6, (214, 160), 30, 56, 26
COLORS = ["#6b7280", "#b45309", "#b91c1c", "#15803d", "#1d4ed8", "#7c3aed", "#0f766e", "#be185d"]


def beside(parts: list[Image.Image], pick: Pick, gap: int = 3) -> Image.Image:
    "Parts in a grid that fills the tile."
    columns = min(pick.columns, len(parts))
    rows = -(-len(parts) // columns)
    size = (TILE[0] - gap * (columns - 1)) // columns, (TILE[1] - gap * (rows - 1)) // rows
    sheet = Image.new("RGB", TILE, "white")
    for place, part in enumerate(parts):
        sheet.paste(
            fitted(part, size, pick.fill), (place % columns * (size[0] + gap), place // columns * (size[1] + gap))
        )
    return sheet


def fitted(part: Image.Image, size: tuple, fill: bool) -> Image.Image:
    """A picture at another size, its sides in proportion: what stands over is cut on both sides, or what is missing is
    white."""
    return ImageOps.fit(part, size, Image.LANCZOS) if fill else ImageOps.pad(part, size, Image.LANCZOS, color="white")


def strips(parts: list[Image.Image]) -> Image.Image:
    "Pictures of the same thing as one, from left to right a strip of each."
    sheet = fitted(parts[0], TILE, True)
    for place, part in enumerate(parts):
        left, right = TILE[0] * place // len(parts), TILE[0] * (place + 1) // len(parts)
        sheet.paste(
            fitted(part, TILE, True).crop((left + 2 * (place > 0), 0, right, TILE[1])), (left + 2 * (place > 0), 0)
        )
        if place:
            sheet.paste("white", (left, 0, left + 2, TILE[1]))
    return sheet


def font(size: int, name: str = "DejaVuSans") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def written(lines: list[str]) -> Image.Image:
    "Text as a tile, in letters as large as its longest line and its number of lines allow, within reason."
    size = max(11, min(15, int(TILE[0] / (0.62 * max(map(len, lines)))), (TILE[1] - 14) // len(lines) - 4))
    room = int((TILE[0] - 14) / (0.602 * size))
    card = Image.new("RGB", TILE, "#f9fafb")
    for row, line in enumerate(lines):
        ImageDraw.Draw(card).text(
            (8, 7 + (size + 4) * row),
            line if len(line) <= room else line[: room - 1] + "…",
            fill="#374151",
            font=font(size, "DejaVuSansMono"),
        )
    return card


def draw_map() -> Image.Image:
    "All chapters in rows, an arrow from each to the next, the parts of the course in colors."
    course = chapters()
    wings = list(dict.fromkeys(part for _, part in course))
    row_height, step = TILE[1] + CAPTION + GAP, (WIDTH - 2 * MARGIN - TILE[0]) / (COLUMNS - 1)
    sheet = Image.new("RGB", (WIDTH, row_height * -(-len(course) // COLUMNS)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (notebook, part) in enumerate(course):
        x, y = round(MARGIN + place % COLUMNS * step), GAP - 10 + place // COLUMNS * row_height
        color, content = COLORS[wings.index(part) % len(COLORS)], picked(notebook)
        if not place or part != course[place - 1][1]:
            heading = font(19, "DejaVuSans-Bold")
            draw.text((min(x, WIDTH - 4 - heading.getlength(part)), y - 27), part, fill=color, font=heading)
        sheet.paste(written(content) if isinstance(content, list) else content, (x, y))
        draw.rectangle((x - 1, y - 1, x + TILE[0], y + TILE[1]), outline=color, width=2)
        number = "".join(re.findall(r"\d\d(?=_)", notebook))
        draw.text((x, y + TILE[1] + 4), number, fill=color, font=font(19, "DejaVuSans-Bold"))
        draw.text((x + 33 * bool(number), y + TILE[1] + 4), PICKS[notebook].title, fill="#111827", font=font(19))
        if place < len(course) - 1:
            arrow(draw, x, y, place % COLUMNS == COLUMNS - 1, step, row_height)
    return sheet


def arrow(
    draw: ImageDraw.ImageDraw, x: int, y: int, ends: bool, step: float, row_height: int, color: str = "#b6bcc6"
) -> None:
    "From a tile to the next: the one beside it, or, where the row ends, the first of the next row."
    middle, right = y + TILE[1] / 2, x + TILE[0]
    line = [(right + 8, middle), (x + step - 14, middle)]
    if ends:
        below = y + row_height - 36
        line = [
            (right + 4, middle),
            (right + 14, middle),
            (right + 14, below),
            (10, below),
            (10, middle + row_height),
            (MARGIN - 8, middle + row_height),
        ]
    draw.line(line, fill=color, width=3, joint="curve")
    tip, height = line[-1][0] + (4 if ends else 8), line[-1][1]
    draw.polygon([(tip, height), (tip - 9, height - 6), (tip - 9, height + 6)], fill=color)


def on_map(notebooks: list[str]) -> bytes:
    "What the picture file says of itself: the chapters that it shows."
    return ("chapters " + " ".join(notebooks)).encode()


if __name__ == "__main__":
    picture = draw_map()
    with atomic_write(MAP) as temporary:
        picture.save(temporary, quality=68, optimize=True, comment=on_map([notebook for notebook, _ in chapters()]))
    print(f"{MAP.relative_to(HERE)}: {picture.width}×{picture.height} pixels, {MAP.stat().st_size / 1000:.0f} kB")
