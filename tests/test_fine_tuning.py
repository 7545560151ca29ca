"""Four ways to fine-tune: what moves in each, a resume to the bit, two processes that equal one, small files that open
as the network that wrote them, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import changes, command_here
from forked import end_together, forked_ranks
from safetensors.torch import load_file

from dpt_nb.network.config import ConfigError
from dpt_nb.network.dpt import DPT
from dpt_nb.network.inside import attention_maps
from dpt_nb.network.zoo import create_model
from dpt_nb.training.fine_tuning import begin_way
from dpt_nb.training.recipe_fields import RecipeError, change_recipe, settings_without_effect
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train
from dpt_nb.weights.adapters import AdapterError, add_adapters, is_adapted, merged_state, read_adapted
from dpt_nb.weights.load import load_checkpoint
from dpt_nb.weights.write import convert

pytestmark = pytest.mark.usefixtures("no_figures")
TINY = [
    "loop.steps=4",
    "data.batch_size=2",
    "data.train.count=4",
    "data.held_out.count=2",
    "data.transforms=[]",
    "keep.validate_every=4",
    "keep.save_steps=2",
    "keep.best=false",
    "keep.pictures=0",
    "keep.report_images=0",
    "optimizer.lr=1e-3",
    "model.weights=dpt_tiny_scenes",
    "model.name=dpt_tiny_scenes",
    'model.changes={"heads": {"depth": {"output": "exp", "hidden": 16}}}',
]


def asked(way, *more):
    return change_recipe(get_recipe("rooms_tiny"), [*TINY, f"tune.way={way}", *more])


def ran(way, out, data, *more, resume=False):
    train(asked(way, *more), out, data, cpu=True, workers=0, progress=False, resume=resume)
    return load_checkpoint(out / "model")


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one, other):
    one, other = one.state_dict(), other.state_dict()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def runs(no_figures, home):
    "A run with adapters and one of the decoder alone."
    return {way: ran(way, home / way, home / "data") for way in ("lora", "decoder")}


def goes_on(way, straight, folder, data):
    "A copy of a run without its last two steps goes on to the same weights."
    shutil.copytree(straight, folder)
    (folder / "checkpoints" / "step-00000004.pt").unlink()
    shutil.rmtree(folder / "model")
    return ran(way, folder, data, resume=True)


@pytest.mark.parametrize("way", ["lora", "decoder"])
def test_resume_is_exact(way, runs, home, tmp_path):
    assert same(runs[way], goes_on(way, home / way, tmp_path / "again", home / "data"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "layer_decay"])
def test_resume_is_exact_where_everything_moves(way, home, tmp_path):
    straight = ran(way, tmp_path / "straight", home / "data")
    assert same(straight, goes_on(way, tmp_path / "straight", tmp_path / "again", home / "data"))


def test_taps_from_files_and_taps_computed_anew_train_the_same_decoder(runs, home, tmp_path):
    plain = ["optimizer.name=sgd", "optimizer.lr=0.01"]  # Adam's first steps would enlarge what rounding leaves
    on_disk = ["tune.cache=float32", "tune.cache_gib=0", *plain]
    files = ran("decoder", tmp_path / "files", home / "data", *on_disk)
    anew = ran("decoder", tmp_path / "anew", home / "data", "tune.cache=none", *plain)
    kept = list((home / "data" / "taps").rglob("*.safetensors"))
    assert len(kept) == 4 and apart(files, anew) < 1e-5
    assert apart(files.decoder, load_checkpoint("dpt_tiny_scenes").decoder) > 1e-4
    before = [path.stat().st_mtime_ns for path in kept]
    again = ran("decoder", tmp_path / "again", home / "data", *on_disk)
    assert same(files, again) and before == [path.stat().st_mtime_ns for path in kept]
    begun = load_checkpoint("dpt_tiny_scenes").backbone
    assert same(begun, files.backbone) and same(begun, runs["decoder"].backbone)


def test_adapters_are_saved_small_and_open_as_the_network_that_was_trained(runs, home, tmp_path):
    folder = home / "lora" / "model"
    _, note, learned = read_adapted(folder)
    state = torch.load(home / "lora" / "checkpoints" / "step-00000004.pt", weights_only=True)["model"]
    begun = load_checkpoint("dpt_tiny_scenes", heads=asked("lora").model.changes["heads"])
    model = add_adapters(begun, "dpt_tiny_scenes")
    model.load_state_dict(state)
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unmerged, merged = model.eval()(image)["depth"], runs["lora"](image)["depth"]
    assert torch.allclose(unmerged, merged, atol=1e-5, rtol=1e-5) and not is_adapted(runs["lora"])
    assert note.trunk == "dpt_tiny_scenes" and note.rank == 8
    assert not any(name.startswith("backbone.") and ".lora_" not in name for name in learned)
    whole = (home / "decoder" / "model" / "model.safetensors").stat().st_size
    assert (folder / "adapter.safetensors").stat().st_size < whole / 3
    convert(folder, tmp_path / "merged")  # a folder that needs no trunk beside it
    assert same(DPT.from_pretrained(tmp_path / "merged"), runs["lora"])


def test_merging_is_the_sum_computed_by_hand():
    weight, down, up = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    learned = {"a.lora_A.weight": down, "a.lora_B.weight": up, "heads.x": torch.ones(1)}
    merged = merged_state({"a.weight": weight}, learned, 0.5)
    assert torch.equal(merged["a.weight"], torch.tensor([[2.5, 3.0], [2.0, 5.0]]))
    assert set(merged) == {"a.weight", "heads.x"}


TRUNKS = {
    "vit_base_patch16_224": dict(backbone_arguments=dict(embed_dim=32, depth=4, num_heads=1), taps=[0, 1, 2, 3]),
    "beit_base_patch16_224": dict(backbone_arguments=dict(embed_dim=32, depth=4, num_heads=1), taps=[0, 1, 2, 3]),
    "swin_tiny_patch4_window7_224": dict(
        backbone_arguments=dict(embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]), channels=[32, 64, 128, 256]
    ),
    "convnext_tiny": dict(
        backbone_arguments=dict(dims=[16, 32, 64, 128], depths=[1, 1, 1, 1]), channels=[16, 32, 64, 128]
    ),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_every_adapter_is_asked(name):
    "A network that multiplies by a layer's weight itself would pass an adapter by."
    torch.manual_seed(0)
    model = add_adapters(create_model(name, heads=dict(depth=dict(output="exp")), **TRUNKS[name]), "x", rank=2)
    side = 64 if name[:4] in ("vit_", "conv") else 224
    model.backbone.eval()  # else whole layers may be dropped
    model(torch.rand(1, 3, side, side))["depth"].mean().backward()
    learning = {n: each for n, each in model.backbone.named_parameters() if each.requires_grad}
    assert learning and all(".lora_" in n for n in learning)
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for n, each in learning.items() if "lora_B" in n)


def test_attention_is_shown_with_its_adapters():
    torch.manual_seed(0)
    trunk = TRUNKS["vit_base_patch16_224"] | dict(image_size=[64, 64])
    model = create_model("vit_base_patch16_224", **trunk).eval()
    image = torch.rand(1, 3, 64, 64)
    before = attention_maps(model, image).probabilities[0]
    add_adapters(model, "x", rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.5)
        attention = model.backbone.vit.blocks[0].attn
        tokens = model.backbone.vit.blocks[0].norm1(model.backbone.embed((image - model.mean) / model.std)[0])
        query, key, _ = attention.qkv(tokens).unflatten(-1, (3, 1, 32)).permute(2, 0, 3, 1, 4)
        expected = (query @ key.mT * 32**-0.5).softmax(-1)
    found = attention_maps(model, image).probabilities[0]
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, before, atol=1e-4)


def test_a_network_with_adapters_is_not_saved_as_a_folder_that_nobody_can_open(tmp_path):
    model = add_adapters(create_model("dpt_tiny"), "x", rank=2)
    with pytest.raises(ConfigError, match="has adapters.*write_adapted"):
        model.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_each_head_may_have_a_decoder_of_its_own():
    heads = dict(depth=dict(output="exp"), normal={})
    model = create_model("dpt_tiny", heads=heads, decoder_per_head=True)
    add_adapters(model, "x", rank=2)
    assert all(each.requires_grad for each in model.branches.parameters())


def test_what_cannot_be_is_said_in_a_sentence(tmp_path):
    with pytest.raises(RecipeError, match="tune.way is 'half'.*full, layer_decay, decoder or lora"):
        asked("half")
    with pytest.raises(RecipeError, match="loop.fsdp does not go together with tune.way=lora"):
        asked("lora", "loop.fsdp=true")
    with pytest.raises(RecipeError, match="begins with random weights"):
        begin_way(change_recipe(get_recipe("rooms_tiny"), ["tune.way=lora"]), create_model("dpt_tiny"))
    with pytest.raises(RecipeError, match="no linear layers called"):
        begin_way(asked("lora"), create_model("resnet18", heads=dict(depth={})))
    with mock.patch.dict(sys.modules, peft=None), pytest.raises(RecipeError, match=r"pip install 'dpt_nb\[lora\]'"):
        begin_way(asked("lora"), create_model("dpt_tiny"))
    (said,) = settings_without_effect(asked("decoder", "optimizer.layer_decay=0.8"))
    assert "leaves the trunk as it is" in said
    assert "belongs to tune.way=lora" in settings_without_effect(asked("decoder", "tune.rank=4"))[0]


def test_a_trunk_that_has_changed_is_refused(runs, home, tmp_path):
    shutil.copytree(home / "lora" / "model", tmp_path / "model")
    note = json.loads((tmp_path / "model" / "adapter.json").read_text())
    (tmp_path / "model" / "adapter.json").write_text(json.dumps(note | dict(trunk=str(home / "decoder" / "model"))))
    assert same(load_checkpoint(tmp_path / "model"), runs["lora"])  # the same trunk in another place
    (tmp_path / "model" / "adapter.json").write_text(json.dumps(note | dict(digest="0" * 64)))
    with pytest.raises(AdapterError, match="another trunk"):
        load_checkpoint(tmp_path / "model")


def test_a_command_says_what_each_way_needs(home):
    done = command_here("dpt_train", "rooms_tiny", "--fine-tune", "decoder", "--dry-run", "--cpu", "--workers", 0,
                        *changes(*TINY), folder=home, check=0)  # fmt: skip
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ") and line.strip()}
    assert "this recipe's is decoder" in done.stdout
    learn = {way: int(lines[way].split()[1].replace(",", "")) for way in ("full", "layer_decay", "decoder", "lora")}
    assert learn["decoder"] < learn["lora"] < learn["full"] == learn["layer_decay"]
    assert "once the trunk has seen all images" in lines["decoder"] and not list(home.glob("runs"))


def test_a_recipe_saved_without_ways_is_full():
    from dpt_nb.training.run_folder import as_json, differing_fields, with_defaults

    recipe = get_recipe("rooms_tiny")
    saved = {name: value for name, value in as_json(recipe).items() if name != "tune"}
    assert not differing_fields(with_defaults(saved), as_json(recipe)) and recipe.tune.way == "full"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "decoder"])
def test_two_processes_follow_one(way, runs, home, tmp_path):
    words = ["rooms_tiny", "--cpu", "--workers", 0, "--out", tmp_path / "two", "--data-root", home / "data"]
    told = map(str, [*words, *changes(*TINY, f"tune.way={way}")])
    end_together(forked_ranks(2, sys.executable, "-m", "dpt_nb.training.run", *told, folder="."))
    read = lambda out: [json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    assert read(tmp_path / "two") == pytest.approx(read(home / way), abs=1e-4)
    file = "adapter.safetensors" if way == "lora" else "model.safetensors"
    one, two = load_file(home / way / "model" / file), load_file(tmp_path / "two" / "model" / file)
    assert one.keys() == two.keys() and max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-3
