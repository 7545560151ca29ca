"""Two processes train as one: the same losses, shared batch norms, an exact resume after any end, and no process left
behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import alive, changes, command_here, wait_until
from forked import command_forked, end_together, forked_ranks
from safetensors.torch import load_file

from dpt_nb.data.folder import make_folder
from dpt_nb.data.registry import open_dataset
from dpt_nb.data.sampling import ResumableSampler
from dpt_nb.images.images import write_label

pytestmark = pytest.mark.usefixtures("no_figures")
TWELVE = [
    "loop.steps=12",
    "data.batch_size=4",
    "data.train.count=16",
    "data.held_out.count=3",
    "keep.validate_every=12",
    "keep.save_steps=3",
    "optimizer.lr=2e-4",
]
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def words(recipe, out, data, *assignments, workers=0):
    "What each process is told."
    told = [recipe, "--cpu", "--workers", workers, "--out", out, "--data-root", data]
    return [*map(str, told), *changes(*TWELVE, *assignments)]


def typed(processes, *told):
    "A run in a number of processes, as one types it."
    launcher = Path(sys.executable).parent / "torchrun"
    return [launcher, "--standalone", "--nproc-per-node", str(processes), "-m", "dpt_nb.training.run", *told]


def begin(processes, *told):
    "The same in forks of a process that has torch already."
    return forked_ranks(processes, sys.executable, "-m", "dpt_nb.training.run", *told, folder=".")


def run(processes, recipe, out, data, *assignments, resume=False):
    "Train to the end, or fail with what was said."
    end_together(begin(processes, *words(recipe, out, data, *assignments), *(["--resume"] if resume else [])))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "One process and two on the same recipe, for depth alone."
    folder = tmp_path_factory.mktemp("distributed")
    for processes in (1, 2):
        run(processes, "rooms_tiny", folder / f"with{processes}", folder / "data")
    return folder


def follow(folder):
    "The second run's losses are the first's, and so are the figures of its share-wise judging."
    one, two = rows(folder / "with1"), rows(folder / "with2")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 13))
    assert max(abs(first["loss"] - second["loss"]) for first, second in zip(one, two)) <= 1e-5
    reports = [json.loads((folder / f"with{processes}" / "report.json").read_text()) for processes in (1, 2)]
    assert [report["processes"] for report in reports] == [1, 2] and [report["images"] for report in reports] == [3, 3]
    assert reports[0]["abs_rel"] == pytest.approx(reports[1]["abs_rel"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_follow_one(pair):
    follow(pair)


@pytest.mark.slow
def test_two_processes_begun_by_torchrun_are_the_same(pair, tmp_path):
    torchrun = typed(2, *words("rooms_tiny", tmp_path / "typed", pair / "data"))
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300, env=QUIET)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(rows(pair / "with2"), rows(tmp_path / "typed"), strict=True):
        assert (one["step"], one["loss"]) == (other["step"], other["loss"])
    assert weights(pair / "with2").keys() == weights(tmp_path / "typed").keys()
    for name, tensor in weights(pair / "with2").items():
        assert torch.equal(tensor, weights(tmp_path / "typed")[name]), name


@pytest.mark.slow
def test_two_processes_that_share_their_batch_norms_follow_one(tmp_path):
    for processes in (1, 2):
        run(
            processes,
            "rooms_joint",
            tmp_path / f"with{processes}",
            tmp_path / "data",
            "loop.sync_bn=true",
            "model.changes.heads.label.dropout=0",
        )
    follow(tmp_path)


ALONE = """    expected.backward()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]
    by_hand = {name: parameter.grad.clone() for name, parameter in trained}
    model.zero_grad()
"""  # of the whole batch, in the first process
TOGETHER = """backward, shown = batch_loss(predictions, own[0], losses, fractions=batch_fractions(own, losses)[0])
backward.backward()
if rank == 0:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(value.abs().max() for value in by_hand.values())
    apart = max((found[name] - by_hand[name]).abs().max() for name in by_hand)
    same = found.keys() == by_hand.keys()
    torch.save(dict(loss=expected.item(), shown=shown.item(), apart=(apart / largest).item(), same=same), out)
dist.destroy_process_group()
"""  # each process with its half, and how far its gradients are from those


def check_two_processes(script, folder):
    "Two processes have the loss and the gradients that the script has worked out alone."
    end_together(forked_ranks(2, sys.executable, "-c", script, folder / "found.pt", folder=folder))
    found = torch.load(folder / "found.pt", weights_only=True)
    assert found["same"] and found["shown"] == pytest.approx(found["loss"], rel=1e-6) and found["apart"] <= 1e-6, found


UNEQUAL = (
    """
import sys, torch, torch.distributed as dist
from dpt_nb.network.zoo import create_model
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.batch_loss import batch_fractions, batch_loss
from dpt_nb.training.distributed import convert_sync_batchnorm

dist.init_process_group("gloo")
rank, out = dist.get_rank(), sys.argv[1]
torch.manual_seed(0)
model = create_model("dpt_tiny", heads={"label": dict(num_classes=5, auxiliary=True, dropout=0.0)}, batch_norm=True)
model = model.double().train()
images, labels = torch.rand(4, 3, 96, 128, dtype=torch.float64), torch.randint(5, (4, 96, 128))
labels[2:][torch.rand(2, 96, 128) < 7 / 8] = 255  # the second process has an eighth of its labels
chosen = dict(auxiliary_weight=0.4, class_weights=[1, 2, 3, 4, 5])
losses = build_losses(get_recipe("rooms_labels", losses={"label": chosen}))
if rank == 0:  # alone, by the formula
    predictions = {name: logits.double() for name, logits in model(images).items()}
    weight = torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64)
    resized = torch.nn.functional.interpolate(predictions["label_auxiliary"], (96, 128), mode="bilinear")
    cross_entropy = lambda logits: torch.nn.functional.cross_entropy(logits, labels, weight, ignore_index=255)
    expected = cross_entropy(predictions["label"]) + 0.4 * cross_entropy(resized)
"""
    + ALONE
    + """halves = torch.nn.parallel.DistributedDataParallel(convert_sync_batchnorm(model, torch.device("cpu")))
own = [{"label": labels[2 * rank : 2 * rank + 2]}]
predictions = {name: logits.double() for name, logits in halves(images[2 * rank : 2 * rank + 2]).items()}
"""
    + TOGETHER
)


def test_two_processes_with_unequal_labels_have_the_gradient_of_one(tmp_path):
    """In double precision, with the auxiliary head and shared batch norms, beside PyTorch's cross-entropy of the whole
    batch."""
    check_two_processes(UNEQUAL, tmp_path)


SURE = (
    """
import sys, torch, torch.distributed as dist
from dpt_nb.network.zoo import create_model
from dpt_nb.training.recipe_parts import build_losses
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.batch_loss import batch_fractions, batch_loss

dist.init_process_group("gloo")
rank, out = dist.get_rank(), sys.argv[1]
torch.manual_seed(0)
model = create_model("dpt_tiny", heads={"depth": dict(output="exp"), "confidence": {}}).double().train()
images, depth = torch.rand(4, 3, 64, 64, dtype=torch.float64), 1 + torch.rand(4, 1, 64, 64, dtype=torch.float64)
depth[2:][torch.rand(2, 1, 64, 64) < 7 / 8] = 0  # the second process has an eighth of its measurements
losses = build_losses(get_recipe("rooms_confidence", losses={"depth": dict(loss="regression"), "confidence": {}}))
if rank == 0:  # alone, by the formula
    predictions, known = model(images), depth > 0
    error, sure = (predictions["depth"] - depth).abs()[known], predictions["confidence"][known]
    expected = error.mean() + (sure * error - 0.2 * sure.log()).mean()
"""
    + ALONE
    + """halves = torch.nn.parallel.DistributedDataParallel(model)
own = [{"depth": depth[2 * rank : 2 * rank + 2]}]
predictions = halves(images[2 * rank : 2 * rank + 2])
"""
    + TOGETHER
)


def test_a_confidence_in_two_processes_has_the_gradient_of_one(tmp_path):
    "Its loss sees the depth that the other process predicted, and counts the pixels that both have measured."
    check_two_processes(SURE, tmp_path)


@pytest.mark.slow
def test_a_head_without_a_loss_does_not_stop_two_processes(tmp_path):
    "And labels of which one process sees none: what had no truth is counted over both."
    make_folder(tmp_path / "own", count=12)
    entries = open_dataset("folder", tmp_path / "own", "train").entries
    for entry in entries[::2]:
        write_label(entry.label, torch.full((96, 128), 255))
    untaught = [
        "loop.steps=4",
        "keep.validate_every=4",
        "data.name=folder",
        "data.train={}",
        "data.held_out={}",
        "data.protocol=rooms",
        'losses={"label": {}}',
        "model.changes.heads.label.dropout=0",
        "loop.sync_bn=true",
    ]
    for processes in (1, 2):
        run(processes, "rooms_joint", tmp_path / f"with{processes}", tmp_path / "own", *untaught)
    one, two = (rows(tmp_path / f"with{processes}") for processes in (1, 2))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-5)
    reports = [json.loads((tmp_path / f"with{processes}" / "report.json").read_text()) for processes in (1, 2)]
    order = [index for _, index in ResumableSampler(len(entries), 0, stop=4 * 4)]
    assert [report["without_truth"] for report in reports] == [{"label": sum(index % 2 == 0 for index in order)}] * 2
    first, second = weights(tmp_path / "with1"), weights(tmp_path / "with2")
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=5e-4) for name in first)
    depth = [name for name in first if name.startswith("heads.depth")]
    assert depth and all(torch.equal(first[name], second[name]) for name in depth), "a head without a loss has moved"


def ended_at(step, how, out, *started):
    """End processes of a run by a signal once it has made some steps, and return what they said. Nothing is left
    running."""
    log = out / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= step, started[0])
    family = [psutil.Process(each.pid) for each in started]
    below = [child for process in family for child in process.children(recursive=True)]
    for process in family if how == signal.SIGTERM else family + below:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended by the end of another
            process.send_signal(how)
    said = "".join(each.communicate(timeout=300)[1] for each in started)
    assert all(each.returncode for each in started) and not (out / "report.json").exists(), said
    assert len(family + below) >= 2
    wait_until(lambda: not alive(family + below), seconds=60)  # a busy machine takes its time to end what was killed
    return said


@pytest.mark.slow  # quick tests stop one process, and two that a notebook launched
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_two_processes_that_were_stopped_end_with_the_same_weights(how, pair, tmp_path):
    out = tmp_path / "run"
    told = words("rooms_tiny", out, pair / "data", workers=1)
    if how == signal.SIGKILL:
        ended_at(7, how, out, *begin(2, *told))
    else:  # told to the launcher alone, as a scheduler does
        options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=QUIET)
        said = ended_at(7, how, out, subprocess.Popen(typed(2, *told), **options))
        assert sorted((out / "checkpoints").glob("step-*.pt"))[-1].name >= "step-00000007.pt", (
            "the state at the stop was not kept"
        )
        assert "Stopped after step" in said, said[-2000:]
    run(2, "rooms_tiny", out, pair / "data", resume=True)
    straight, resumed = weights(pair / "with2"), weights(out)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [row["step"] for row in rows(out)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("assignments", [[], ["loop.fsdp=true"]], ids=["copies", "halves"])
def test_each_process_goes_on_with_its_own_chance(assignments, tmp_path):
    "The head for labels has dropout, which draws from the random state of its process."
    out, half = tmp_path / "run", ["model.changes.heads.label.dropout=0.5", "loop.steps=12", *assignments]
    run(2, "rooms_joint", tmp_path / "straight", tmp_path / "data", *half)
    ended_at(7, signal.SIGKILL, out, *begin(2, *words("rooms_joint", out, tmp_path / "data", *half)))
    last = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    one, other = (state["cpu"] for state in torch.load(last, weights_only=True)["random"])
    assert not torch.equal(one, other), "both processes drop the same"
    run(2, "rooms_joint", out, tmp_path / "data", *half, resume=True)
    straight, resumed = weights(tmp_path / "straight"), weights(out)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(tmp_path / "straight")]


SHARDED = "loop.fsdp=true"
ADAM = 0.02 * 1.5e-3  # of the recipe's largest step


def alike(first, second, slack=1e-6):
    """Whether two networks are the same but for rounding. Copies are moved by another kernel of PyTorch than halves,
    and Adam divides by the root of a mean that is nearly nothing for some weights: a last digit is a share of a step
    there."""
    return all(torch.allclose(first[name], second[name], rtol=1e-4, atol=slack) for name in first)


@pytest.fixture(scope="module")
def sharded(pair):
    "The same recipe in two processes of which each holds half of the network."
    run(2, "rooms_tiny", pair / "sharded" / "with2", pair / "data", SHARDED)
    (pair / "sharded" / "with1").symlink_to(pair / "with1")
    return pair / "sharded"


@pytest.mark.slow
def test_two_halves_of_a_network_follow_a_whole_one(sharded):
    follow(sharded)
    assert alike(weights(sharded.parent / "with2"), weights(sharded / "with2"), ADAM)


def rewound(run, out, step):
    "A copy of a run, as if it had ended at a step."
    shutil.copytree(run, out)
    for part in ("model", "best"):
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "report.json").unlink()
    for path in (out / "checkpoints").glob("step-*.pt"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    assert (out / "checkpoints" / f"step-{step:08d}.pt").exists()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun, processes, assignments",
    [
        ("sharded/with2", 2, [SHARDED]),
        ("sharded/with2", 2, []),
        ("sharded/with2", 1, [SHARDED]),
        ("sharded/with2", 1, []),
        ("with1", 2, [SHARDED]),
    ],
    ids=[
        "halves go on",
        "halves become copies",
        "halves become one",
        "halves become one, said otherwise",
        "one becomes halves",
    ],
)
def test_a_run_goes_on_in_shares_or_whole_whatever_it_began_as(begun, processes, assignments, pair, sharded, tmp_path):
    out = rewound(pair / begun, tmp_path / "run", 9)
    run(processes, "rooms_tiny", out, pair / "data", *assignments, resume=True)
    assert [row["step"] for row in rows(out)] == list(range(1, 13))
    assert max(abs(first["loss"] - second["loss"]) for first, second in zip(rows(pair / "with1"), rows(out))) <= 1e-5
    straight, resumed = weights(pair / begun), weights(out)
    if (begun, processes, assignments) == ("sharded/with2", 2, [SHARDED]):
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert all(torch.allclose(straight[name], resumed[name], rtol=1e-3, atol=5e-4) for name in straight)


@pytest.mark.slow
def test_a_checkpoint_of_halves_is_laid_out_as_one_of_a_whole(pair, sharded):
    one, two = (
        torch.load(pair / name / "checkpoints" / "step-00000012.pt", weights_only=True)
        for name in ("with2", "sharded/with2")
    )
    assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
    assert one["optimiser"]["param_groups"][0].keys() == two["optimiser"]["param_groups"][0].keys()
    for number, kept in one["optimiser"]["state"].items():
        for name, value in kept.items():
            assert (
                type(two["optimiser"]["state"][number][name]) is torch.Tensor
                and two["optimiser"]["state"][number][name].shape == value.shape
            )
            apart = (two["optimiser"]["state"][number][name] - value).abs().max()
            assert apart <= 1e-2 * value.abs().max() + 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, assignments",
    [
        ("rooms_joint", ["loop.sync_bn=true", "model.changes.heads.label.dropout=0"]),
        ("rooms_tiny", ["loop.ema=0.9"]),
        ("rooms_tiny", ["optimizer.freeze_steps=5", "loop.checkpointing=true"]),
        ("rooms_tiny", ["optimizer.name=sgd", "optimizer.lr=0.01", "optimizer.backbone=0.1", "optimizer.clip=0.05"]),
        ("rooms_tiny", ["optimizer.name=sgd", "optimizer.lr=0.003", "optimizer.clip=1e9"]),
    ],
    ids=[
        "shared batch norms and labels",
        "running mean",
        "frozen, recomputed",
        "SGD, much clipped",
        "SGD, not clipped",
    ],
)
def test_a_network_in_halves_does_all_that_two_copies_do(recipe, assignments, tmp_path):
    for name, how in [("copies", []), ("halves", [SHARDED])]:
        run(
            2, recipe, tmp_path / name, tmp_path / "data", "loop.steps=10", "keep.validate_every=10", *how, *assignments
        )
    copies, halves = rows(tmp_path / "copies"), rows(tmp_path / "halves")
    assert len(copies) == 10 and [row["loss"] for row in copies] == pytest.approx(
        [row["loss"] for row in halves], abs=1e-6
    )
    assert copies[-1]["abs_rel"] == pytest.approx(halves[-1]["abs_rel"], rel=1e-4)
    slack = 1e-6 if "optimizer.name=sgd" in assignments else ADAM
    assert alike(weights(tmp_path / "copies"), weights(tmp_path / "halves"), slack)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [
        ("beit_base_patch16_224", dict(backbone_arguments=dict(embed_dim=64, depth=4, num_heads=2), taps=[0, 1, 2, 3])),
        (
            "swin_tiny_patch4_window7_224",
            dict(
                backbone_arguments=dict(embed_dim=32, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], drop_path_rate=0),
                channels=[32, 64, 128, 256],
            ),
        ),
    ],
    ids=["BEiT", "Swin"],
)
def test_backbones_whose_blocks_are_read_and_not_called_can_be_halved_too(name, changes, tmp_path):
    small = changes | dict(heads={"depth": dict(output="exp", hidden=16)}, features=32)
    for processes in (1, 2):
        run(
            processes,
            "rooms_tiny",
            tmp_path / f"with{processes}",
            tmp_path / "data",
            SHARDED,
            f"model.name={name}",
            f"model.changes={json.dumps(small)}",
            "loop.steps=6",
            "keep.validate_every=6",
        )
    losses = [[row["loss"] for row in rows(tmp_path / f"with{processes}")] for processes in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6


@pytest.mark.slow
def test_halves_in_parts_of_a_batch_and_in_bfloat16(pair, tmp_path):
    for name, assignments in [("copies", []), ("halves", [SHARDED])]:
        for precision in ("no", "bf16"):
            run(
                2,
                "rooms_tiny",
                tmp_path / name / precision,
                pair / "data",
                "loop.gradient_accumulation_steps=2",
                f"loop.precision={precision}",
                "loop.steps=6",
                "keep.validate_every=6",
                *assignments,
            )
    for precision, apart in [("no", 1e-5), ("bf16", 5e-3)]:
        copies, halves = ([row["loss"] for row in rows(tmp_path / name / precision)] for name in ("copies", "halves"))
        assert copies == pytest.approx(halves, abs=apart) and len(copies) == 6


@pytest.mark.slow
def test_asked_for_through_the_environment_shares_are_refused(pair, tmp_path):
    done = subprocess.run(
        typed(1, *words("rooms_tiny", tmp_path / "run", pair / "data")),
        capture_output=True,
        text=True,
        timeout=300,
        env=QUIET | {"ACCELERATE_USE_FSDP": "true"},
    )
    assert done.returncode != 0 and "set loop.fsdp=true" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_two_processes_wrote_one_opens(pair, tmp_path):
    done = command_here(
        "dpt_eval",
        "--model",
        pair / "with2" / "model",
        "--data-root",
        pair / "data",
        "--count",
        3,
        "--out",
        tmp_path,
        folder=tmp_path,
        check=0,
    )
    report = json.loads((pair / "with2" / "report.json").read_text())
    assert json.loads((tmp_path / "report.json").read_text())["abs_rel"] == pytest.approx(
        report["abs_rel"], rel=1e-5
    ), done.stdout


@pytest.mark.slow
def test_a_mistake_is_a_sentence_and_all_processes_end(pair, tmp_path):
    done = subprocess.run(
        typed(2, *words("rooms_tiny", tmp_path / "run", pair / "data", "data.batch_size=7")),
        capture_output=True,
        text=True,
        timeout=300,
        env=QUIET,
    )
    assert done.returncode != 0 and "A batch of 7 samples cannot be shared evenly by 2 processes" in done.stderr


@pytest.mark.slow
def test_run_as_a_module_an_error_of_its_own_is_one_line(pair):
    told = ["rooms_tiny", "--cpu", "--out", pair / "with1", "--data-root", pair / "data"]
    done = command_forked(sys.executable, "-m", "dpt_nb.training.run", *told, folder=pair, check=1)
    assert done.stderr.count("\n") == 1 and "holds a run already" in done.stderr, done.stderr
