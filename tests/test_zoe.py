"""ZoeDepth: opened from transformers' folders and from the original's files, against transformers' class at random
weights, used, trained, exported and written back."""

import json
import re

import pytest
import torch
import transformers
from conftest import SHORT, folder_of, gradients_under_our_names, image_of
from safetensors.torch import load_file
from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessor

from dpt_nb.deploy.engines import check_export
from dpt_nb.deploy.export import export
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.config import ConfigError
from dpt_nb.network.dpt import empty_model
from dpt_nb.network.head_spec import HeadError
from dpt_nb.network.named import named_config
from dpt_nb.network.zoo import create_model
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.infer_config import infer_config, transformers_fields
from dpt_nb.weights.load import load_checkpoint
from dpt_nb.weights.read import CheckpointError, CheckpointWarning
from dpt_nb.weights.write import convert

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-5  # of the range
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2)
DECODER = dict(neck_hidden_sizes=[16, 24, 32, 40], fusion_hidden_size=16, bottleneck_features=16)
ROUTER = dict(
    num_patch_transformer_layers=4,
    patch_transformer_hidden_size=128,
    patch_transformer_intermediate_size=32,
    patch_transformer_num_attention_heads=4,
)
ROADS = dict(n_bins=24, min_depth=0.001, max_depth=80.0)
KINDS = {
    "one domain": dict(bin_configurations=[dict(n_bins=24, min_depth=0.001, max_depth=10.0)]),
    "bounded, one domain": dict(bin_configurations=[ROADS], bin_centers_type="normed", attractor_kind="sum"),
    "rooms and roads": dict(
        bin_configurations=[
            dict(name="nyu", n_bins=24, min_depth=0.001, max_depth=10.0),
            dict(name="kitti", **ROADS),
        ],
        **ROUTER,
    ),
    "bounded, rooms and roads": dict(
        bin_configurations=[dict(name="nyu", **ROADS), dict(name="kitti", **ROADS | dict(max_depth=200.0))],
        bin_centers_type="normed",
        **ROUTER,
    ),
}


@torch.no_grad()
def zoe_peer(kind, way=None, **changes):
    "Of random weights, none at 0 or 1; with `way` its router sends everything there."
    backbone = BeitConfig(
        **TINY,
        image_size=96,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    shape = dict(bin_embedding_dim=24, num_relative_features=8, num_attractors=[4, 3, 2, 1], **DECODER)
    torch.manual_seed(0)
    peer = ZoeDepthForDepthEstimation(ZoeDepthConfig(backbone_config=backbone, **shape | KINDS[kind] | changes))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peer.named_parameters():
        amount = 0.5 if "cls_token" in name or "bias_table" in name else 0.15
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    if way is not None:
        peer.metric_head.mlp_classifier.linear2.bias.copy_(100.0 * torch.eye(2)[way])
    return peer.eval()


def smallest_cosine(ours, expected):
    "Over all parameters that learn and that the peer's answer depends on."
    cosines = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and expected[name].abs().max() > 0:
            found = parameter.grad.flatten()
            cosines[name] = torch.cosine_similarity(found, expected[name].flatten(), dim=0).item()
        elif parameter.requires_grad:  # of the domain that no image belongs to
            assert ".domains." in name and not parameter.grad.any()
    assert sum(".domains." in name for name in cosines) >= 6 and min(cosines.values()) >= 0.9999
    return min(cosines.values())


@pytest.mark.parametrize("kind, way", [("one domain", None), ("bounded, one domain", None), ("rooms and roads", 0)])
def test_the_numbers_and_gradients_of_transformers(kind, way, tmp_path, parity_rows):
    compare(kind, way, tmp_path, parity_rows, [(96, 96), (64, 128)])


@pytest.mark.parametrize("kind, way", [("rooms and roads", 1), ("bounded, rooms and roads", 1)])
def test_the_other_domain_is_as_transformers_has_it(kind, way, tmp_path, parity_rows):
    compare(kind, way, tmp_path, parity_rows, [(96, 64)])


def compare(kind, way, folder, parity_rows, sizes):
    peer = zoe_peer(kind, way)
    ours = load_checkpoint(folder_of(peer, folder / "peer"))
    assert ours.config.heads["depth"]["form"] == "zoe"
    for size in sizes:
        image = image_of(*size)
        theirs = peer((image - ours.mean) / ours.std).predicted_depth[:, None]
        mine = ours(image)["depth"]
        spread = theirs.max() - theirs.min()
        assert spread > 0.2
        found, cosine = ((mine - theirs).abs().max() / spread).item(), None
        if size == sizes[0]:
            weight = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
            (theirs * weight).sum().backward(), (mine * weight).sum().backward()
            cosine = smallest_cosine(ours, gradients_under_our_names(peer, folder))
        parity_rows.append((f"transformers: ZoeDepth, {kind}{'' if way is None else f', {way}'}", size, found, cosine))
        assert found <= TOLERANCE, f"{size}: {found:.1e}"


def test_each_image_goes_its_own_way(tmp_path):
    "transformers sends a batch one way, by the sum of its scores; each image alone goes where we send it in a batch."
    peer = zoe_peer("rooms and roads")
    images = image_of(64, 64, batch=6)
    with torch.no_grad():
        scores = torch.cat([peer(image[None] * 2 - 1).domain_logits for image in images])
        middle = (scores[:, 0] - scores[:, 1]).sort().values[2:4].mean()
        peer.metric_head.mlp_classifier.linear2.bias[1] += middle
        alone = [peer(image[None] * 2 - 1) for image in images]
        ways = torch.cat([each.domain_logits.argmax(1) for each in alone])
        assert ways.sum() == 3
        ours = load_checkpoint(folder_of(peer, tmp_path / "peer"))
        wanted = torch.cat([each.predicted_depth for each in alone])[:, None]
        assert (ours(images)["depth"] - wanted).abs().max() <= TOLERANCE * (wanted.max() - wanted.min())


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_transformers_bit_for_bit(kind, tmp_path):
    peer = zoe_peer(kind)
    folder_of(peer, tmp_path / "peer")
    ZoeDepthImageProcessor(ensure_multiple_of=32).save_pretrained(tmp_path / "peer")
    report = convert(tmp_path / "peer", tmp_path / "back", to="transformers")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("peer", "back"))
    assert not report.lost_settings and before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(report.filled)
    assert all("layers.0.residual_layer1" in name for name in report.filled)
    again, image = ZoeDepthForDepthEstimation.from_pretrained(tmp_path / "back").eval(), image_of(96, 64)
    with torch.no_grad():
        assert torch.equal(again(image).predicted_depth, peer(image).predicted_depth)
    was, became = (json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("peer", "back"))
    assert {name: was[name] for name in became if name != "rescale_factor"} == {
        name: value for name, value in became.items() if name != "rescale_factor"
    }


def test_the_published_folders_are_the_named_ones():
    "Configs as the published folders have them: the class's defaults, the sizes of a BEiT-L, and these bins."
    bins = lambda name, high: dict(name=name, n_bins=64, min_depth=0.001, max_depth=high)
    router = ROUTER | dict(patch_transformer_intermediate_size=1024)
    published = {
        "zoedepth_nyu": dict(bin_configurations=[bins("nyu", 10.0)]),
        "zoedepth_kitti": dict(bin_configurations=[bins("kitti", 80.0)], bin_centers_type="normed"),
        "zoedepth_nyu_kitti": dict(bin_configurations=[bins("nyu", 10.0), bins("kitti", 80.0)], **router),
    }
    processor = json.loads(ZoeDepthImageProcessor(ensure_multiple_of=32).to_json_string())
    for name, said in published.items():
        with torch.device("meta"):
            peer = ZoeDepthForDepthEstimation(ZoeDepthConfig(neck_hidden_sizes=[256, 512, 1024, 1024], **said))
        ours = empty_model(named_config(name)).state_dict()
        unused = [value for key, value in peer.state_dict().items() if "fusion_stage.layers.0.residual_layer1" in key]
        counts = [sum(each.numel() for each in values) for values in (peer.parameters(), unused, ours.values())]
        assert counts[0] - counts[1] == counts[2]
        config, inferred = json.loads(peer.config.to_json_string(use_diff=False)), infer_config(ours)
        found, named = inferred | transformers_fields(config, inferred, processor), vars(named_config(name))
        other = {each for each in found if found[each] != named[each]}
        assert other <= {"fusion_doubles", "layer_norm_eps", "pos_embed_mode"}, other


def test_the_published_kitti_folder_is_opened_as_it_says_with_a_warning(tmp_path):
    peer = zoe_peer("bounded, one domain")
    peer.config.bin_configurations = [dict(name="nyu", n_bins=24, min_depth=0.001, max_depth=10.0)]
    folder_of(peer, tmp_path / "peer")
    with pytest.warns(CheckpointWarning, match="its depths are an eighth of metres"):
        ours = load_checkpoint(tmp_path / "peer")
    assert ours.config.heads["depth"]["max_depth"] == 10.0
    with pytest.warns(CheckpointWarning):
        metres = load_checkpoint(tmp_path / "peer", heads={"depth": ours.config.heads["depth"] | dict(max_depth=80.0)})
    image = image_of(64, 64)
    with torch.no_grad():
        ratio = (metres(image)["depth"] - 0.001) / (ours(image)["depth"] - 0.001)
    assert torch.allclose(ratio, torch.full_like(ratio, 79.999 / 9.999), rtol=1e-4)


def its_own_names(state):
    "A folder's names as isl-org/ZoeDepth has them, put down from its code; as its files wrap them."
    named = {}
    for name, tensor in state.items():
        if ".query." in name or re.search(r"\.(key|value)\.", name):
            if ".query." not in name:
                continue
            kind = name.split(".")[-1]
            parts = [state.get(name.replace("query", part)) for part in ("query", "key", "value")]
            if "self_attn" in name:
                ours = re.sub(
                    r"metric_head\.(.*encoder)\.(\d)\.self_attn\..*", r"\1.layers.\2.self_attn.in_proj_", name
                )
                named[ours + kind] = torch.cat(parts)
                continue
            block = re.sub(r".*layer\.(\d)\..*", r"core.core.pretrained.model.blocks.\1.attn.", name)
            if kind == "weight":
                named[f"{block}qkv.weight"] = torch.cat(parts)
            else:
                named |= {f"{block}q_bias": parts[0], f"{block}v_bias": parts[2]}
            continue
        for pattern, words in OWN_WORDS:
            name = re.sub(pattern, words, name)
        named[name] = tensor
    weights = [name for name in named if name.endswith("mlp.0.weight") and "log_binomial" in name]
    tables = {
        name.replace("mlp.0.weight", "log_binomial_transform.k_idx"): torch.arange(24).reshape(1, -1, 1, 1)
        for name in weights
    }
    return dict(model={f"module.{name}": tensor for name, tensor in (named | tables).items()})


CORE = "core.core."
OWN_WORDS = [
    (r"^backbone\.encoder\.layer", f"{CORE}pretrained.model.blocks"),
    (r"^backbone\.embeddings\.patch_embeddings\.projection", f"{CORE}pretrained.model.patch_embed.proj"),
    (r"^backbone\.embeddings\.cls_token", f"{CORE}pretrained.model.cls_token"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"lambda_(\d)", r"gamma_\1"),
    (r"attention\.attention\.relative_position_bias\.", "attn."),
    (r"neck\.convs\.(\d)", lambda found: f"{CORE}scratch.layer{int(found[1]) + 1}_rn"),
    (r"neck\.fusion_stage\.layers\.(\d)", lambda found: f"{CORE}scratch.refinenet{4 - int(found[1])}"),
    (r"residual_layer(\d)\.convolution(\d)", r"resConfUnit\1.conv\2"),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (
        r"neck\.reassemble_stage\.readout_projects\.(\d)",
        lambda found: f"{CORE}pretrained.act_postprocess{int(found[1]) + 1}.0.project",
    ),
    (
        r"neck\.reassemble_stage\.layers\.(\d)\.(projection|resize)",
        lambda found: f"{CORE}pretrained.act_postprocess{int(found[1]) + 1}.{dict(projection=3, resize=4)[found[2]]}",
    ),
    (r"relative_head\.conv(\d)", lambda found: f"{CORE}scratch.output_conv.{2 * int(found[1]) - 2}"),
    (
        r"^metric_head\.(.*)\.conv(\d)\.(weight|bias)",
        lambda found: f"{found[1]}._net.{2 * int(found[2]) - 2}.{found[3]}",
    ),
    (r"^metric_head\.", ""),
    (r"(patch_transformer\.transformer_encoder)\.(\d)", r"\1.layers.\2"),
    (r"mlp_classifier\.linear(\d)", lambda found: f"mlp_classifier.{2 * int(found[1]) - 2}"),
]


@pytest.mark.parametrize("kind", ["one domain", "bounded, one domain", "rooms and roads"])
def test_the_originals_file_opens_and_goes_to_transformers(kind, tmp_path):
    state = load_file(folder_of(zoe_peer(kind), tmp_path / "peer") / "model.safetensors")
    torch.save(its_own_names(state), tmp_path / "zoe.pt")
    own, folder = load_checkpoint(tmp_path / "zoe.pt"), load_checkpoint(tmp_path / "peer")
    assert (own.config.input_size, own.config.resizing, own.config.mean) == ([384, 512], "zoedepth", [0.5] * 3)
    head = own.config.heads["depth"]
    assert head["bounded"] == kind.startswith("bounded") and head["bins"] == 24
    assert head.get("max_depth", 80.0) == (10.0 if kind == "one domain" else 80.0)
    assert own.state_dict().keys() == folder.state_dict().keys()
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in folder.state_dict().items())
    convert(tmp_path / "zoe.pt", tmp_path / "back", to="transformers")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], state[name]) for name in state if "layers.0.residual_layer1" not in name)


class Core(torch.nn.Module):
    "Instead of MiDaS: what our own network computes before the metric bins."

    def __init__(self, network):
        super().__init__()
        self.network, self.output_channels = [network], [network.config.features] * 5

    def forward(self, image, **_):
        (network,) = self.network
        features, size = network.forward_features(image), tuple(image.shape[-2:])
        maps = [features["levels"][-1], *features["fused"]]
        head = network.heads["depth"]
        inner = super(type(head), head).inner(maps, size)
        return torch.relu(inner["raw"][:, 0]), [inner["hidden"], *maps]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_the_originals_code(kind, tmp_path, parity_rows):
    one = pytest.importorskip(
        "zoedepth.models.zoedepth.zoedepth_v1", reason="ZoeDepth is on no index: put its repository on PYTHONPATH"
    )
    several = pytest.importorskip("zoedepth.models.zoedepth_nk.zoedepth_nk_v1")
    said = KINDS[kind]
    is_router = "patch_transformer_hidden_size" in said
    fixed = dict(bin_embedding_dim=128, num_relative_features=32)  # in its code, and in every published model
    fixed |= dict(patch_transformer_intermediate_size=1024) if is_router else {}
    folder = folder_of(zoe_peer(kind, 1 if is_router else None, **fixed), tmp_path / "peer")
    ours, state = load_checkpoint(folder), its_own_names(load_file(folder / "model.safetensors"))["model"]
    common = dict(n_attractors=[4, 3, 2, 1], attractor_type="inv", min_temp=0.0212, max_temp=50.0)
    common |= dict(attractor_kind=said.get("attractor_kind", "mean"), bin_embedding_dim=128)
    common |= dict(bin_centers_type=said.get("bin_centers_type", "softplus"))
    if is_router:
        domains = [ByName(each) for each in said["bin_configurations"]]
        peer = several.ZoeDepthNK(Core(ours), domains, memory_efficient=True, **common)
    else:
        peer = one.ZoeDepth(Core(ours), **said["bin_configurations"][0], **common)
    metric = {key.removeprefix("module."): value for key, value in state.items() if "core.core." not in key}
    lacking = peer.load_state_dict(metric, strict=False)
    assert not lacking.unexpected_keys and all("log_binomial_transform" in key for key in lacking.missing_keys)
    image = image_of(64, 96)
    with torch.no_grad():
        wanted, found = peer.eval()(image)["metric_depth"], ours(image)["depth"]
    difference = ((found - wanted).abs().max() / (wanted.max() - wanted.min())).item()
    parity_rows.append((f"isl-org/ZoeDepth's bins, {kind}", (64, 96), difference, None))
    assert difference <= TOLERANCE


class ByName(dict):
    "A dict whose entries are attributes too, as its configs are."

    __getattr__ = dict.get


def test_other_formats_refuse_in_a_sentence(tmp_path):
    folder_of(zoe_peer("one domain"), tmp_path / "peer")
    for to in ("isl-org", "depth-anything", "mmseg"):
        with pytest.raises(CheckpointError, match=f"it predicts depth by zoe, and {to} knows depth and classes"):
            convert(tmp_path / "peer", tmp_path / "other.pth", to=to)
    config = json.loads((tmp_path / "peer" / "config.json").read_text())
    for name, value, words in [
        ("num_attractors", [1, 2], "four whole numbers from 1 to 256"),
        ("bin_configurations", [dict(n_bins=24)], "a list of bins, one a domain"),
        ("bin_centers_type", "hybrid1", "one of 'softplus', 'normed'"),
    ]:
        (tmp_path / "peer" / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "peer")
    with pytest.raises((ConfigError, HeadError), match="min_depth has to be below max_depth"):
        create_model("dpt_tiny", heads={"depth": dict(form="zoe", min_depth=20.0)})
    other = create_model("dpt_tiny", heads={"depth": dict(form="zoe", embedding=16)})
    other.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="cannot be written as transformers: it predicts depth by zoe"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="transformers")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A folder of this library for one domain, and for two."
    home = tmp_path_factory.mktemp("zoe")
    for kind in ("bounded, one domain", "rooms and roads"):
        ours = load_checkpoint(folder_of(zoe_peer(kind), home / "peer" / kind[:4]))
        ours.save_pretrained(home / kind[:4])
    return home


def test_predicted_whole_in_tiles_and_in_batches(opened):
    predictor = Predictor(load_checkpoint(opened / "room"), device="cpu", size=(96, 96))
    image = (render(random_scene("rooms", 5, (100, 140)))["image"] * 255).byte()
    whole = predictor(image)["depth"]
    assert whole.shape == (1, 100, 140) and (whole > 0).all()
    tiled = predictor.predict_tiled(image, window=(96, 96), progress=False)["depth"]
    assert tiled.shape == whole.shape and tiled.isfinite().all()


def test_the_predictor_gives_what_transformers_gives_without_padding(tmp_path):
    peer = zoe_peer("one domain")
    folder_of(peer, tmp_path / "peer")
    processor = ZoeDepthImageProcessor(ensure_multiple_of=32, do_pad=False, size=dict(height=96, width=128))
    processor.save_pretrained(tmp_path / "peer")
    predictor = Predictor(load_checkpoint(tmp_path / "peer"), device="cpu")
    image = (image_of(100, 150, batch=1)[0] * 255).byte()
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = peer(**inputs)
    wanted = processor.post_process_depth_estimation(outputs, source_sizes=[(100, 150)])[0]["predicted_depth"]
    found = predictor(image)["depth"][0]
    assert inputs["pixel_values"].shape[-2:] == (96, 128)
    assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@pytest.mark.parametrize("kind", ["boun", "room"])
def test_exported_for_any_size(kind, form, opened, tmp_path):
    model = load_checkpoint(opened / kind)
    path = export(model, tmp_path / dict(onnx="m.onnx", torch_export="m.pt2")[form], form=form, sizes="any")
    assert check_export(model, path, sizes=[(96, 96), (64, 128)], batches=(1, 2)).worst <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["boun", "room"])
def test_three_steps_of_training(kind, opened, tmp_path):
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [*SHORT, f"model.weights={opened / kind}", "model.changes={}", "loop.steps=3", "data.batch_size=2"],
    )
    start = load_checkpoint(opened / kind)
    train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    trained = load_checkpoint(tmp_path / "run" / "model")
    assert trained.config.heads == start.config.heads
    before, after = start.state_dict(), trained.state_dict()
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    kept = {name for name in after if name.startswith(("heads.depth.router.", "heads.depth.convolution3."))}
    assert {name for name in still if ".domains." not in name} == (kept if kind == "room" else set())
    moved = {name.split(".")[3] for name in after.keys() - still if ".domains." in name}
    assert moved and moved <= {"all", "nyu", "kitti"}
