"Hostile images: every format, files damaged in many ways, small files that claim to be large, and memory."

import io
import os
import random
import re
import stat
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpt_nb.images.files import ImageError
from dpt_nb.images.images import (
    IMAGE_FORMATS,
    find_images,
    read_depth,
    read_image,
    read_label,
    read_or_wait,
    sort_folder,
    to_image,
    unreadable,
)
from dpt_nb.inference.outputs import read_map
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.zoo import create_model


def photograph(size=(120, 80)):
    "Smooth colors, so that lossy formats keep them."
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )


WAYS = {  # suffix → how pillow writes it, and how far a value may be off
    ".png": (dict(format="PNG"), 0),
    ".apng": (dict(format="PNG"), 0),
    ".jpg": (dict(format="JPEG", quality=95), 12),
    ".jfif": (dict(format="JPEG", progressive=True, quality=95), 12),
    ".mpo": (dict(format="MPO", quality=95), 12),
    ".bmp": (dict(format="BMP"), 0),
    ".gif": (dict(format="GIF"), 60),
    ".webp": (dict(format="WEBP", lossless=True), 0),
    ".tif": (dict(format="TIFF", compression="tiff_lzw"), 0),
    ".tiff": (dict(format="TIFF", compression="jpeg", quality=95), 12),
    ".jp2": (dict(format="JPEG2000"), 1),
    ".j2k": (dict(format="JPEG2000", no_jp2=True), 1),
    ".ppm": (dict(format="PPM"), 0),
    ".pnm": (dict(format="PPM"), 0),
    ".tga": (dict(format="TGA"), 0),
    ".avif": (dict(format="AVIF", quality=95), 12),
    ".heic": (dict(format="HEIF", quality=95), 12),
}


def encoded(suffix):
    "A photograph in a format, or a skipped test."
    if reason := unreadable(IMAGE_FORMATS[suffix]):
        pytest.skip(reason)
    if suffix == ".heic":
        import pillow_heif

        pillow_heif.register_heif_opener()
    file = io.BytesIO()
    photograph().save(file, **WAYS[suffix][0])
    return file.getvalue()


@pytest.mark.parametrize("suffix", WAYS)
def test_each_format_is_read_as_a_named_file_and_from_a_folder(suffix, tmp_path):
    (tmp_path / f"photo{suffix.upper()}").write_bytes(encoded(suffix))
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert [path.name for path in found] == [f"photo{suffix.upper()}"]
    assert sort_folder(tmp_path)[1] == {"not an image by its suffix": [tmp_path / "notes.txt"]}
    wanted = torch.tensor(np.asarray(photograph())).permute(2, 0, 1).float() / 255
    assert (read_image(found[0]) - wanted).abs().max() <= WAYS[suffix][1] / 255 + 1e-6
    assert torch.equal(to_image(read_image(found[0], keep_bytes=True)), read_image(found[0]))


def damaged(content, generator):
    "One of six kinds of damage."
    content, how, place = bytearray(content), generator.randrange(6), generator.randrange(len(content))
    if how == 0:
        return bytes(content[:place])
    if how == 1:
        for _ in range(generator.randrange(1, 8)):
            content[generator.randrange(len(content))] = generator.randrange(256)
    if how == 2:  # among the words at the beginning
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(min(len(content), 200))] = generator.choice([0, 255, 127, 128, 1])
    if how == 3:  # a size
        place = generator.randrange(min(len(content), 300))
        content[place : place + 4] = generator.choice(
            [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00", b"\xff\xff\xff\x7f"]
        )
    if how == 4:
        content[place:place] = content[generator.randrange(len(content)) :][: generator.randrange(200)]
    if how == 5:
        del content[place : place + generator.randrange(1, 30)]
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", WAYS)
def test_a_damaged_file_is_an_image_or_one_printable_sentence(suffix, tmp_path):
    generator, whole, sentences = random.Random(f"damage {suffix}"), encoded(suffix), 0
    for _ in range(25):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged(whole, generator))
        try:
            image = read_image(path)
            assert image.min() >= 0 and image.max() <= 1
        except ImageError as error:
            sentences += 1
            assert str(path) in str(error) and str(error).isprintable()
    assert sentences


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, extra=b""):
    pixels = zlib.compress(b"".join(b"\0" + bytes(3 * width) for _ in range(min(height, 100))))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + extra
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def gif(screen, frame):
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
        + b"\x02\x02\x44\x01\0;"
    )


def tiff(width, height, *more):
    tags = sorted([(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1), *more])
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(500)
    )


PACKED = zlib.compress(bytes(2 * 10**8), 9)  # 200 kB that unpack to 200 MB
BOMBS = {
    "size.png": (png(2**20, 2**31 - 1), "at most 179 million are unpacked"),
    "text.png": (png(9, 9, chunk(b"zTXt", b"a\0\0" + PACKED)), "damaged"),
    "international.png": (png(9, 9, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)), "damaged"),
    "profile.png": (png(9, 9, chunk(b"iCCP", b"a\0\0" + PACKED)), "damaged"),
    "screen.gif": (gif((65535, 65535), (1, 1)), "at most 179 million are unpacked"),
    "frame.gif": (gif((1, 1), (65535, 65535)), "a frame of 4294836225 pixels"),
    "tile.tif": (
        tiff(9, 9, (259, 3, 1, 8), (322, 4, 1, 2**16), (323, 4, 1, 2**15), (324, 4, 1, 200), (325, 4, 1, 100)),
        "damaged",
    ),
    "wide.tif": (
        tiff(2**31, 1, (259, 3, 1, 1), (273, 4, 1, 200), (278, 4, 1, 1), (279, 4, 1, 100)),
        "at most 179 million are unpacked",
    ),
    "wide.bmp": (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 13000, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(100),
        "at most 179 million are unpacked",
    ),
    "wide.ppm": (b"P6 99999999 99999999 255\n" + bytes(100), "at most 179 million are unpacked"),
    "wide.tga": (
        struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(100),
        "at most 179 million are unpacked",
    ),
    "array.npy": (
        b"\x93NUMPY\1\0"
        + struct.pack("<H", 70)
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}".ljust(69)
        + b"\n",
        "and holds 0",
    ),
    "header.npy": (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{", "4294967295 bytes long"),
}
READ = """
import sys, time, torch
from dpt_nb.training.dry_run import peak_memory
from dpt_nb.images.files import ImageError; from dpt_nb.images.images import read_image
from dpt_nb.inference.outputs import read_map
before = peak_memory(torch.device("cpu"))
for path in sys.argv[1:]:
    try: (read_map if path.endswith(".npy") else read_image)(path); print(path, "was read")
    except ImageError as error: print(error)
print("more by", (peak_memory(torch.device("cpu")) - before) // 1024, "kB")
"""


def test_a_png_of_right_checksums_and_wrong_data_is_a_sentence_as_image_depth_and_label(tmp_path):
    "Such a file ends the process in torchvision's decoder: no reader may hand it on, whatever it is read as."
    modes = dict(RGB=[read_image, lambda path: read_or_wait(path).quick(), lambda path: read_or_wait(path).exact()])
    modes |= {"I;16": [read_depth], "L": [read_label, lambda path: read_label(path, keep_bytes=True)]}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64), dtype=np.uint8))
    for mode, readers in modes.items():
        whole = io.BytesIO()
        noise.convert(mode).save(whole, "PNG")
        whole, damaged, place = whole.getvalue(), bytearray(whole.getvalue()[:8]), 8
        while place < len(whole):
            size, kind = struct.unpack_from(">I4s", whole, place)
            data = bytearray(whole[place + 8 : place + 8 + size])
            if kind == b"IDAT":
                data = data[: len(data) // 2]
            damaged += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            place += 12 + size
        path = tmp_path / f"{mode[0]}.png"
        path.write_bytes(damaged)
        Image.open(path).verify()  # its checksums are right
        for read in readers:
            with pytest.raises(ImageError, match="is damaged or cut short"):
                read(path)


def test_small_files_that_claim_to_be_large_take_no_memory(tmp_path):
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *(str(tmp_path / name) for name in BOMBS)],
        capture_output=True,
        text=True,
    )
    *sentences, memory = done.stdout.splitlines()
    assert done.returncode == 0 and len(sentences) == len(BOMBS), done.stdout + done.stderr
    for (name, (_, words)), sentence in zip(BOMBS.items(), sentences):
        assert name in sentence and words in sentence
    assert int(memory.split()[2]) < 100_000


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "start",
    [
        POSTSCRIPT,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(POSTSCRIPT)) + bytes(18) + POSTSCRIPT,
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + bytes(100),
        b"8BPS" + bytes(100),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps", "a.tga"])
def test_a_program_that_is_called_an_image_is_not_run(start, name, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    (tmp_path / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    (tmp_path / name).write_bytes(start)
    with pytest.raises(ImageError, match="not an image in a format that is read here|damaged"):
        read_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_limits_of_threads_do_not_meet(tmp_path):
    "Eight threads, every other one with a limit that the image is above; the setting of the process stays."
    photograph((400, 300)).save(tmp_path / "photo.png")
    before, outcomes = Image.MAX_IMAGE_PIXELS, {}

    def read(number):
        for turn in range(10):
            try:
                read_image(tmp_path / "photo.png", max_pixels=120_000 - number % 2)
                outcomes[number, turn] = 0
            except ImageError:
                outcomes[number, turn] = 1

    threads = [threading.Thread(target=read, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {(number, turn): number % 2 for number in range(8) for turn in range(10)}
    assert Image.MAX_IMAGE_PIXELS == before


def test_names_that_are_no_text_are_found_read_and_said(tmp_path):
    names = [b"caf\xe9.png", b"line\nbreak.png", b"\x1b[31mred.png", b"\xff\xfe.png"]
    for number, name in enumerate(names):
        path = os.fsencode(tmp_path) + b"/" + name
        if number % 2:
            Path(os.fsdecode(path)).write_bytes(b"")
        else:
            photograph().save(os.fsdecode(path), format="PNG")
    assert {os.fsencode(path.name) for path in find_images(tmp_path)} == set(names)
    for path in find_images(tmp_path):
        try:
            assert read_image(path).shape == (3, 80, 120)
        except ImageError as error:
            assert "is empty" in str(error) and str(error).isprintable() and str(error).encode()


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return Predictor(
        create_model("dpt_tiny", heads={"depth": dict(output="exp"), "label": dict(num_classes=12)}), "cpu"
    )


def test_a_folder_is_streamed(predictor, tmp_path, monkeypatch):
    "At any time one image has been read more than was asked for, at most."
    for number in range(6):
        photograph().save(tmp_path / f"{number}.png")
    read = []
    monkeypatch.setattr(
        "dpt_nb.inference.predictor.read_image",
        lambda path, **settings: read.append(path) or read_image(path, **settings),
    )
    found = predictor(tmp_path)
    assert len(found) == 6 and not read
    for number, prediction in enumerate(found):
        assert prediction.name == str(number) and number < len(read) <= number + 2
    assert len(read) == 6
    assert torch.equal(found[3]["depth"], predictor(tmp_path / "3.png")["depth"]) and len(found[1:4]) == 3
    assert torch.equal(found[-1]["label"], found[5]["label"])


def test_above_the_budget_an_image_is_tiled_and_says_so(predictor, tmp_path):
    photograph((500, 400)).save(tmp_path / "photo.png")
    narrow = Predictor(predictor.model, "cpu", max_memory=1e6)
    found = narrow(tmp_path / "photo.png")
    assert (
        "photo is 400×500" in found.note
        and "seen in tiles of 96×128" in found.note
        and found["depth"].shape == (1, 400, 500)
    )
    assert torch.equal(found["depth"], narrow.predict_tiled(tmp_path / "photo.png", progress=False)["depth"])
    facts = found.save(tmp_path / "out")
    assert facts["note"] == found.note and read_map(tmp_path / "out" / facts["label"]["file"]).shape == (400, 500)
    assert not predictor(tmp_path / "photo.png").note


MEMORY = """
import sys
from dpt_nb.all import *
from dpt_nb.training.dry_run import peak_memory
import torch
torch.manual_seed(0)
heads = dict(depth=dict(output="exp"), label=dict(num_classes=int(sys.argv[3])))
model = create_model("dpt_tiny", heads=heads, image_size=[384, 384])
predictor = Predictor(model, "cpu", max_memory=float(sys.argv[2]))
before = peak_memory(torch.device("cpu"))
found = predictor(sys.argv[1])
found.save("out")
print("more by", (peak_memory(torch.device("cpu")) - before) // 1024, "kB", found.note)
"""


@pytest.mark.slow
@pytest.mark.parametrize("side, classes, max_memory, most", [(8000, 150, 2**40, 2.6e9), (2000, 20, 5e7, 0.5e9)])
def test_the_memory_of_large_images(side, classes, max_memory, most, tmp_path):
    """8000×8000 as floats are 0.77 GB, depth 0.26 and labels 0.51; logits of 150 classes would be 38. 2000×2000 as a
    whole are more than the budget."""
    photograph((side, side)).save(tmp_path / "large.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "large.png", str(max_memory), str(classes)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    more = int(re.search(r"more by (\d+)", done.stdout).group(1)) * 1024
    print(f"{more / 1e9:.2f} GB more")
    assert more < most and ("tiles" in done.stdout) == (side == 2000)
