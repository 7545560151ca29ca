"""Predictions by other programs than torch: the same files from a folder, in tiles, of networks that cut into windows;
in 8 bits by the error of the task."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import command_here
from forked import command_forked
from PIL import Image

from dpt_nb.data.scene_sets import Scenes
from dpt_nb.inference.engine import ENGINES, Engine, EngineError, register_engine
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.zoo import create_model

VIT = dict(taps=[0, 1, 2, 3], channels=[16, 32, 48, 64], image_size=[96, 96], features=16)
VIT |= dict(backbone_arguments=dict(depth=4, embed_dim=64, num_heads=2))
SWIN = dict(embed_dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)


def alive(model):
    "Answers that vary, and are not cut at 0."
    with torch.no_grad():
        next(iter(model.heads.values())).convolution3.bias.fill_(3.0)
    return model.eval()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = alive(create_model("dpt_large", **VIT)), tmp_path_factory.mktemp("engines")
    model.save_pretrained(folder / "model")
    return model, folder


def worst(found, wanted):
    return (np.abs(found - wanted).max() / (wanted.max() - wanted.min())).item()


@pytest.mark.parametrize("options", [["--size", "96x128"], ["--window", "96"]], ids=["whole", "in tiles"])
def test_a_folder_is_predicted_as_torch_does(vit, photographs, monkeypatch, options):
    _, folder = vit
    monkeypatch.setenv("DPT_NB_CACHE", str(folder / "cache"))
    words = [photographs / "color.jpg", photographs / "gray.png", "--model", folder / "model", "--outputs", "npy"]
    for engine in ("torch", "onnx", "openvino"):
        told = [*words, *options, "--device", "cpu", "--engine", engine, "--out", f"{engine}-{options[0][2:]}"]
        command_here("dpt_predict", *told, folder=folder, check=0)
    files = sorted((folder / f"torch-{options[0][2:]}").glob("*.npy"))
    assert len(files) == 2
    for file in files:
        for engine in ("onnx", "openvino"):
            found = np.load(folder / f"{engine}-{options[0][2:]}" / file.name)
            assert worst(found, np.load(file)) < 1e-4, (engine, file.name)
    assert len(list((folder / "cache" / "engines").glob("*.onnx"))) == 1  # written once for all


@pytest.mark.slow
def test_a_damaged_file_is_written_anew(vit, tmp_path):
    model, image = vit[0], torch.rand(1, 3, 96, 96)
    wanted = Predictor(model, "cpu").predict(image)["inverse_depth"].numpy()
    Predictor(model, "cpu", engine="onnx", cache=tmp_path).predict(image)
    (file,) = tmp_path.glob("*.onnx")
    file.write_bytes(file.read_bytes()[:5000])
    found = Predictor(model, "cpu", engine="openvino", cache=tmp_path).predict(image)["inverse_depth"].numpy()
    assert worst(found, wanted) < 1e-4 and file.stat().st_size > 1e6


@pytest.mark.slow
def test_a_network_of_windows_has_a_file_for_each_size(tmp_path):
    torch.manual_seed(0)
    names = dict(taps=[f"layers.{index}" for index in range(4)], channels=[32, 64, 128, 256], image_size=(128, 128))
    model = alive(create_model("dpt_swin_large_384", features=16, backbone_arguments=SWIN, **names))
    for size in ((128, 128), (128, 192)):
        image = torch.rand(1, 3, *size)
        wanted = Predictor(model, "cpu", size=size).predict(image)["inverse_depth"].numpy()
        found = Predictor(model, "cpu", size=size, engine="openvino", cache=tmp_path).predict(image)
        assert worst(found["inverse_depth"].numpy(), wanted) < 1e-4
    assert len(list(tmp_path.glob("*.onnx"))) == 2


LET_GO = """
import signal, subprocess, threading
import torch
from dpt_nb.inference.predictor import Predictor
from dpt_nb.weights.load import load_checkpoint

held = [Predictor(load_checkpoint({model!r}), "cpu", engine="openvino", cache={cache!r})]
held[0].predict(torch.rand(1, 3, 96, 96))
signal.signal(signal.SIGCHLD, lambda *_: print("heard"))
elsewhere = threading.Thread(target=held.clear)
elsewhere.start(), elsewhere.join()
subprocess.run(["true"], check=True)
"""


def test_a_signal_is_heard_after_another_thread_let_go_of_openvino(vit, tmp_path):
    "Where a processor has AMX, the process ended here without a word."
    model = str(vit[1] / "model")
    code = LET_GO.format(model=model, cache=str(tmp_path / "cache"))
    done = command_forked("python", "-c", code, folder=tmp_path, check=0)
    assert done.stdout == "heard\n", (done.stdout, done.stderr)


def test_what_an_engine_cannot_do_is_a_sentence(photographs, tmp_path):
    words = ["dpt_predict", photographs / "color.jpg", "--model", "dpt_tiny_scenes", "--device", "cpu"]
    for more, sentence in [
        (["--engine", "abacus"], "There is no engine called 'abacus'"),
        (["--engine", "onnx", "--precision", "bfloat16"], "computes in float32, and bfloat16 was asked for"),
    ]:
        done = command_here(*words, *more, folder=tmp_path, check=1)
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_engine_from_outside(vit):
    model = vit[0]
    try:

        @register_engine("halves")
        def halves(model, device, precision, cache):
            return Engine(lambda image, *size: {head: values / 2 for head, values in model(image, *size).items()})

        image = torch.rand(1, 3, 96, 96)
        whole, half = (Predictor(model, "cpu", engine=name).predict(image) for name in ("torch", "halves"))
        assert torch.allclose(half["inverse_depth"], whole["inverse_depth"] / 2, atol=1e-6)
    finally:
        ENGINES.pop("halves"), ENGINES.homes.pop("halves")


def test_padding_is_not_for_a_file(tmp_path, vit):
    from dpt_nb.deploy.predictor_engines import ExportedNetwork

    with pytest.raises(EngineError, match="padded from 90×96"):
        ExportedNetwork(vit[0], tmp_path, None, False)(torch.rand(1, 3, 96, 96), (90, 96))


ROOMS = dict(kind="rooms", size=(96, 128), joint=True)


def abs_rel(predictor, scenes):
    "Written down once more: the mean over images of the mean over pixels of |d - t| / t."
    errors = []
    for place in range(len(scenes)):
        truth = scenes[place]["depth"].double()
        depth = predictor.predict(scenes[place]["image"][None])["depth"][0].double()
        errors.append(((depth - truth).abs() / truth)[(truth > 1e-3) & (truth < 10)].mean().item())
    return float(np.mean(errors))


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, precision, most",
    [("onnx", "float32", 1e-4), ("openvino", "float32", 1e-4), ("openvino", "bfloat16", 2e-2)],
)
def test_engines_give_what_torch_gives(engine, precision, most, scenes_folder):
    model = create_model("dpt_tiny_scenes", pretrained=True)
    image = Scenes(scenes_folder, count=1, split="held_out", **ROOMS)[0]["image"][None]
    wanted = Predictor(model, "cpu").predict(image)["depth"].numpy()
    fast = Predictor(model, "cpu", engine=engine, precision=precision, cache=scenes_folder / "cache")
    assert worst(fast.predict(image)["depth"].numpy(), wanted) <= most


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_8_bits_cost_little_and_are_made_once(engine, scenes_folder, monkeypatch):
    from dpt_nb.deploy import predictor_engines, quantization

    model, cache = create_model("dpt_tiny_scenes", pretrained=True), scenes_folder / "cache"
    train = Scenes(scenes_folder, count=12, split="train", **ROOMS)
    photographs = scenes_folder / f"photographs-{engine}"
    photographs.mkdir()
    for place in range(12):
        pixels = (train[place]["image"] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(photographs / f"{place}.png")
    options = dict(engine=engine, precision="int8", cache=cache)
    small = Predictor(model, "cpu", calibration=photographs, **options)
    weights = small.network.path.with_suffix(quantization.SUFFIXES[engine][0])
    floats = predictor_engines.exported(model, predictor_engines.model_digest(model), None, cache)
    assert weights.stat().st_size < 0.8 * floats.stat().st_size
    unseen = Scenes(scenes_folder, count=12, split="held_out", **ROOMS)
    before, after = abs_rel(Predictor(model, "cpu"), unseen), abs_rel(small, unseen)
    assert before != after and after <= 1.02 * before, (before, after)
    rows = quantization.quantization_error(Predictor(model, "cpu"), small, unseen, progress=False)
    assert rows["after"]["abs_rel"] / rows["before"]["abs_rel"] - 1 == pytest.approx(rows["change"]["abs_rel"])
    assert after / before - 1 == pytest.approx(rows["change"]["abs_rel"], abs=1e-3)
    note = json.loads(small.network.path.with_suffix(".json").read_text())
    assert note["chosen"] in note["candidates"] and note["chosen"]["error"] <= note["tolerance"]

    real, calls = quantization.quantize_files, []
    monkeypatch.setattr(quantization, "quantize_files", lambda *words: calls.append(words) or real(*words))
    again = Predictor(model, "cpu", calibration=photographs, **options)
    assert again.network.path == small.network.path and not calls
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert quantization.stored(small.network.path) is None
    Predictor(model, "cpu", calibration=photographs, **options)
    assert len(calls) == 1 and quantization.stored(small.network.path)


@pytest.mark.slow
def test_a_choice_by_ground_truth(scenes_folder):
    from dpt_nb.deploy.quantization import Choice, quantize

    model = create_model("dpt_tiny_scenes", pretrained=True)
    train = Scenes(scenes_folder, count=8, split="train", **ROOMS)
    images = [train[place]["image"] for place in range(8)]
    choice = Choice(samples=train, left_out=((), ("decoder", "heads")))
    found = quantize(model, images, "onnx", scenes_folder / "cache", choice, progress=False)
    assert found.facts["error_to"] == "ground truth" and len(found.facts["candidates"]) == 2
    assert found.facts["chosen"]["error"] <= 0.02
    impossible = Choice(tolerance=-1.0, left_out=((),))
    with pytest.raises(EngineError, match="the nearest leaves nothing in floats"):
        quantize(model, images, "onnx", scenes_folder / "cache", impossible, progress=False)


def test_a_quantizer_that_fails_is_a_sentence(tmp_path, monkeypatch):
    from dpt_nb.deploy import quantize_file

    for program, words in [
        ("import os; os.kill(os.getpid(), 9)", "it was ended by SIGKILL, perhaps for lack of memory"),
        ("import sys; print('{}'); print('noise'); sys.exit('last words')", "last words"),
        ("raise ValueError('odd')", "ValueError: odd"),
    ]:
        monkeypatch.setattr(quantize_file, "PROGRAM", program)
        with pytest.raises(EngineError, match=f"could not be quantized .{re.escape(words)}.: take precision"):
            quantize_file.quantize_files(tmp_path / "no.onnx", [], [()], tmp_path, progress=False)


@pytest.mark.slow
def test_the_quantizer_itself_says_what_is_wrong(tmp_path):
    from dpt_nb.deploy.quantize_file import quantize_files

    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match="DecodeError"):
        quantize_files(tmp_path / "model.onnx", [], [()], tmp_path, progress=False)


def test_8_bits_ask_for_images(vit, tmp_path, photographs):
    model, swin = vit[0], dict(taps=[f"layers.{index}" for index in range(4)], channels=[32, 64, 128, 256])
    windows = create_model("dpt_swin_large_384", features=16, image_size=(128, 128), backbone_arguments=SWIN, **swin)
    images = [torch.rand(3, 96, 96)]
    for network, options, words in [
        (model, {}, "has to see images before it can compute"),
        (model, dict(calibration=[]), "is empty"),
        (model, dict(calibration=images, precision="float32"), "are for int8, and float32 was asked for"),
        (model, dict(calibration=images, engine="torch"), "There is no engine in int8 called 'torch'"),
        (windows, dict(calibration=images), "cuts its maps into windows"),
    ]:
        with pytest.raises(ValueError, match=words):
            Predictor(network, "cpu", **dict(engine="onnx", precision="int8", cache=tmp_path) | options)
    words = ["dpt_predict", photographs / "color.jpg", "--model", "dpt_tiny_scenes", "--device", "cpu"]
    done = command_here(*words, "--calibration", photographs, folder=tmp_path, check=1)
    assert done.stderr == "--calibration is for --precision int8, found float32: leave it out.\n"
    done = command_here(*words[:1], "film.mp4", *words[2:], "--precision", "int8", folder=tmp_path, check=1)
    assert done.stderr.count("\n") == 1 and "name some by --calibration" in done.stderr, done.stderr


def test_an_evaluation_by_an_engine(tmp_path, monkeypatch):
    "The same metrics as torch's, up to rounding; the report says what computed them."
    monkeypatch.setenv("DPT_NB_CACHE", str(tmp_path / "cache"))
    words = ["dpt_eval", "--model", "dpt_tiny_scenes", "--count", "2", "--device", "cpu", "--data-root", tmp_path]
    reports = {}
    for engine, precision in [("torch", "float32"), ("openvino", "bfloat16")]:
        chosen = ["--engine", engine, "--precision", precision, "--out", tmp_path / engine]
        command_here(*words, *chosen, folder=tmp_path, check=0)
        reports[engine] = json.loads((tmp_path / engine / "report.json").read_text())
        assert (reports[engine]["engine"], reports[engine]["precision"]) == (engine, precision)
    before, after = (reports[engine]["abs_rel"] for engine in ("torch", "openvino"))
    assert before != after and after == pytest.approx(before, rel=1e-2)


@pytest.mark.slow
def test_8_bits_from_the_shell(tmp_path, photographs, monkeypatch):
    "Calibrated on the images to predict, and for an evaluation on the training split."
    monkeypatch.setenv("DPT_NB_CACHE", str(tmp_path / "cache"))
    model = ["--model", "dpt_tiny_scenes", "--device", "cpu", "--engine", "onnx", "--precision", "int8"]
    images = [photographs / "color.jpg", photographs / "gray.png"]
    command_here("dpt_predict", *images, *model, "--out", "found", folder=tmp_path, check=0)
    assert len(list((tmp_path / "found").glob("*-depth.png"))) == 2
    done = command_here("dpt_predict", *images, *model, "--out", "found", folder=tmp_path, check=0)
    assert "already" in done.stdout, done.stdout
    told = ["--count", "4", "--data-root", tmp_path / "data", "--out", "report"]
    command_here("dpt_eval", *model, *told, folder=tmp_path, check=0)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["engine"], report["precision"]) == ("onnx", "int8") and 0 < report["abs_rel"] < 0.3
