"""Files of other projects, by names written down by hand: opened, converted there and back, opened by the other side,
refused when they are bad, sent to the Hub."""

import functools
import http.server
import json
import os
import pickle
import re
import shutil
import threading
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import transformers
from forked import command_forked
from huggingface_hub.errors import LocalEntryNotFoundError
from official_names import (
    depth_anything,
    isl_org_hybrid,
    isl_org_vit,
    midas_beit,
    midas_swin,
    mmseg,
    mmseg_vit,
    random_tensors,
)
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from dpt_nb.commands import main
from dpt_nb.network.dpt import DPT
from dpt_nb.network.named import PUBLISHED
from dpt_nb.network.zoo import create_model, list_models
from dpt_nb.weights.key_maps import key_rules, remap_state_dict
from dpt_nb.weights.load import load_backbone, load_checkpoint, open_checkpoint
from dpt_nb.weights.read import CheckpointError
from dpt_nb.weights.write import convert

transformers.utils.logging.disable_progress_bar()
NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def both(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


IDLE = both("scratch.refinenet4.resConfUnit1.conv1", "scratch.refinenet4.resConfUnit1.conv2")
CLASSIFIER = both("pretrained.model.norm", "pretrained.model.head")
IDLE_NORMED = {
    f"scratch.refinenet4.resConfUnit1.{part}"
    for part in ["conv1.weight", "conv2.weight"] + [f"bn{place}.{part}" for place in (1, 2) for part in NORM]
}
SWIN_MASKS = {f"pretrained.model.layers.{stage}.blocks.1.attn_mask" for stage in (0, 1)}
SWIN_PLACES = {
    f"pretrained.model.layers.{stage}.blocks.{block}.attn.relative_position_index"
    for stage in range(4)
    for block in (0, 1)
}
BEIT_PLACES = {f"pretrained.model.blocks.{block}.attn.relative_position_index" for block in range(4)}
# What a file holds and no prediction needs. It stays behind on the way in, and is filled in again on the way out.
FILES = {
    "isl-org ViT": (isl_org_vit(), "isl-org", "inverse_depth", (1, 96, 160), CLASSIFIER | IDLE),
    "isl-org ViT, ADE20K": (isl_org_vit(classes=150), "isl-org", "label", (150, 96, 160), CLASSIFIER | IDLE_NORMED),
    "isl-org hybrid": (isl_org_hybrid(), "isl-org", "inverse_depth", (1, 96, 160), CLASSIFIER | IDLE),
    "isl-org hybrid, ADE20K": (
        isl_org_hybrid(classes=150),
        "isl-org",
        "label",
        (150, 96, 160),
        CLASSIFIER | IDLE_NORMED,
    ),
    "MiDaS BEiT": (
        midas_beit(),
        "isl-org",
        "inverse_depth",
        (1, 96, 160),
        both("pretrained.model.fc_norm", "pretrained.model.head") | IDLE | BEIT_PLACES,
    ),
    "MiDaS Swin V2": (midas_swin(second=True), "isl-org", "inverse_depth", (1, 64, 96), CLASSIFIER | IDLE | SWIN_MASKS),
    "MiDaS Swin": (
        midas_swin(second=False),
        "isl-org",
        "inverse_depth",
        (1, 64, 96),
        CLASSIFIER | IDLE | SWIN_MASKS | SWIN_PLACES,
    ),
    "Depth Anything": (
        depth_anything(),
        "depth-anything",
        "inverse_depth",
        (1, 70, 126),
        {"pretrained.mask_token"} | {f"depth_head.{name}" for name in IDLE},
    ),
    "Toolbox, depth": (mmseg(), "mmseg", "depth", (1, 96, 160), set()),
    "mmsegmentation": (mmseg(classes=19), "mmseg", "label", (19, 96, 160), set()),
}
quiet = pytest.mark.filterwarnings("ignore:.*published models")


def some_slow(kinds, *slow):
    "Parameters of a test; those named run with --slow only."
    assert set(slow) < set(kinds)
    return [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in kinds]


def random_image(*size):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def same(first, second):
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def depth_file(tmp_path_factory):
    "A model of isl-org's for depth, as they would publish it."
    path = tmp_path_factory.mktemp("weights") / "depth.pt"
    torch.save(random_tensors(isl_org_vit()), path)
    return path


@pytest.fixture(scope="module")
def label_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "labels.pt"
    torch.save(random_tensors(isl_org_vit(classes=7)), path)
    return path


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    "What timm's classifiers are published as."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classifier.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    "A function: a kind of file → what it held, the two conversions (to ours and back), and what came back."

    @functools.cache
    def travel(kind):
        names, format_name, *_ = FILES[kind]
        folder, tensors = tmp_path_factory.mktemp("way"), random_tensors(names)
        torch.save(
            dict(meta={"epoch": 3}, state_dict=tensors) if format_name == "mmseg" else tensors, folder / "theirs.pth"
        )
        there, back = (
            convert(folder / "theirs.pth", folder / "ours"),
            convert(folder / "ours", folder / "back.pth", to=format_name),
        )
        returned = torch.load(folder / "back.pth", weights_only=True)
        returned = returned["state_dict"] if format_name == "mmseg" else returned
        return SimpleNamespace(path=folder / "theirs.pth", tensors=tensors, there=there, back=back, returned=returned)

    return travel


@quiet
@pytest.mark.parametrize("kind", some_slow(FILES, "MiDaS Swin", "MiDaS Swin V2", "isl-org hybrid, ADE20K"))
def test_published_files_round_trip_bit_for_bit(kind, round_trip):
    names, format_name, head, shape, unneeded = FILES[kind]
    way = round_trip(kind)
    assert (way.there.source, way.back.to, set(way.there.dropped), set(way.back.filled)) == (
        format_name,
        format_name,
        unneeded,
        unneeded,
    )
    assert {name: tuple(tensor.shape) for name, tensor in way.returned.items()} == names
    kept = set(names) - unneeded
    assert same({name: way.tensors[name] for name in kept}, {name: way.returned[name] for name in kept})
    model = load_checkpoint(way.path)
    assert same(load_file(way.there.path / "model.safetensors"), model.state_dict())
    with torch.no_grad():
        prediction = model(random_image(*shape[1:]))
    assert (
        list(prediction) == [head]
        and prediction[head].shape == (1, *shape)
        and prediction[head].isfinite().all()
        and prediction[head].std() > 0
    )


def test_beit_position_index_equals_a_loop(round_trip):
    places = [(row, column) for row in range(6) for column in range(6)]
    index = torch.tensor(
        [
            [(row - other_row + 5) * 11 + column - other_column + 5 for other_row, other_column in places]
            for row, column in places
        ]
    )
    found = round_trip("MiDaS BEiT").returned["pretrained.model.blocks.3.attn.relative_position_index"]
    assert (
        torch.equal(found[1:, 1:], index)
        and set(found[0, 1:].tolist()) == {121}
        and set(found[1:, 0].tolist()) == {122}
        and found[0, 0] == 123
    )


@pytest.mark.slow
def test_swin_position_index_and_masks_equal_a_loop(round_trip):
    swin, places = round_trip("MiDaS Swin").returned, [(row, column) for row in range(4) for column in range(4)]
    index = torch.tensor(
        [
            [(row - other_row + 3) * 7 + column - other_column + 3 for other_row, other_column in places]
            for row, column in places
        ]
    )
    assert torch.equal(swin["pretrained.model.layers.2.blocks.1.attn.relative_position_index"], index)
    # After a shift by 2, windows at the lower and right edge hold tokens that are not neighbors: from before and
    # after the seam.
    mask = swin["pretrained.model.layers.0.blocks.1.attn_mask"]
    for window in range(16):
        last_row, last_column = window // 4 == 3, window % 4 == 3
        part = [(last_row and row >= 2, last_column and column >= 2) for row, column in places]
        assert torch.equal(mask[window] == 0, torch.tensor([[mine == other for other in part] for mine in part])), (
            window
        )
    assert set(mask.unique().tolist()) == {0.0, -100.0}


ZOO = {
    "dpt_large": isl_org_vit(1024, 24, 24, (256, 512, 1024, 1024), 256),
    "dpt_hybrid_ade20k": isl_org_hybrid(768, 12, 24, (256, 512, 768, 768), 256, 150, (3, 4, 9), (256, 512, 1024), 64),
    "dpt_beit_large_512": midas_beit(1024, 24, 32, (256, 512, 1024, 1024), 256),
    "dpt_swin2_large_384": midas_swin(True, 192, (2, 2, 18, 2), (6, 12, 24, 48), 24, 96, 256),
    "dpt_swin_large_384": midas_swin(False, 192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 96, 256),
    "depth_anything_v2_small": depth_anything(384, 12, 37, (48, 96, 192, 384), 64),
    "dpt_large_ade20k": isl_org_vit(1024, 24, 24, (256, 512, 1024, 1024), 256, classes=150),
    "dpt_hybrid": isl_org_hybrid(768, 12, 24, (256, 512, 768, 768), 256, None, (3, 4, 9), (256, 512, 1024), 64),
    "dpt_beit_large_384": midas_beit(1024, 24, 24, (256, 512, 1024, 1024), 256),
    "dpt_beit_base_384": midas_beit(768, 12, 24, (96, 192, 384, 768), 256),
    "dpt_swin2_base_384": midas_swin(True, 128, (2, 2, 18, 2), (4, 8, 16, 32), 24, 96, 256),
    "dpt_swin2_tiny_256": midas_swin(True, 96, (2, 2, 6, 2), (3, 6, 12, 24), 16, 64, 256),
    "depth_anything_base": depth_anything(768, 12, 37, (96, 192, 384, 768), 128),
    "depth_anything_v2_large": depth_anything(1024, 24, 37, (256, 512, 1024, 1024), 256),
}


@pytest.mark.parametrize("zoo", some_slow(ZOO, *list(ZOO)[4:]))
def test_zoo_has_names_and_shapes_of_published_files(zoo):
    unneeded = (
        "relative_position_index",
        "attn_mask",
        "mask_token",
        "model.norm.",
        ".head.",
        "fc_norm",
        "refinenet4.resConfUnit1",
    )
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in ZOO[zoo].items()
        if not any(part in name for part in unneeded)
    }
    ours, unknown = remap_state_dict(
        state, key_rules("depth-anything" if zoo.startswith("depth") else "isl-org", state, None)
    )
    with torch.device("meta"):
        wanted = create_model(zoo).state_dict()
    assert not unknown and {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }


WRAPPINGS = {
    "bare": lambda state: state,
    "beside NumPy's numbers": lambda state: dict(state_dict=state, meta=dict(epoch=np.int64(3), best=np.float64(0.07))),
    "under model": lambda state: dict(model=state, epoch=3),
    "under state_dict, by DataParallel": lambda state: dict(
        state_dict={f"module.{name}": tensor for name, tensor in state.items()}
    ),
    "in half precision": lambda state: {name: tensor.half() for name, tensor in state.items()},
}


@pytest.mark.parametrize(
    "wrapping, stored",
    [
        *[(wrapping, "zip") for wrapping in WRAPPINGS],
        ("under state_dict, by DataParallel", "pickle of 2019"),
        ("bare", "safetensors"),
        ("in half precision", "safetensors"),
    ],
)
def test_wrapped_files_open(wrapping, stored, depth_file, tmp_path):
    tensors = torch.load(depth_file, weights_only=True)
    wrapped, path = WRAPPINGS[wrapping](tensors), tmp_path / "weights"
    if stored == "safetensors":
        save_file(wrapped, path)
    else:
        torch.save(wrapped, path, _use_new_zipfile_serialization=stored == "zip")
    state, expected = load_checkpoint(path).state_dict(), tensors["scratch.layer1_rn.weight"]
    assert torch.equal(
        state["reassemble.0.to_features.weight"], expected.half().float() if "half" in wrapping else expected
    )
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def vit2depth(state):
    "The Toolbox's `tools/model_converters/vit2depth.py`, its rule and its order."
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("head"):
            continue
        if name.startswith("norm."):
            new = name.replace("norm.", "ln1.")
        elif name.startswith("patch_embed"):
            new = name.replace("proj", "projection")
        elif name.startswith("blocks."):
            new = name.replace("blocks.", "layers.")
            words = {
                "norm": "ln",
                "mlp.fc1": "ffn.layers.0.0",
                "mlp.fc2": "ffn.layers.1",
                "attn.qkv.": "attn.attn.in_proj_",
                "attn.proj": "attn.attn.out_proj",
            }
            for word, other in words.items():
                if word in new:
                    new = new.replace(word, other)
                    break
        else:
            new = name
        renamed[new] = tensor
    return renamed


@pytest.mark.parametrize("wrapping", [None, "model", "state_dict"])
def test_convert_equals_vit2depth_key_by_key(wrapping, classifier_file, tmp_path, capsys):
    state = torch.load(classifier_file, weights_only=True)
    torch.save({wrapping: state} if wrapping else state, tmp_path / "vit.pth")
    assert main(["dpt_convert", str(tmp_path / "vit.pth"), str(tmp_path / "converted.pth"), "--to", "mmseg"]) == 0
    converted, expected = torch.load(tmp_path / "converted.pth", weights_only=True), vit2depth(state)
    assert list(converted) == list(expected) and same(converted, expected)
    printed = capsys.readouterr().out
    assert "head.weight, head.bias" in printed and "norm.weight" not in printed
    convert(tmp_path / "converted.pth", tmp_path / "back.pth", to="timm")
    assert same(
        torch.load(tmp_path / "back.pth", weights_only=True),
        {name: tensor for name, tensor in state.items() if not name.startswith("head")},
    )


@pytest.fixture
def served(tmp_path):
    "A folder, and the address at which it can be downloaded."
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_command_downloads_converts_and_keeps_what_is_there(served, classifier_file, tmp_path, monkeypatch, capsys):
    folder, address = served
    shutil.copy(classifier_file, folder / "jx_vit.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    words = ["dpt_convert", f"{address}/jx_vit.pth", "out/vit.pth", "--to", "mmseg"]
    done = command_forked(*words, folder=tmp_path, check=0)
    expected = vit2depth(torch.load(classifier_file, weights_only=True))
    assert same(torch.load(tmp_path / "out" / "vit.pth", weights_only=True), expected)
    assert f"{len(expected)} tensors" in done.stdout and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["jx_vit.pth"]
    (tmp_path / "out" / "vit.pth").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1 and (tmp_path / "out" / "vit.pth").read_text() == "mine"
    printed = capsys.readouterr().err
    assert "out/vit.pth exists" in printed and printed.count("\n") == 1
    assert main([*words, "--force"]) == 0 and same(
        torch.load(tmp_path / "out" / "vit.pth", weights_only=True), expected
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vit.pth"]


def test_missing_url_has_a_clear_error(served, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="gone.pth could not be downloaded") as caught:
        load_checkpoint(f"{served[1]}/gone.pth")
    assert "\n" not in str(caught.value) and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_urls_that_end_alike_are_two_files(served, classifier_file, tmp_path, monkeypatch):
    folder, address = served
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    state = torch.load(classifier_file, weights_only=True)
    for index, place in enumerate("ab"):
        (folder / place).mkdir()
        torch.save({name: tensor + index for name, tensor in state.items()}, folder / place / "weights.pth")
        opened = open_checkpoint(f"{address}/{place}/weights.pth").state
        assert torch.equal(opened["backbone.vit.cls_token"], state["cls_token"] + index)


def test_command_converts_through_all_formats_and_back(depth_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (
        [str(depth_file), "own"],
        ["own", "hf", "--to", "transformers"],
        ["hf", "own again"],
        ["own again", "back.safetensors", "--to", "isl-org"],
    ):
        assert main(["dpt_convert", *words]) == 0
    printed = capsys.readouterr().out
    assert "filled in" in printed
    told = [
        line.split(": ", 1)[1] for line in printed.splitlines() if line.startswith("to be told")
    ]  # nothing but by which interpolation images are fed
    assert told == [
        "images are fed minimal 96×96 by isl-org here and minimal 96×96 by transformers there",
        "images are fed minimal 96×96 by transformers here and minimal 96×96 by isl-org there",
    ]
    tensors, back = torch.load(depth_file, weights_only=True), load_file("back.safetensors")
    kept = set(tensors) - CLASSIFIER - IDLE
    assert set(back) == set(tensors) and same(
        {name: tensors[name] for name in kept}, {name: back[name] for name in kept}
    )
    assert same(load_checkpoint("own").state_dict(), load_checkpoint("own again").state_dict())


def test_backbone_alone_is_written_and_read_by_others(depth_file, tmp_path):
    tensors = torch.load(depth_file, weights_only=True)
    convert(depth_file, tmp_path / "toolbox.pth", to="mmseg", what="backbone")
    toolbox = torch.load(tmp_path / "toolbox.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in toolbox.items()} == mmseg_vit("", 128, 4, 6)
    assert torch.equal(toolbox["layers.3.ffn.layers.0.0.weight"], tensors["pretrained.model.blocks.3.mlp.fc1.weight"])
    report = convert(depth_file, tmp_path / "backbone.pth", to="timm")
    vit = timm.create_model("vit_base_patch16_224", img_size=96, embed_dim=128, depth=4, num_heads=2, num_classes=0)
    vit.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True))
    assert report.what == "backbone" and set(report.filled) == both("norm")
    tokens = vit.forward_intermediates(
        vit.patch_embed.proj.weight.new_ones(1, 3, 96, 96), indices=[3], intermediates_only=True, output_fmt="NLC"
    )[0]
    with torch.no_grad():
        assert torch.allclose(
            tokens, load_checkpoint(depth_file).backbone(torch.ones(1, 3, 96, 96))[-1].tokens, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_dinov2", dict(img_size=56)),
        ("vit_small_patch14_reg4_dinov2", dict(img_size=56)),
        ("beit_base_patch16_224", dict(embed_dim=128, num_heads=2)),
    ],
)
def test_classifier_becomes_a_model_with_a_warning(name, shape, tmp_path):
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=10, depth=4, **shape)
    torch.save(peer.state_dict(), tmp_path / "classifier.pth")
    with pytest.warns(UserWarning, match="classifier.pth is a backbone alone"):
        model = load_checkpoint(tmp_path / "classifier.pth", heads={"depth": {}, "label": dict(num_classes=3)})
    ours, theirs = model.backbone.vit.state_dict(), peer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and len(ours) > 4 * 10
    with torch.no_grad():
        assert model(random_image(112, 112))["label"].shape == (1, 3, 112, 112)


def test_classifier_of_an_unknown_family_is_refused(tmp_path):
    torch.save(
        timm.create_model("vit_tiny_r_s16_p8_224").state_dict(), tmp_path / "other.pth"
    )  # a ResNet of another make
    with pytest.raises(CheckpointError, match="other.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_depth_anything_starts_from_a_dinov2_of_timm(tmp_path):
    torch.manual_seed(0)
    peer = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=4)
    torch.save(peer.state_dict(), tmp_path / "dinov2.pth")
    model = create_model(
        "depth_anything_v2_small", image_size=[56, 56], taps=[0, 1, 2, 3], backbone_arguments=dict(depth=4)
    )
    load_backbone(model, tmp_path / "dinov2.pth")
    assert torch.equal(model.backbone.vit.norm.weight, peer.norm.weight) and torch.equal(
        model.backbone.vit.blocks[3].mlp.fc2.weight, peer.blocks[3].mlp.fc2.weight
    )


def change(**tensors):
    "A good file with some tensors changed; None takes one out."

    def write(folder, good):
        torch.save({name: tensor for name, tensor in (good | tensors).items() if tensor is not None}, folder / "bad.pt")
        return folder / "bad.pt"

    return write


class Runs:
    "What a pickle can do to whoever opens it."

    def __reduce__(self):
        return (os.mkdir, ("ran",))


def write(name, content):
    def writer(folder, good):
        path = folder / name
        if callable(content):
            content(path, good)
        else:
            path.write_bytes(content)
        return path

    return writer


def saved(name, make, **options):
    "What `make` makes of a good file's tensors, saved by PyTorch."
    return write(name, lambda path, good: torch.save(make(good), path, **options))


def zipped(path, good):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", "…")


def cut(share, **options):
    def write(path, good):
        torch.save(good, path, **options)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def cut_safetensors(path, good):
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-1000])


def of_transformers(config, without=None, moved=None):
    "A folder written by transformers with another config.json, without one of its files, or its weights moved out."

    def write(folder, good):
        shape = dict(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=1,
            intermediate_size=256,
            image_size=96,
            fusion_hidden_size=32,
        )
        peer = transformers.DPTForDepthEstimation(
            transformers.DPTConfig(**shape, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 64, 64])
        )
        peer.save_pretrained(folder / "folder")
        path = folder / "folder" / "config.json"
        if isinstance(config, str):
            path.write_text(config)
        else:
            path.write_text(
                json.dumps(
                    {key: value for key, value in (json.loads(path.read_text()) | config).items() if value != "gone"}
                )
            )
        if without:
            (folder / "folder" / without).unlink()
        return shutil.move(folder / "folder" / "model.safetensors", folder / moved) if moved else folder / "folder"

    return write


def own_without_config(folder, good):
    model = create_model(
        "vit_tiny_patch16_224",
        taps=[0, 1, 2, 3],
        image_size=[96, 96],
        backbone_arguments=dict(depth=4),
        features=32,
        channels=[8, 16, 32, 64],
    )
    model.save_pretrained(folder / "own")
    shutil.move(folder / "own" / "model.safetensors", folder / "alone.safetensors")
    return folder / "alone.safetensors"


def own_with_other_config(folder, good):
    own_without_config(folder, good)
    shutil.move(folder / "alone.safetensors", folder / "own" / "model.safetensors")
    config = json.loads((folder / "own" / "config.json").read_text())
    (folder / "own" / "config.json").write_text(json.dumps(config | dict(color="red")))
    return folder / "own"


WEIGHT = "scratch.layer2_rn.weight"
BAD = {
    "runs code": (saved("evil.pt", lambda good: good | {"x": Runs()}), ["evil.pt", "mkdir", "code"]),
    "runs code, in an old pickle": (
        saved("evil.pth", lambda good: good | {"x": Runs()}, _use_new_zipfile_serialization=False),
        ["evil.pth", "mkdir", "code"],
    ),
    "cut short": (write("short.pt", cut(0.5)), ["short.pt", "cut short"]),
    "cut within the first bytes": (write("short.pt", b"PK\x03"), ["short.pt", "cut short"]),
    "cut within the last bytes": (write("short.pt", cut(0.9999)), ["short.pt", "cut short"]),
    "old pickle cut in its data": (
        write("short.pth", cut(0.5, _use_new_zipfile_serialization=False)),
        ["short.pth", "cut short"],
    ),
    "old pickle cut at its start": (
        write("short.pth", lambda path, good: path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9c")),
        ["short.pth", "cut short"],
    ),
    "runs code, in a pickle of another hand": (
        write("evil.pkl", lambda path, good: path.write_bytes(pickle.dumps({"x": Runs()}))),
        ["evil.pkl", "refused", "state_dict"],
    ),
    "a pickle of another hand": (
        write("other.pkl", lambda path, good: path.write_bytes(pickle.dumps({"x": [1, 2]}, protocol=2))),
        ["other.pkl", "refused", "state_dict"],
    ),
    "a pickle protocol that PyTorch does not read": (
        saved("late.pt", lambda good: good, pickle_protocol=4),
        ["late.pt", "refused", "state_dict"],
    ),
    "safetensors cut short": (
        write("short.safetensors", cut_safetensors),
        ["short.safetensors", "not a whole safetensors"],
    ),
    "a zip archive renamed": (write("photos.pt", zipped), ["photos.pt", "zip archive"]),
    "a page of html": (
        write("page.pt", b"<!DOCTYPE html><title>404</title>"),
        ["page.pt", "is not a checkpoint", "<!DOCTYPE"],
    ),
    "an empty file": (write("empty.pt", b""), ["empty.pt", "is not a checkpoint"]),
    "an image": (write("photo.pt", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01"), ["photo.pt", "is not a checkpoint"]),
    "a list": (saved("list.pt", lambda good: list(good.values())), ["list.pt", "a list and", "state_dict"]),
    "numbers for names": (saved("numbers.pt", lambda good: dict(enumerate(good.values()))), ["numbers.pt"]),
    "nothing in it": (saved("none.pt", lambda good: {}), ["none.pt", "no named weights"]),
    "a training state without weights": (
        saved("optimiser.pt", lambda good: {"optimizer": {"lr": 1.0}, "step": 3}),
        ["optimiser.pt", "'optimizer'"],
    ),
    "no such file": (lambda folder, good: folder / "gone.pt", ["gone.pt"]),
    "a tensor is missing": (change(**{WEIGHT: None}), ["bad.pt", "isl-org", "layer2_rn"]),
    "a block is missing": (
        change(**{name: None for name in isl_org_vit() if ".blocks.1." in name}),
        ["bad.pt", "isl-org", "blocks"],
    ),
    "a tensor of a block is missing": (
        change(**{"pretrained.model.blocks.2.attn.proj.bias": None}),
        ["bad.pt", "isl-org", "blocks.2.attn.proj.bias"],
    ),
    "the class token is missing": (change(**{"pretrained.model.cls_token": None}), ["bad.pt", "cls_token"]),
    "the whole decoder is missing": (
        change(**{name: None for name in isl_org_vit() if name.startswith("scratch.")}),
        ["bad.pt", "isl-org", "scratch."],
    ),
    "the head is missing": (
        change(**{name: None for name in isl_org_vit() if ".output_conv." in name}),
        ["bad.pt", "isl-org"],
    ),
    "a tensor too many": (
        change(**{"scratch.layer9_rn.weight": torch.ones(1)}),
        ["bad.pt", "isl-org", "scratch.layer9_rn.weight"],
    ),
    "a block too many": (
        change(**{"pretrained.model.blocks.9.attn.qkv.weight": torch.ones(384, 128)}),
        ["bad.pt", "isl-org", "blocks"],
    ),
    "another shape": (
        change(**{WEIGHT: torch.ones(32, 32, 1, 1)}),
        ["bad.pt", "isl-org", "layer2_rn", "(32, 32, 1, 1)", "(32, 32, 3, 3)"],
    ),
    "another number of dimensions": (change(**{WEIGHT: torch.ones(32)}), ["bad.pt", "isl-org", "layer2_rn"]),
    "a class token without dimensions": (
        change(**{"pretrained.model.cls_token": torch.tensor(1.0)}),
        ["bad.pt", "cls_token"],
    ),
    "two formats": (
        change(**{"neck.convs.0.weight": torch.ones(1), "head.head.0.weight": torch.ones(1)}),
        ["bad.pt", "isl-org", "transformers"],
    ),
    "a ResNet": (
        saved("resnet18.pth", lambda good: timm.create_model("resnet18").state_dict()),
        ["resnet18.pth", "conv1.weight", "no project known", "stands on a vision transformer"],
    ),
    "a ConvNeXt": (
        saved("convnext.pth", lambda good: timm.create_model("convnext_atto").state_dict()),
        ["convnext.pth", "no project known", "stands on a vision transformer"],
    ),
    "transformers without config.json": (of_transformers({}, without="config.json"), ["folder", "config.json"]),
    "transformers' file alone": (of_transformers({}, moved="alone.safetensors"), ["alone.safetensors", "config.json"]),
    "another model of transformers": (of_transformers({"model_type": "glpn"}), ["'glpn'"]),
    "another backbone of transformers": (of_transformers({"backbone_config": {"model_type": "resnet"}}), ["'resnet'"]),
    "config.json that is no JSON": (of_transformers("{ model_type: dpt"), ["config.json", "JSON"]),
    "config.json that is a list": (of_transformers("[1, 2]"), ["config.json"]),
    "config.json without attention heads": (of_transformers({"num_attention_heads": "gone"}), ["num_attention_heads"]),
    "config.json of another network": (of_transformers({"backbone_out_indices": [2, 5, 8, 11]}), ["folder"]),
    "config.json and no weights": (of_transformers({}, without="model.safetensors"), ["folder", "model.safetensors"]),
    "ours without config.json": (own_without_config, ["alone.safetensors", "config.json"]),
    "ours with a config.json of another version": (own_with_other_config, ["config.json", "color"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_have_clear_errors_and_nothing_is_written(kind, depth_file, tmp_path, monkeypatch, recwarn):
    make, fragments = BAD[kind]
    monkeypatch.chdir(tmp_path)
    path = Path(make(tmp_path, torch.load(depth_file, weights_only=True)))
    before = sorted(tmp_path.rglob("*"))
    for open_it in (load_checkpoint, lambda source: convert(source, tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            open_it(path)
        message = str(caught.value)
        assert not recwarn.list
        assert "\n" not in message and len(message) < 1200, message
        assert all(fragment in message for fragment in fragments), message
    assert sorted(tmp_path.rglob("*")) == before and not Path("ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors"])
def test_files_damaged_anywhere_have_clear_errors(kind, tmp_path):
    tensors, path = (
        {"blocks.0.norm1.weight": torch.ones(3), "patch_embed.proj.weight": torch.ones(2, 2)},
        tmp_path / f"cut.{kind}",
    )
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    whole = path.read_bytes()
    shortened = [whole[:length] for length in [*range(40), *range(40, len(whole), 5), len(whole) - 1]]
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 5)]
    for content in shortened + damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"cut.{kind}"):
            load_checkpoint(path)


def test_command_errors_are_one_line(depth_file, tmp_path, capsys):
    (tmp_path / "short.pt").write_bytes(depth_file.read_bytes()[:5000])
    assert main(["dpt_convert", str(tmp_path / "short.pt"), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert "short.pt" in printed and printed.count("\n") == 1 and not (tmp_path / "out").exists()


def test_unsupported_models_are_refused_and_not_written(depth_file, label_file, tmp_path):
    convert(depth_file, tmp_path / "own")
    for source, to, reason in [
        (tmp_path / "own", "mmseg", "residual_bias=False"),
        (tmp_path / "own", "depth-anything", "DINOv2"),
        (label_file, "depth-anything", "DINOv2"),
        (tmp_path / "own", "onnx", "'onnx'"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            convert(source, tmp_path / "out.pth", to=to)
    with pytest.raises(CheckpointError, match="no model called 'dpt_huge'"):
        convert(depth_file, tmp_path / "out.pth", variant="dpt_huge")
    assert not (tmp_path / "out.pth").exists()


UNUSUAL = {  # what nobody publishes but training can give, where it is sent, and what becomes of it
    "a wide image": (dict(image_size=[64, 128]), "isl-org", "refused: takes every table for a square"),
    "a wide image, transformers": (
        dict(image_size=[64, 128]),
        "transformers",
        "refused: takes every table for a square",
    ),
    "class token added": (dict(readout="add"), "isl-org", "lost: the class token is added"),
    "other taps": (
        dict(taps=[0, 1, 2, 7], backbone_arguments=dict(embed_dim=128, depth=8, num_heads=2)),
        "isl-org",
        "lost: the taps are [0, 1, 2, 7]",
    ),
    "depth that ends in ReLU": (dict(heads={"depth": {}}), "isl-org", "lost: its number is a depth in metres"),
    "depth that ends in ReLU, transformers": (
        dict(heads={"depth": {}}),
        "transformers",
        "lost: its number is a depth in metres",
    ),
    "a narrow head": (
        dict(heads={"inverse_depth": dict(hidden=16)}),
        "transformers",
        "refused: its head has 16 channels",
    ),
    "labels resized as mmsegmentation does": (
        dict(heads={"label": dict(num_classes=5, align_corners=False)}, batch_norm=True),
        "isl-org",
        "refused: resized with align_corners=False",
    ),
    "labels resized as isl-org does": (
        dict(heads={"label": dict(num_classes=5)}, batch_norm=True, pos_embed_mode="bicubic", layer_norm_eps=1e-5),
        "mmseg",
        "lost: logits are resized with align_corners=True",
    ),
    "taps read through a ViT's norm": (
        dict(norm_intermediates=True),
        "transformers",
        "refused: read through the final norm",
    ),
    "no class token": (
        dict(
            readout="ignore",
            backbone_arguments=dict(embed_dim=128, depth=4, num_heads=2, class_token=False, global_pool="avg"),
        ),
        "isl-org",
        "refused: it has 0 tokens in front of the patches, and",
    ),
    "another mean": (dict(mean=[0.4, 0.4, 0.4]), "isl-org", "lost: images are normalized with mean [0.4, 0.4, 0.4]"),
    "another epsilon": (dict(layer_norm_eps=0.1), "isl-org", "lost: layer norms have an epsilon of 0.1"),
}


@pytest.mark.parametrize(
    "kind",
    some_slow(
        UNUSUAL,
        "a wide image, transformers",
        "depth that ends in ReLU, transformers",
        "a narrow head",
        "labels resized as isl-org does",
        "another mean",
        "another epsilon",
    ),
)
def test_unusual_models_are_refused_or_reported(kind, tmp_path):
    changes, to, told = UNUSUAL[kind]
    outcome, words = told.split(": ", 1)
    torch.manual_seed(0)
    usual = dict(
        taps=[0, 1, 2, 3],
        channels=[16, 32, 64, 128],
        features=32,
        image_size=[96, 96],
        backbone_arguments=dict(embed_dim=128, depth=4, num_heads=2),
    )
    model = create_model("vit_base_patch16_224", **usual | changes).eval()
    model.save_pretrained(tmp_path / "own")
    destination = tmp_path / ("theirs" if to == "transformers" else "theirs.pt")
    if outcome == "refused":
        with pytest.raises(CheckpointError, match=re.escape(words)):
            convert(tmp_path / "own", destination, to=to)
        assert not destination.exists()
    else:
        assert any(words in lost for lost in convert(tmp_path / "own", destination, to=to).lost_settings)


def test_convolutional_networks_save_and_export_their_backbone(tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet18", features=16, image_size=[64, 96]).eval()
    model.save_pretrained(tmp_path / "own")
    opened = load_checkpoint(tmp_path / "own", image_size=(96, 128))
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(opened(image)["inverse_depth"], model(image)["inverse_depth"])
    for to in ("isl-org", "transformers", "mmseg", "depth-anything"):
        with pytest.raises(
            CheckpointError,
            match=f"cannot be written as {to}: it stands on resnet18, which only convolves.*Nothing was written",
        ):
            convert(tmp_path / "own", tmp_path / "theirs.pt", to=to)
    with pytest.raises(CheckpointError, match="mmseg has names for a plain ViT"):
        convert(tmp_path / "own", tmp_path / "theirs.pt", to="mmseg", what="backbone")
    assert not (tmp_path / "theirs.pt").exists()
    convert(tmp_path / "own", tmp_path / "timm.pt", to="timm", what="backbone")
    peer = timm.create_model("resnet18", num_classes=0)
    peer.load_state_dict(torch.load(tmp_path / "timm.pt", weights_only=True))
    assert torch.equal(peer.layer4[1].conv2.weight, model.backbone.network.layer4[1].conv2.weight)
    torch.manual_seed(1)
    other = create_model("resnet18", features=32, image_size=[64, 96])
    load_backbone(other, tmp_path / "own")
    assert all(
        torch.equal(value, model.backbone.state_dict()[name]) for name, value in other.backbone.state_dict().items()
    )


def test_positions_are_resampled_from_224_to_384(classifier_file, tmp_path):
    state = torch.load(classifier_file, weights_only=True)
    expected = resample_abs_pos_embed(state["pos_embed"], [24, 24], interpolation="bilinear", antialias=False)
    model = create_model("vit_tiny_patch16_224", image_size=[384, 384])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    assert load_backbone(model, classifier_file) is model
    torch.testing.assert_close(model.backbone.vit.pos_embed.data, expected)
    assert torch.equal(model.backbone.vit.blocks[11].attn.qkv.weight, state["blocks.11.attn.qkv.weight"])
    assert same(
        before, {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    )
    with pytest.warns(UserWarning, match="backbone alone"):
        larger = load_checkpoint(classifier_file, image_size=(384, 384))
    torch.testing.assert_close(larger.backbone.vit.pos_embed.data, expected)
    convert(classifier_file, tmp_path / "toolbox.pth", to="mmseg")
    third = load_backbone(create_model("vit_tiny_patch16_224", image_size=[384, 384]), tmp_path / "toolbox.pth")
    torch.testing.assert_close(third.backbone.vit.pos_embed.data, expected)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256", "deit3_small_patch16_224"]
)
def test_a_table_of_positions_is_laid_out_as_the_models_own(name, tmp_path):
    "Without a class token, with registers that have no position, with a class token that has none."
    torch.manual_seed(0)
    shape = dict(embed_dim=64, depth=4, num_heads=1)
    peer = timm.create_model(name, img_size=64, **shape)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    for side in (64, 96):
        model = create_model(
            name, taps=[0, 1, 2, 3], features=16, image_size=[side, side], backbone_arguments=shape, readout="ignore"
        )
        load_backbone(model, tmp_path / "peer.pth")
        expected = resample_abs_pos_embed(
            peer.pos_embed.data, [side // 16] * 2, num_prefix_tokens=0, interpolation="bilinear", antialias=False
        )
        torch.testing.assert_close(model.backbone.vit.pos_embed.data, expected)


def test_what_a_plain_vits_file_does_not_say_is_told(classifier_file):
    with pytest.warns(UserWarning, match="for MAE and DINO"):
        load_checkpoint(classifier_file)
    with pytest.warns(UserWarning) as told:
        load_checkpoint(classifier_file, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert not any("MAE" in str(each.message) for each in told)


def test_whole_models_are_resampled_and_all_else_stays(depth_file):
    small, wide = load_checkpoint(depth_file), load_checkpoint(depth_file, image_size=(128, 192))
    expected = resample_abs_pos_embed(
        small.backbone.vit.pos_embed.data, [8, 12], [6, 6], interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(wide.backbone.vit.pos_embed.data, expected)
    others = [
        {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("pos_embed")}
        for model in (small, wide)
    ]
    assert same(*others) and wide.config.image_size == [128, 192]
    image = random_image(128, 192)
    with torch.no_grad():
        torch.testing.assert_close(small(image)["inverse_depth"], wide(image)["inverse_depth"])


def test_load_backbone_takes_a_whole_model(depth_file):
    tensors = torch.load(depth_file, weights_only=True)
    shape = dict(
        taps=[0, 1, 2, 3],
        image_size=[96, 96],
        features=16,
        channels=[8, 16, 32, 64],
        backbone_arguments=dict(embed_dim=128, depth=4, num_heads=2),
    )
    model = create_model("vit_base_patch16_224", heads={"label": dict(num_classes=5)}, **shape)
    load_backbone(model, depth_file)
    assert torch.equal(model.backbone.vit.pos_embed, tensors["pretrained.model.pos_embed"])
    narrow = create_model("vit_tiny_patch16_224", image_size=[96, 96])
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with pytest.raises(CheckpointError, match="depth.pt.*does not fit vit_tiny_patch16_224"):
        load_backbone(narrow, depth_file)
    assert same(before, narrow.state_dict())


def test_heads_are_swapped_only_on_request(label_file):
    tensors = torch.load(label_file, weights_only=True)
    plain = load_checkpoint(label_file)
    asked = load_checkpoint(label_file, heads=dict(plain.config.heads))
    assert same(plain.state_dict(), asked.state_dict()) and torch.equal(
        plain.heads["label"].classify.weight, tensors["scratch.output_conv.4.weight"]
    )
    trunk = {
        name: tensor for name, tensor in plain.state_dict().items() if not name.startswith(("heads.", "auxiliary."))
    }
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        other = load_checkpoint(label_file, heads={"label": dict(num_classes=5), "depth": dict(output="exp")})
        assert same(
            trunk,
            {
                name: tensor
                for name, tensor in other.state_dict().items()
                if not name.startswith(("heads.", "auxiliary."))
            },
        )
        assert (
            other.heads["label"].classify.weight.shape[0] == 5
            and other.auxiliary is None
            and list(other.heads) == ["label", "depth"]
        )
        drawn.append(other.heads["label"].classify.weight)
    assert not torch.equal(*drawn)
    added = load_checkpoint(label_file, heads=plain.config.heads | {"depth": {}})
    assert same(plain.heads["label"].state_dict(), added.heads["label"].state_dict()) and same(
        plain.auxiliary.state_dict(), added.auxiliary.state_dict()
    )


def test_isl_org_export_has_every_name(label_file, tmp_path):
    load_checkpoint(label_file, heads={"label": dict(num_classes=5)}).save_pretrained(
        tmp_path / "own"
    )  # without the auxiliary layer
    convert(tmp_path / "own", tmp_path / "theirs.pt", to="isl-org")
    written = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == isl_org_vit(classes=5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The Hub as a folder: what is sent lands there, what is asked for comes from there, one file at a time."
    shelf = tmp_path / "hub"

    def fetch(name, file, **options):
        if not (shelf / name / file).is_file():
            raise LocalEntryNotFoundError(f"no {file} in {name}")
        (tmp_path / "cache" / name).mkdir(parents=True, exist_ok=True)
        return shutil.copy(shelf / name / file, tmp_path / "cache" / name / file)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path, **options: shutil.copytree(folder_path, shelf / repo_id),
    )
    monkeypatch.setattr("dpt_nb.weights.hub.hf_hub_download", fetch)
    return shelf


@pytest.mark.parametrize(
    "kind, meaning", [("depth_file", "relative: larger is nearer"), ("label_file", "one of 7 classes")]
)
def test_hub_round_trip_and_model_card(kind, meaning, hub, request):
    model = load_checkpoint(request.getfixturevalue(kind))
    model.push_to_hub("someone/rooms")
    folder = hub / "someone" / "rooms"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert next(iter(model.heads)) in card.text and meaning in card.text and "someone/rooms" in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "dpt_nb",
        "image-segmentation" if kind == "label_file" else "depth-estimation",
    )
    assert same(load_checkpoint("someone/rooms").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "place, mean, std, rescaled",
    [
        ("the Hub", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), True),
        (
            "a folder",
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            False,
        ),  # of values to 255, as DINOv2's depth models have them
    ],
    ids=["Hub", "folder"],
)
def test_images_are_normalized_as_the_folder_says(place, mean, std, rescaled, hub, depth_file, tmp_path):
    folder = hub / "someone" / "peer"
    convert(depth_file, folder, to="transformers")
    processor = transformers.DPTImageProcessor(
        do_resize=False, do_rescale=rescaled, image_mean=list(mean), image_std=list(std)
    )
    processor.save_pretrained(folder)
    pixels = (255 * random_image(96, 96)).to(torch.uint8)
    ours, peer = (
        load_checkpoint(folder if place == "a folder" else "someone/peer"),
        transformers.AutoModelForDepthEstimation.from_pretrained(folder),
    )
    with torch.no_grad():
        theirs = peer.eval()(processor(pixels, return_tensors="pt").pixel_values).predicted_depth[:, None]
        torch.testing.assert_close(ours(pixels / 255)["inverse_depth"], theirs, rtol=1e-3, atol=1e-4)


def test_missing_hub_id_has_a_clear_error(hub):
    with pytest.raises(CheckpointError, match="someone/nothing is not a file or folder here, and the Hub did not"):
        load_checkpoint("someone/nothing")


def named_after(name, folder, names):
    torch.save(random_tensors(names), folder / name)
    return folder / name


WRITTEN = {  # names, file, class of transformers, size
    "DPT": (isl_org_vit(), "a.pt", "AutoModelForDepthEstimation", (96, 96)),
    "DPT-Hybrid": (isl_org_hybrid(), "a.pt", "AutoModelForDepthEstimation", (96, 96)),
    "DPT on BEiT": (midas_beit(), "a.pt", "AutoModelForDepthEstimation", (96, 160)),
    "DPT on Swin V2": (midas_swin(second=True), "a.pt", "AutoModelForDepthEstimation", (64, 96)),
    "DPT, segmentation": (isl_org_vit(classes=7), "a.pt", "DPTForSemanticSegmentation", (96, 96)),
    "DPT-Hybrid, segmentation": (isl_org_hybrid(classes=7), "a.pt", "DPTForSemanticSegmentation", (96, 96)),
    "Depth Anything": (
        depth_anything(dim=64, depth=12),
        "depth_anything_vits14.pth",
        "AutoModelForDepthEstimation",
        (70, 70),
    ),
    "Depth Anything V2 metric": (
        depth_anything(dim=64, depth=12),
        "depth_anything_v2_metric_vkitti_vits.pth",
        "AutoModelForDepthEstimation",
        (70, 70),
    ),
}


@quiet
@pytest.mark.parametrize("kind", some_slow(WRITTEN, "DPT on Swin V2", "DPT-Hybrid, segmentation", "Depth Anything"))
def test_transformers_opens_exported_folders(kind, tmp_path):
    names, file, opener, size = WRITTEN[kind]
    source = named_after(file, tmp_path, names)
    convert(source, tmp_path / "hf", to="transformers")
    peer, info = getattr(transformers, opener).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    ours, image = load_checkpoint(source), random_image(*size)
    with torch.no_grad():
        output, mine = peer.eval()((image - ours.mean) / ours.std), next(iter(ours(image).values()))
    theirs = output.logits if "segmentation" in kind else output.predicted_depth[:, None]
    assert theirs.std() > 0 and (theirs - mine).abs().max() <= 1e-4 * theirs.abs().max()
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == (ours.config.mean, ours.config.std)


def test_files_need_no_suffix(depth_file, tmp_path):
    convert(depth_file, tmp_path / "weights", to="timm")
    assert len(torch.load(tmp_path / "weights", weights_only=True)) == 54 and [
        path.name for path in tmp_path.iterdir()
    ] == ["weights"]


def test_variants_are_told_apart_by_name_or_option_and_otherwise_warned_about(tmp_path, capsys):
    hybrid = named_after("mine.pt", tmp_path, isl_org_hybrid(dim=64, depth=12))
    with pytest.warns(UserWarning, match="mine.pt.*dpt_hybrid_kitti.*dpt_hybrid_nyu"):
        assert open_checkpoint(hybrid).config.heads == {"inverse_depth": {}}
    anything = named_after("also mine.pt", tmp_path, depth_anything(dim=64, depth=12))
    with pytest.warns(UserWarning, match="also mine.pt.*depth_anything_small.*depth_anything_v2_indoor_small"):
        assert open_checkpoint(anything).config.taps == [2, 5, 8, 11]
    kitti = {"depth": dict(output="invert", scale=0.00006016, shift=0.00579)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path, variant, expected in [
            (hybrid, "dpt_hybrid", {"inverse_depth": {}}),
            (hybrid, "dpt_hybrid_nyu", {"depth": dict(output="invert", scale=0.000305, shift=0.1378)}),
            (shutil.copy(hybrid, tmp_path / "dpt_hybrid_kitti-cb926ef4.pt"), None, kitti),
            (
                shutil.copy(anything, tmp_path / "depth_anything_v2_metric_hypersim_vits.pth"),
                None,
                {"depth": dict(output="sigmoid", max_depth=20.0)},
            ),
        ]:
            assert open_checkpoint(path, variant=variant).config.heads == expected
        assert open_checkpoint(anything, variant="depth_anything_small").config.taps == [8, 9, 10, 11]
    assert (
        main(["dpt_convert", str(hybrid), str(tmp_path / "own"), "--variant", "dpt_hybrid_kitti"]) == 0
        and not capsys.readouterr().err
    )
    assert open_checkpoint(tmp_path / "own").config.heads == kitti


def test_published_file_names_lead_to_their_models(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dpt_nb.weights.hub.fetch",
        lambda url, path, checksum: (
            asked.append(url),
            path.parent.mkdir(parents=True),
            torch.save({"x": torch.ones(1)}, path),
        ),
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    unpublished = {"dpt_tiny", "dpt_tiny_scenes", "dpt_base", "resnet_tiny"}
    unpublished |= {name for name, entry in PUBLISHED.items() if "://" not in entry.weights}  # folders of the Hub
    for name in set(list_models()) - unpublished:
        with pytest.raises(CheckpointError, match="no project known"):
            load_checkpoint(name)
    assert len(asked) == len(set(asked)) == len(list_models()) - len(unpublished) and all(
        address.startswith("https://") for address in asked
    )


def test_a_model_with_the_names_of_0_1_0_opens_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = create_model("dpt_tiny").eval()
    model.save_pretrained(tmp_path)
    former = {".project.": ".reduce.", ".to_features.": ".widen.", ".out_conv.": ".mix."}
    state, renamed = load_file(tmp_path / "model.safetensors"), 0
    for key in list(state):
        part = re.fullmatch(r"(reassemble|decoder\.steps)\.\d+(\.\w+\.)\w+", key)
        if part and part[2] in former:
            state[key.replace(part[2], former[part[2]])] = state.pop(key)
            renamed += 1
    assert renamed == 16  # two levels are made of tokens: two times weight and bias, four weights; four steps: 8
    save_file(state, tmp_path / "model.safetensors")
    image = torch.rand(1, 3, *model.config.image_size)
    for opened in (DPT.from_pretrained(tmp_path), load_checkpoint(tmp_path)):
        assert torch.equal(opened(image)["inverse_depth"], model(image)["inverse_depth"])
