"""DPT against other implementations with the same random weights: same numbers, same gradients, same unused parts.

The weights go by way of a folder on disk, so that writing there, opening here, renaming, and every layer of the network
are tested together."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import transformers
from conftest import image_of
from official_names import isl_org_hybrid, isl_org_vit, random_tensors
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BeitConfig,
    BitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    Swinv2Config,
)
from transformers import DPTConfig as PeerConfig

from dpt_nb.network.dpt import DPT
from dpt_nb.network.zoo import create_model
from dpt_nb.weights.key_maps import key_rules, remap_state_dict
from dpt_nb.weights.load import load_checkpoint, open_checkpoint

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-5  # of the largest value; rounding in float32 leaves some 1e-6
COMMON = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
STAGES = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
DECODER = dict(fusion_hidden_size=32, neck_hidden_sizes=[16, 32, 64, 96])
OWN = dict(**COMMON, **DECODER, intermediate_size=256, backbone_out_indices=[0, 1, 2, 3], image_size=96)


def plain(**changes):
    return DPTForDepthEstimation(PeerConfig(**OWN, **changes))


def hybrid():
    source_defaults = dict(
        global_padding="same",
        layer_type="bottleneck",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    resnet = BitConfig(embedding_size=32, hidden_sizes=[128, 256, 512], depths=[2, 1, 1], **source_defaults)
    # The published hybrid's config says 1, 1 for the two levels that come from the ResNet and are not resampled.
    changes = dict(
        neck_hidden_sizes=[128, 256, 64, 96],
        backbone_featmap_shape=[1, 512, 6, 6],
        backbone_out_indices=[0, 1, 1, 3],
        reassemble_factors=[1, 1, 1, 0.5],
    )
    return DPTForDepthEstimation(PeerConfig(**OWN | changes, is_hybrid=True, backbone_config=resnet))


def on_beit():
    beit = BeitConfig(
        **COMMON,
        **STAGES,
        intermediate_size=256,
        image_size=96,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
    )
    return DPTForDepthEstimation(PeerConfig(**DECODER, backbone_config=beit))


def on_swin(pretrained=(0, 0, 0, 0)):
    swin = Swinv2Config(
        **STAGES,
        image_size=128,
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=8,
        pretrained_window_sizes=list(pretrained),
    )
    return DPTForDepthEstimation(
        PeerConfig(**DECODER | dict(neck_hidden_sizes=[16, 32, 64, 128]), backbone_config=swin)
    )


def dinov2(side, **changes):
    return Dinov2Config(**COMMON, **STAGES, image_size=side, patch_size=14, reshape_hidden_states=False, **changes)


def on_dinov2(side=56, apply_layernorm=True, **changes):
    return DPTForDepthEstimation(
        PeerConfig(**DECODER | changes, backbone_config=dinov2(side, apply_layernorm=apply_layernorm))
    )


def segmentation(**changes):
    return DPTForSemanticSegmentation(
        PeerConfig(
            **OWN, num_labels=7, use_batch_norm_in_fusion_residual=True, semantic_classifier_dropout=0, **changes
        )
    )


def depth_anything(**changes):
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(**DECODER, backbone_config=dinov2(70), reassemble_hidden_size=64, **changes)
    )


PROJECTED = dict(add_projection=True, fusion_hidden_size=256, use_bias_in_fusion_residual=False)
PEERS = {  # what to build, and sizes: its native one first
    "DPT, readout project": (plain, [(96, 96), (160, 160)]),  # the peer lays out its tokens as a square: no wide size
    "DPT, readout add": (lambda: plain(readout_type="add", layer_norm_eps=0.01), [(96, 96), (64, 64)]),
    "DPT, readout ignore": (lambda: plain(readout_type="ignore"), [(96, 96), (128, 128)]),
    "DPT-Hybrid": (hybrid, [(96, 96)]),  # the peer takes no other size
    "DPT on BEiT": (on_beit, [(96, 96), (96, 160), (96, 320)]),
    "DPT on Swin V2": (on_swin, [(128, 128), (96, 352)]),  # grids of 24×88 to 3×11: windows of 8 have to be padded
    "DPT on Swin V2, windows enlarged": (lambda: on_swin(pretrained=(4, 4, 4, 2)), [(128, 128), (160, 64)]),
    "DPT on DINOv2": (on_dinov2, [(56, 56), (56, 112)]),
    # As DINOv2's own depth models were published. The projection's width is fixed at 256.
    "DPT on DINOv2, with projection": (lambda: on_dinov2(28, apply_layernorm=False, **PROJECTED), [(28, 28), (28, 56)]),
    "DPT, segmentation": (segmentation, [(96, 96), (160, 160)]),
    "Depth Anything": (depth_anything, [(70, 70), (70, 126), (42, 98)]),
    "Depth Anything, metric": (
        lambda: depth_anything(depth_estimation_type="metric", max_depth=20),
        [(70, 70), (70, 126)],
    ),
}


@torch.no_grad()
def shaken(peer, size, amount=0.05, middle=2, head="head"):
    "Other weights: nothing is left at 0 or 1, and the output is scaled to vary and seldom end at ReLU's 0."
    for name, parameter in peer.named_parameters():
        by_place = re.search("position_embeddings|pos_embed|cls_token|position_bias_table", name)
        parameter.add_((0.5 if by_place else amount) * torch.randn_like(parameter))
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    last, said = [module for module in getattr(peer, head).modules() if isinstance(module, nn.Conv2d)][-1], []
    hook = last.register_forward_hook(lambda module, inputs, output: said.append(output))
    peer.eval()(image_of(*size))
    hook.remove()
    spread = said[0].std()
    last.weight.div_(spread)
    last.bias.sub_(said[0].mean()).div_(spread).add_(middle)
    return peer


@dataclass
class Pair:
    name: str
    ours: DPT
    peer: nn.Module
    folder: Path
    sizes: list

    def answers(self, image):
        "Theirs and ours, `(B, C, H, W)`."
        said = self.peer((image - self.ours.mean) / self.ours.std)
        theirs = said.logits if hasattr(said, "logits") else said.predicted_depth[:, None]
        if theirs.shape[-2:] == image.shape[-2:]:
            return theirs, next(iter(self.ours(image).values()))
        # The peer doubles four times whatever the patch: patches of 14 give a map 16/14 as large as the image.
        # Ours is asked for that size.
        head = next(iter(self.ours.heads.values()))
        return theirs, head(self.ours.forward_features(image)["fused"], tuple(theirs.shape[-2:]))


def open_pair(name, make, sizes, folder, amount=0.05):
    torch.manual_seed(0)
    peer = shaken(make(), sizes[0], amount, middle=0 if "metric" in name else 2)
    peer.save_pretrained(folder)
    return Pair(name, load_checkpoint(folder), peer, folder, sizes)


@pytest.fixture(scope="module", params=PEERS)
def pair(request, tmp_path_factory):
    make, sizes = PEERS[request.param]
    return open_pair(request.param, make, sizes, tmp_path_factory.mktemp("peer"))


def difference(theirs, mine):
    assert theirs.shape == mine.shape and theirs.std() > 0.05 * theirs.abs().max()
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def smallest_cosine(model, theirs):
    "Over all used parameters, against gradients of the same names; where one is practically zero the other has to be."
    used = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    typical, cosines = torch.cat([theirs[name].flatten() for name in used]).square().mean().sqrt(), {}
    for name in used:
        parts = 3 if ".attn.qkv." in name else 1
        for mine, gradient in zip(used[name].chunk(parts), theirs[name].chunk(parts)):
            if gradient.square().mean().sqrt() < 1e-5 * typical:  # a key's bias has none: softmax does not see it
                assert mine.square().mean().sqrt() < 1e-4 * typical, name
            else:
                cosines[name] = min(
                    cosines.get(name, 1), torch.cosine_similarity(mine.flatten(), gradient.flatten(), dim=0).item()
                )
    worst = min(cosines, key=cosines.get)
    assert cosines[worst] >= 0.9999, worst
    return cosines[worst]


def gradients_as_saved(peer, folder):
    "The peer's gradients under the names it writes, which are not those it has in memory; NaN where there is none."
    values = {parameter: parameter.data for parameter in peer.parameters()}
    for parameter in values:
        parameter.data = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
    peer.save_pretrained(folder)
    for parameter, value in values.items():
        parameter.data = value
    return load_file(folder / "model.safetensors")


def test_the_same_predictions_and_gradients(pair, parity_rows, tmp_path):
    for size in pair.sizes:
        native = size == pair.sizes[0]
        pair.ours.zero_grad(), pair.peer.zero_grad()
        with torch.set_grad_enabled(native):
            theirs, mine = pair.answers(image_of(*size))
        found, cosine = difference(theirs.detach(), mine.detach()), None
        if native:
            weight = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
            (theirs * weight).sum().backward(), (mine * weight).sum().backward()
            saved, config = (
                gradients_as_saved(pair.peer, tmp_path),
                json.loads((pair.folder / "config.json").read_text()),
            )
            cosine = smallest_cosine(pair.ours, remap_state_dict(saved, key_rules("transformers", saved, config))[0])
            assert {
                name.split(".")[0] for name, parameter in pair.ours.named_parameters() if parameter.grad is None
            } <= {"auxiliary"}
        parity_rows.append((f"transformers: {pair.name}", size, found, cosine))
        assert found <= TOLERANCE, f"{size}: {found:.1e}"


def test_what_we_leave_out_is_what_receives_no_gradient(pair, tmp_path):
    pair.peer.zero_grad(set_to_none=True)
    pair.answers(image_of(*pair.sizes[0]))[0].sum().backward()
    unused = {
        name
        for name, gradient in gradients_as_saved(pair.peer, tmp_path).items()
        if gradient.isnan().all() and not name.startswith("auxiliary_head.")
    }
    assert unused == {
        name
        for name in open_checkpoint(pair.folder).dropped
        if not re.search(r"\.(running_mean|running_var|num_batches_tracked)$", name)
    }
    idle = {
        f"neck.fusion_stage.layers.0.residual_layer1.{part}"
        for part in ("convolution1", "convolution2", "batch_norm1", "batch_norm2")
    }
    assert {name.rsplit(".", 1)[0] for name in unused} <= idle | {
        "dpt.layernorm",
        "backbone.layernorm",
        "backbone.embeddings",
    }


def test_norms_keep_the_epsilon_that_the_folder_names(tmp_path):
    for changes, expected in [({}, 1e-12), (dict(layer_norm_eps=0.01), 0.01)]:
        ours = open_pair("", lambda: plain(**changes), [(96, 96)], tmp_path / str(expected)).ours
        assert {module.eps for module in ours.backbone.modules() if isinstance(module, nn.LayerNorm)} == {expected}


def test_training_gives_the_same_logits_auxiliary_logits_and_statistics(tmp_path, parity_rows):
    pair = open_pair("DPT, segmentation", *PEERS["DPT, segmentation"], tmp_path / "peer")
    pair.peer.train(), pair.ours.train()
    pair.peer.auxiliary_head.head[3].p = 0
    asked = []
    pair.peer.auxiliary_head.register_forward_hook(lambda module, inputs, output: asked.append(output))
    image = image_of(96, 96, batch=3)
    with torch.no_grad():
        logits = pair.peer((image - 0.5) / 0.5).logits
        fused = pair.ours.forward_features(image)["fused"]
        mine = pair.ours.heads["label"](fused, (96, 96))
        # transformers' auxiliary head reads the last fused map; isl-org/DPT's and ours the one before (`path_2`).
        # So the head alone is compared, on the last map.
        auxiliary = pair.ours.auxiliary([fused[-1], fused[-1]])
    assert difference(logits, mine) <= TOLERANCE
    found = difference(asked[0], auxiliary)
    parity_rows.append(("transformers: DPT, segmentation, auxiliary, training", (96, 96), found, None))
    assert found <= TOLERANCE
    pair.peer.save_pretrained(tmp_path / "after")
    after = load_checkpoint(tmp_path / "after").state_dict()
    statistics = [name for name in after if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) == 3 * 16
    for name in statistics:
        torch.testing.assert_close(pair.ours.state_dict()[name], after[name], rtol=1e-4, atol=1e-5)


SMP = [  # segmentation_models_pytorch's names → ours
    (r"encoder\.model\.", "backbone.vit."),
    (r"decoder\.projection_blocks\.(\d)\.project\.0\.", r"reassemble.\1.read.project."),
    (r"decoder\.reassemble_blocks\.(\d)\.project_to_out_channel\.", r"reassemble.\1.project."),
    (r"decoder\.reassemble_blocks\.(\d)\.upsample\.", r"reassemble.\1.resample."),
    (r"decoder\.reassemble_blocks\.(\d)\.project_to_feature_dim\.", r"reassemble.\1.to_features."),
    (
        r"decoder\.fusion_blocks\.(\d)\.residual_conv_block1\.conv_(\d)\.",
        r"decoder.steps.\1.lateral_unit.convolution\2.",
    ),
    (r"decoder\.fusion_blocks\.(\d)\.residual_conv_block2\.conv_(\d)\.", r"decoder.steps.\1.unit.convolution\2."),
    (
        r"decoder\.fusion_blocks\.(\d)\.residual_conv_block1\.batch_norm_(\d)\.",
        r"decoder.steps.\1.lateral_unit.norm\2.",
    ),
    (r"decoder\.fusion_blocks\.(\d)\.residual_conv_block2\.batch_norm_(\d)\.", r"decoder.steps.\1.unit.norm\2."),
    (r"decoder\.fusion_blocks\.(\d)\.project\.", r"decoder.steps.\1.out_conv."),
    (r"segmentation_head\.head\.0\.", "heads.label.convolution."),
    (r"segmentation_head\.head\.1\.", "heads.label.norm."),
    (r"segmentation_head\.head\.4\.", "heads.label.classify."),
]


def smp_names(tensors):
    "Under our names; blocks after the last tap, final norm, classifier, the deepest step's first unit have none."
    found = {}
    for name, tensor in tensors.items():
        if not re.match(
            r"encoder\.model\.(norm|head|blocks\.(8|9|10|11))\.|decoder\.fusion_blocks\.0\.residual_conv_block1\.", name
        ):
            renamed = [re.sub(f"^{pattern}", ours, name) for pattern, ours in SMP if re.match(pattern, name)]
            assert len(renamed) == 1, name
            found[renamed[0]] = tensor
    return found


@pytest.mark.parametrize(
    "readout, size", [("cat", (96, 96)), ("add", (96, 96)), ("ignore", (96, 96)), ("cat", (64, 224))]
)
def test_the_same_as_segmentation_models_pytorch(readout, size, parity_rows):
    torch.manual_seed(0)
    decoder = dict(
        decoder_readout=readout, decoder_intermediate_channels=[16, 32, 64, 96], decoder_fusion_channels=32, classes=7
    )
    peer = smp.DPT(
        "tu-vit_tiny_patch16_224", encoder_weights=None, encoder_output_indices=[1, 3, 4, 7], img_size=size, **decoder
    )
    shaken(peer, size, head="segmentation_head")
    # The peer also sends the deepest level through a unit of its own before the first step, isl-org/DPT and we do not:
    # made to add nothing, the rest coincides.
    deepest = peer.decoder.fusion_blocks[0].residual_conv_block1.batch_norm_2
    nn.init.zeros_(deepest.weight), nn.init.zeros_(deepest.bias)
    decoder = dict(
        readout=dict(cat="project").get(readout, readout),
        channels=[16, 32, 64, 96],
        features=32,
        heads={"label": dict(num_classes=7)},
        batch_norm=True,
    )
    ours = create_model("vit_tiny_patch16_224", taps=[1, 3, 4, 7], image_size=list(size), **decoder).eval()
    ours.load_state_dict(smp_names(peer.state_dict()))
    image = image_of(*size)
    theirs, mine = peer((image - ours.mean) / ours.std), ours(image)["label"]
    weight = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
    (theirs * weight).sum().backward(), (mine * weight).sum().backward()
    found = difference(theirs.detach(), mine.detach())
    cosine = smallest_cosine(ours, smp_names({name: parameter.grad for name, parameter in peer.named_parameters()}))
    parity_rows.append((f"segmentation_models_pytorch: DPT, readout {readout}", size, found, cosine))
    assert found <= TOLERANCE


def isl_org_in_float64(weights, image, heads, classes=None):
    """isl-org/DPT's order of operations (`vit.py`, `blocks.py`, `models.py`), with its names, in float64.

    Returns the prediction, and with `classes` also the auxiliary logits."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name, value):
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, value):
        return F.layer_norm(value, value.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def convolve(name, value, **arguments):
        return F.conv2d(value, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **arguments)

    def batch_norm(name, value):
        return F.batch_norm(
            value, *[weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        )

    def larger(value):
        return F.interpolate(value, scale_factor=2, mode="bilinear", align_corners=True)

    vit = "pretrained.model."
    patches = convolve(f"{vit}patch_embed.proj", (image.double() - 0.5) / 0.5, stride=16)
    rows, columns = patches.shape[-2:]
    places = weights[f"{vit}pos_embed"]
    side = int((places.shape[1] - 1) ** 0.5)
    stretched = F.interpolate(
        places[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear"
    )
    tokens = torch.cat([weights[f"{vit}cls_token"].expand(len(image), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + torch.cat([places[:, :1], stretched.flatten(2).transpose(1, 2)], 1)
    taps = []
    for block in range(4):
        name = f"{vit}blocks.{block}"
        batch, count, dim = tokens.shape
        query, key, value = (
            linear(f"{name}.attn.qkv", norm(f"{name}.norm1", tokens))
            .reshape(batch, count, 3, heads, dim // heads)
            .permute(2, 0, 3, 1, 4)
        )
        scores = (query @ key.transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
        tokens = tokens + linear(f"{name}.attn.proj", (scores @ value).transpose(1, 2).reshape(batch, count, dim))
        tokens = tokens + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens))))
        taps.append(tokens)
    levels = []
    for level, tap in enumerate(taps, 1):
        name = f"pretrained.act_postprocess{level}"
        read = F.gelu(linear(f"{name}.0.project.0", torch.cat([tap[:, 1:], tap[:, :1].expand_as(tap[:, 1:])], -1)))
        value = convolve(f"{name}.3", read.transpose(1, 2).reshape(batch, dim, rows, columns))
        if level < 3:
            value = F.conv_transpose2d(
                value, weights[f"{name}.4.weight"], weights[f"{name}.4.bias"], stride={1: 4, 2: 2}[level]
            )
        elif level == 4:
            value = convolve(f"{name}.4", value, stride=2, padding=1)
        levels.append(convolve(f"scratch.layer{level}_rn", value, padding=1))

    def unit(name, value):
        inside = value
        for place in (1, 2):
            inside = convolve(f"{name}.conv{place}", inside.relu(), padding=1)
            inside = batch_norm(f"{name}.bn{place}", inside) if classes else inside
        return inside + value

    path, paths = None, []
    for level in (4, 3, 2, 1):
        name = f"scratch.refinenet{level}"
        path = levels[3] if path is None else path + unit(f"{name}.resConfUnit1", levels[level - 1])
        path = convolve(f"{name}.out_conv", larger(unit(f"{name}.resConfUnit2", path)))
        paths.append(path)
    if classes:
        ends = [("scratch.output_conv", paths[3]), ("auxlayer", paths[2])]
        logits = [
            convolve(f"{name}.4", batch_norm(f"{name}.1", convolve(f"{name}.0", value, padding=1)).relu())
            for name, value in ends
        ]
        return larger(logits[0]), logits[1]
    value = convolve(
        "scratch.output_conv.2", larger(convolve("scratch.output_conv.0", path, padding=1)), padding=1
    ).relu()
    return convolve("scratch.output_conv.4", value).relu()


@pytest.mark.parametrize("size", [(96, 96), (96, 352)])
def test_the_same_as_a_slow_reference_in_float64_at_a_wide_size(size, tmp_path, parity_rows):
    weights = random_tensors(isl_org_vit())
    weights["scratch.output_conv.4.bias"] += 1
    torch.save(weights, tmp_path / "depth.pt")
    ours, image = load_checkpoint(tmp_path / "depth.pt"), image_of(*size)
    with torch.no_grad():
        theirs, mine = isl_org_in_float64(weights, image, heads=2), ours(image)["inverse_depth"]
    found = difference(theirs, mine)
    parity_rows.append(("float64 reference: isl-org/DPT", size, found, None))
    assert (theirs == 0).double().mean() < 0.5 and found <= TOLERANCE


@pytest.mark.parametrize("size", [(96, 96), (96, 352)])
def test_segmentation_and_its_auxiliary_logits_are_those_of_the_slow_reference(size, tmp_path, parity_rows):
    weights = random_tensors(isl_org_vit(classes=7))
    torch.save(weights, tmp_path / "labels.pt")
    ours, image = load_checkpoint(tmp_path / "labels.pt"), image_of(*size)
    ours.training = True  # only so that it gives its auxiliary logits: batch norms and dropout stay as in evaluation
    with torch.no_grad():
        theirs, mine = isl_org_in_float64(weights, image, heads=2, classes=7), ours(image)
    for name, expected in zip(("label", "label_auxiliary"), theirs):
        found = difference(expected, mine[name])
        parity_rows.append((f"float64 reference: isl-org/DPT, {name.replace('_', ' ')}", size, found, None))
        assert found <= TOLERANCE, name


def resnet_in_float64(weights, image, stages):
    """The hybrid's ResNet in float64, in the order of timm 0.4.5, which isl-org/DPT was trained with.

    See its `resnetv2.py` and `std_conv.py`.

    Returns the map of each stage."""

    def convolve(name, value, stride=1):
        weight = weights[f"{name}.weight"].double()
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        used = centred / ((centred**2).mean((1, 2, 3), keepdim=True) ** 0.5 + 1e-5)
        return F.conv2d(padded(value, weight.shape[-1], stride, 0.0), used, stride=stride)

    def padded(value, kernel, stride, filling):
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in value.shape[-2:])
        return F.pad(value, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=filling)

    def norm(name, value):
        return F.group_norm(value, 32, weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double(), 1e-5)

    resnet = "pretrained.model.patch_embed.backbone"
    value = norm(f"{resnet}.stem.norm", convolve(f"{resnet}.stem.conv", (image.double() - 0.5) / 0.5, 2)).relu()
    value, maps = F.max_pool2d(padded(value, 3, 2, -torch.inf), 3, 2), []
    for stage in range(stages):
        name, stride = f"{resnet}.stages.{stage}.blocks.0", 1 if stage == 0 else 2
        shortcut = norm(f"{name}.downsample.norm", convolve(f"{name}.downsample.conv", value, stride))
        inside = norm(f"{name}.norm1", convolve(f"{name}.conv1", value)).relu()
        inside = norm(f"{name}.norm2", convolve(f"{name}.conv2", inside, stride)).relu()
        value = (norm(f"{name}.norm3", convolve(f"{name}.conv3", inside)) + shortcut).relu()
        maps.append(value)
    return maps


@pytest.mark.parametrize("name", ["dpt_hybrid-midas-501f0c75.pt", "dpt_hybrid_kitti-cb926ef4.pt", "mine.pt"])
@pytest.mark.filterwarnings("ignore:mine.pt has the names and shapes")
def test_the_hybrids_resnet_is_that_of_the_code_it_was_trained_with(name, tmp_path, parity_rows):
    weights = random_tensors(isl_org_hybrid(dim=64, depth=12))
    for key in weights:
        if ".backbone." in key and weights[key].ndim == 4:  # channels of any deviation: epsilon matters to some
            spread = torch.logspace(-3, 0, len(weights[key])).reshape(-1, 1, 1, 1)
            weights[key] = spread * torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(len(key)))
    torch.save(weights, tmp_path / name)
    ours, image = load_checkpoint(tmp_path / name), image_of(96, 160)
    with torch.no_grad():
        taps = ours.forward_features(image)["taps"]
    for theirs, mine in zip(resnet_in_float64(weights, image, stages=2), taps):
        found = difference(theirs, mine)
        parity_rows.append(
            (f"float64 reference: timm 0.4.5's ResNet, stride {96 // mine.shape[-2]}", (96, 160), found, None)
        )
        assert found <= TOLERANCE


LARGE = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    backbone_out_indices=[5, 11, 17, 23],
)
LARGE |= dict(neck_hidden_sizes=[256, 512, 1024, 1024])
BASE = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    backbone_out_indices=[2, 5, 8, 11],
)
HYBRID = BASE | dict(
    is_hybrid=True,
    neck_hidden_sizes=[256, 512, 768, 768],
    backbone_featmap_shape=[1, 1024, 24, 24],
    neck_ignore_stages=[0, 1],
)


@pytest.mark.parametrize("name, arguments", [("dpt_base", BASE), ("dpt_large", LARGE), ("dpt_hybrid", HYBRID)])
def test_parameters_equal_the_peers_less_what_is_unused(name, arguments):
    with torch.device("meta"):
        peer = DPTForDepthEstimation(PeerConfig(image_size=384, **arguments))
        ours = create_model(name)
    used = [
        parameter
        for name, parameter in peer.named_parameters()
        if not name.startswith(("dpt.layernorm", "neck.fusion_stage.layers.0.residual_layer1"))
    ]
    assert len(used) < len(list(peer.parameters()))
    assert sum(parameter.numel() for parameter in ours.parameters()) == sum(parameter.numel() for parameter in used)


def full_depth_anything():
    backbone = Dinov2Config(
        image_size=518,
        patch_size=14,
        hidden_size=384,
        num_attention_heads=6,
        out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, make, sizes",
    [
        (
            "DPT-Base, full size",
            lambda: DPTForDepthEstimation(PeerConfig(image_size=384, **BASE)),
            [(384, 384), (480, 480)],
        ),
        ("DPT-Large, full size", lambda: DPTForDepthEstimation(PeerConfig(image_size=384, **LARGE)), [(384, 384)]),
        ("DPT-Hybrid, full size", lambda: DPTForDepthEstimation(PeerConfig(image_size=384, **HYBRID)), [(384, 384)]),
        ("Depth Anything V2 Small, full size", full_depth_anything, [(518, 518), (350, 1218)]),
    ],
)
def test_the_same_predictions_at_full_size(name, make, sizes, tmp_path, parity_rows):
    pair = open_pair(name, make, sizes, tmp_path / "peer", amount=0.01)
    shutil.rmtree(tmp_path / "peer")
    for size in sizes:
        with torch.no_grad():
            found = difference(*pair.answers(image_of(*size, batch=1)))
        parity_rows.append((f"transformers: {name}", size, found, None))
        assert found <= TOLERANCE, f"{size}: {found:.1e}"
