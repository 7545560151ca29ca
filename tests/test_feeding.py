"""What a published model sees, and how its answer comes back: held against values that the projects' own scripts gave.

feeding_reference.json holds them and says by which versions; nothing of those projects is needed to run this."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpt_nb.inference.predictor import Predictor
from dpt_nb.inference.resizing import fit_size, resize_image, resize_policy, resize_prediction
from dpt_nb.network.named import TEST_PIPELINES
from dpt_nb.network.zoo import config_for
from dpt_nb.training.recipes import RECIPES
from dpt_nb.weights.load import load_checkpoint

REFERENCE = json.loads((Path(__file__).parent / "feeding_reference.json").read_text(encoding="utf-8"))


def photograph(height, width, seed=12):
    "Smooth noise with hard edges, stripes and grain; bytes, RGB. The reference values belong to it."
    random = np.random.default_rng(seed)
    low = random.random((7, 9, 3))
    y, x = np.linspace(0, 6, height), np.linspace(0, 8, width)
    top, left = np.minimum(y.astype(int), 5), np.minimum(x.astype(int), 7)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    corners = [low[rows][:, columns] for rows in (top, top + 1) for columns in (left, left + 1)]
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    image = corners[0] * weights[0] + corners[2] * weights[2] + corners[1] * weights[1] + corners[3] * weights[3]
    rows, columns = np.mgrid[:height, :width]
    image[(columns > 0.3 * width) & (columns < 0.45 * width) & (rows > 0.2 * height)] = (0.95, 0.1, 0.05)
    image[(rows - 0.6 * height) ** 2 + (columns - 0.75 * width) ** 2 < (0.18 * height) ** 2] = (0.02, 0.9, 0.98)
    image[(columns + 2 * rows) % 23 < 3] *= 0.35
    image += random.normal(0, 0.02, image.shape)
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)


def tensor(image):
    return torch.tensor(image.transpose(2, 0, 1))[None].float() / 255


def answer(height=24, width=32, seed=7):
    "A small map with a near block and a spike; float32."
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    values = 2 + 6 * rows / (height - 1) + np.sin(columns / 3.0) + random.normal(0, 0.2, (height, width))
    values[8:16, 10:18], values[3, 25] = 0.5, 20.0
    return torch.tensor(values.astype(np.float32))[None, None]


def config_of(name):
    "The config of a model of the zoo, or of a file of mmsegmentation or the Toolbox."
    if name in ("toolbox", "mmseg", "mmseg 1.2"):
        return replace(config_for("dpt_base"), **dict(input_multiple=None) | TEST_PIPELINES[name.split()[0]])
    return config_for(name)


def patch_of(name):
    return 14 if "anything" in name else 32 if "swin" in name else 16


@pytest.mark.parametrize("name", REFERENCE["sizes"])
def test_input_size_is_the_projects(name):
    policy = resize_policy(config_of(name), patch_of(name))
    for height, width, fed_height, fed_width in REFERENCE["sizes"][name]:
        if fed_height * fed_width <= 8 * policy.size[0] * policy.size[1]:  # the bound is ours
            assert fit_size(height, width, *policy[:2], method=policy.method) == (fed_height, fed_width), (
                height,
                width,
            )


@pytest.mark.parametrize("name", REFERENCE["inputs"])
def test_network_input_is_the_projects(name):
    config = config_of(name)
    for size, wanted in REFERENCE["inputs"][name].items():
        height, width = map(int, size.split("x"))
        policy = resize_policy(config, patch_of(name))
        fed = fit_size(height, width, *policy[:2], method=policy.method)
        assert list(fed) == wanted["size"]
        seen = resize_image(tensor(photograph(height, width)), fed, config.resizing)[0]
        level = (
            1.01 / 255 if config.resizing == "mmseg" else 2e-5
        )  # OpenCV's bytes: a value in a thousand is one level off
        for row, column, *colors in wanted["values"]:
            assert np.abs(seen[:, row, column].numpy() - colors).max() < level, (size, row, column)
        if config.resizing == "mmseg":
            exact = [
                np.abs(seen[:, row, column].numpy() - colors).max() < 1e-6 for row, column, *colors in wanted["values"]
            ]
            assert sum(exact) >= len(exact) - 1


@pytest.mark.parametrize("name", [name for name in REFERENCE["inputs"] if not name.startswith(("toolbox", "mmseg"))])
def test_mean_and_std_are_the_projects(name):
    wanted = next(iter(REFERENCE["inputs"][name].values()))
    assert np.allclose(config_of(name).mean, wanted["mean"]) and np.allclose(config_of(name).std, wanted["std"])


@pytest.mark.parametrize("resizing", REFERENCE["back"])
def test_predictions_are_resized_back_as_in_the_project(resizing):
    head, small = ("label" if resizing == "mmseg" else "inverse_depth"), answer()
    if resizing == "mmseg":  # from the map to what was fed, and from there to the image
        small = resize_prediction(small, (512, 691), head, resizing)
    back = resize_prediction(small, (97, 131), head, resizing)[0, 0]
    for row, column, value in REFERENCE["back"][resizing]:
        assert abs(back[row, column].item() - value) < 1e-4, (row, column)


@pytest.fixture(scope="module")
def toolbox_files(tmp_path_factory):
    "Files of the Toolbox's DPT in small, with the weights that its own classes had, in their order of parameters."
    folder, made = tmp_path_factory.mktemp("toolbox"), {}
    for size, seed in (("352x1216", 31), ("480x640", 32)):
        generator, state = torch.Generator().manual_seed(seed), {}
        for name, shape in REFERENCE["toolbox"]["parameters"]:
            drawn = torch.randn(shape, generator=generator)
            if len(shape) > 1:
                fan = drawn[0].numel() if len(shape) > 2 or "token" not in name else shape[-1]
                token = "pos_embed" in name or "cls_token" in name
                state[name] = drawn * (0.3 if token else (1.0 / fan) ** 0.5 * (1.4 if len(shape) == 4 else 1.0))
            elif "norm" in name or ".bn" in name or "ln" in name:
                state[name] = (1.0 if name.endswith("weight") else 0.0) + 0.1 * drawn
            else:
                state[name] = 0.05 * drawn
        last = REFERENCE["toolbox"][size]["last"]  # scaled there, so that depth covers the range
        state["decode_head.conv_depth.head.4.weight"] = torch.tensor(last["weight"]).reshape(1, 32, 1, 1)
        state["decode_head.conv_depth.head.4.bias"] = torch.tensor(last["bias"])
        made[size] = folder / f"{size}.pth"
        torch.save(dict(meta={}, state_dict=state), made[size])
    return made


@pytest.mark.parametrize("flip", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "flip"])
@pytest.mark.parametrize(
    "size, weights, farthest", [("352x1216", "352x1216", 80), ("480x640", "480x640", 10), ("97x131", "352x1216", 80)]
)
def test_toolbox_file_predicts_the_toolboxs_depth(toolbox_files, size, weights, farthest, flip):
    height, width = map(int, size.split("x"))
    model = load_checkpoint(toolbox_files[weights])
    assert model.config.image_size == [224, 224] and model.config.mean == [0.5] * 3
    predictor = Predictor(model, "cpu", flip=flip, depth_range=(1e-3, farthest))
    assert predictor.input_size(height, width) == (height, width)
    depth = predictor.predict(tensor(photograph(height, width)))["depth"][0, 0]
    for row, column, value in REFERENCE["toolbox"][size]["flip" if flip else "plain"]:
        assert abs(depth[row, column].item() - value) < 1e-5 * farthest, (row, column)
    shrunken = Predictor(model, "cpu", flip=flip, size=(224, 768), depth_range=(1e-3, farthest)).predict(
        tensor(photograph(height, width))
    )["depth"][0, 0]
    assert (shrunken - depth).abs().mean() > 0.02 * farthest  # as it was fed before: the test can fail


def test_mmseg_label_file_has_imagenet_normalization_and_needs_no_patch_bias(tmp_path):
    from dpt_nb.network.named import IMAGENET_MEAN, IMAGENET_STD
    from dpt_nb.network.zoo import create_model
    from dpt_nb.weights.write import convert

    torch.manual_seed(0)
    model = create_model(
        "vit_base_patch16_224",
        taps=[0, 1, 2, 3],
        channels=[16, 32, 48, 64],
        features=32,
        image_size=[96, 96],
        batch_norm=True,
        layer_norm_eps=1e-5,
        pos_embed_mode="bicubic",
        backbone_arguments=dict(depth=4, embed_dim=64, num_heads=1),
        heads={"label": dict(num_classes=5, align_corners=False)},
        class_names=["sky", "road", "tree", "car", "person"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        **TEST_PIPELINES["mmseg"],
    ).eval()
    model.backbone.vit.patch_embed.proj.bias.data.zero_()
    model.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "mmseg.pth", "mmseg")
    kept = torch.load(tmp_path / "mmseg.pth", weights_only=True)
    assert kept["meta"]["CLASSES"] == tuple(model.config.class_names)
    del kept["state_dict"]["backbone.patch_embed.projection.bias"]
    torch.save(kept, tmp_path / "no bias.pth")
    image = tensor(photograph(97, 131))
    wanted = Predictor(model, "cpu").predict(image)["label"]
    for file in ("mmseg.pth", "no bias.pth"):
        opened = load_checkpoint(tmp_path / file)
        assert replace(opened.config, backbone_arguments=model.config.backbone_arguments) == model.config
        assert torch.allclose(Predictor(opened, "cpu").predict(image)["label"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "recipe, image, fed",
    [
        ("kitti_vitb", (352, 1216), (352, 1216)),
        ("kitti_vitb_config", (352, 1216), (352, 1216)),
        ("nyu_vitb", (480, 640), (480, 640)),
        ("nyu_vitb_config", (480, 640), (480, 640)),
        ("kitti_hybrid", (352, 1216), (352, 1216)),
        ("nyu_hybrid", (480, 640), (480, 640)),
        ("mix_relative", (480, 640), (384, 512)),
        ("ade20k_hybrid", (512, 683), (480, 640)),
        ("ade20k_large", (512, 683), (480, 640)),
        ("pascal_context_hybrid", (375, 500), (352, 480)),
        ("depth_anything_metric", (480, 640), (518, 686)),
        ("folder_depth", (480, 640), (518, 686)),
        ("rooms_tiny", (96, 128), (96, 128)),
    ],
)
def test_recipes_validate_at_the_size_of_their_source(recipe, image, fed):
    from dpt_nb.network.dpt import empty_model

    chosen = RECIPES[recipe].model
    model = empty_model(config_for(chosen.name, **chosen.changes))
    policy = resize_policy(model.config, model.backbone.patch)
    assert fit_size(*image, *policy[:2], method=policy.method) == fed
    assert model.config.input_size is None or model.config.image_size != model.config.input_size


TRANSFORMERS = {  # what preprocessor_config.json says → images of these sizes
    "squeezed, bilinear": dict(
        size=dict(height=96, width=96), keep_aspect_ratio=False, ensure_multiple_of=1, resample=2
    ),
    "squeezed, cubic": dict(size=dict(height=96, width=128), keep_aspect_ratio=False, ensure_multiple_of=1, resample=3),
    "aspect ratio kept": dict(
        size=dict(height=96, width=96), keep_aspect_ratio=True, ensure_multiple_of=32, resample=3
    ),
}


@pytest.fixture(scope="module")
def segmentation_folder(tmp_path_factory):
    "A small segmentation DPT that transformers saved, with names for its classes."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=256,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=96,
        fusion_hidden_size=32,
        neck_hidden_sizes=[16, 32, 64, 96],
    )
    peer = transformers.DPTForSemanticSegmentation(
        transformers.DPTConfig(**own, id2label={0: "sky", 1: "road", 2: "tree"})
    ).eval()
    folder = tmp_path_factory.mktemp("transformers") / "model"
    peer.save_pretrained(folder)
    return folder, peer


@pytest.mark.parametrize("said", TRANSFORMERS)
@pytest.mark.parametrize("size", [(97, 131), (240, 320), (131, 97)])
def test_transformers_folder_is_fed_as_its_image_processor_says(segmentation_folder, said, size):
    from transformers import DPTImageProcessor

    folder, peer = segmentation_folder
    processor = DPTImageProcessor(
        **TRANSFORMERS[said], do_rescale=True, do_normalize=True, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    model = load_checkpoint(folder)
    assert model.config.class_names == ["sky", "road", "tree"] and model.config.mean == [0.4, 0.5, 0.6]
    image = photograph(*size)
    fed = processor(images=torch.tensor(image.transpose(2, 0, 1)), return_tensors="pt")["pixel_values"]
    predictor = Predictor(model, "cpu")
    seen = resize_image(tensor(image), predictor.input_size(*size), predictor.resizing)
    normalised = (seen - model.mean) / model.std
    assert normalised.shape == fed.shape
    assert (normalised - fed).abs().max() < 1e-5
    if fed.shape[-2] == fed.shape[-1]:  # the peer lays out its tokens as a square
        with torch.no_grad():
            logits = peer(fed).logits
        theirs = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)[0]
        assert (predictor(image)["label"] == theirs).float().mean() > 0.9999
