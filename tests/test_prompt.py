"""Prompt Depth Anything: opened from transformers' folders and from its own names, against transformers' class at
random weights, used, trained, exported and written back."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import SHORT, command_here, folder_of, gradients_under_our_names, image_of
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import Dinov2Config, PromptDepthAnythingConfig, PromptDepthAnythingForDepthEstimation

from dpt_nb.deploy.engines import check_export, open_export
from dpt_nb.deploy.export import ExportError, export
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.config import ConfigError
from dpt_nb.network.named import named_config
from dpt_nb.network.prompt import PromptError
from dpt_nb.network.zoo import create_model
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.load import load_checkpoint
from dpt_nb.weights.read import CheckpointError
from dpt_nb.weights.write import convert

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-5  # of the range
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=1)
SHARES = dict(output="sigmoid", max_depth=1.0)


@torch.no_grad()
def stirred(peer):
    "Other weights, none at 0 or 1; the head's last layer is scaled so that its answers vary."
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peer.named_parameters():
        amount = 0.5 if "position_embeddings" in name or "cls_token" in name else 0.05
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    last, said = peer.head.conv3, []
    hook = last.register_forward_hook(lambda module, inputs, output: said.append(output))
    peer.eval()(image_of(70, 70), prompt_depth=prompt_of(5, 9))
    hook.remove()
    spread, middle = said[0].std(), said[0].mean()
    last.weight.div_(spread)
    last.bias.sub_(middle).div_(spread).add_(0 if peer.config.depth_estimation_type == "metric" else 2)
    return peer


def prompted_peer(kind="metric", **changes):
    backbone = Dinov2Config(**TINY, out_indices=[1, 2, 3, 4], image_size=70, patch_size=14, reshape_hidden_states=False)
    decoder = dict(reassemble_hidden_size=64, fusion_hidden_size=32, neck_hidden_sizes=[16, 32, 64, 96])
    config = PromptDepthAnythingConfig(
        **decoder, backbone_config=backbone, depth_estimation_type=kind, max_depth=None, **changes
    )
    torch.manual_seed(0)
    return stirred(PromptDepthAnythingForDepthEstimation(config))


def prompt_of(*size, batch=2):
    metres = 1 + 4 * torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(sum(size)))
    return metres * torch.arange(1, batch + 1).reshape(-1, 1, 1, 1)  # each has its own range


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_the_numbers_and_gradients_of_transformers(kind, tmp_path, parity_rows):
    peer = prompted_peer(kind)
    ours = load_checkpoint(folder_of(peer, tmp_path / "peer"))
    assert ours.config.prompt and ours.config.heads == {"depth": SHARES if kind == "metric" else {}}
    # A prompt coarser than every map, one finer than all but the last, and none
    for size, prompt in [((70, 70), (5, 9)), ((70, 126), (48, 64)), ((98, 42), None)]:
        image, given = image_of(*size), {} if prompt is None else dict(prompt_depth=prompt_of(*prompt))
        theirs = peer((image - ours.mean) / ours.std, **given).predicted_depth[:, None]
        mine = ours(image, **given)["depth"]
        scale = theirs.amax((1, 2, 3)) - theirs.amin((1, 2, 3))
        assert (scale > 0.2 * (1 if prompt is None else 4)).all()
        found, cosine = ((mine - theirs).abs().amax((1, 2, 3)) / scale).max().item(), None
        if prompt == (5, 9):
            weight = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
            (theirs * weight).sum().backward(), (mine * weight).sum().backward()
            expected = gradients_under_our_names(peer, tmp_path)
            cosines = {
                name: torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0).item()
                for name, parameter in ours.named_parameters()
            }
            cosine = min(cosines.values())
            assert sum(".prompt." in name for name in cosines) == 4 * 6 and cosine >= 0.9999
        parity_rows.append((f"transformers: Prompt Depth Anything, {kind}", size, found, cosine))
        assert found <= TOLERANCE, f"{size}: {found:.1e}"


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_back_to_transformers_bit_for_bit(kind, tmp_path):
    peer = prompted_peer(kind)
    report = convert(folder_of(peer, tmp_path / "peer"), tmp_path / "back", to="transformers")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("peer", "back"))
    assert not report.lost_settings and before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(report.filled)
    assert all("residual_layer1" in name or "mask_token" in name for name in report.filled)
    again = PromptDepthAnythingForDepthEstimation.from_pretrained(tmp_path / "back").eval()
    image, prompt = image_of(70, 70), prompt_of(5, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(image, prompt).predicted_depth, peer(image, prompt).predicted_depth)
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "PromptDepthAnythingImageProcessor"
    )


def its_own_names(state):
    "A folder's names as PromptDA has them (`promptda/model/`), put down from its code; as its files wrap them."
    named = {}
    for name, tensor in state.items():
        words = name.split(".")
        if name.startswith("backbone.encoder"):
            block, rest = f"pretrained.blocks.{words[3]}.", ".".join(words[4:])
            rest = rest.replace("attention.output.dense", "attn.proj")
            rest = re.sub(r"layer_scale(.)\.lambda1", r"ls\1.gamma", rest)
            if "attention.attention" in rest:  # three of them become one
                if ".query." in rest:
                    parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
                    named[f"{block}attn.qkv.{words[-1]}"] = torch.cat(parts)
                continue
            named[block + rest] = tensor
            continue
        name = name.replace("backbone.layernorm", "pretrained.norm")
        name = name.replace("backbone.embeddings.patch_embeddings.projection", "pretrained.patch_embed.proj")
        name = name.replace("backbone.embeddings.position_embeddings", "pretrained.pos_embed")
        name = name.replace("backbone.embeddings.", "pretrained.")
        name = re.sub(r"neck\.reassemble_stage\.layers\.(.)\.projection", r"depth_head.projects.\1", name)
        name = re.sub(r"neck\.reassemble_stage\.layers\.(.)\.resize", r"depth_head.resize_layers.\1", name)
        level = lambda match: f"depth_head.scratch.layer{int(match[1]) + 1}_rn"
        name = re.sub(r"neck\.convs\.(.)", level, name)
        step = lambda match: f"depth_head.scratch.refinenet{4 - int(match[1])}"
        name = re.sub(r"neck\.fusion_stage\.layers\.(.)", step, name)
        place = lambda match: f"resConfUnit_depth.{2 * int(match[1]) - 2}"
        name = re.sub(r"prompt_depth_layer\.convolution(.)", place, name)
        name = re.sub(r"residual_layer(.)\.convolution(.)", r"resConfUnit\1.conv\2", name)
        name = re.sub(r"(refinenet.)\.projection", r"\1.out_conv", name)
        name = name.replace("head.conv1", "depth_head.scratch.output_conv1")
        name = name.replace("head.conv2", "depth_head.scratch.output_conv2.0")
        named[name.replace("head.conv3", "depth_head.scratch.output_conv2.2")] = tensor
    numbers = dict(_mean=torch.zeros(1, 3, 1, 1), _std=torch.ones(1, 3, 1, 1))
    return dict(state_dict={f"pipeline.{name}": tensor for name, tensor in (named | numbers).items()})


def test_its_own_file_opens_and_goes_to_transformers(tmp_path):
    peer = prompted_peer()
    state = load_file(folder_of(peer, tmp_path / "peer") / "model.safetensors")
    torch.save(its_own_names(state), tmp_path / "model.ckpt")
    own, folder = load_checkpoint(tmp_path / "model.ckpt"), load_checkpoint(tmp_path / "peer")
    assert own.config.prompt and own.config.heads == {"depth": SHARES}
    assert (own.config.pos_embed_mode, own.config.input_size) == ("dinov2", [756, 756])
    assert own.state_dict().keys() == folder.state_dict().keys()
    image, prompt = image_of(70, 70), prompt_of(5, 9)
    with torch.no_grad():  # at its native size, where no position is resampled
        torch.testing.assert_close(own(image, prompt_depth=prompt), folder(image, prompt_depth=prompt))
    convert(tmp_path / "model.ckpt", tmp_path / "folder", to="transformers")
    convert(tmp_path / "folder", tmp_path / "again.pth", to="depth-anything")
    again = load_checkpoint(tmp_path / "again.pth")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in own.state_dict().items())


def test_other_formats_refuse_in_a_sentence(tmp_path):
    folder_of(prompted_peer(), tmp_path / "peer")
    for to in ("isl-org", "mmseg"):
        with pytest.raises(CheckpointError, match=f"it takes prompts, and of {to} only a Prompt Depth Anything does"):
            convert(tmp_path / "peer", tmp_path / "other.pth", to=to)
    folder_of(prompted_peer("relative"), tmp_path / "relative")
    with pytest.raises(CheckpointError, match="its last number is no share of the prompt's range"):
        convert(tmp_path / "relative", tmp_path / "other.pth", to="depth-anything")
    with pytest.raises(ConfigError, match="prompt is true, which needs a head called depth"):
        create_model("dpt_tiny", prompt=True)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = create_model("dpt_tiny", heads={"depth": SHARES | dict(hidden=16)}, prompt=True).eval()
    for step in model.decoder.steps:
        nn.init.normal_(step.prompt.convolution3.weight, std=0.1)
    return model


def test_a_prompt_at_the_network_itself(small):
    image, prompt = image_of(96, 128), prompt_of(6, 8)
    with torch.no_grad():
        together = small(image, prompt_depth=prompt)["depth"]
        alone = torch.cat([small(image[i : i + 1], prompt_depth=prompt[i : i + 1])["depth"] for i in (0, 1)])
        flat = small(image, prompt_depth=torch.full_like(prompt, 3.0))["depth"]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flat, torch.full_like(flat, 3.0))  # a range of 0: what it says is certain
    with pytest.raises(PromptError, match=r"\(2, 6, 8\), and \(2, 1, h, w\) metres"):
        small(image, prompt_depth=prompt[:, 0])
    with pytest.raises(PromptError, match="takes no prompt"):
        create_model("dpt_tiny")(image, prompt_depth=prompt)


def test_the_predictor_gives_what_transformers_gives(tmp_path):
    peer = prompted_peer()
    predictor = Predictor(load_checkpoint(folder_of(peer, tmp_path / "peer")), "cpu", size=(70, 126))
    image, metres = image_of(70, 126, batch=1), prompt_of(12, 16, batch=1)[0, 0].numpy()
    millimetres = Image.fromarray((1000 * metres).round().astype(np.uint16))
    found = predictor(image, prompt=millimetres).maps["depth"]
    given = torch.tensor(np.array(millimetres) / 1000)[None, None].float()
    with torch.no_grad():
        wanted = peer((image - predictor.model.mean) / predictor.model.std, given).predicted_depth
    assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


def test_the_command_takes_prompts(small, tmp_path):
    small.save_pretrained(tmp_path / "model")
    (tmp_path / "lidar").mkdir()
    (tmp_path / "photos").mkdir()
    for name in ("chair", "table"):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)).save(
            tmp_path / f"photos/{name}.png"
        )
    np.save(tmp_path / "lidar/chair.npy", prompt_of(6, 8, batch=1)[0, 0].numpy())
    command = ["dpt_predict", "photos", "--model", "model", "--out", "out", "--outputs", "npy", "--device", "cpu"]
    ended = command_here(*command, "--prompt", "lidar", folder=tmp_path)
    assert ended.returncode == 1 and "holds no prompt for table" in ended.stderr
    depth = np.load(tmp_path / "out/chair-depth.npy")
    assert 1 <= depth.min() < depth.max() <= 5
    ended = command_here(*command, folder=tmp_path)
    assert ended.returncode == 1 and "This network completes a coarse depth" in ended.stderr
    ended = command_here(*command, "--prompt", "nowhere", folder=tmp_path)
    assert ended.returncode != 0 and "There is no prompt nowhere" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_an_exported_file_takes_prompts_of_any_size(form, small, tmp_path):
    path = export(small, tmp_path / ("depth.onnx" if form == "onnx" else "depth.pt2"), form)
    assert check_export(small, path, sizes=[(96, 128), (128, 80)], batches=(1, 2)).worst <= 1e-4
    with pytest.raises(ExportError, match="takes prompt_depth, .* metres beside the image: give it"):
        open_export(path)(image_of(96, 128))


@pytest.mark.slow
def test_three_steps_of_training_with_prompts_made_of_the_truth(tmp_path):
    changes = dict(heads={"depth": SHARES | dict(hidden=16)}, prompt=True)
    recipe = change_recipe(get_recipe("rooms_tiny"), [*SHORT, f"model.changes={json.dumps(changes)}", "loop.steps=3"])
    report = train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    assert report
    trained = load_checkpoint(tmp_path / "run" / "model")
    assert trained.config.prompt and trained.config.heads["depth"] == changes["heads"]["depth"]
    assert all(step.prompt.convolution3.weight.abs().max() > 0 for step in trained.decoder.steps)


def test_the_published_networks_are_those_of_transformers():
    for size, features, width in [("small", 64, 384), ("large", 256, 1024)]:
        config = named_config(f"prompt_depth_anything_{size}")
        assert (config.features, config.channels[-1], config.prompt) == (features, width, True)
        assert config.heads == {"depth": SHARES} and config.taps == (
            [2, 5, 8, 11] if size == "small" else [4, 11, 17, 23]
        )
