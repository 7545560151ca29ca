"DPT against transformers' DPT with the same random weights: the same numbers, the same gradients, and the same unused parts."
import pytest
import torch
from transformers import DPTConfig as PeerConfig
from transformers import DPTForDepthEstimation

from dpt_nb.models import create_model

SMALL = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, backbone_out_indices=[0, 1, 2, 3],
             neck_hidden_sizes=[8, 16, 32, 64], image_size=96, fusion_hidden_size=32, layer_norm_eps=1e-6, attn_implementation="eager")
LAYER = {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2"}


def peer_tensors(peer):
    "The peer's parameters under our names; what has no counterpart is left out."
    theirs, ours = dict(peer.named_parameters()), {}
    for name in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias"):
        short = {"cls_token": "cls_token", "position_embeddings": "pos_embed"}.get(name, name.replace("patch_embeddings.projection", "patch_embed.proj"))
        ours[f"backbone.vit.{short}"] = theirs[f"dpt.embeddings.{name}"]
    for index in range(SMALL["num_hidden_layers"]):
        layer, block = f"dpt.encoder.layer.{index}.", f"backbone.vit.blocks.{index}."
        for kind in ("weight", "bias"):
            ours[f"{block}attn.qkv.{kind}"] = [theirs[f"{layer}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            ours |= {f"{block}{short}.{kind}": theirs[f"{layer}{long}.{kind}"] for long, short in LAYER.items()}
    for name, tensor in theirs.items():
        words = name.split(".")
        if name.startswith("neck.reassemble_stage.readout_projects"):
            ours[f"reassemble.{words[3]}.read.project.{words[-1]}"] = tensor
        elif name.startswith("neck.reassemble_stage.layers"):
            ours[f"reassemble.{words[3]}.{dict(projection='reduce', resize='resample')[words[4]]}.{words[-1]}"] = tensor
        elif name.startswith("neck.convs"):
            ours[f"reassemble.{words[2]}.widen.weight"] = tensor
        elif name.startswith("neck.fusion_stage.layers") and not ("layers.0.residual_layer1" in name):
            part = dict(projection="mix", residual_layer1="lateral_unit", residual_layer2="unit")[words[4]]
            ours[".".join(["decoder.steps", words[3], part, *words[5:]])] = tensor
        elif name.startswith("head.head"):
            ours[f"heads.inverse_depth.convolution{int(words[2]) // 2 + 1}.{words[-1]}"] = tensor
    return ours


def joined(tensors):
    return torch.cat(tensors) if isinstance(tensors, list) else tensors


@pytest.fixture(scope="module", params=["project", "add", "ignore"])
def pair(request):
    torch.manual_seed(0)
    peer = DPTForDepthEstimation(PeerConfig(**SMALL, readout_type=request.param)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = create_model("vit_tiny_patch16_224", heads={"inverse_depth": {}}, features=32, channels=[8, 16, 32, 64], taps=[0, 1, 2, 3], image_size=[96, 96],
                        readout=request.param, backbone_arguments=dict(embed_dim=64, depth=4, num_heads=2)).eval()
    tensors = peer_tensors(peer)
    ours.load_state_dict({name: joined(tensor).detach() for name, tensor in tensors.items()})
    return ours, peer, tensors


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (64, 64)])  # square and even: the peer takes no other
def test_the_same_prediction(pair, size):
    ours, peer, _ = pair
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = ours(image)["inverse_depth"][:, 0], peer((image - 0.5) / 0.5).predicted_depth
    assert theirs.abs().max() > 0 and (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_the_same_gradients(pair):
    ours, peer, tensors = pair
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(2))
    ours.zero_grad(), peer.zero_grad()
    (ours(image)["inverse_depth"][:, 0] * weight).sum().backward()
    (peer((image - 0.5) / 0.5).predicted_depth * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        theirs = tensors[name]
        gradient = torch.cat([part.grad for part in theirs]) if isinstance(theirs, list) else theirs.grad
        if gradient.norm() < 1e-6 * gradient.numel() ** 0.5:  # a key's bias has none: softmax does not see it
            assert parameter.grad.norm() < 1e-4 * gradient.numel() ** 0.5, name
            continue
        assert torch.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), dim=0) > 0.9999, name


def test_what_we_leave_out_is_what_receives_no_gradient(pair):
    _, peer, _ = pair
    peer.zero_grad(set_to_none=True)
    peer(torch.rand(1, 3, 96, 96)).predicted_depth.sum().backward()
    unused = {name for name, parameter in peer.named_parameters() if parameter.grad is None}
    assert {".".join(name.split(".")[:-1]) for name in unused} == {"dpt.layernorm", "neck.fusion_stage.layers.0.residual_layer1.convolution1", "neck.fusion_stage.layers.0.residual_layer1.convolution2"}


@pytest.mark.parametrize("name, arguments", [
    ("dpt_base", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, backbone_out_indices=[2, 5, 8, 11], neck_hidden_sizes=[96, 192, 384, 768])),
    ("dpt_large", dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, backbone_out_indices=[5, 11, 17, 23], neck_hidden_sizes=[256, 512, 1024, 1024])),
    ("dpt_hybrid", dict(is_hybrid=True, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, backbone_out_indices=[2, 5, 8, 11], neck_hidden_sizes=[256, 512, 768, 768],
                        backbone_featmap_shape=[1, 1024, 24, 24], neck_ignore_stages=[0, 1])),
])
def test_parameters_equal_the_peers_less_what_is_unused(name, arguments):
    with torch.device("meta"):
        peer = DPTForDepthEstimation(PeerConfig(image_size=384, **arguments))
        ours = create_model(name)
    unused = sum(parameter.numel() for name, parameter in peer.named_parameters() if name.startswith(("dpt.layernorm", "neck.fusion_stage.layers.0.residual_layer1")))
    assert sum(parameter.numel() for parameter in ours.parameters()) == sum(parameter.numel() for parameter in peer.parameters()) - unused
