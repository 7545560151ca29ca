"""TIPSv2-DPT, three heads with a decoder each on one trunk: opened from transformers' folders, against its classes at
random weights, used, trained, exported and written back."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SHORT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Tipsv2DptConfig, Tipsv2DptImageProcessor, Tipsv2VisionConfig

from dpt_nb.deploy.engines import check_export
from dpt_nb.deploy.export import export
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.inside import InsideError, readouts
from dpt_nb.network.named import TIPS_SIZES, named_config
from dpt_nb.network.zoo import create_model
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.optim import parameter_groups
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.training.train_state import freeze_untrained
from dpt_nb.weights.infer_config import infer_config, transformers_fields
from dpt_nb.weights.key_maps import key_rules, remap_state_dict
from dpt_nb.weights.load import load_checkpoint
from dpt_nb.weights.read import CheckpointError, CheckpointWarning
from dpt_nb.weights.tips import TIPS_CLASSES, TIPS_TYPE, shaped_as_ours
from dpt_nb.weights.write import convert

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-5  # of the range
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=70)
TINY |= dict(out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True)
DECODERS = dict(neck_hidden_sizes=[16, 24, 32, 40], fusion_hidden_size=16, num_depth_bins=24, num_labels=7)
SINGLE = {name: heads for heads, name in TIPS_CLASSES.items()}  # class → its heads
KINDS = {
    "three heads": ("Tipsv2DptForDensePrediction", {}, {}),
    "three heads, gated": (
        "Tipsv2DptForDensePrediction",
        dict(use_swiglu_ffn=True, num_register_tokens=2, num_attention_heads=1, layer_norm_eps=1e-5),
        dict(min_depth=0.5, max_depth=80.0, readout_activation="gelu"),
    ),
    "depth": ("Tipsv2DptForDepthEstimation", dict(qkv_bias=False), {}),
    "normals": ("Tipsv2DptForNormalEstimation", dict(mlp_ratio=3.7362), {}),
    "labels": ("Tipsv2DptForSemanticSegmentation", {}, {}),
}


def image_of(*size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@torch.no_grad()
def tips_peer(kind="three heads"):
    "Other weights, none at 0 or 1."
    name, of_trunk, of_model = KINDS[kind]
    config = Tipsv2DptConfig(**DECODERS | of_model, backbone_config=Tipsv2VisionConfig(**TINY | of_trunk))
    torch.manual_seed(0)
    peer, generator = getattr(transformers, name)(config), torch.Generator().manual_seed(0)
    for name, parameter in peer.named_parameters():
        embedding = any(word in name for word in ("position_embeddings", "cls_token", "register_tokens"))
        parameter.add_((0.5 if embedding else 0.1) * torch.randn(parameter.shape, generator=generator))
    return peer.eval()


def folder_of(peer, folder, size=(70, 126)):
    peer.save_pretrained(folder)
    Tipsv2DptImageProcessor(size=dict(height=size[0], width=size[1])).save_pretrained(folder)
    return folder


def their_answers(peer, image):  # head → `(B, C, h, w)`
    given = peer(image)
    logits = given.get("segmentation_logits", given.get("logits"))
    normals = None if given.get("normals") is None else F.normalize(given["normals"], dim=1)
    depth = None if given.get("predicted_depth") is None else given["predicted_depth"][:, None]
    return {name: each for name, each in dict(depth=depth, normal=normals, label=logits).items() if each is not None}


def our_answers(model, image, sizes):  # sizes: head → height and width that it is asked for
    fused = model.forward_features(image)["fused"]
    return {name: model.ask_head(name, fused, sizes[name]) for name in model.heads}


def gradients_under_our_names(peer, folder):
    "As it writes them, which is not as it has them in memory; the register's place in the table moves as it does."
    values = {parameter: parameter.data for parameter in peer.parameters()}
    for parameter in values:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    peer.save_pretrained(folder / "gradients")
    for parameter, value in values.items():
        parameter.data = value
    gradients = shaped_as_ours(load_file(folder / "gradients" / "model.safetensors"))
    config = json.loads((folder / "peer" / "config.json").read_text())
    ours = remap_state_dict(gradients, key_rules("transformers", gradients, config))[0]
    registers = ours["backbone.vit.reg_token"]
    ours["backbone.vit.pos_embed"][:, 1 : 1 + registers.shape[1]] = registers
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_and_gradients_of_transformers(kind, tmp_path, parity_rows):
    peer = tips_peer(kind)
    ours = load_checkpoint(folder_of(peer, tmp_path / "peer"))
    assert tuple(sorted(ours.heads)) == SINGLE[KINDS[kind][0]] and ours.config.decoder_per_head
    for size in [(70, 70), (42, 126), (98, 56)]:  # its own, one longer than the table, and one of more rows
        image = image_of(*size)
        theirs = their_answers(peer, image)
        mine = our_answers(ours, image, {name: tuple(each.shape[-2:]) for name, each in theirs.items()})
        cosine = None
        if size == (42, 126):
            for answers in (theirs, mine):
                generator = torch.Generator().manual_seed(1)
                weigh = lambda each, generator=generator: torch.rand(each.shape, generator=generator) - 0.3
                sum((answers[name] * weigh(answers[name])).sum() for name in sorted(answers)).backward()
            expected = gradients_under_our_names(peer, tmp_path)
            cosines = {}
            for name, parameter in ours.named_parameters():
                assert expected[name].abs().max() > 0, name
                cosines[name] = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
            assert expected.keys() - {"backbone.vit.mask_token"} == cosines.keys()
            cosine = min(cosines.values()).item()
            assert cosine >= 0.9999, min(cosines, key=cosines.get)
        for name, wanted in theirs.items():
            scale = wanted.max() - wanted.min()
            assert scale > 0.5 and mine[name].shape == wanted.shape, (name, scale)
            found = ((mine[name] - wanted).abs().max() / scale).item()
            parity_rows.append((f"transformers: TIPSv2-DPT, {kind}: {name}", size, found, cosine))
            assert found <= TOLERANCE, f"{name}, {size}: {found:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_transformers_bit_for_bit(kind, tmp_path):
    peer = tips_peer(kind)
    report = convert(folder_of(peer, tmp_path / "peer"), tmp_path / "back", to="transformers")
    assert not report.lost_settings and report.filled == ["vision_encoder.mask_token"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("peer", "back"))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(report.filled)
    again = type(peer).from_pretrained(tmp_path / "back").eval()
    image = image_of(42, 126)
    with torch.no_grad():
        wanted, found = their_answers(peer, image), their_answers(again, image)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    was, became = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("peer", "back"))
    trunk = became.pop("backbone_config")
    assert {name: was[name] for name in became} == became
    ratios = was["backbone_config"].pop("mlp_ratio"), trunk.pop("mlp_ratio")
    assert int(64 * ratios[0]) == int(64 * ratios[1])
    assert {name: was["backbone_config"][name] for name in trunk} == trunk
    fed, was_fed = (json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("back", "peer"))
    for name in ("image_processor_type", "do_resize", "do_rescale", "do_normalize", "resample", "size"):
        assert fed[name] == was_fed[name], name


PUBLISHED_TRUNKS = {  # of its authors' configs
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, out_indices=[3, 6, 9, 12]),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, out_indices=[6, 12, 18, 24]),
    "so400m": dict(
        hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, mlp_ratio=3.7362, out_indices=[7, 14, 21, 27]
    ),
    "giant": dict(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        out_indices=[10, 20, 30, 40],
    ),
}


@pytest.mark.parametrize("size", TIPS_SIZES)
def test_the_published_networks_are_the_named_ones(size):
    trunk = Tipsv2VisionConfig(**PUBLISHED_TRUNKS[size], reshape_hidden_states=False)
    width = trunk.hidden_size
    config = Tipsv2DptConfig(
        backbone_config=trunk, neck_hidden_sizes=[width // 8, width // 4, width // 2, width], num_labels=150
    )
    with torch.device("meta"):
        peer = transformers.Tipsv2DptForDensePrediction(config)
        ours = create_model(f"tipsv2_dpt_{size}")
    count = lambda model: sum(each.numel() for each in model.parameters())
    assert count(ours) == count(peer)  # the register's place in the table here, a token for masks there
    fields = json.loads(config.to_json_string()) | dict(backbone_config=json.loads(trunk.to_json_string()))
    found = infer_config(ours.state_dict())
    found |= transformers_fields(fields, found, {})
    named = vars(named_config(f"tipsv2_dpt_{size}"))
    assert {name: named[name] for name in found if name != "class_names"} == {
        name: value for name, value in found.items() if name != "class_names"
    }
    assert len(named["class_names"]) == 150


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A folder of transformers, fed at 70×126."
    return folder_of(tips_peer(), tmp_path_factory.mktemp("tips") / "peer")


@pytest.mark.parametrize("size", [(70, 126), (90, 150)])
def test_one_pass_predicts_what_transformers_predicts(size, opened):
    pixels = (render(random_scene("rooms", 5, size))["image"] * 255).byte()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    predictor, seen = Predictor(load_checkpoint(opened), "cpu"), []
    predictor.model.backbone.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    found, processor = predictor.predict((pixels / 255)[None]), Tipsv2DptImageProcessor.from_pretrained(opened)
    fed = processor(image, return_tensors="pt")["pixel_values"]
    assert len(seen) == 1 and (seen[0] - fed).abs().max() <= 1e-6
    with torch.no_grad():
        given = tips_peer()(fed)
        wanted = their_answers(tips_peer(), fed)
    post_processed = dict(
        depth=processor.post_process_depth_estimation(given, [(70, 126)])[0]["predicted_depth"][None, None],
        normal=processor.post_process_normal_estimation(given, [(70, 126)])[0]["normals"][None],
        label=F.interpolate(wanted["label"], size=(70, 126), mode="bilinear", align_corners=False),
    )
    for name, each in post_processed.items():  # from there to an image of another size likewise
        each = F.normalize(each, dim=1) if name == "normal" else each
        each = F.interpolate(each, size=size, mode="bilinear", align_corners=False)
        each = F.normalize(each, dim=1) if name == "normal" else each
        assert (found[name] - each).abs().max() <= 1e-4 * (each.max() - each.min()), name
    labels = processor.post_process_semantic_segmentation(given, [(70, 126)])[0]
    if size == (70, 126):
        assert torch.equal(predictor(image)["label"].squeeze(), labels)


def test_predicted_in_tiles(opened):
    predictor = Predictor(load_checkpoint(opened), "cpu", size=(70, 70))
    image = (render(random_scene("rooms", 5, (100, 140)))["image"] * 255).byte()
    whole, tiled = predictor(image), predictor.predict_tiled(image, window=(70, 70), progress=False)
    for name in ("depth", "normal", "label"):
        assert tiled[name].shape == whole[name].shape and tiled[name].float().isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_exported_for_any_size(form, opened, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    model, path = load_checkpoint(opened), tmp_path / dict(onnx="m.onnx", torch_export="m.pt2")[form]
    export(model, path, form=form, sizes="any")
    assert check_export(model, path, sizes=[(70, 70), (42, 126), (98, 56)], batches=(1, 2)).worst <= 1e-4


@pytest.mark.slow
def test_three_steps_of_training_move_every_weight(opened, tmp_path, no_figures):
    recipe = change_recipe(
        get_recipe("rooms_joint_normals"),
        [
            *SHORT,
            f"model.weights={opened}",
            'model.changes={"heads":{"depth":{"form":"bins","bins":24,"weighting":"linear","epsilon":0.001,'
            '"upsampled":false},"normal":{"form":"plain"},"label":{"form":"plain","num_classes": 12}}}',
            "loop.steps=3",
            "optimizer.layer_decay=0.8",
            "data.batch_size=2",
            *(f"data.{split}.size=[70,70]" for split in ("train", "held_out")),
        ],
    )
    with pytest.warns(CheckpointWarning, match="has no such label: random weights"):
        train(recipe, tmp_path / "run", tmp_path / "data", cpu=True, workers=0, progress=False)
    trained, start = load_checkpoint(tmp_path / "run" / "model"), load_checkpoint(opened)
    before, after = start.state_dict(), trained.state_dict()
    assert trained.config.decoder_per_head and list(trained.branches) == list(start.branches)
    still = [
        name for name, each in after.items() if each.shape == before[name].shape and torch.equal(each, before[name])
    ]
    assert not still, still


def test_rates_fall_by_layer_and_untaught_branches_are_frozen(opened):
    model = load_checkpoint(opened).train()
    rates = {}
    for group in parameter_groups(model, 0.01, lr=1.0, layer_decay=0.5):
        rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
    named = dict(model.named_parameters())
    assert len(rates) == len(named)
    assert rates[id(named["backbone.vit.blocks.0.norm1.weight"])] == 0.5**4
    assert all(rates[id(each)] == 1 for name, each in named.items() if not name.startswith("backbone."))
    freeze_untrained(model, build_losses(change_recipe(get_recipe("rooms_tiny"), ['losses={"normal":{}}'])))
    trained = {name.split(".")[1] for name, each in named.items() if each.requires_grad and "backbone" not in name}
    assert trained == {"normal"}


def test_heads_can_be_taken_and_added(opened):
    whole, image = load_checkpoint(opened), image_of(42, 70)
    plain = {"form": "plain"}
    one = load_checkpoint(opened, heads={"normal": plain})
    assert list(one.branches) == ["normal"] and not any("depth" in name for name in one.state_dict())
    with pytest.warns(CheckpointWarning, match="has no such sky"):
        more = load_checkpoint(opened, heads={"depth": whole.config.heads["depth"], "sky": {}})
    assert list(more.branches) == ["depth"]
    with pytest.warns(CheckpointWarning, match="relative_depth and relative_depth branch"):
        other = load_checkpoint(opened, heads={"normal": plain, "relative_depth": {}})
    with torch.no_grad():
        wanted = whole(image)["normal"]
        assert torch.equal(one(image)["normal"], wanted) and torch.equal(other(image)["normal"], wanted)


def test_one_head_with_its_decoder_is_a_plain_network(opened):
    whole, image = load_checkpoint(opened), image_of(42, 70)
    one = load_checkpoint(opened, heads={"normal": {"form": "plain"}}, decoder_per_head=False)
    assert one.branches is None and not any("branches" in name for name in one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(image)["normal"], whole(image)["normal"])
    taps = one.forward_features(image)["taps"]
    assert set(readouts(one, taps, 2)) == {"ignore", "add", "project"}
    with pytest.raises(InsideError, match="Each head of this network has a decoder of its own"):
        readouts(whole, taps, 2)


def test_saved_and_opened_as_our_own(opened, tmp_path):
    model = load_checkpoint(opened)
    model.save_pretrained(tmp_path / "own")
    again, image = load_checkpoint(tmp_path / "own"), image_of(42, 70)
    assert again.config == model.config
    with torch.no_grad():
        assert all(torch.equal(each, model(image)[name]) for name, each in again(image).items())
    convert(tmp_path / "own", tmp_path / "folder", to="transformers")
    first, second = load_file(opened / "model.safetensors"), load_file(tmp_path / "folder" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first if "mask_token" not in name)


def test_what_cannot_be_opened_or_written_is_said(opened, tmp_path):
    for to in ("isl-org", "depth-anything", "mmseg"):
        with pytest.raises(CheckpointError, match="each of its heads has a decoder of its own"):
            convert(opened, tmp_path / "other.pth", to=to)
    load_checkpoint(opened, heads={"depth": {"form": "bins", "bins": 24, "upsampled": False}}).save_pretrained(
        tmp_path / "softmax"
    )
    with pytest.raises(CheckpointError, match="its depth has not form='bins', linear spacing and weighting"):
        convert(tmp_path / "softmax", tmp_path / "other", to="transformers")
    state, config = load_file(opened / "model.safetensors"), json.loads((opened / "config.json").read_text())
    heads_alone = {name: each for name, each in state.items() if not name.startswith("vision_encoder")}
    for number, (tensors, changes, said) in enumerate(
        [
            (
                state,
                dict(depth_decoder_activation="gelu"),
                "has depth_decoder_activation = gelu, and relu was expected",
            ),
            (state, dict(readout_activation="silu"), "readout_activation = silu, and gelu_pytorch_tanh or gelu was"),
            (
                state,
                dict(backbone_config=config["backbone_config"] | dict(apply_layernorm=False)),
                "has apply_layernorm = False, and True was expected",
            ),
            (heads_alone, dict(model_type=TIPS_TYPE), "holds the heads of a TIPSv2-DPT without its trunk"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(folder)
