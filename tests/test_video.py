"""Films as they come: turned, with odd pixels and times, cut short and broken; what options do with them; and what
smoothing leaves of a moving room."""

import json
import math
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

av = pytest.importorskip("av", reason="films need PyAV")

from dpt_nb.commands import main  # noqa: E402
from dpt_nb.inference import video  # noqa: E402
from dpt_nb.inference.films import predict_video  # noqa: E402
from dpt_nb.inference.outputs import read_map, read_scaled  # noqa: E402
from dpt_nb.inference.predictor import Predictor  # noqa: E402
from dpt_nb.inference.result_folder import read_predictions  # noqa: E402
from dpt_nb.inference.smoothing import TemporalSmoother  # noqa: E402
from dpt_nb.inference.video import FilmReader, VideoError, read_video  # noqa: E402
from dpt_nb.network.zoo import create_model  # noqa: E402
from dpt_nb.scenes.raycast import render  # noqa: E402
from dpt_nb.scenes.scenes import random_scene  # noqa: E402

MODEL = str(Path(__file__).resolve().parent.parent / "dpt_nb" / "weights" / "dpt_tiny_scenes")
CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def predictor():
    return Predictor(create_model("dpt_tiny_scenes", pretrained=True), device="cpu")


def corner_image(height=48, width=64):
    "Red, green, blue and white quarters, in reading order."
    image = np.zeros((height, width, 3), np.uint8)
    rows, columns = (slice(0, height // 2), slice(height // 2, None)), (slice(0, width // 2), slice(width // 2, None))
    for color, (row, column) in zip(CORNERS.values(), ((0, 0), (0, 1), (1, 0), (1, 1))):
        image[rows[row], columns[column]] = color
    return image


def corners(image):
    "Names of the colors in the four corners, in reading order; of a tensor or an array."
    image = image.permute(1, 2, 0).numpy() * 255 if isinstance(image, torch.Tensor) else image
    height, width = image.shape[:2]
    places = [image[y, x].astype(float) for y in (height // 5, 4 * height // 5) for x in (width // 5, 4 * width // 5)]
    return [min(CORNERS, key=lambda name: np.abs(np.array(CORNERS[name]) - place).sum()) for place in places]


def write_raw(
    path,
    images,
    times=None,
    base=Fraction(1, 25),
    rate=25,
    codec="libx264",
    pixels="yuv420p",
    form="rgb24",
    setup=None,
    options=None,
    container_options=None,
):
    "A film by PyAV itself, not by the code that is tested."
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pixels
        stream.codec_context.time_base = base
        if setup:
            setup(container, stream)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format=form)
            frame.pts, frame.time_base = (index if times is None else times[index]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def stated_times(path):
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(container.streams.video[0])]


def some_film(path, count=6, size=(48, 64)):
    grays = [np.full((*size, 3), 20 + 30 * index, np.uint8) for index in range(count)]
    return write_raw(path, grays)


def predict(*words):
    return main(["dpt_predict", *map(str, words), "--model", MODEL, "--device", "cpu"])


# how a film is meant to be seen


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_films_are_read_and_written_upright(degrees, tmp_path, predictor):
    stored = np.rot90(corner_image(), -degrees // 90)  # lies on its side, and a matrix says to turn it back

    def turn(container, stream):
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(degrees)

    film = write_raw(tmp_path / "phone.mp4", [np.ascontiguousarray(stored)] * 3, setup=turn)
    image, *_ = read_video(film)
    assert corners(image) == list(CORNERS) and image.shape == (3, 48, 64)
    predict_video(predictor, film, tmp_path / "out", progress=False, outputs=("side", "npy"))
    with av.open(str(tmp_path / "out" / "phone-depth.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation == 0 and frame.side_data.get("DISPLAYMATRIX") is None
        assert corners(frame.to_ndarray(format="rgb24")[:, :64]) == list(CORNERS)
    assert np.load(tmp_path / "out" / "phone-depth" / "000000.npy").shape[-2:] == (48, 64)


def test_pixels_that_are_not_square_are_made_square_and_said_so(tmp_path, predictor):
    def wide(container, stream):
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    film = write_raw(tmp_path / "dv.mp4", [corner_image()] * 3, setup=wide)
    assert next(iter(FilmReader(film))).image.shape == (3, 48, 96)
    entry = predict_video(predictor, film, tmp_path / "out", progress=False)
    assert "3/2 times as wide as high" in entry["note"]


# times


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 2e-5), (".mkv", 1.1e-3)])
def test_times_of_a_variable_rate_film_are_kept(suffix, tolerance, tmp_path, predictor):
    times = [0, 3600, 7300, 12000, 90000, 93003, 140000, 500000]
    film = write_raw(
        tmp_path / f"varied{suffix}",
        [np.full((32, 32, 3), 20 * i, np.uint8) for i in range(8)],
        times,
        Fraction(1, 90000),
    )
    for every in (1, 3):
        entry = predict_video(predictor, film, tmp_path / "out", every=every, outputs=("color", "npy"), progress=False)
        assert entry["frames"] == len(times[::every])
        found = stated_times(tmp_path / "out" / "varied-depth-color.mp4")
        listed = json.loads((tmp_path / "out" / "varied-depth" / "frames.json").read_text())["frames"]
        assert [each["number"] for each in listed] == list(range(0, 8, every))
        for time, written, noted in zip(times[::every], found, listed, strict=True):
            assert abs(float(written) - time / 90000) <= tolerance and abs(noted["time"] - time / 90000) <= tolerance


@pytest.mark.parametrize(
    "base",
    [
        Fraction(1001, 30000),
        Fraction(1001, 24000),
        Fraction(1, 90000),
        Fraction(1, 1000),
        Fraction(3),
        Fraction(1000, 14985),
    ],
)
def test_odd_time_bases(base, tmp_path, predictor):
    step = max(1, round(Fraction(1, 20) / base)) if base < Fraction(1, 100) else 1
    times = [index * step for index in range(6)]
    film = write_raw(
        tmp_path / "odd.mp4",
        [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(6)],
        times,
        base,
        rate=1 / (base * step),
    )
    predict_video(predictor, film, tmp_path / "out", progress=False)
    for time, written in zip(times, stated_times(tmp_path / "out" / "odd-depth.mp4"), strict=True):
        assert abs(written - time * base) <= Fraction(1, 45000)


def test_frames_without_times_are_placed_by_the_rate_and_counted(tmp_path, predictor):
    some_film(tmp_path / "raw.mp4", 5)
    with (
        av.open(str(tmp_path / "raw.mp4")) as source,
        av.open(str(tmp_path / "raw.h264"), "w", format="h264") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    frames = list(film := FilmReader(tmp_path / "raw.h264"))
    assert [frame.time for frame in frames] == [Fraction(number, 25) for number in range(5)]
    entry = predict_video(predictor, tmp_path / "raw.h264", tmp_path / "out", progress=False)
    assert film.clock.mended == 5 and "5 frames stated no usable time" in entry["note"]


def test_times_that_begin_below_zero(tmp_path):
    film = write_raw(
        tmp_path / "early.mkv",
        [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(4)],
        [500, 1500, 2500, 3500],
        Fraction(1, 25000),
    )
    assert [round(float(frame.time), 2) for frame in FilmReader(film)] == [0, 0.04, 0.08, 0.12]


# kinds of films


@pytest.mark.parametrize(
    "codec, pixels, suffix, size",
    [
        ("libx264", "yuv420p10le", ".mp4", (48, 64)),
        ("ffv1", "gray", ".mkv", (33, 51)),
        ("ffv1", "bgr0", ".mkv", (33, 51)),
        ("mpeg4", "yuv420p", ".avi", (48, 64)),
    ],
)
def test_kinds_of_frames(codec, pixels, suffix, size, tmp_path, predictor):
    image = corner_image(*size)
    film = write_raw(tmp_path / f"kind{suffix}", [image] * 2, codec=codec, pixels=pixels)
    image = next(read_video(film))
    assert image.shape[1:] == size and (pixels == "gray" or corners(image) == list(CORNERS))
    entry = predict_video(predictor, film, tmp_path / "out", outputs=("side", "png"), progress=False)
    assert entry["frames"] == 2 and read_scaled(tmp_path / "out" / "kind-depth" / "000001.png")[0].shape[1:] == size
    assert next(read_video(tmp_path / "out" / "kind-depth.mp4")).shape[1:] == (size[0] + size[0] % 2, 2 * size[1])


def test_one_frame_and_sound(tmp_path, predictor):
    with av.open(str(tmp_path / "talk.mp4"), "w") as container:
        frames, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        frames.height, frames.width, frames.pix_fmt = 48, 64, "yuv420p"
        container.mux(frames.encode(av.VideoFrame.from_ndarray(corner_image(), format="rgb24")))
        container.mux(frames.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    entry = predict_video(predictor, tmp_path / "talk.mp4", tmp_path / "out", smooth=0.5, progress=False)
    assert entry["frames"] == 1 and "damage" not in entry
    with av.open(str(tmp_path / "out" / "talk-depth.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_cover_picture_is_not_a_film(monkeypatch, tmp_path):
    "An attached picture is the first video stream of many music files; a film may have one, too."

    class Stream:
        width, height, sample_aspect_ratio = 64, 48, None

        def __init__(self, kind, disposition):
            self.type, self.disposition, self.thread_type, self.codec_context = (
                kind,
                disposition,
                None,
                SimpleNamespace(),
            )

    cover, film = (
        Stream("video", av.stream.Disposition.attached_pic | av.stream.Disposition.default),
        Stream("video", av.stream.Disposition.default),
    )

    class Container:
        closed = False

        def __init__(self, *streams):
            self.streams = self
            self.all = streams
            self.video = [each for each in streams if each.type == "video"]

        def __iter__(self):
            return iter(self.all)

        def close(self):
            Container.closed = True

    (tmp_path / "song.m4a").write_bytes(b"x")
    monkeypatch.setattr(av, "open", lambda path, **options: Container(cover, Stream("audio", None), film))
    assert video.open_video(tmp_path / "song.m4a")[1] is film
    monkeypatch.setattr(av, "open", lambda path, **options: Container(cover, Stream("audio", None)))
    with pytest.raises(VideoError, match="holds no video, only a cover picture, audio"):
        video.open_video(tmp_path / "song.m4a")
    assert Container.closed


# broken films and stops


def long_film(path, count=20, **container):
    "Four seconds of noise, which does not compress."
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(count)]
    return write_raw(path, images, base=Fraction(1, 5), rate=5, **container)


@pytest.mark.parametrize("suffix", [".mkv", pytest.param(".mp4", marks=pytest.mark.slow)])
def test_of_a_film_that_breaks_off_the_beginning_is_kept_and_said(suffix, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the list of frames in front, as films for the web have it
    long_film(f"long{suffix}", container_options={"movflags": "faststart"} if suffix == ".mp4" else {})
    whole = Path(f"long{suffix}").read_bytes()
    Path(f"long{suffix}").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # not taken for finished the second time
        assert predict(f"long{suffix}", "--out", "out") == 1
        said = capsys.readouterr()
        count = len(list(read_video("out/long-depth.mp4")))
        assert 3 < count < 17 and f"out/long-depth.mp4 ({count} frames)" in said.out
        assert (
            "what came before was read" in said.err
            and "Traceback" not in said.err
            and "were there already" not in said.out
        )


def test_bytes_broken_in_the_middle(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = bytearray(long_film(Path("bad.avi")).read_bytes())
    content[len(content) // 2 :] = b"\x55" * (len(content) - len(content) // 2)
    Path("bad.avi").write_bytes(content)
    code = predict("bad.avi", "--out", "out")
    said = capsys.readouterr()
    assert code == 1 and "what came before was read" in said.err and len(list(read_video("out/bad-depth.mp4"))) > 3


def test_a_stop_leaves_nothing_half_written(tmp_path, predictor, monkeypatch):
    film, real, count = some_film(tmp_path / "film.mp4"), Predictor.predict, [0]

    def stopping(self, image):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return real(self, image)

    monkeypatch.setattr(Predictor, "predict", stopping)
    with pytest.raises(KeyboardInterrupt):
        predict_video(predictor, film, tmp_path / "out", outputs=("side", "png", "npy"), progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_prediction_that_is_nan_is_named_and_nothing_is_written(tmp_path, predictor, monkeypatch):
    film, real = some_film(tmp_path / "film.mp4"), Predictor.predict
    monkeypatch.setattr(
        Predictor,
        "predict",
        lambda self, image: {
            head: values * torch.nan if image.mean() > 0.3 else values for head, values in real(self, image).items()
        },
    )
    with pytest.raises(VideoError, match="predicted for frame 2 of .* holds NaN"):
        predict_video(predictor, film, tmp_path / "out", smooth=0.5, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


# options of the command


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--outputs", "png,ply"], "ply cannot be written of a video"),
        (["--outputs", "bar"], "bar cannot be written"),
        (["--smooth", "1"], "below 1"),
        (["--every", "0"], "--every 0"),
        (["--window", "0"], "at least 1 pixel"),
        (["--window", "32", "--overlap", "0.95"], "below 0.9"),
        (["--batch", "0"], "1 or more"),
    ],
)
def test_what_films_cannot_do_is_refused_before_a_model_is_opened(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some_film("film.mp4")
    Path("images").mkdir()
    Image.fromarray(corner_image()).save("images/a.png")
    code = main(["dpt_predict", "images", "film.mp4", "--model", "no such model", "--out", "out", *words])
    assert code == 1 and sentence in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("words", [["--smooth", "0.5"], ["--every", "2"]])
def test_settings_of_videos_without_a_video_are_refused(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(corner_image()).save("a.png")
    assert main(["dpt_predict", "a.png", "--model", "no such model", *words]) == 1
    assert "no video was named" in capsys.readouterr().err


def test_outputs_of_films_and_images_together(tmp_path, capsys, monkeypatch, predictor):
    monkeypatch.chdir(tmp_path)
    some_film("film.mp4", 4)
    Image.fromarray(corner_image()).save("a.png")
    assert (
        predict("a.png", "film.mp4", "--out", "out", "--outputs", "png,npy,pfm,color,overlay,side", "--every", 2) == 0
    )
    written = {path.name for path in Path("out").iterdir()}
    assert {
        "a-depth.png",
        "film-depth",
        "film-label",
        "film-depth.mp4",
        "film-depth-color.mp4",
        "film-depth-overlay.mp4",
        "film-label-overlay.mp4",
        "predictions.json",
    } <= written
    assert {path.name for path in Path("out/film-label").iterdir()} == {
        "000000.png",
        "000000.npy",
        "000002.png",
        "000002.npy",
        "frames.json",
    }
    said = json.loads(Path("out/film-depth/frames.json").read_text())
    assert (
        [frame["number"] for frame in said["frames"]] == [0, 2]
        and said["frames"][1]["time"] == 0.08
        and said["scale"] == 1000
        and said["unit"] == "metre"
    )
    expected = predictor(list(read_video("film.mp4"))[2])["depth"]
    assert torch.allclose(read_map("out/film-depth/000002.pfm"), expected, atol=1e-5)
    assert torch.allclose(read_map("out/film-depth/000002.npy"), expected, atol=1e-5)
    assert (read_map("out/film-depth/000002.png") - expected).abs().max() <= 0.00051


def test_finished_films_are_left_alone_and_again_is_heard(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some_film("film.mp4", 2)
    Image.fromarray(corner_image()).save("a.png")
    words = ["a.png", "film.mp4", "--out", "out", "--outputs", "png,color"]
    now = lambda: Path("out/film-depth-color.mp4").stat().st_mtime_ns
    assert predict(*words) == 0
    first = now()
    capsys.readouterr()
    assert predict(*words) == 0 and now() == first and "2 of 2 were there already" in capsys.readouterr().out
    assert predict(*words, "--again") == 0 and now() != first
    first = now()
    assert predict(*words, "--smooth", 0.5) == 0 and now() != first  # other settings
    first = now()
    Path("out/film-depth/000001.png").unlink()
    assert predict(*words, "--smooth", 0.5) == 0 and now() != first and Path("out/film-depth/000001.png").exists()
    assert len([entry for entry in read_predictions(Path("out")) if entry["source"] == "film.mp4"]) == 1


def test_windows_batches_flip_scales_and_precision(tmp_path, predictor, monkeypatch):
    scene = random_scene("rooms", 4, (96, 128))
    views = [
        render(replace(scene, camera=replace(scene.camera, yaw=scene.camera.yaw + 0.01 * step)))["image"]
        for step in range(2)
    ]
    film = write_raw(tmp_path / "room.mp4", [(view * 255).round().byte().permute(1, 2, 0).numpy() for view in views])
    images = list(read_video(film))
    found = lambda predictor, **how: [each["depth"] for each in predictor.frames(film, **how)]
    for one, image in zip(found(predictor, window=64, overlap=0.5), images, strict=True):
        assert torch.allclose(one, predictor.predict_tiled(image, None, 64, 0.5, progress=False)["depth"], atol=1e-5)
    for one, other in zip(found(predictor, smooth=0.6), found(predictor, smooth=0.6, batch=2), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    other = Predictor(predictor.model, "cpu", flip=True, scales=(0.5, 1.0))
    for one, image in zip(found(other), images, strict=True):
        assert torch.allclose(one, other(image)["depth"], atol=1e-4) and not torch.allclose(
            one, predictor(image)["depth"], atol=1e-3
        )
    votes = [each["label"] for each in predictor.frames(film, window=128, smooth=0.3)]
    assert (votes[0] == predictor(images[0])["label"]).all()


def test_what_a_user_put_beside_is_not_overwritten(tmp_path, predictor):
    film, out = some_film(tmp_path / "film.mp4", 2), tmp_path / "out"
    mine = {out / "film-depth" / "000000.npy": b"my own numbers", out / "film-2-depth.mp4": b"my own film"}
    for path, content in mine.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for earlier in (False, True):  # the second run finds its result under the other name
        entry = predict_video(predictor, film, out, outputs=("npy", "side"), progress=False)
        assert entry["name"] == "film-3" and entry.get("earlier", False) == earlier
    assert all(path.read_bytes() == content for path, content in mine.items())
    assert {path.name for path in out.iterdir()} == {
        "film-depth",
        "film-2-depth.mp4",
        "predictions.json",
        *(f"film-3-{head}{end}" for head in ("depth", "label") for end in ("", ".mp4")),
    }
    notes = out / "film-3-depth" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(VideoError, match="what no film wrote"):
        predict_video(predictor, film, out, outputs=("npy", "side"), again=True, progress=False)
    assert notes.read_text() == "mine"


# films that mean harm


def test_a_playlist_called_a_film_opens_no_other_file(tmp_path):
    some_film(tmp_path / "secret.mp4", 2)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "web.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "web.mp4"):
        with pytest.raises(VideoError, match="is not a video that ffmpeg can open"):
            FilmReader(tmp_path / name)


def test_frames_that_are_too_large_are_refused_by_what_they_declare(tmp_path, predictor):
    film = some_film(tmp_path / "film.mp4", 2, (96, 128))
    assert [frame.image.shape for frame in FilmReader(film, max_pixels=96 * 128)] == [(3, 96, 128)] * 2
    with pytest.raises(VideoError, match="declares frames of 96×128 pixels, .*--max-pixels"):
        FilmReader(film, max_pixels=96 * 128 - 1)
    header = b"YUV4MPEG2 W64 H48 F25:1 Ip A{aspect}:1 C420jpeg\n"
    (tmp_path / "wide.avi").write_bytes(
        header.replace(b"{aspect}", b"65535") + (b"FRAME\n" + bytes(64 * 48 * 3 // 2)) * 2
    )
    with pytest.raises(VideoError, match="declares frames of 48×4194240 pixels"):
        predict_video(predictor, tmp_path / "wide.avi", tmp_path / "out", progress=False)


def test_films_whose_names_are_not_text_or_hold_a_colon(tmp_path, predictor):
    film = some_film(tmp_path / "film.mp4", 2)
    for name, called in (("12:30.mp4", "12:30"), (os.fsdecode(b"\xff\n.mp4"), "__")):
        shutil.copy(film, tmp_path / name)
        entry = predict_video(predictor, tmp_path / name, tmp_path / "out", outputs=("npy",), progress=False)
        assert entry["name"] == called and entry["frames"] == 2
    assert [Path(entry["source"]).name for entry in read_predictions(tmp_path / "out")] == ["12:30.mp4", "\udcff\n.mp4"]


# smoothing


def walk(seed, pose, count, size=(48, 64)):
    "Frames of a room whose camera has moved by (degrees, metres right, metres ahead) of `pose(step)`."
    scene = random_scene("rooms", seed, size)
    camera, frames = scene.camera, []
    for step in range(count):
        turn, right, prefetch = pose(step)
        x = right * math.cos(camera.yaw) - prefetch * math.sin(camera.yaw)
        y = right * math.sin(camera.yaw) + prefetch * math.cos(camera.yaw)
        position = (camera.position[0] + x, camera.position[1] + y, camera.position[2])
        frames.append(
            render(replace(scene, camera=replace(camera, yaw=camera.yaw + math.radians(turn), position=position)))
        )
    return frames


def smoothed(frames, maps, strength, head="inverse_depth"):
    smoother = TemporalSmoother(strength)
    return [smoother(frame["image"][None], {head: values})[head] for frame, values in zip(frames, maps)]


def spread(shown, true):
    return [(a.std() / b.std()).item() for a, b in zip(shown, true)]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "seed, strength",
    [(4, 0.8), *(pytest.param(seed, strength, marks=slow) for seed in (1, 4, 7) for strength in (0.5, 0.9))],
)
def test_a_turning_camera_keeps_the_spread_of_a_perfect_network(seed, strength):
    frames = walk(seed, lambda step: (step / 2, 0, 0), 121)
    true = [1 / frame["depth"][None] for frame in frames]
    ratios = spread(smoothed(frames, true, strength), true)
    assert 0.95 <= ratios[120] <= 1.1 and min(ratios) > 0.92 and max(ratios) < 1.12, (
        ratios[120],
        min(ratios),
        max(ratios),
    )


@pytest.mark.parametrize(
    "pose",
    [lambda step: (0, 0.01 * step, 0), pytest.param(lambda step: (0, 0, 0.015 * step), marks=slow)],
    ids=["sideways", "ahead"],
)
def test_a_walking_camera(pose):
    frames = walk(4, pose, 60)
    true = [1 / frame["depth"][None] for frame in frames]
    ratios = spread(smoothed(frames, true, 0.8), true)
    assert 0.85 < min(ratios) and max(ratios) < 1.15, (min(ratios), max(ratios))
    metres = smoothed(frames, [frame["depth"][None] for frame in frames], 0.8, "depth")
    assert max(((a - b["depth"]).abs() / b["depth"]).mean().item() for a, b in zip(metres, frames)) < 0.04


def test_a_jitter_of_scale_on_a_still_scene_is_steadied():
    frames, generator = walk(4, lambda step: (0, 0, 0), 1) * 60, torch.Generator().manual_seed(0)
    true = 1 / frames[0]["depth"][None]
    jitter = [true * (0.8 + 0.4 * torch.rand(1, generator=generator)) for _ in frames]
    flicker = lambda maps: (
        sum((b - a).square().mean().sqrt() for a, b in zip(maps, maps[1:])).item() / 59 / true.std().item()
    )
    shown = smoothed(frames, jitter, 0.8)
    assert flicker(shown) < 0.05 * flicker(jitter) and 0.8 < spread(shown, [true] * 60)[-1] < 1.2
    shifted = [values + torch.rand(1, generator=generator) for values in jitter]
    assert flicker(smoothed(frames, shifted, 0.8)) < 0.1 * flicker(shifted)


def test_after_a_cut_nothing_of_the_old_scene_remains():
    for seed in range(2):
        old, new = walk(seed, lambda step: (step / 2, 0, 0), 4), walk(seed + 20, lambda step: (step / 2, 0, 0), 4)
        for head, quantity in (
            ("inverse_depth", lambda frame: 1 / frame["depth"][None]),
            ("depth", lambda frame: frame["depth"][None]),
        ):
            joined = smoothed(old + new, [quantity(frame) for frame in old + new], 0.9, head)
            alone = smoothed(new, [quantity(frame) for frame in new], 0.9, head)
            assert all(torch.equal(a, b) for a, b in zip(joined[4:], alone)), (seed, head)


def test_frames_without_spread_and_with_holes():
    frames = walk(4, lambda step: (0, 0, 0), 1) * 8
    true = 1 / frames[0]["depth"][None]
    maps = [true.clone() for _ in frames]
    maps[2][..., :24, :] = torch.nan
    maps[3] = torch.full_like(true, 0.5)
    maps[5] = torch.full_like(true, torch.nan)
    shown = smoothed(frames, maps, 0.8)
    assert torch.equal(shown[2].isnan(), maps[2].isnan()) and shown[5].isnan().all()
    assert (
        all(shown[index].isfinite().all() for index in (0, 1, 3, 4, 6, 7))
        and abs(spread(shown, [true] * 8)[7] - 1) < 0.2
    )
    depth = smoothed(frames, [torch.full_like(true, 4.0)] * 8, 0.8, "depth")
    assert all(torch.allclose(values, torch.tensor(4.0), atol=1e-4) for values in depth)
