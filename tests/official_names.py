"""What other projects call their tensors, with shapes, written down by hand from their code: the tables of the library
are not asked."""

import torch


def layer(name, *shape, bias=True):
    "A linear layer, a convolution, or (one dimension) a norm."
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def batch_norm(name, width):
    return layer(name, width) | {
        f"{name}.running_mean": (width,),
        f"{name}.running_var": (width,),
        f"{name}.num_batches_tracked": (),
    }


def timm_block(name, dim):
    names = layer(f"{name}.norm1", dim) | layer(f"{name}.attn.qkv", 3 * dim, dim) | layer(f"{name}.attn.proj", dim, dim)
    return (
        names
        | layer(f"{name}.norm2", dim)
        | layer(f"{name}.mlp.fc1", 4 * dim, dim)
        | layer(f"{name}.mlp.fc2", dim, 4 * dim)
    )


def timm_vit(prefix, dim, depth, grid, patch=16):
    names = {f"{prefix}cls_token": (1, 1, dim), f"{prefix}pos_embed": (1, grid * grid + 1, dim)} | layer(
        f"{prefix}patch_embed.proj", dim, 3, patch, patch
    )
    for block in range(depth):
        names |= timm_block(f"{prefix}blocks.{block}", dim)
    return names | layer(f"{prefix}norm", dim)


def mmseg_vit(prefix, dim, depth, grid, patch=16):
    names = {f"{prefix}cls_token": (1, 1, dim), f"{prefix}pos_embed": (1, grid * grid + 1, dim)} | layer(
        f"{prefix}patch_embed.projection", dim, 3, patch, patch
    )
    for block in range(depth):
        name = f"{prefix}layers.{block}"
        names |= {
            f"{name}.attn.attn.in_proj_weight": (3 * dim, dim),
            f"{name}.attn.attn.in_proj_bias": (3 * dim,),
        } | layer(f"{name}.attn.attn.out_proj", dim, dim)
        names |= (
            layer(f"{name}.ln1", dim)
            | layer(f"{name}.ln2", dim)
            | layer(f"{name}.ffn.layers.0.0", 4 * dim, dim)
            | layer(f"{name}.ffn.layers.1", dim, 4 * dim)
        )
    return names


def residual_unit(name, features, normed):
    "isl-org/DPT's; with batch norm its convolutions have no bias."
    names = layer(f"{name}.conv1", features, features, 3, 3, bias=not normed) | layer(
        f"{name}.conv2", features, features, 3, 3, bias=not normed
    )
    return names | (batch_norm(f"{name}.bn1", features) | batch_norm(f"{name}.bn2", features) if normed else {})


def scratch(prefix, channels, features, normed=False):
    names = {}
    for level in (1, 2, 3, 4):
        names |= layer(f"{prefix}layer{level}_rn", features, channels[level - 1], 3, 3, bias=False)
        names |= layer(f"{prefix}refinenet{level}.out_conv", features, features, 1, 1)
        for unit in (1, 2):
            names |= residual_unit(f"{prefix}refinenet{level}.resConfUnit{unit}", features, normed)
    return names


def act_postprocess(dim, channels, first):
    names = {}
    for level in range(first, 5):
        name, width = f"pretrained.act_postprocess{level}", channels[level - 1]
        names |= layer(f"{name}.0.project.0", dim, 2 * dim) | layer(f"{name}.3", width, dim, 1, 1)
        if level != 3:
            size = {1: 4, 2: 2, 4: 3}[level]
            names |= layer(f"{name}.4", width, width, size, size)
    return names


def depth_output(features):
    names = layer("scratch.output_conv.0", features // 2, features, 3, 3)
    return names | layer("scratch.output_conv.2", 32, features // 2, 3, 3) | layer("scratch.output_conv.4", 1, 32, 1, 1)


def label_output(name, features, classes):
    return (
        layer(f"{name}.0", features, features, 3, 3, bias=False)
        | batch_norm(f"{name}.1", features)
        | layer(f"{name}.4", classes, features, 1, 1)
    )


def isl_org(backbone, reassembled, channels, features, classes=None):
    names = backbone | reassembled | scratch("scratch.", channels, features, normed=classes is not None)
    if classes is None:
        return names | depth_output(features)
    return names | label_output("scratch.output_conv", features, classes) | label_output("auxlayer", features, classes)


def isl_org_vit(dim=128, depth=4, grid=6, channels=(16, 32, 64, 128), features=32, classes=None):
    "isl-org/DPT `DPTDepthModel`, or with `classes` `DPTSegmentationModel`, on timm's ViT with its classifier."
    vit = timm_vit("pretrained.model.", dim, depth, grid) | layer("pretrained.model.head", 1000, dim)
    return isl_org(vit, act_postprocess(dim, channels, 1), channels, features, classes)


def isl_org_hybrid(
    dim=128,
    depth=4,
    grid=6,
    channels=(128, 256, 64, 96),
    features=32,
    classes=None,
    layers=(1, 1, 1),
    widths=(128, 256, 512),
    stem=32,
):
    "The same on timm's ViT behind a ResNet."
    vit = timm_vit("pretrained.model.", dim, depth, grid) | layer("pretrained.model.head", 1000, dim)
    vit |= layer("pretrained.model.patch_embed.proj", dim, widths[-1], 1, 1)
    resnet, before = "pretrained.model.patch_embed.backbone", stem
    vit |= layer(f"{resnet}.stem.conv", stem, 3, 7, 7, bias=False) | layer(f"{resnet}.stem.norm", stem)
    for stage, (count, width) in enumerate(zip(layers, widths)):
        for unit in range(count):
            name, inside = f"{resnet}.stages.{stage}.blocks.{unit}", width // 4
            if unit == 0:
                vit |= layer(f"{name}.downsample.conv", width, before, 1, 1, bias=False) | layer(
                    f"{name}.downsample.norm", width
                )
            vit |= layer(f"{name}.conv1", inside, before, 1, 1, bias=False) | layer(f"{name}.norm1", inside)
            vit |= layer(f"{name}.conv2", inside, inside, 3, 3, bias=False) | layer(f"{name}.norm2", inside)
            vit |= layer(f"{name}.conv3", width, inside, 1, 1, bias=False) | layer(f"{name}.norm3", width)
            before = width
    return isl_org(vit, act_postprocess(dim, channels, 3), channels, features, classes)


def midas_beit(dim=128, depth=4, grid=6, channels=(16, 32, 64, 128), features=32):
    "MiDaS 3.1 on timm's BEiT of 2022, which kept its table of places in the file."
    prefix, heads = "pretrained.model.", dim // 64
    names = {f"{prefix}cls_token": (1, 1, dim)} | layer(f"{prefix}patch_embed.proj", dim, 3, 16, 16)
    names |= layer(f"{prefix}fc_norm", dim) | layer(f"{prefix}head", 1000, dim)
    for block in range(depth):
        name = f"{prefix}blocks.{block}"
        names |= {key: shape for key, shape in timm_block(name, dim).items() if key != f"{name}.attn.qkv.bias"}
        names |= {
            f"{name}.gamma_1": (dim,),
            f"{name}.gamma_2": (dim,),
            f"{name}.attn.q_bias": (dim,),
            f"{name}.attn.v_bias": (dim,),
        }
        names |= {f"{name}.attn.relative_position_bias_table": ((2 * grid - 1) ** 2 + 3, heads)}
        names |= {f"{name}.attn.relative_position_index": (grid * grid + 1, grid * grid + 1)}
    return isl_org(names, act_postprocess(dim, channels, 1), channels, features)


def midas_swin(second, dim=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4, grid=16, features=32):
    "MiDaS 3.1 on timm's Swin or Swin V2 of 2022, which kept the masks of shifted windows in the file."
    prefix, widths = "pretrained.model.", [dim * 2**stage for stage in range(4)]
    names = layer(f"{prefix}patch_embed.proj", dim, 3, 4, 4) | layer(f"{prefix}patch_embed.norm", dim)
    names |= layer(f"{prefix}norm", widths[-1]) | layer(f"{prefix}head", 1000, widths[-1])
    for stage, (depth, width, count) in enumerate(zip(depths, widths, heads)):
        side = grid // 2**stage
        area, windows = min(window, side) ** 2, (side // min(window, side)) ** 2
        if stage < 3:
            downsample = f"{prefix}layers.{stage}.downsample"
            names |= layer(f"{downsample}.reduction", 2 * width, 4 * width, bias=False) | layer(
                f"{downsample}.norm", (2 if second else 4) * width
            )
        for block in range(depth):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            names |= timm_block(name, width)
            if block % 2 and side > window:
                names[f"{name}.attn_mask"] = (windows, area, area)
            if second:
                del names[f"{name}.attn.qkv.bias"]
                names |= {
                    f"{name}.attn.logit_scale": (count, 1, 1),
                    f"{name}.attn.q_bias": (width,),
                    f"{name}.attn.v_bias": (width,),
                }
                names |= layer(f"{name}.attn.cpb_mlp.0", 512, 2) | layer(
                    f"{name}.attn.cpb_mlp.2", count, 512, bias=False
                )
            else:
                table = ((2 * min(window, side) - 1) ** 2, count)
                names |= {
                    f"{name}.attn.relative_position_bias_table": table,
                    f"{name}.attn.relative_position_index": (area, area),
                }
    return isl_org(names, {}, widths, features)


def depth_anything(dim=128, depth=4, grid=5, channels=(16, 32, 64, 128), features=32):
    "Depth Anything V1, V2 and V2 metric."
    names = timm_vit("pretrained.", dim, depth, grid, patch=14) | {"pretrained.mask_token": (1, dim)}
    for block in range(depth):
        names |= {f"pretrained.blocks.{block}.ls1.gamma": (dim,), f"pretrained.blocks.{block}.ls2.gamma": (dim,)}
    for level, width in enumerate(channels):
        names |= layer(f"depth_head.projects.{level}", width, dim, 1, 1)
        if level != 2:
            size = {0: 4, 1: 2, 3: 3}[level]
            names |= layer(f"depth_head.resize_layers.{level}", width, width, size, size)
    names |= scratch("depth_head.scratch.", channels, features) | layer(
        "depth_head.scratch.output_conv1", features // 2, features, 3, 3
    )
    return (
        names
        | layer("depth_head.scratch.output_conv2.0", 32, features // 2, 3, 3)
        | layer("depth_head.scratch.output_conv2.2", 1, 32, 1, 1)
    )


def depth_anything_3(dim=128, depth=4, grid=5, channels=(16, 32, 64, 128), features=32):
    "Depth Anything 3 for one image, mono or metric: the deepest fusion has no first unit, and there is no mask token."
    kept = {
        name: shape
        for name, shape in depth_anything(dim, depth, grid, channels, features).items()
        if "refinenet4.resConfUnit1" not in name and "mask_token" not in name
    }
    names = {
        ("backbone." + name if name.startswith("pretrained.") else name.removeprefix("depth_")): shape
        for name, shape in kept.items()
    }
    for place, shape in (("0", (32, features // 2, 3, 3)), ("2", (1, 32, 1, 1))):
        names |= layer(f"head.scratch.sky_output_conv2.{place}", *shape)
    return names


def mmseg(dim=128, depth=4, grid=6, channels=(16, 32, 64, 128), features=32, classes=None):
    "The Toolbox's depth model, or with `classes` mmsegmentation's: fusion blocks count from the deepest."
    names, head = mmseg_vit("backbone.", dim, depth, grid), "decode_head."
    for level, width in enumerate(channels):
        reassemble = f"{head}reassemble_blocks."
        names |= layer(f"{reassemble}projects.{level}.conv", width, dim, 1, 1) | layer(
            f"{reassemble}readout_projects.{level}.0", dim, 2 * dim
        )
        names |= layer(f"{head}convs.{level}.conv", features, width, 3, 3, bias=False)
        if level != 2:
            size = {0: 4, 1: 2, 3: 3}[level]
            names |= layer(f"{reassemble}resize_layers.{level}", width, width, size, size)
        names |= layer(f"{head}fusion_blocks.{level}.project.conv", features, features, 1, 1)
        for unit in (1, 2) if level else (2,):
            for place in (1, 2):
                name = f"{head}fusion_blocks.{level}.res_conv_unit{unit}.conv{place}"
                names |= layer(f"{name}.conv", features, features, 3, 3, bias=False) | (
                    batch_norm(f"{name}.bn", features) if classes else {}
                )
    if classes:
        names |= layer(f"{head}project.conv", features, features, 3, 3, bias=False) | batch_norm(
            f"{head}project.bn", features
        )
        return names | layer(f"{head}conv_seg", classes, features, 1, 1)
    names |= layer(f"{head}project.conv", features, features, 3, 3) | layer(
        f"{head}conv_depth.head.0", features // 2, features, 3, 3
    )
    return (
        names
        | layer(f"{head}conv_depth.head.2", 32, features // 2, 3, 3)
        | layer(f"{head}conv_depth.head.4", 1, 32, 1, 1)
    )


def random_tensors(names, seed=0):
    "Tensors of these shapes that make a network whose output varies: gains near one, variances positive."
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in names.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            noise = torch.tensor(7)
        elif name.endswith(("relative_position_index", "attn_mask")):
            noise = torch.zeros(shape)  # can be computed, and is
        elif name.endswith("running_var"):
            noise = noise.abs() + 0.5
        elif name.endswith("weight") and len(shape) > 1:
            noise = noise / torch.tensor(shape[1:]).prod().sqrt()
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith(("bias", "running_mean", "gamma_1", "gamma_2")):
            noise = 0.1 * noise
        tensors[name] = noise
    return tensors
