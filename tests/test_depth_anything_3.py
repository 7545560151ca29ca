"""Depth Anything 3's networks for one image: opened from what the project writes, and the same numbers and gradients as
its own code (PyPI `depth-anything-3`, compared where it is installed) and as a slow reference in float64."""

import json
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_here, image_of
from official_names import depth_anything_3, random_tensors
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dpt_nb.data.registry import DATASETS, open_dataset
from dpt_nb.data.scene_sets import Scenes
from dpt_nb.deploy.engines import open_export
from dpt_nb.deploy.export import export, export_facts
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import EvaluationError, Protocol
from dpt_nb.inference.films import predict_video
from dpt_nb.inference.folders import predict_files
from dpt_nb.inference.outputs import read_map
from dpt_nb.inference.point_clouds import map_points, read_ply
from dpt_nb.inference.predictor import Predictor
from dpt_nb.inference.video import VideoWriter
from dpt_nb.network.dpt import DPT
from dpt_nb.network.named import NAMED
from dpt_nb.network.zoo import count_parameters, create_model
from dpt_nb.training.recipe_fields import RecipeError, change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.key_maps import depth_anything_3_rules, remap_state_dict
from dpt_nb.weights.load import load_checkpoint, open_checkpoint
from dpt_nb.weights.read import CheckpointError, CheckpointWarning

TINY = dict(dim=128, depth=4, grid=5, channels=(16, 32, 64, 128), features=32)
NAMES = {"da3mono-large": "relative_depth", "da3metric-large": "depth"}
NET = dict(name="vitl", out_layers=[0, 1, 2, 3], alt_start=-1, qknorm_start=-1, rope_start=-1, cat_token=False)


def shaken(seed=0, **shape):
    "Random weights by the project's names; nothing stands at 0 or 1, and exp does not overflow."
    torch.manual_seed(seed)
    weights = random_tensors(depth_anything_3(**(TINY | shape)))
    for name in weights:
        if name.endswith("pos_embed") or name.endswith("cls_token"):
            weights[name] = torch.randn_like(weights[name])
    return weights


def published(weights, folder, name="da3mono-large", **net):
    "A folder as `PyTorchModelHubMixin` writes it: every name begins with `model.`."
    folder.mkdir()
    save_file({f"model.{key}": tensor.contiguous() for key, tensor in weights.items()}, folder / "model.safetensors")
    head = dict(dim_in=128, output_dim=1, features=32, out_channels=[16, 32, 64, 128])
    said = dict(model_name=name, config=dict(net=NET | net, head=head))
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def reference(weights, image, heads=2):
    "The order of operations of `vision_transformer.py` and `dpt.py`, by their names: depth and sky."
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def convolve(name, value, **options):
        return F.conv2d(value, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    def linear(name, value):
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, value, eps):
        return F.layer_norm(value, value.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def resized(value, size):
        return F.interpolate(value, size=size, mode="bilinear", align_corners=True)

    trunk, batch = "backbone.pretrained.", len(image)
    patches = convolve(f"{trunk}patch_embed.proj", (image - mean) / std, stride=14)
    (rows, columns), dim = patches.shape[-2:], patches.shape[1]
    places = weights[f"{trunk}pos_embed"]
    side = round((places.shape[1] - 1) ** 0.5)
    table = places[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    if (rows, columns) != (side, side):
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
    tokens = torch.cat([weights[f"{trunk}cls_token"].expand(batch, -1, -1), patches.flatten(2).mT], 1)
    tokens = tokens + torch.cat([places[:, :1], table.flatten(2).mT], 1)
    taps = []
    for block in range(4):
        name = f"{trunk}blocks.{block}."
        qkv = linear(f"{name}attn.qkv", norm(f"{name}norm1", tokens, 1e-6))
        query, key, value = qkv.unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
        attended = (query @ key.mT * (dim // heads) ** -0.5).softmax(-1) @ value
        attended = linear(f"{name}attn.proj", attended.transpose(1, 2).flatten(2))
        tokens = tokens + weights[f"{name}ls1.gamma"] * attended
        hidden = F.gelu(linear(f"{name}mlp.fc1", norm(f"{name}norm2", tokens, 1e-6)))
        tokens = tokens + weights[f"{name}ls2.gamma"] * linear(f"{name}mlp.fc2", hidden)
        taps.append(norm(f"{trunk}norm", tokens, 1e-5)[:, 1:])
    levels = []
    for level, tap in enumerate(taps):
        value = convolve(f"head.projects.{level}", tap.mT.reshape(batch, dim, rows, columns))
        again = f"head.resize_layers.{level}"
        if level < 2:
            value = F.conv_transpose2d(
                value, weights[f"{again}.weight"], weights[f"{again}.bias"], stride=4 // 2**level
            )
        elif level == 3:
            value = convolve(again, value, stride=2, padding=1)
        levels.append(convolve(f"head.scratch.layer{level + 1}_rn", value, padding=1))

    def unit(name, value):
        inside = convolve(f"{name}.conv1", value.relu(), padding=1)
        return value + convolve(f"{name}.conv2", inside.relu(), padding=1)

    path = None
    for number in (4, 3, 2, 1):
        name = f"head.scratch.refinenet{number}"
        level = levels[number - 1]
        path = level if path is None else path + unit(f"{name}.resConfUnit1", level)
        path = unit(f"{name}.resConfUnit2", path)
        size = levels[number - 2].shape[-2:] if number > 1 else [2 * length for length in path.shape[-2:]]
        path = convolve(f"{name}.out_conv", resized(path, tuple(size)))
    features = resized(convolve("head.scratch.output_conv1", path, padding=1), image.shape[-2:])
    ends = []
    for name in ("output_conv2", "sky_output_conv2"):
        hidden = convolve(f"head.scratch.{name}.0", features, padding=1).relu()
        ends.append(convolve(f"head.scratch.{name}.2", hidden))
    return ends[0].exp(), ends[1].relu()


@torch.no_grad()
def spread(weights, size):
    "Last layers scaled so that depth varies by some factors and the sky's values are seldom below 0."
    ends = {"output_conv2": 0.0, "sky_output_conv2": 1.0}
    for (name, middle), raw in zip(ends.items(), reference(weights, image_of(*size))):
        raw = raw.log() if name == "output_conv2" else raw
        last = f"head.scratch.{name}.2"
        scale = 0.5 / raw.std().clamp(min=1e-3)
        weights[f"{last}.weight"] = weights[f"{last}.weight"] * scale
        weights[f"{last}.bias"] = (weights[f"{last}.bias"] - raw.mean()) * scale + middle
    return weights


def difference(theirs, mine):
    assert theirs.shape == mine.shape and theirs.std() > 0.05 * theirs.abs().max()
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def pulled_back(answers):
    "A number in which every pixel of both maps counts by a weight of its own."
    draws = torch.Generator().manual_seed(1)
    return sum((values * torch.rand(values.shape, generator=draws).to(values)).sum() for values in answers)


def smallest_cosine(model, theirs, head):
    "Of our gradients against theirs, by our names."
    renamed = remap_state_dict(theirs, depth_anything_3_rules(head))
    assert not renamed.unknown and set(renamed.state) == {name for name, _ in model.named_parameters()}
    typical, cosines = torch.cat([other.flatten() for other in renamed.state.values()]).square().mean().sqrt(), []
    for name, parameter in model.named_parameters():
        parts = 3 if ".attn.qkv." in name else 1
        for mine, other in zip(parameter.grad.chunk(parts), renamed.state[name].chunk(parts)):
            if other.square().mean().sqrt() < 1e-5 * typical:  # a key's bias has none: softmax does not see it
                assert mine.square().mean().sqrt() < 1e-4 * typical, name
            else:
                cosines.append(F.cosine_similarity(mine.flatten(), other.flatten().float(), dim=0).item())
    return min(cosines)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_and_gradients_as_a_slow_reference(name, tmp_path, parity_rows):
    weights, head = spread(shaken(), (70, 70)), NAMES[name]
    ours = load_checkpoint(published(weights, tmp_path / "folder", name))
    for size in [(70, 70), (70, 126), (28, 98)]:
        leaves = {key: tensor.double().requires_grad_() for key, tensor in weights.items()}
        theirs, maps = reference(leaves, image_of(*size).double()), ours(image_of(*size))
        assert list(maps) == [head, "sky"]
        mine = maps[head], maps["sky"]
        found = max(difference(*pair) for pair in zip(theirs, mine))
        ours.zero_grad()
        pulled_back(theirs).backward(), pulled_back(mine).backward()
        cosine = smallest_cosine(ours, {key: leaf.grad for key, leaf in leaves.items()}, head)
        parity_rows.append((f"Depth Anything 3, {name}, in float64", size, found, cosine))
        assert found <= 2e-5 and cosine > 0.9999, size


def project_network(width, depth, heads, channels, features):
    "Their classes, as their yaml files put them together."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = pytest.importorskip("depth_anything_3.model.dinov2.vision_transformer", reason="needs depth-anything-3")
        from depth_anything_3.model.da3 import DepthAnything3Net
        from depth_anything_3.model.dpt import DPT as TheirDPT

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            off = dict(alt_start=-1, qknorm_start=-1, rope_start=-1, cat_token=False)
            self.taps = [4, 11, 17, 23] if depth == 24 else list(range(4))
            self.pretrained = trunk.DinoVisionTransformer(
                img_size=70 if depth == 4 else 518, patch_size=14, embed_dim=width, depth=depth, num_heads=heads, **off
            )

        def forward(self, image, **options):
            return self.pretrained.get_intermediate_layers(image, self.taps, **options)

    return DepthAnything3Net(Net(), TheirDPT(width, output_dim=1, features=features, out_channels=channels)).eval()


def compared_with_the_project(weights, folder, network, sizes, parity_rows, words):
    "Their depth before and after the sky is filled, and their sky, against ours."
    network.load_state_dict(weights)
    assert set(network.state_dict()) == set(weights)
    ours = load_checkpoint(folder)
    head = next(iter(ours.heads))
    for size in sizes:
        image = image_of(*size)
        seen = ((image - ours.mean) / ours.std)[:, None]  # one view each
        fill, network._process_mono_sky_estimation = network._process_mono_sky_estimation, lambda output: output
        said, maps = network(seen), ours(image)
        network._process_mono_sky_estimation = fill
        theirs, mine = (said.depth, said.sky), (maps[head], maps["sky"])
        found = max(difference(*pair) for pair in zip(theirs, mine))
        network.zero_grad(), ours.zero_grad()
        pulled_back(theirs).backward(), pulled_back(mine).backward()
        cosine = smallest_cosine(ours, {key: leaf.grad for key, leaf in network.named_parameters()}, head)
        parity_rows.append((f"depth-anything-3: {words}", size, found, cosine))
        assert found <= 2e-5 and cosine > 0.9999, size


@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_the_projects_code(name, tmp_path, parity_rows):
    network = project_network(128, 4, 2, (16, 32, 64, 128), 32)
    weights = spread(shaken(), (70, 70))
    folder = published(weights, tmp_path / "folder", name)
    compared_with_the_project(weights, folder, network, [(70, 70), (70, 126), (28, 98)], parity_rows, f"{name}, tiny")


@torch.no_grad()
def spread_network(network, weights, size):
    "As `spread`, of the project's own network of any size: its weights."
    network.load_state_dict(weights)
    ends = {"output_conv2": 0.0, "sky_output_conv2": 1.0}
    for name, middle in ends.items():
        raws, layer = [], getattr(network.head.scratch, name)
        hook = layer.register_forward_hook(lambda module, inputs, output: raws.append(output))
        network(image_of(*size)[:, None])
        hook.remove()
        scale = 0.5 / raws[0].std()
        layer[-1].weight *= scale
        layer[-1].bias.sub_(raws[0].mean()).mul_(scale).add_(middle)
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


@pytest.mark.slow
def test_the_same_as_the_projects_code_at_full_size(tmp_path, parity_rows):
    network = project_network(1024, 24, 16, (256, 512, 1024, 1024), 256)
    weights = shaken(dim=1024, depth=24, grid=37, channels=(256, 512, 1024, 1024), features=256)
    weights = spread_network(network, weights, (84, 112))
    folder = published(weights, tmp_path / "folder", "da3metric-large", out_layers=[4, 11, 17, 23])
    compared_with_the_project(weights, folder, network, [(84, 112)], parity_rows, "da3metric-large")
    assert count_parameters(network) == count_parameters(create_model("depth_anything_3_metric_large"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Both networks, tiny, as the project saves them."
    place = tmp_path_factory.mktemp("da3")
    weights = spread(shaken(), (70, 70))
    weights["head.scratch.sky_output_conv2.2.bias"] -= 0.7  # about as many pixels below 0.3 as above
    return {name: published(weights, place / name, name) for name in NAMES}


def test_a_file_is_told_by_its_config_or_by_its_name(folders, tmp_path):
    for name, head in NAMES.items():
        model = load_checkpoint(folders[name])
        assert list(model.config.heads) == [head, "sky"] and model.config.taps == [0, 1, 2, 3]
        assert model.config.heads == NAMED[f"depth_anything_3_{'mono' if head != 'depth' else 'metric'}_large"]["heads"]
        bare = tmp_path / f"{name}.safetensors"
        bare.write_bytes((folders[name] / "model.safetensors").read_bytes())
        assert open_checkpoint(bare).config.heads == model.config.heads
    nameless = tmp_path / "weights.safetensors"
    bare.rename(nameless)
    with pytest.warns(
        CheckpointWarning, match="weights.safetensors.*2 published models.*opened as depth_anything_3_mono"
    ):
        assert list(open_checkpoint(nameless).config.heads) == ["relative_depth", "sky"]
    metric = open_checkpoint(nameless, variant="depth_anything_3_metric_large").config
    assert metric.heads["depth"]["canonical_focal"] == 300 and metric.final_norm_eps == 1e-5
    assert (metric.input_size, metric.input_method, metric.resizing) == ([504, 504], "upper_bound", "depth-anything-3")


def test_it_is_saved_opened_and_given_other_heads(folders, tmp_path):
    model = load_checkpoint(folders["da3metric-large"])
    model.save_pretrained(tmp_path / "saved")
    again = DPT.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert torch.equal(again(image_of(28, 42))["sky"], model(image_of(28, 42))["sky"])
    with pytest.warns(CheckpointWarning, match="no such label"):
        other = load_checkpoint(
            folders["da3metric-large"], heads=dict(depth=dict(output="exp"), sky={}, label=dict(num_classes=3))
        )
    assert torch.equal(other(image_of(28, 42))["sky"], model(image_of(28, 42))["sky"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(alt_start=8, cat_token=True), "several views are another network"),
        (dict(out_layers=[0, 1]), "four numbers of blocks"),
        (dict(out_layers=[0, 1, 2, 9]), "describes no network"),
    ],
)
def test_another_networks_config_is_refused(changes, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(published(shaken(), tmp_path / "folder", **changes))


def project_fill(depth, sky):
    "`_process_mono_sky_estimation`, of fewer than 100,000 pixels, in numpy."
    depth, known = depth.numpy().copy(), sky.numpy() < 0.3
    depth[~known] = np.quantile(depth[known], 0.99)
    return torch.from_numpy(depth)


def test_prediction_of_a_photograph_in_metres_with_its_sky_filled(folders, tmp_path):
    size, focal = (252, 504), 700.0  # what the network is shown is the photograph itself
    model, photo = load_checkpoint(folders["da3metric-large"]), image_of(*size, batch=1)[0]
    with torch.no_grad():
        said = {head: values[0] for head, values in model(photo[None]).items()}
    assert 0.1 < (said["sky"] >= 0.3).float().mean() < 0.9
    by_hand = project_fill(said["depth"] * focal / 300, said["sky"])
    found = Predictor(model, "cpu", focal=focal)(photo)
    assert torch.allclose(found["depth"], by_hand, rtol=1e-5) and not found.note
    halved = Predictor(model, "cpu", size=(126, 252), focal=focal)(photo)  # the lens shrinks with the image
    with torch.no_grad():
        small = model(F.interpolate(photo[None], size=(126, 252), mode="area"))
    ratio = halved["depth"][halved["sky"] < 0.3].median() / (small["depth"][small["sky"] < 0.3].median() * focal / 600)
    assert abs(ratio - 1) < 0.02
    written = found.save(tmp_path, ("png", "npy", "ply"))
    assert written["focal"] == focal and written["sky"]["files"] == ["image-sky.png", "image-sky.npy"]
    points, _ = read_ply(tmp_path / "image.ply")
    assert (points[:, 0] / points[:, 2]).abs().max() == pytest.approx(251.5 / focal, rel=0.01)


def test_mono_is_relative_depth_and_its_points_need_no_guess(folders, tmp_path):
    predictor = Predictor(load_checkpoint(folders["da3mono-large"]), "cpu")
    found = predictor(image_of(100, 80, batch=1)[0])
    assert not found.note and found.focal is None
    written = found.save(tmp_path, ("png", "pfm", "color"))
    assert written["relative_depth"]["file"] == "image-relative_depth.png"
    kept = read_map(tmp_path / "image-relative_depth.png")
    assert torch.allclose(kept, found["relative_depth"], atol=found["relative_depth"].max().item() / 60_000)
    points, _ = map_points(found.image, found.maps, edge=None)
    assert torch.allclose(points[:, 2], found["relative_depth"].flatten())


def test_the_sky_is_filled_when_windows_have_been_joined(folders):
    predictor = Predictor(load_checkpoint(folders["da3mono-large"]), "cpu")
    found = predictor.predict_tiled(image_of(168, 252, batch=1)[0], window=84, progress=False)
    sky, depth = found["sky"] >= 0.3, found["relative_depth"]
    assert 0.1 < sky.float().mean() < 0.9 and len(depth[sky].unique()) == 1
    assert abs(depth[sky][0].item() - np.quantile(depth[~sky].numpy(), 0.99)) < 1e-4


def test_exif_tells_the_focal_length(folders, tmp_path):
    model, exif = load_checkpoint(folders["da3metric-large"]), Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 26
    pixels = (image_of(60, 80, batch=1)[0] * 255).byte().permute(1, 2, 0).numpy()
    for name, extra in (("known", dict(exif=exif)), ("unknown", {})):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", **extra)
    predictor = Predictor(model, "cpu")
    known, unknown = predictor([tmp_path / "known.jpg", tmp_path / "unknown.jpg"])
    assert known.focal == pytest.approx(100 * 26 / np.hypot(36, 24)) and not known.note
    assert unknown.focal == pytest.approx(40 * 3**0.5) and "field of view of 60°" in unknown.note
    assert torch.allclose(known["depth"] / known.focal, unknown["depth"] / unknown.focal, rtol=1e-4)
    entries, bad = predict_files(predictor, [tmp_path], tmp_path / "out", progress=False)
    assert not bad and [entry["focal"] for entry in entries] == [known.focal, unknown.focal]
    told = [
        Predictor(model, "cpu", **given)(tmp_path / "known.jpg").focal
        for given in (dict(focal=50.0), dict(field_of_view=90))
    ]
    assert told == pytest.approx([50, 40])


@pytest.mark.slow
@pytest.mark.parametrize("form, file", [("onnx", "da3.onnx"), ("torch_export", "da3.pt2")])
def test_it_is_exported(form, file, folders, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, image = load_checkpoint(folders["da3metric-large"]), image_of(84, 112)
    export(model, tmp_path / file, form)
    said = open_export(tmp_path / file)(image)
    with torch.no_grad():
        for head, values in model(image).items():
            assert difference(values, torch.as_tensor(said[head])) < 1e-4
    assert "multiplied by the focal length" in export_facts(tmp_path / file)["heads"]["depth"]["unit"]


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_fine_tuning(name, folders, tmp_path):
    "On streets, whose samples know their cameras; validation takes each camera's focal length."
    head, metric = NAMES[name], name == "da3metric-large"
    full = f"depth_anything_3_{'metric' if metric else 'mono'}_large"
    recipe = get_recipe(
        "streets_tiny",
        model=dict(name=full, weights=str(folders[name]), changes={}),
        losses={head: {}, "sky": {}},
        data=dict(
            name="streets",
            protocol="streets" if metric else "zero_shot_median",
            train=dict(count=4, size=[42, 56], sky=True),
            held_out=dict(count=2, size=[42, 56], sky=True),
            transforms=[["Flip", {}]],
            batch_size=2,
        ),
    )
    recipe = change_recipe(recipe, ["loop.steps=3", "keep.validate_every=3", "keep.save_steps=3", "keep.pictures=1"])
    report = train(recipe, tmp_path / "run", tmp_path, cpu=True, workers=0, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and 0 <= report["sky_invented"] <= 1 and report["abs_rel"] > 0
    trained = DPT.from_pretrained(tmp_path / "run" / "model")
    if metric:
        held_out = open_dataset("streets", tmp_path, "held_out", count=2, size=[42, 56], sky=True)
        errors = []
        for index in range(2):
            sample = held_out[index]
            focal = float(sample["intrinsics"][0, 0])
            depth = Predictor(trained, "cpu", size=(378, 504), focal=focal)(sample["image"])["depth"]
            known = (sample["depth"] > 1e-3) & (sample["depth"] < 80)
            errors.append(((depth.clamp(1e-3, 80) - sample["depth"]).abs() / sample["depth"])[known].mean().item())
        assert report["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-3)


def test_metres_of_one_camera_are_not_learned_without_cameras(folders, tmp_path):
    recipe = get_recipe(
        "rooms_tiny",
        model=dict(name="depth_anything_3_metric_large", weights=str(folders["da3metric-large"]), changes={}),
        losses={"depth": {}},
    )

    class Blind(Scenes):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.targets = ("depth", "label")

    with (
        mock.patch.dict(DATASETS, rooms=Blind),
        pytest.raises(RecipeError, match="every image's camera has to be known"),
    ):
        train(
            change_recipe(recipe, ["data.train.count=2", "data.held_out.count=1"]), tmp_path / "run", tmp_path, cpu=True
        )


def test_evaluation_without_cameras_is_refused_and_with_a_focal_length_it_is_not(folders):
    model, samples = load_checkpoint(folders["da3metric-large"]), [dict(image=image_of(56, 70, batch=1)[0])]
    samples[0] |= dict(depth=torch.rand(1, 56, 70) + 1, meta=dict(path="mine.png"))
    with pytest.raises(EvaluationError, match="mine.png comes without its camera"):
        evaluate(Predictor(model, "cpu"), samples, Protocol(), progress=False)
    errors = [
        evaluate(Predictor(model, "cpu", **given), data, Protocol(max_depth=1e6), progress=False)["abs_rel"]
        for given, data in [
            (dict(focal=60.0), samples),
            ({}, [samples[0] | dict(intrinsics=torch.diag(torch.tensor([60.0, 60.0, 1.0])))]),
        ]
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_the_command_takes_a_focal_length(folders, tmp_path):
    pixels = (image_of(60, 80, batch=1)[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    words = "dpt_predict", "photo.png", "--model", folders["da3metric-large"], "--device", "cpu", "--outputs", "npy,ply"
    assumed = command_here(*words, "--out", "one", folder=tmp_path, check=0)
    assert "field of view of 60°" in assumed.stdout
    command_here(*words, "--out", "two", "--focal", 160, folder=tmp_path, check=0)
    one, two = (np.load(tmp_path / out / "photo-depth.npy") for out in ("one", "two"))
    assert np.allclose(two / one, 160 / (40 * 3**0.5), rtol=1e-4)
    refused = command_here(*words, "--out", "three", "--focal", -1, folder=tmp_path, check=1)
    assert "The focal length is -1" in refused.stderr and refused.stderr.count("\n") == 1


REFUSED = {
    "model.da3.backbone.pretrained.cls_token": "Depth Anything 3 Nested",
    "model.backbone.pretrained.camera_token": "Depth Anything 3 for several views",
    "model.head.scratch.output_conv2_aux.0.0.weight": "Depth Anything 3 for several views",
    "model.backbone.pretrained.blocks.0.mlp.w12.weight": "Depth Anything 3 on a giant ViT",
    "encoder.patch_encoder.blocks.0.norm1.weight": "Depth Pro",
    "points_head.input_blocks.0.weight": "MoGe",
    "pixel_decoder.camera_layer.latents_pos": "UniDepth",
    "module.depth_model.decoder.context_zqr_convs.0.weight": "Metric3D",
    "aggregator.global_blocks.0.norm1.weight": "VGGT",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_family_is_refused_by_name_with_the_reason(name, tmp_path):
    torch.save({"model": {name: torch.zeros(2)}, "model_config": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "model.pt")
    words = str(error.value)
    assert REFUSED[name] in words and "there is no network for it, since it " in words
    assert "Open DA3MONO-LARGE" in words or "Predict with its own program" in words


def test_a_folder_is_refused_by_its_config(tmp_path):
    save_file({"fusion_stage.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="depth_pro")))
    with pytest.raises(CheckpointError, match="Depth Pro.*DepthProForDepthEstimation"):
        load_checkpoint(tmp_path)


def test_a_film_is_in_metres_with_its_sky_filled(folders, tmp_path):
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "film.mp4", 5) as film:
        for number in range(2):
            film.add((image_of(64, 96, batch=1)[0] * 255).byte().permute(1, 2, 0).numpy(), number / 5)
    predictor = Predictor(load_checkpoint(folders["da3metric-large"]), "cpu", size=(56, 84))
    entry = predict_video(predictor, tmp_path / "film.mp4", tmp_path / "out", outputs=("npy",), progress=False)
    assert entry["focal"] == pytest.approx(48 * 3**0.5) and "field of view of 60°" in entry["note"]
    depth, sky = (read_map(tmp_path / "out" / f"film-{head}" / "000001.npy") for head in ("depth", "sky"))
    assert len(depth[sky >= 0.3].unique()) == 1
    told = Predictor(predictor.model, "cpu", size=(56, 84), focal=96 * 3**0.5)
    again = predict_video(told, tmp_path / "film.mp4", tmp_path / "told", outputs=("npy",), progress=False)
    assert "note" not in again
    assert torch.allclose(read_map(tmp_path / "told" / "film-depth" / "000001.npy"), 2 * depth, rtol=1e-4)
