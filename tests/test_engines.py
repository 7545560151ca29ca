"Predictions by other programs than torch: the same files from a folder, in tiles, of networks that cut into windows."

import numpy as np
import pytest
import torch
from conftest import command_here

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
