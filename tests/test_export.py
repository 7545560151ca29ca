"""Exported files of every family of the zoo against their models, at sizes that stay open where they can; networks of
full size; and what is refused."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import command, command_here

from dpt_nb.deploy.engines import check_export, open_export, sizes_to_check
from dpt_nb.deploy.export import ExportError, export, export_facts, fold_constants
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.heads import HEADS
from dpt_nb.network.zoo import create_model
from dpt_nb.registry import import_one

TOLERANCE = 1e-3  # of the range of the model's output; rounding in float32 leaves some 1e-6
SWIN = dict(
    taps=[f"layers.{index}" for index in range(4)],
    channels=[32, 64, 128, 256],
    image_size=[128, 128],
    backbone_arguments=dict(embed_dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
)
HYBRID = dict(
    taps=["stages.0", "stages.1", 0, 1],
    backbone_arguments=dict(
        depth=2, embed_dim=64, num_heads=2, resnet=dict(layers=[1, 1, 1], channels=[16, 32, 64], groups=8)
    ),
)
DINOV2 = dict(image_size=[70, 70])
FAMILIES = {
    "DPT": ("dpt_large", {}),
    "DPT-Hybrid": ("dpt_hybrid", HYBRID),
    "DPT-Hybrid, metres": ("dpt_hybrid", HYBRID | dict(heads={"depth": dict(output="invert", scale=0.3, shift=0.1)})),
    "DPT, labels and auxiliary": ("dpt_large_ade20k", {}),
    "BEiT": ("dpt_beit_large_384", {}),
    "Swin": ("dpt_swin_large_384", SWIN),
    "Swin V2": ("dpt_swin2_tiny_256", SWIN),
    "Depth Anything": ("depth_anything_v2_small", DINOV2),  # so small, 1 and 2 are the same network
    "Depth Anything 2, metres": ("depth_anything_v2_indoor_small", DINOV2),
}


@torch.no_grad()
def awake(network):
    "Weights such that places matter and the output varies: untrained depth heads mostly end at ReLU's 0."
    for name, parameter in network.named_parameters():
        if "pos_embed" in name or "position_bias_table" in name:
            parameter.normal_(0, 0.5)
    head, said = next(iter(network.heads.values())), []
    last = head.classify if hasattr(head, "classify") else head.convolution3
    hook = last.register_forward_hook(lambda module, inputs, output: said.append(output))
    network.eval()(torch.rand(2, 3, *network.config.image_size))
    hook.remove()
    last.weight.div_(said[0].std())
    last.bias.sub_(said[0].mean()).div_(said[0].std()).add_(1)
    return network


def small(family):
    torch.manual_seed(0)
    name, changes = FAMILIES[family]
    shape = dict(
        taps=[0, 1, 2, 3],
        channels=[16, 32, 48, 64],
        image_size=[96, 96],
        backbone_arguments=dict(depth=4, embed_dim=64, num_heads=2),
    )
    return awake(create_model(name, features=16, **shape | changes))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Family → a small network, its file, and whether the network is as it was before: each is written once."
    folder = tmp_path_factory.mktemp("files")

    @cache
    def written(family):
        model = small(family).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path = export(model, folder / f"{family}.onnx", sizes=tuple(model.config.image_size))
        same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        return model, path, same and model.training and all(each.requires_grad for each in model.parameters())

    return written


def check(model, path, parity_rows, name, **options):
    rows = check_export(model, path, **options)
    for row in rows:
        parity_rows.append((f"ONNX Runtime: {name}, batch {row.batch}", row.size, row.difference, None))
    assert rows.worst <= TOLERANCE
    return rows


# One whose taps are normed; the others take longer.
QUICK = ("Depth Anything",)


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_every_family_is_what_onnx_runtime_computes(family, files, parity_rows):
    model, path, _ = files(family)
    rows, size = check(model, path, parity_rows, family), tuple(model.config.image_size)
    assert {(row.size, row.batch) for row in rows} == {(size, 1), (size, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if "Swin" not in family])
def test_sizes_stay_open(family, tmp_path, parity_rows):
    model = small(family)
    rows = check(model, export(model, tmp_path / "model.onnx"), parity_rows, f"{family}, any size")
    native = tuple(model.config.input_size or model.config.image_size)
    assert len(rows) == 8 and native in {row.size for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Swin", "Swin V2"])
def test_windows_are_for_one_size_at_a_time(family, tmp_path, parity_rows):
    model = small(family)
    with pytest.raises(ExportError, match="is worked out for one size. Give sizes="):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    check(model, export(model, tmp_path / "wide.onnx", sizes=(96, 224)), parity_rows, f"{family}, wide")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["DPT-Hybrid", "Depth Anything"])
def test_the_traced_program_takes_any_size(family, tmp_path):
    model = small(family)
    rows = check_export(model, export(model, tmp_path / "model.pt2", "torch_export"))
    assert rows.worst <= 1e-4 and len(rows) == 8


def test_hybrids_with_folded_constants_give_the_same_numbers(tmp_path):
    for changes in ({}, dict(standardised_eps=None)):
        name, shape = FAMILIES["DPT-Hybrid"]
        torch.manual_seed(0)
        model = awake(
            create_model(name, features=16, channels=[16, 32, 48, 64], image_size=[96, 96], **shape | changes)
        )
        image = torch.rand(2, 3, 96, 160)
        with torch.no_grad():
            expected, found = model(image)["inverse_depth"], fold_constants(model)(image)["inverse_depth"]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() and expected.std() > 0.1


@pytest.mark.slow
def test_a_changed_weight_in_the_file_is_noticed(files, tmp_path):
    model, path, _ = files("DPT")
    file, path = onnx.load(path), tmp_path / "model.onnx"
    bias = next(tensor for tensor in file.graph.initializer if tensor.name.endswith("convolution3.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    onnx.save(file, path)
    assert check_export(model, path, batches=(1,)).worst > TOLERANCE


def test_the_file_says_what_to_feed(tmp_path):
    model = small("DPT, labels and auxiliary")
    path = export(model, tmp_path / "model.onnx", sizes=(64, 96), batch=2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (facts["multiple"], facts["sizes"], facts["batch"], facts["heads"]["label"]["classes"]) == (
        16,
        [64, 96],
        2,
        150,
    )
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("image", [2, 3, 64, 96])]
    assert [(each.name, each.shape) for each in session.get_outputs()] == [("label", [2, 150, 64, 96])]
    assert sizes_to_check(facts) == [(64, 96)]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_a_shell_writes_a_file_that_onnx_runtime_runs(tmp_path):
    done = command("dpt_export", "dpt_tiny_scenes", "depth.onnx", "--size", "64x96", folder=tmp_path, check=0)
    assert "| depth.onnx | depth | 64×96 | 3 |" in done.stdout
    image = torch.rand(2, 3, 64, 96)
    (found,) = onnxruntime.InferenceSession(tmp_path / "depth.onnx", providers=["CPUExecutionProvider"]).run(
        ["depth"], {"image": image.numpy()}
    )
    with torch.no_grad():
        expected = create_model("dpt_tiny_scenes", pretrained=True).eval()(image)["depth"]
    assert (torch.from_numpy(found) - expected).abs().max() <= TOLERANCE * (expected.max() - expected.min())
    kept = command_here("dpt_export", "dpt_tiny_scenes", "depth.onnx", folder=tmp_path, check=1)
    assert "depth.onnx exists and was left as it is" in kept.stderr and [path.name for path in tmp_path.iterdir()] == [
        "depth.onnx"
    ]


def test_the_model_is_left_as_it_was(files):
    assert files("DPT")[2], "weights, training mode or gradients are others"


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(ExportError, match="model.pt2 could not be written .No space left on device.: make room"):
        export(small("DPT"), tmp_path / "model.pt2", "torch_export", sizes=(96, 96))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_compiled_form_runs_where_this_library_is_not(tmp_path):
    model = small("Depth Anything")
    path = export(model, tmp_path / "model.pt2", "compiled", sizes=(70, 98))
    assert check_export(model, path).worst <= TOLERANCE
    alone = f"""
import sys
sys.modules["dpt_nb"] = sys.modules["timm"] = None
import torch
print(tuple(torch._inductor.aoti_load_package({str(path)!r})(torch.rand(1, 3, 70, 98))["inverse_depth"].shape))
"""
    done = subprocess.run([sys.executable, "-I", "-c", alone], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 1, 70, 98)", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("dpt_base", (384, 384)), ("depth_anything_v2_small", (518, 518))])
def test_networks_of_full_size(name, size, tmp_path, parity_rows):
    torch.manual_seed(0)
    model = awake(create_model(name))
    check(model, export(model, tmp_path / "model.onnx", sizes=size), parity_rows, f"{name}, full size", batches=(1,))


@pytest.mark.slow  # the lesson on engines compares them too
def test_the_shipped_weights(tmp_path, parity_rows):
    model = create_model("dpt_tiny_scenes", pretrained=True)
    path = export(model, tmp_path / "scenes.onnx", sizes=(96, 128))
    check(model, path, parity_rows, "dpt_tiny_scenes")
    assert set(open_export(path)(torch.rand(1, 3, 96, 128))) == {"depth", "label"}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A module outside the library with two heads of its own: a height, and parts of things."
    (tmp_path / "outside_heads.py").write_text(
        "import torch\n"
        "from dpt_nb.network.heads import DepthHead, SegmentationHead, register_head\n"
        "@register_head('Height2', words='height (m)', unit='metre', missing=-1)\n"
        "class Height(DepthHead):\n"
        "    def forward(self, fused, size):\n"
        "        return torch.tanh(self.raw(fused, size))\n"
        "@register_head('part', words='part', channels=0, missing=0)\n"
        "class Parts(SegmentationHead):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield import_one("outside_heads")
    for name in ("Height2", "part"):
        HEADS.pop(name), HEADS.homes.pop(name)
    sys.modules.pop("outside_heads")


@pytest.mark.slow
@pytest.mark.parametrize("form, ending", [("onnx", ".onnx"), ("torch_export", ".pt2")])
def test_every_kind_of_prediction_is_exported(form, ending, outside, tmp_path):
    torch.manual_seed(0)
    heads = dict(depth=dict(form="bins", bins=8, max_depth=2.0), confidence={}, entropy={})
    heads |= dict(label=dict(num_classes=5), normal=dict(hidden=16), Height2={}, part=dict(num_classes=3))
    model = create_model("dpt_tiny", heads=heads).eval()
    path = export(model, tmp_path / f"model{ending}", form, sizes=(96, 128))
    assert check_export(model, path, batches=(2,)).worst <= 1e-4
    facts = export_facts(path)["heads"]
    others = dict(label="B,5,H,W", normal="B,3,H,W", part="B,3,H,W")
    assert {name: fact["shape"] for name, fact in facts.items()} == dict.fromkeys(heads, "B,1,H,W") | others
    assert {name: fact.get("module") for name, fact in facts.items()} == dict.fromkeys(heads) | dict.fromkeys(
        ("Height2", "part"), "outside_heads"
    )
    assert facts["normal"]["unit"].startswith("unit vector") and facts["part"]["classes"] == 3
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    found, predicted = open_export(path)(image[None]), Predictor(model, "cpu").predict(image[None])
    for head, wanted in predicted.items():
        torch.testing.assert_close(found[head], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["normal"].norm(dim=1), torch.ones(1, 96, 128))


@pytest.mark.slow
def test_a_file_with_a_head_from_outside_runs_where_it_is_unknown(outside, tmp_path):
    model = create_model("dpt_tiny", heads=dict(Height2={})).eval()
    path = export(model, tmp_path / "model.onnx", sizes=(96, 128))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch\nfrom dpt_nb.deploy.engines import open_export\n"
            "print(*open_export(sys.argv[1])(torch.rand(1, 3, 96, 128))['Height2'].shape)",
            path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "1", "96", "128"], done.stderr
