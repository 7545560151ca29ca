"""Trunks with rotary positions, and what Meta published on DINOv3: opened from both projects' files, against both
projects' code at random weights, used, trained, exported and written back."""

import json
import math
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import SHORT, image_of
from safetensors.torch import load_file
from torch import nn
from transformers import CHMv2Config, CHMv2ForDepthEstimation, DINOv3ViTConfig, DINOv3ViTModel

from dpt_nb.deploy.engines import check_export
from dpt_nb.deploy.export import export
from dpt_nb.inference.predictor import Predictor, PredictorError
from dpt_nb.network.config import ConfigError
from dpt_nb.network.inside import attention_maps
from dpt_nb.network.named import named_config
from dpt_nb.network.zoo import config_for, create_model
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.distributed import shard
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.infer_config import infer_config, transformers_fields
from dpt_nb.weights.key_maps import key_rules, remap_state_dict
from dpt_nb.weights.load import load_backbone, load_checkpoint
from dpt_nb.weights.read import CheckpointError, CheckpointWarning
from dpt_nb.weights.write import convert

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-5  # of the largest value
TRUNK = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2, num_register_tokens=4)
DECODER = dict(post_process_channels=[16, 24, 32, 40], fusion_hidden_size=32, head_hidden_size=16)
TINY = dict(embed_dim=64, depth=4, num_heads=2)


def stirred(model, amount=0.1):
    "Other weights and statistics: none is at 0 or 1."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def trunk(**changes):
    return DINOv3ViTConfig(
        **TRUNK | changes, out_indices=[1, 2, 3, 4], return_class_token=True, layer_norm_eps=1e-6, image_size=96
    )


def chmv2(key_bias=True, use_gated_mlp=False, **changes):
    backbone = trunk(
        key_bias=key_bias, use_gated_mlp=use_gated_mlp, hidden_act="silu" if use_gated_mlp else "gelu", rope_theta=50.0
    )
    return stirred(
        CHMv2ForDepthEstimation(
            CHMv2Config(**DECODER | dict(number_output_channels=24) | changes, backbone_config=backbone)
        )
    )


FOLDERS = {  # of transformers
    "CHMv2": {},
    "CHMv2, gated, logarithmic bins": dict(
        key_bias=False,
        use_gated_mlp=True,
        bins_strategy="log",
        norm_strategy="softmax",
        readout_type="ignore",
    ),
    "CHMv2, even bins": dict(bins_strategy="linear", norm_strategy="linear", max_depth=50.0, readout_type="add"),
    "CHMv2, one number": dict(number_output_channels=1, key_bias=False),
}


def compare(theirs, ours, image):
    "Largest difference as a part of the largest value, of the answers at the size that the peer gives."
    with torch.no_grad():
        expected = theirs((image - ours.mean) / ours.std)
        found = ours.ask_head("depth", ours.forward_features(image)["fused"], tuple(expected.shape[-2:]))
    assert expected.max() - expected.min() > max(0.2, 0.03 * expected.max())
    return ((found - expected).abs().max() / expected.max()).item()


def smallest_cosine(theirs, ours, image, renamed):
    "Over all parameters, of the gradients of one weighted sum; `renamed`: their gradients, under our names."
    for answer in (theirs((image - ours.mean) / ours.std), ours(image)["depth"]):
        weight = torch.rand(answer.shape, generator=torch.Generator().manual_seed(1))
        (answer * weight).sum().backward()
    gradients, cosines = renamed(), {}
    for name, parameter in ours.named_parameters():
        expected, found = gradients[name].flatten(), parameter.grad.flatten()
        assert expected.abs().max() > 0, name
        cosines[name] = torch.cosine_similarity(found, expected, dim=0).item()
    worst = min(cosines, key=cosines.get)
    assert cosines[worst] >= 0.9999, worst
    return cosines[worst]


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_transformers_opens_and_goes_back(kind, tmp_path, parity_rows):
    peer = chmv2(**FOLDERS[kind])
    peer.save_pretrained(tmp_path / "peer")
    ours, theirs = load_checkpoint(tmp_path / "peer"), lambda image: peer(image).predicted_depth[:, None]

    def renamed():  # as it writes them, which is not as it has them in memory
        values = {parameter: parameter.data for parameter in peer.parameters()}
        for parameter in values:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        peer.save_pretrained(tmp_path / "gradients")
        for parameter, value in values.items():
            parameter.data = value
        gradients = load_file(tmp_path / "gradients" / "model.safetensors")
        config = json.loads((tmp_path / "peer" / "config.json").read_text())
        return remap_state_dict(gradients, key_rules("transformers", gradients, config))[0]

    cosine = smallest_cosine(theirs, ours, image_of(96, 96), renamed)
    for size in [(96, 96), (80, 144)]:
        found = compare(theirs, ours, image_of(*size))
        parity_rows.append((f"transformers: {kind}", size, found, cosine if size == (96, 96) else None))
        assert found <= TOLERANCE
    report = convert(tmp_path / "peer", tmp_path / "back", to="transformers")
    assert not report.lost_settings, report.lost_settings
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("peer", "back"))
    assert before.keys() == after.keys()
    assert report.filled == ["backbone.embeddings.mask_token"]
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - set(report.filled))
    again = CHMv2ForDepthEstimation.from_pretrained(tmp_path / "back").eval()
    image = image_of(96, 96)
    with torch.no_grad():
        assert torch.equal(again(image).predicted_depth, peer(image).predicted_depth)
    was, became = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("peer", "back"))
    inner = became.pop("backbone_config")
    assert {name: was[name] for name in became} == became
    assert {name: was["backbone_config"][name] for name in inner} == inner


def test_the_published_chmv2_is_the_named_one():
    with torch.device("meta"):
        peer = CHMv2ForDepthEstimation(CHMv2Config())
    config, state = json.loads(peer.config.to_json_string()), peer.state_dict()
    config = config | dict(backbone_config=json.loads(peer.config.backbone_config.to_json_string()))
    state = {name.replace(".model.", "."): tensor for name, tensor in state.items() if "mask_token" not in name}
    ours = remap_state_dict(state, key_rules("transformers", state, config))
    assert not ours.unknown
    inferred = infer_config(ours.state)
    found = inferred | transformers_fields(config, inferred, {})
    named = vars(named_config("chmv2_large"))
    assert {name: named[name] for name in found} == found


def test_the_backbone_alone_opens_from_both_projects(tmp_path):
    peer = stirred(DINOv3ViTModel(trunk()))
    peer.save_pretrained(tmp_path / "peer")
    with pytest.warns(CheckpointWarning, match="is a backbone alone"):
        ours = load_checkpoint(tmp_path / "peer", norm_intermediates=True)
    image = image_of(80, 144)
    with torch.no_grad():
        expected = peer(image).last_hidden_state
        tap = ours.backbone(image)[-1]
    for found, wanted in [(tap.tokens, expected[:, 5:]), (tap.prefix, expected[:, :1])]:
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_a_backbone_is_normalized_as_its_folder_says_or_its_name(tmp_path):
    folder = tmp_path / "dinov3-vits16-pretrain-sat493m"
    DINOv3ViTModel(trunk()).save_pretrained(folder)
    with pytest.warns(CheckpointWarning, match="is a backbone alone"):
        named = load_checkpoint(folder).config
    assert (named.mean, named.std) == ([0.43, 0.411, 0.296], [0.213, 0.156, 0.143])
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.1] * 3, image_std=[0.4] * 3)))
    with pytest.warns(CheckpointWarning, match="is a backbone alone"):
        said = load_checkpoint(folder).config
    assert (said.mean, said.std) == ([0.1] * 3, [0.4] * 3)


SYNTHMIX = dict(use_batchnorm=True, use_cls_token=False, min_depth=0.001, max_depth=100.0)
CANOPY = dict(use_batchnorm=False, use_cls_token=True, min_depth=0.001, max_depth=96.0)
CANOPY |= dict(bins_strategy="chmv2_mixlog", norm_strategy="chmv2_mixlog", use_bias=True, projection_after_fusion=False)
DEPTHERS = {
    "depther": (dict(qkv_bias=False, ffn_layer="swiglu64", ffn_ratio=3), SYNTHMIX),
    "depther with biases": (dict(qkv_bias=True), SYNTHMIX),
    "CHMv2": (dict(qkv_bias=True), CANOPY),
}


@pytest.mark.parametrize("kind", DEPTHERS)
def test_the_same_as_dinov3s_own_code(kind, tmp_path, parity_rows):
    models = pytest.importorskip(
        "dinov3.eval.depth.models", reason="DINOv3's code is on no index: put its repository on PYTHONPATH"
    )
    vision = pytest.importorskip("dinov3.models.vision_transformer")
    of_trunk, of_depther = DEPTHERS[kind]
    shape = dict(embed_dim=64, depth=4, num_heads=1, n_storage_tokens=4, layerscale_init=1e-5, mask_k_bias=True)
    torch.manual_seed(0)
    backbone = vision.DinoVisionTransformer(
        **shape, **of_trunk, norm_layer="layernormbf16", pos_embed_rope_dtype="fp32"
    )
    backbone.init_weights()
    decoder = dict(channels=32, post_process_channels=[16, 24, 32, 40], n_hidden_channels=8)
    peer = stirred(models.build_depther(backbone, [0, 1, 2, 3], 24, use_backbone_norm=True, **decoder, **of_depther))
    peer.requires_grad_(True)
    torch.save(peer.state_dict(), tmp_path / "depther.pth")
    ours = load_checkpoint(tmp_path / "depther.pth")
    theirs = lambda image: peer.features_to_depth(peer.decoder(peer.encoder(image)))
    for size in [(96, 96), (80, 144)]:
        found = compare(theirs, ours, image_of(*size))
        parity_rows.append((f"facebookresearch/dinov3: {kind}", size, found, None))
        assert found <= 1e-4  # where nearly all bins weigh nothing, the mixed bins' answer is sensitive to rounding
    trunk_file, head_file = "dinov3_vits16_pretrain_lvd1689m.pth", "dinov3_vits16_synthmix_dpt_head.pth"
    torch.save(peer.decoder.state_dict(), tmp_path / head_file)
    with pytest.raises(CheckpointError, match="its trunk is a file of its own"):
        load_checkpoint(tmp_path / head_file)
    torch.save(peer.encoder.backbone.state_dict(), tmp_path / trunk_file)
    joined = load_checkpoint(tmp_path / head_file).state_dict()
    assert all(torch.equal(joined[name], tensor) for name, tensor in ours.state_dict().items())
    with pytest.warns(CheckpointWarning, match="is a backbone alone"):
        alone = load_checkpoint(tmp_path / trunk_file)
    assert torch.equal(alone.backbone.vit.reg_token, peer.encoder.backbone.storage_tokens)


def depther_file(path):
    "A depther's file without its code: our own tensors under its names, with a norm behind each tap."
    torch.manual_seed(0)
    model = stirred(
        create_model(
            "dinov3_depther_7b",
            backbone="vit_small_patch16_dinov3",
            backbone_arguments=TINY | dict(num_heads=1),
            taps=[0, 1, 2, 3],
            channels=[16, 24, 32, 40],
            features=32,
        )
    )
    state = model.state_dict()
    names = {f"encoder.backbone.{key}": value for key, value in model.backbone.vit.state_dict().items()}
    words = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    for ours, theirs in words:
        names = {re.sub(rf"{ours}$", theirs, key): value for key, value in names.items()}
    units = [("lateral_unit", "res_conv_unit1"), ("unit", "res_conv_unit2")]
    for level in range(4):
        block = "decoder.reassemble_blocks."
        for kind in ("weight", "bias"):
            names[f"{block}projects.{level}.conv.{kind}"] = state[f"reassemble.{level}.project.{kind}"]
            if level != 2:
                names[f"{block}resize_layers.{level}.{kind}"] = state[f"reassemble.{level}.resample.{kind}"]
            names[f"decoder.fusion_blocks.{level}.project.conv.{kind}"] = state[
                f"decoder.steps.{level}.out_conv.{kind}"
            ]
        names[f"decoder.convs.{level}.conv.weight"] = state[f"reassemble.{level}.to_features.weight"]
        for ours, theirs in units[0 if level else 1 :]:
            for place in (1, 2):
                name = f"decoder.fusion_blocks.{level}.{theirs}.conv{place}.conv.weight"
                names[name] = state[f"decoder.steps.{level}.{ours}.convolution{place}.weight"]
    for ours, theirs in zip(("projection", *(f"convolution{n}" for n in (1, 2, 3))), ("project.conv", *"024")):
        for kind in ("weight", "bias"):
            place = theirs if "." in theirs else f"conv_depth.head.{theirs}"
            names[f"decoder.{place}.{kind}"] = state[f"heads.depth.{ours}.{kind}"]
    for level in range(4):
        norm = stirred(nn.BatchNorm2d(64))
        names |= {f"decoder.reassemble_blocks.batchnorm_layers.{level}.{k}": v for k, v in norm.state_dict().items()}
    torch.save(names, path)
    return model, names


def test_a_depthers_file_opens_with_its_norms_in_the_convolutions(tmp_path):
    model, names = depther_file(tmp_path / "depther.pth")
    opened, image = load_checkpoint(tmp_path / "depther.pth"), image_of(96, 128)
    assert opened.config.heads == model.config.heads and opened.config.features == 32
    for level, reassemble in enumerate(model.reassemble):
        norm = nn.BatchNorm2d(64).eval()
        prefix = f"decoder.reassemble_blocks.batchnorm_layers.{level}."
        norm.load_state_dict({key.removeprefix(prefix): names[key] for key in names if key.startswith(prefix)})
        reassemble.project = nn.Sequential(norm, reassemble.project)
    with torch.no_grad():
        expected, found = model(image)["depth"], opened(image)["depth"]
    assert (found - expected).abs().max() <= TOLERANCE * expected.max() and expected.std() > 0.1


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A folder of this library for each kind."
    home = tmp_path_factory.mktemp("opened")
    chmv2().save_pretrained(home / "peer")
    depther_file(home / "depther.pth")
    models = {"CHMv2": load_checkpoint(home / "peer"), "depther": load_checkpoint(home / "depther.pth")}
    for name, arguments in TRUNKS.items():
        torch.manual_seed(0)
        models[name] = create_model(
            name,
            backbone_arguments=arguments,
            taps=[0, 1, 2, 3],
            channels=[16, 24, 32, 40],
            features=16,
            heads={"depth": dict(output="exp")},
            image_size=[5 * (14 if "14" in name else 16)] * 2,
        )
    for name, model in models.items():
        model.save_pretrained(home / name.replace(" ", "_"))
    return {name: home / name.replace(" ", "_") for name in models}


TRUNKS = {
    "vit_small_patch16_dinov3_qkvb": dict(TINY),
    "eva02_tiny_patch14_224": dict(TINY),
    "vit_pe_spatial_tiny_patch16_512": dict(TINY),
    "vit_small_patch16_rope_mixed_224": dict(TINY),
    "vit_base_patch16_sapiens2": TINY | dict(num_kv_heads=1),
    "vit_small_patch14_reg4_dinov2": dict(TINY),
}
KINDS = ("CHMv2", "depther", *TRUNKS)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_whole_and_in_tiles(kind, opened, tmp_path):
    predictor = Predictor(load_checkpoint(opened[kind]), device="cpu", size=(112, 112) if "14" in kind else (96, 96))
    image = (render(random_scene("rooms", 5, (100, 140)))["image"] * 255).byte()
    whole = predictor(image)["depth"]
    assert whole.shape == (1, 100, 140) and whole.isfinite().all()
    tiled = predictor.predict_tiled(image, window=(112, 112) if "14" in kind else (96, 96), progress=False)["depth"]
    assert tiled.shape == whole.shape and tiled.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind, form", [("CHMv2", "onnx"), *((kind, "torch_export") for kind in KINDS)])
def test_exported_for_any_size(kind, form, opened, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    model = load_checkpoint(opened[kind])
    path = tmp_path / dict(onnx="m.onnx", torch_export="m.pt2")[form]
    export(model, path, form=form, sizes="any")
    patch = model.backbone.patch
    sizes = [(5 * patch, 5 * patch), (4 * patch, 9 * patch)]
    assert check_export(model, path, sizes=sizes, batches=(2,)).worst <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "CHMv2",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("depther", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224")
        ),
    ],
)
def test_three_steps_of_training_move_every_weight(kind, opened, tmp_path):
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [
            *SHORT,
            f"model.weights={opened[kind]}",
            "model.changes={}",  # its own head
            "loop.steps=3",
            "loop.checkpointing=true",
            "data.batch_size=2",
            "optimizer.layer_decay=0.8",
            *(f"data.{split}.size=[112,112]" for split in ("train", "held_out")),
        ],
    )
    start = load_checkpoint(opened[kind])
    train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    trained = load_checkpoint(tmp_path / "run" / "model")
    assert trained.config.heads == start.config.heads
    before, after = start.state_dict(), trained.state_dict()
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not still, still


def test_layer_decay_and_attention_on_rotary_trunks(opened):
    model = load_checkpoint(opened["CHMv2"])
    assert len(model.backbone.block_groups()) == 4 and model.backbone.shard_groups() == model.backbone.block_groups()
    seen = attention_maps(model, torch.rand(1, 3, 64, 96))
    assert (seen.grid, seen.prefix, seen.class_token, len(seen.probabilities)) == ((4, 6), 5, True, 4)
    assert all(torch.allclose(table.sum(-1), torch.ones(()), atol=1e-5) for table in seen.probabilities)


def one_half(rank, folder, kinds):
    "One of two processes that share each network: its gradients have to be those of a whole one."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in kinds:
        whole, halves = load_checkpoint(folder / kind).train(), load_checkpoint(folder / kind).train()
        side = 4 * whole.backbone.patch
        image = torch.rand(1, 3, side, 2 * side, generator=torch.Generator().manual_seed(3))
        halves = shard(halves, torch.device("cpu"))
        for model in (whole, halves):
            model(image)["depth"].square().mean().backward()
        for (name, expected), found in zip(whole.named_parameters(), halves.parameters()):
            gradient = found.grad.full_tensor()
            assert (gradient - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max() + 1e-7, (kind, name)
    dist.destroy_process_group()


@pytest.mark.slow
def test_halves_of_a_rotary_network_have_the_gradients_of_a_whole_one(opened):
    kinds = [opened[kind].name for kind in ("CHMv2", "vit_small_patch16_rope_mixed_224")]
    torch.multiprocessing.start_processes(one_half, (opened["CHMv2"].parent, kinds), nprocs=2, start_method="spawn")


def test_no_other_project_is_given_what_it_cannot_hold(opened, tmp_path):
    for to in ("isl-org", "depth-anything", "mmseg", "transformers"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            convert(opened["eva02_tiny_patch14_224"], tmp_path / "other", to=to)
    for to in ("isl-org", "depth-anything", "mmseg"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            convert(opened["CHMv2"], tmp_path / "other", to=to)
    with pytest.raises(CheckpointError, match="residual units with biases"):
        convert(opened["depther"], tmp_path / "other", to="transformers")


def test_timms_other_eva_networks_are_filled_by_name(tmp_path):
    torch.manual_seed(0)
    model = create_model(
        "eva02_tiny_patch14_224", backbone_arguments=TINY, taps=[0, 1, 2, 3], features=8, image_size=[70, 70]
    )
    torch.save(stirred(model).backbone.vit.state_dict(), tmp_path / "eva02.pth")
    with pytest.raises(CheckpointError, match="Build it by timm's name"):
        load_checkpoint(tmp_path / "eva02.pth")
    other = create_model(
        "eva02_tiny_patch14_224", backbone_arguments=TINY, taps=[0, 1, 2, 3], features=8, image_size=[70, 70]
    )
    load_backbone(other, tmp_path / "eva02.pth")
    assert all(
        torch.equal(tensor, model.backbone.state_dict()[name]) for name, tensor in other.backbone.state_dict().items()
    )


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("vit_tiny_patch16_224", dict(in_chans=4, **TINY)),
        ("vit_small_patch16_dinov3", dict(in_chans=6, **TINY)),
        pytest.param("vit_tiny_patch16_224", dict(patch_size=8, **TINY), marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_reg4_dinov2", dict(TINY), marks=pytest.mark.slow),
        pytest.param("beit_base_patch16_224", dict(in_chans=1, **TINY), marks=pytest.mark.slow),
        ("resnet18", dict(in_chans=4)),
    ],
)
def test_other_channels_patches_and_registers(name, arguments, tmp_path):
    seen, patch = arguments.get("in_chans", 3), arguments.get("patch_size", 14 if "14" in name else 16)
    extra = {} if name == "resnet18" else dict(taps=[0, 1, 2, 3], channels=[16, 24, 32, 40])
    colors = dict(mean=[0.4 + 0.01 * index for index in range(seen)], std=[0.2] * seen) if seen != 3 else {}
    torch.manual_seed(0)
    side = 32 if name == "resnet18" else patch
    extra |= dict(heads={"depth": dict(output="exp")}) | colors
    model = create_model(
        name, backbone_arguments=arguments, features=16, image_size=[6 * side, 6 * side], **extra
    ).eval()
    image = torch.rand(2, seen, 4 * side, 7 * side)
    with torch.no_grad():
        answer = model(image)["depth"]
    assert answer.shape == (2, 1, 4 * side, 7 * side) and answer.isfinite().all()
    model.save_pretrained(tmp_path / "model")
    again = load_checkpoint(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(image)["depth"], answer)
    if seen == 3:
        return
    with pytest.raises(ConfigError, match=rf"takes \(B, {seen}, H, W\)"):
        model(image[:, :1].expand(-1, seen + 1, -1, -1))
    with pytest.raises(PredictorError, match=f"sees {seen} channels"):
        Predictor(model, device="cpu")
    with pytest.raises(ConfigError, match=f"the backbone sees {seen} channels"):
        config_for(name, backbone_arguments=arguments)
    path = tmp_path / "m.pt2"
    export(model, path, form="torch_export", sizes=(4 * side, 7 * side))
    assert check_export(model, path, batches=(1,)).worst <= 1e-4


def test_rotation_depends_on_the_distance_alone():
    "By hand: the angles of DINOv3 for a grid of 2×4, head of 8 channels, in float64."
    from timm.layers import RotaryEmbeddingDinoV3, apply_rot_embed_cat

    from dpt_nb.network.eva import centred_rotation

    table = centred_rotation(RotaryEmbeddingDinoV3(8), (2, 4))
    rows, columns = [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]
    periods = [100 ** (2 * index / 4) for index in range(2)]
    wanted = []
    for row in rows:
        for column in columns:
            angles = [2 * math.pi * place / period for place in (row, column) for period in periods]
            wanted.append([math.sin(angle) for angle in angles * 2] + [math.cos(angle) for angle in angles * 2])
    assert torch.allclose(table.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
    query, key = torch.rand(2, 1, 1, 1, 8).double()
    turn = lambda vector, place: apply_rot_embed_cat(vector, table[place : place + 1].double(), half=True)
    products = [(turn(query, place) * turn(key, place + 1)).sum() for place in (0, 1, 5, 6)]
    assert torch.allclose(torch.stack(products), products[0].expand(4), atol=1e-6)
