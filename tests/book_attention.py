"""The attention that the book's explorer shows, computed once and stored: the book has neither torch nor kernel.

python tests/book_attention.py

writes nbs/book/token_explorer_data.js: for each image its pixels, and what every token gives to every token in each
block and head, one byte each. A row of attention sums to one, so that bytes say it by themselves: a byte is the square
root of a weight, as a fraction of the row's largest, in 255 steps; a weight is the byte's square over the row's sum of
squares. The root spends the steps on small weights, of which there are many.
"""

import base64
import io
import json
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from dpt_nb.images.files import atomic_write
from dpt_nb.network.dpt import DPT
from dpt_nb.network.inside import AttentionMaps, attention_maps
from dpt_nb.network.zoo import create_model
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene

DATA = Path(__file__).resolve().parents[1] / "nbs" / "book" / "token_explorer_data.js"
MODEL, SIZE = "dpt_tiny_scenes", (192, 256)
SCENES = {"a room": ("rooms", 7), "a street": ("streets", 3)}  # of those that the network has not seen
BEGIN, END = "window.tokenExplorer = ", ";\n"


def quantized(
    probabilities: torch.Tensor,  # `(…, tokens)` not negative
) -> np.ndarray:  # the same shape, uint8
    "Square roots in 255 steps of the row's largest."
    relative = probabilities / probabilities.amax(-1, keepdim=True)
    return (255 * relative.sqrt()).round().to(torch.uint8).numpy()


def weights(
    stored: np.ndarray,  # `(…, tokens)` uint8
) -> np.ndarray:  # the same shape, float64; rows sum to one
    "What the bytes say."
    squares = stored.astype(np.float64) ** 2
    return squares / squares.sum(-1, keepdims=True)


def scene_image(kind: str, number: int) -> torch.Tensor:
    "`(3, H, W)` in [0, 1]."
    from dpt_nb.data.scene_sets import SPLITS  # here, so that tests which only read do not render its views first

    return render(random_scene(kind, SPLITS["held_out"] + number, SIZE))["image"]


def scene_attention(model: DPT, image: torch.Tensor) -> tuple[torch.Tensor, AttentionMaps]:
    "`(blocks, heads, tokens, tokens)`, and how its tokens are laid out."
    maps = attention_maps(model, image[None])
    return torch.stack([each[0] for each in maps.probabilities]), maps


def stored_image(image: torch.Tensor) -> str:
    "As the address of a PNG, whole."
    file = io.BytesIO()
    pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def explored() -> dict:
    "All that the page needs."
    model, scenes = create_model(MODEL, pretrained=True).eval(), []
    for name, (kind, number) in SCENES.items():
        image = scene_image(kind, number)
        table, maps = scene_attention(model, image)
        packed = base64.b64encode(zlib.compress(quantized(table).tobytes(), 9)).decode()
        scenes.append(dict(name=name, pixels=stored_image(image), attention=packed))
    colors = (255 * matplotlib.colormaps["magma"](np.arange(256))[:, :3]).round().astype(np.uint8)
    return dict(
        model=MODEL,
        grid=maps.grid,
        prefix=maps.prefix,
        blocks=table.shape[0],
        heads=table.shape[1],
        colors=base64.b64encode(colors.tobytes()).decode(),
        scenes=scenes,
    )


def read_explored(path: Path = DATA) -> dict:
    "What is stored; a scene's `attention` as `(blocks, heads, tokens, tokens)` uint8, its `pixels` as a file's bytes."
    stored = json.loads(path.read_text(encoding="utf-8").removeprefix(BEGIN).removesuffix(END))
    tokens = stored["prefix"] + stored["grid"][0] * stored["grid"][1]
    for scene in stored["scenes"]:
        raw = np.frombuffer(zlib.decompress(base64.b64decode(scene["attention"])), np.uint8)
        scene["attention"] = raw.reshape(stored["blocks"], stored["heads"], tokens, tokens)
        scene["pixels"] = base64.b64decode(scene["pixels"].split(",")[1])
    return stored


if __name__ == "__main__":
    with atomic_write(DATA) as temporary:
        temporary.write_text(BEGIN + json.dumps(explored()) + END, encoding="utf-8")
    print(f"{DATA}: {DATA.stat().st_size / 1e6:.2f} MB")
