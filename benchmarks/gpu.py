"""DPT on a GPU in every mode that one can choose, beside transformers and segmentation_models_pytorch.

    python benchmarks/gpu.py [--models dpt_base] [--batch 1 16] [--repeats 9]

Three tables: the machine's ceiling (a large matrix product in each type); forward passes; a training step (forward,
L1, backward, AdamW). Each line says median milliseconds, images a second, the share of the measured ceiling of its
type, the most memory that the network, its optimizer and one pass or step hold, and, for forward passes, how far the
answer is from the same network's float32. All modes of one batch size take turns, so that the machine's moods hit all
alike. Random weights. Compiling some fourteen networks takes many minutes; where time is short, one --batch a call.
`--device cpu --models dpt_tiny --repeats 1` shows that everything runs, and measures nothing of interest; `--without
compiled` leaves out the modes whose name holds that word.
"""

import argparse
import statistics
import time
from functools import partial

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import transformers
from network import PEERS
from torch.utils.flop_counter import FlopCounterMode
from transformers import DPTConfig, DPTForDepthEstimation

from dpt_nb.network.backbone import Tap
from dpt_nb.network.zoo import config_for, create_model

SIZE = {"dpt_tiny": (96, 128)}  # pixels; 384×384 for all others


def wait(device):
    "Until the device has done what it was told."
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call, device):
    "One call, the device's work included."
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def take_turns(calls, device, repeats, unseen=3):
    "Median seconds of each call, after some that are not counted; none for what fails, with the reason printed."
    spans = {name: [] for name in calls}
    for turn in range(repeats + unseen):
        for name in list(spans):
            try:
                span = seconds(calls[name], device)
            except Exception as error:  # a mode that this machine or version cannot run
                reason = (str(error).strip() or "no reason was given").splitlines()[0][:150]
                print(f"    {name}: not measured, {type(error).__name__}: {reason}")
                del spans[name]
                continue
            if turn >= unseen:
                spans[name].append(span)
    return {name: statistics.median(values) for name, values in spans.items()}


def peak_memory(call, held, device):
    "MiB in use at most during a call: what it takes, and the tensors that it works with. 0 where nobody counts."
    if device != "cuda":
        return 0.0
    wait(device)
    before = torch.cuda.memory_allocated()  # other networks too
    torch.cuda.reset_peak_memory_stats()
    call()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in held)) / 2**20


def ceiling(dtype, device, repeats):
    "TFLOP/s of a large matrix product."
    side = 8192 if device == "cuda" else 1024
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    span = take_turns({str(dtype): lambda: one @ other}, device, repeats)
    return 2 * side**3 / next(iter(span.values())) / 1e12


def part_of(tap, rows):
    "Some images of what a trunk gives."
    return Tap(tap.tokens[rows], tap.prefix[rows], tap.grid) if isinstance(tap, Tap) else tap[rows]


def to_type(tap, dtype):
    "What a trunk gives, in another type."
    return Tap(tap.tokens.to(dtype), tap.prefix.to(dtype), tap.grid) if isinstance(tap, Tap) else tap.to(dtype)


def trunk_in_bfloat16(model, image):
    "The trunk in bfloat16; reassembling, fusion and heads, in which rounding shows, in float32."
    with torch.autocast(image.device.type, torch.bfloat16):
        taps = model.taps_of(image)
    return model(image, taps=[to_type(tap, image.dtype) for tap in taps])


def decoder_in_parts(model, image, size=4):
    "The trunk for the whole batch; the decoder, whose maps are large, for a few images at a time."
    taps = model.taps_of(image)
    rows = [slice(start, start + size) for start in range(0, len(image), size)]
    found = [model(image[each], taps=[part_of(tap, each) for tap in taps]) for each in rows]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def ours(name, device, dtype):
    "A network with the same random weights each time."
    torch.manual_seed(0)
    model = create_model(name)
    with torch.no_grad():
        [
            each.add_(1) for each in model.heads.parameters() if each.shape == (1,)
        ]  # above 0, where ReLU cuts nothing off
    return model.to(device, dtype).eval()


def channels_innermost(model):
    "The decoder and the heads, which are convolutions; the trunk is matrix products."
    for part in (model.reassemble, model.decoder, model.heads):
        part.to(memory_format=torch.channels_last)
    return model


def our_modes(name, device):
    "Mode → (network, how it is asked, type)."
    full, half = ours(name, device, torch.float32), ours(name, device, torch.bfloat16)
    last = channels_innermost(ours(name, device, torch.bfloat16))
    modes = {"ours, float32": (full, None, torch.float32), "ours, bfloat16": (half, None, torch.bfloat16)}
    modes["ours, bfloat16, channels_last decoder"] = (last, None, torch.bfloat16)
    modes["ours, bfloat16, decoder in parts of 4"] = (half, decoder_in_parts, torch.bfloat16)
    modes["ours, bfloat16 trunk, float32 decoder"] = (full, trunk_in_bfloat16, torch.float32)
    modes["ours, bfloat16, compiled"] = (torch.compile(half), None, torch.bfloat16)
    modes["ours, bfloat16, channels_last, compiled"] = (torch.compile(last), None, torch.bfloat16)
    if device == "cuda":
        modes["ours, bfloat16, CUDA graphs"] = (torch.compile(half, mode="reduce-overhead"), None, torch.bfloat16)
        graphs = torch.compile(last, mode="reduce-overhead")
        modes["ours, bfloat16, channels_last, CUDA graphs"] = (graphs, None, torch.bfloat16)
    return modes


def theirs(name, device, dtype):
    "transformers' network of the same layers."
    return DPTForDepthEstimation(DPTConfig(image_size=384, **PEERS[name])).to(device, dtype).eval()


def their_modes(name, device):
    "As of `our_modes`."
    if name not in PEERS:
        return {}
    full, half = theirs(name, device, torch.float32), theirs(name, device, torch.bfloat16)
    modes = {
        "transformers, float32": (full, None, torch.float32),
        "transformers, bfloat16": (half, None, torch.bfloat16),
    }
    modes["transformers, bfloat16, compiled"] = (torch.compile(half), None, torch.bfloat16)
    if device == "cuda":
        graphs = torch.compile(half, mode="reduce-overhead")
        modes["transformers, bfloat16, CUDA graphs"] = (graphs, None, torch.bfloat16)
    return modes


def flops(model, image):
    "Multiplications and additions of a forward pass, counted apart."
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops()


def asked(model, how, image):
    "A forward pass without gradients."
    with torch.inference_mode():
        return how(model, image) if how else model(image)


def deviation(answer, expected):
    "The largest difference, as a share of the range."
    head = next(iter(expected))
    return ((answer[head].float() - expected[head]).abs().max() / (expected[head].max() - expected[head].min())).item()


def kept(modes, without):
    "Modes whose name holds none of some words."
    return {mode: how for mode, how in modes.items() if not any(word in mode for word in without)}


def forget_compiled():
    "Else programs of other networks and batch sizes count towards the limit beyond which PyTorch compiles no more."
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def measure_forward(name, batch, device, repeats, ceilings, without):
    "A table. A CUDA graph has its memory from the beginning, so nothing is said of it."
    forget_compiled()
    image = torch.rand(batch, 3, *SIZE.get(name, (384, 384)), device=device)
    every = our_modes(name, device) | their_modes(name, device)
    plain, modes = every["ours, float32"][0], kept(every, without)
    calls = {mode: partial(asked, net, how, image.to(dtype)) for mode, (net, how, dtype) in modes.items()}
    work, expected = flops(plain, image), asked(plain, None, image)
    for mode, span in take_turns(calls, device, repeats).items():
        share = work / span / 1e12 / ceilings["float32" if "float32" in mode and "trunk" not in mode else "bfloat16"]
        far = f"{deviation(calls[mode](), expected):9.1e}" if mode.startswith("ours") else " " * 9
        memory = f"{peak_memory(calls[mode], modes[mode][0].parameters(), device):9.0f}"
        memory = f"{'–':>9}" if "graphs" in mode else memory
        print(
            f"{name:11}{batch:4}  {mode:44}{1e3 * span:9.2f}{batch / span:9.1f}{share:8.0%}{memory}{far}",
            flush=True,
        )


def step_of(network, predict, fused):
    "A training step, to be called; the network; its optimizer."
    # None and not False, with which PyTorch would move one tensor at a time
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=fused or None)

    def step(image, truth):
        with torch.autocast(image.device.type, torch.bfloat16):
            predicted = predict(image)
        F.l1_loss(predicted.float().reshape(truth.shape), truth).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, network, optimizer


def training_steps(name, device):
    "Way → what `step_of` gives. Networks in training mode, matrix products in bfloat16."
    head = next(iter(config_for(name).heads))
    plain, fused, compiled = (ours(name, device, torch.float32).train() for _ in range(3))
    steps = {"ours": step_of(plain, lambda image: plain(image)[head], False)}
    steps["ours, fused AdamW"] = step_of(fused, lambda image: fused(image)[head], True)
    fast = torch.compile(compiled)
    steps["ours, fused AdamW, compiled"] = step_of(compiled, lambda image: fast(image)[head], True)
    if name in PEERS:
        for way in ("transformers", "transformers, fused AdamW"):
            peer = theirs(name, device, torch.float32).train()
            steps[way] = step_of(peer, lambda image, peer=peer: peer(image).predicted_depth, "fused" in way)
    if name == "dpt_base":
        layers = dict(encoder_output_indices=[2, 5, 8, 11], decoder_intermediate_channels=(96, 192, 384, 768))
        other = smp.DPT("tu-vit_base_patch16_384", encoder_weights=None, **layers).to(device).train()
        steps["smp (batch norm, a head at half size)"] = step_of(other, other, False)
    return steps


def held_by(network, optimizer):
    "The tensors that stay between two steps; gradients do not."
    states = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    return [*network.parameters(), *states]


def measure_training(name, batch, device, repeats, ceilings, without):
    "A table. A backward pass is counted as two forward passes, of the network's own operations."
    forget_compiled()
    size = SIZE.get(name, (384, 384))
    image, truth = torch.rand(batch, 3, *size, device=device), torch.rand(batch, 1, *size, device=device)
    ways = kept(training_steps(name, device), without)
    calls = {way: partial(step, image, truth) for way, (step, *_) in ways.items()}
    for way, span in take_turns(calls, device, repeats).items():
        _, network, optimizer = ways[way]
        share = 3 * flops(network, image) / span / 1e12 / ceilings["bfloat16"]
        memory = peak_memory(calls[way], held_by(network, optimizer), device)
        print(f"{name:11}{batch:4}  {way:44}{1e3 * span:9.2f}{batch / span:9.1f}{share:8.0%}{memory:9.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dpt_base"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--without", nargs="+", default=[])
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu shows that the script runs.")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions as in matrix products
    machine = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, smp {smp.__version__}")
    types = dict(float32=torch.float32, bfloat16=torch.bfloat16)
    ceilings = {name: ceiling(dtype, chosen.device, chosen.repeats) for name, dtype in types.items()}
    print("ceiling, TFLOP/s: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()))
    print(f"{'model':11}{'batch':>4}  {'':44}{'ms':>9}{'images/s':>9}{'ceiling':>8}{'MiB':>9}{'off by':>9}")
    for measure in (measure_forward, measure_training):
        for name in chosen.models:
            for batch in chosen.batch:
                measure(name, batch, chosen.device, chosen.repeats, ceilings, chosen.without)


if __name__ == "__main__":
    main()
