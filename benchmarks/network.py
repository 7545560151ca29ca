"""Forward passes of DPT beside transformers' DPT, in turn in the same process: `python benchmarks/network.py [--models
dpt_base] [--batch 1]`.

Prints the median time of each and the ratio theirs / ours (above 1: ours is faster), on CUDA where there is one.
Random weights; both networks have the same layers (tests/test_parity.py shows that they compute the same function).
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import DPTConfig, DPTForDepthEstimation

from dpt_nb.network.zoo import create_model

PEERS = {
    "dpt_base": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        backbone_out_indices=[2, 5, 8, 11],
        neck_hidden_sizes=[96, 192, 384, 768],
    ),
    "dpt_large": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        backbone_out_indices=[5, 11, 17, 23],
        neck_hidden_sizes=[256, 512, 1024, 1024],
    ),
    "dpt_hybrid": dict(
        is_hybrid=True,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        backbone_out_indices=[2, 5, 8, 11],
        neck_hidden_sizes=[256, 512, 768, 768],
        backbone_featmap_shape=[1, 1024, 24, 24],
        neck_ignore_stages=[0, 1],
    ),
}


def seconds(call, device):
    "One call, the device's work included."
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name, batch, dtype, repeats, device):
    "Median seconds of ours and theirs, called in turn."
    torch.manual_seed(0)
    ours, theirs = (
        create_model(name).to(device, dtype).eval(),
        DPTForDepthEstimation(DPTConfig(image_size=384, **PEERS[name])).to(device, dtype).eval(),
    )
    image = torch.rand(batch, 3, 384, 384, device=device, dtype=dtype)
    spans = {ours: [], theirs: []}
    with torch.inference_mode():
        for round in range(repeats + 2):
            for model in spans:
                span = seconds(lambda: model(image), device)
                if round >= 2:
                    spans[model].append(span)
    return statistics.median(spans[ours]), statistics.median(spans[theirs])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dpt_base"], choices=PEERS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, 384×384")
    print(f"{'model':12}{'batch':>6}{'type':>10}{'ours ms':>10}{'theirs ms':>11}{'theirs/ours':>13}")
    for name in chosen.models:
        for batch in chosen.batch:
            for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
                ours, theirs = measure(name, batch, dtype, chosen.repeats, device)
                print(
                    f"{name:12}{batch:6}{str(dtype)[6:]:>10}{1000 * ours:10.1f}{1000 * theirs:11.1f}"
                    f"{theirs / ours:13.2f}",
                    flush=True,
                )
