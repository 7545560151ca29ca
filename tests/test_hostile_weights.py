"""What strangers may hand over as a model: configs and weights with anything in them are opened, or refused with a
clear error, soon and within memory."""

import copy
import json
import os
import random
import resource
import stat
import sys
import time
import warnings
from dataclasses import asdict, fields

import pytest
import torch
from conftest import REPOSITORY
from forked import command_forked

from dpt_nb.network.config import DPTConfig
from dpt_nb.network.dpt import DPT, empty_model
from dpt_nb.network.named import NAMED
from dpt_nb.network.saved import config_from
from dpt_nb.network.zoo import config_for, count_multiply_adds, create_model, list_models
from dpt_nb.weights.load import load_checkpoint, open_checkpoint
from dpt_nb.weights.write import convert

SHIPPED = REPOSITORY / "dpt_nb" / "weights" / "dpt_tiny_scenes"
ABSURD = [
    None,
    True,
    0,
    -1,
    7,
    10**9,
    10**30,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    -0.0,
    "",
    "x",
    "depth",
    "../../etc/passwd",
    "\ud800",
    "\0",
    "a" * 10**6,
    [],
    {},
    [[]],
    [None] * 4,
    [10**9] * 4,
    [-1] * 4,
    ["stages.0"] * 4,
    [0.5] * 10**5,
    {"depth": None},
    {"depth": []},
    {"a": {"b": {"c": {}}}},
    {"label": {"num_classes": 10**12}},
    [0] * 2,
    [2**31] * 2,
    [1] * 3,
    [1e-320] * 3,
]
FOR_TIMM = [
    dict(depth=10**9),
    dict(embed_dim=10**9),
    dict(embed_dim=16384, depth=128),
    dict(num_heads=0),
    dict(num_heads=7),
    dict(num_heads=512),
    dict(patch_size=0),
    dict(patch_size=128),
    dict(patch_size=[1, 1]),
    dict(patch_size=1),
    dict(mlp_ratio=1e308),
    dict(mlp_ratio=64),
    dict(mlp_ratio=1e-300),
    dict(checkpoint_path="/etc/passwd"),
    dict(pretrained_cfg={"file": "/etc/passwd"}),
    dict(pretrained_cfg_overlay={"file": "/etc/passwd"}),
    dict(pretrained=True),
    dict(cache_dir="/"),
    dict(features_only=True),
    dict(in_chans=10**6),
    dict(num_classes=10**9),
    dict(img_size=10**6),
    dict(embed_layer="x"),
    dict(norm_layer="x"),
    dict(act_layer="no_such"),
    dict(scriptable=True),
    dict(resnet=dict(layers=[10**6], channels=[64])),
    dict(resnet=dict(layers=[128] * 8, channels=[16384] * 8)),
    dict(resnet=dict(layers=[1], channels=[64], groups=7)),
    dict(resnet=dict(layers=[], channels=[])),
    dict(resnet=dict(layers=[1, 1], channels=[64])),
    dict(resnet={}),
    dict(resnet=[]),
    dict(reg_tokens=64),
    dict(class_token=False),
    dict(pos_embed="none"),
    dict(global_pool="map"),
    dict(drop_path_rate=2.0),
    dict(init_values=1e300),
    dict(window_size=10**4),
    dict(depths=[128] * 8),
    dict(depths=[2, 2, 2, 2]),
    dict(qk_norm=True, scale_attn_norm=True),
    dict(dynamic_img_size=True),
    dict(no_embed_class=True),
    dict(kwargs=1),
    dict(device="cuda"),
    dict(dtype="float8"),
    {"": 1},
    {"self": 1},
]
BACKBONES = [
    "hf-hub:someone/anything",
    "hf_hub:someone/anything",
    "local-dir:/etc",
    "local-dir:.",
    "../vit_base_patch16_384",
    "vit_base_patch16_384.",
    "vit_base_patch16_384.none",
    "vit_base_patch16_384/x",
    "no_such",
    "resnet50",
    "tresnet_m",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
    "vit_giant_patch14_dinov2",
    "vit_gigantic_patch14_clip_224",
    "efficientnet_b0",
    "eva02_base_patch14_448",
    "xcit_nano_12_p8_224",
    "VIT_BASE_PATCH16_384",
    "vit_base_patch16_384\n",
    "résnet50",
]


def own_config() -> dict:
    return json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))


def places(found, above=()):
    "Every place in nested dicts and lists."
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, key))


def put(config: dict, place: tuple, value) -> dict:
    changed = inner = copy.deepcopy(config)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def hostile_configs(seed: int, each: int, mutations: int):
    "Absurd values for each field, absurd arguments for timm, odd backbones, and random mutations at any depth."
    own, generator = own_config(), random.Random(seed)
    for item in fields(DPTConfig):
        for value in generator.sample(ABSURD, each):
            yield own | {item.name: value}
    vit = asdict(config_for("vit_tiny_patch16_224"))
    some = lambda cases, count: cases if each > 3 else generator.sample(cases, count)
    for arguments in some(FOR_TIMM, 14):
        yield vit | dict(backbone_arguments=arguments)
        yield own | dict(backbone_arguments=own["backbone_arguments"] | arguments)
    for name in some(BACKBONES, 10):
        yield vit | dict(backbone=name)
    for size in some([[8192, 1024], [1, 8192], [16, 16], [2048, 4096]], 1):
        for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "swinv2_tiny_window8_256", "resnet50"):
            yield vit | dict(backbone=name, image_size=size)
    for _ in range(mutations):
        config = own
        for _ in range(generator.randint(1, 3)):
            everywhere = list(places(config))
            config = put(config, generator.choice(everywhere), generator.choice(ABSURD)) if everywhere else config
        if generator.random() < 0.2:
            config = {key: value for key, value in config.items() if generator.random() > 0.1} | {
                generator.choice(["taps ", "__class__", "model_type", "depth"]): 1
            }
        yield config


def grown() -> int:  # bytes
    "The most memory that this process has had."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome(tried) -> str:
    "What came of a try: opened, or the refusal's class; anything else is raised."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tried()
    except Exception as error:
        kind = type(error)
        assert kind.__module__.startswith("dpt_nb."), f"{kind.__module__}.{kind.__name__}: {error}"
        text = str(error)
        assert "\n" not in text and len(text) < 3000, f"no sentence: {text[:3000]}"
        text.encode("utf-8")
        return kind.__name__
    return "opened"


def try_configs(configs, folder) -> dict:
    "Each through a config.json, a network on the meta device and the folder's weights; the counts of what came of it."
    (folder / "model.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes())
    counted, before = {}, grown()
    for config in configs:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shown, start = json.dumps(config)[:1500], time.process_time()
        try:
            built = outcome(
                lambda: count_multiply_adds(
                    empty_model(
                        config_from(json.loads((folder / "config.json").read_text(encoding="utf-8")), "a config")
                    )
                )
            )
            found = outcome(lambda: DPT.from_pretrained(folder))
            assert found == outcome(lambda: load_checkpoint(folder)) or found != "opened"
        except Exception as error:
            raise AssertionError(f"{shown}\n{type(error).__name__}: {error}") from error
        assert time.process_time() - start < 5, shown
        assert grown() - before < 2**30, shown
        counted[built, found] = counted.get((built, found), 0) + 1
    return counted


@pytest.mark.slow
def test_hostile_configs_have_clear_errors(tmp_path):
    counted = try_configs(hostile_configs(0, 2, 20), tmp_path)
    assert (
        sum(counted.values()) >= 95 and sum(count for (_, found), count in counted.items() if found != "opened") > 70
    ), counted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_hostile_configs_have_clear_errors(seed, tmp_path):
    counted = try_configs(hostile_configs(seed, 12, 300), tmp_path)
    assert sum(counted.values()) > 600, counted


def test_named_configs_open(tmp_path):
    for name in list_models():
        config = asdict(config_for(name))
        assert config_from(json.loads(json.dumps(config)), name) == config_for(name)
    for name in (
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "deit_base_distilled_patch16_384",
        "swin_large_patch4_window12_384",
        "beit_large_patch16_512",
        "convnext_large",
        "regnety_032",
        "resnetv2_50",
    ):
        assert config_from(json.loads(json.dumps(asdict(config_for(name)))), name) == config_for(name)
    assert len(list_models()) == len(NAMED) > 25


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    "One small model as a checkpoint of each kind: path of what is opened, and the files that are changed."
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    shape = dict(
        taps=[0, 1, 2, 3], channels=[8, 8, 16, 16], features=8, image_size=[32, 32], mean=[0.5] * 3, std=[0.5] * 3
    )
    create_model(
        "vit_base_patch16_384", **shape, backbone_arguments=dict(embed_dim=64, depth=4, num_heads=1, patch_size=16)
    ).save_pretrained(folder / "own")
    for name, to in [("isl.pth", "isl-org"), ("isl.safetensors", "isl-org"), ("hf", "transformers")]:
        convert(folder / "own", folder / name, to)
    torch.save(
        torch.load(folder / "isl.pth", weights_only=True), folder / "old.pth", _use_new_zipfile_serialization=False
    )
    inside = {
        "own": ["config.json", "model.safetensors"],
        "hf": ["config.json", "preprocessor_config.json", "model.safetensors"],
    }
    return {
        name: (folder / name, inside.get(name, [""])) for name in ("isl.pth", "old.pth", "isl.safetensors", "own", "hf")
    }


def mutated(content: bytes, generator: random.Random) -> bytes:
    "A file that was damaged, cut, or changed on purpose: mostly where a format says what comes."
    content, where = (
        bytearray(content),
        lambda: min(int(generator.choice([200, 4000, len(content)]) * generator.random()), len(content) - 1),
    )
    for _ in range(generator.choice([1, 1, 1, 3, 10])):
        place = where() if generator.random() < 0.7 else len(content) - 1 - where()
        match generator.randrange(7):
            case 0:
                content[place] ^= 1 << generator.randrange(8)
            case 1:
                content[place] = generator.choice([0, 255, 0x7F, ord("9"), ord("{"), ord("("), ord("h"), ord("R")])
            case 2:
                content[place : place + 8] = generator.randbytes(8)
            case 3:
                content[place:place] = generator.choice(
                    [b"\0" * 100, content[: generator.randrange(1, 2000)], generator.randbytes(50), b"[" * 2000]
                )
            case 4:
                del content[place : place + generator.choice([1, 8, 1000])]
            case 5:
                digits = [
                    index
                    for index in range(max(0, place - 300), min(len(content), place + 300))
                    if 48 <= content[index] <= 57
                ]
                for index in digits[: generator.choice([1, 3])]:
                    content[index] = ord("9")
            case 6 if len(content) > 1000:
                del content[generator.choice([place, 8, 1000]) :]
        content = content or bytearray(1)
    return bytes(content)


def try_mutations(kinds, seed: int, each: int, folder) -> dict:
    "Each kind of checkpoint damaged and opened, every third also loaded and converted; the counts of what came of it."
    generator, counted, before = random.Random(seed), {}, grown()
    for kind, (source, inside) in kinds.items():
        contents = {name: (source / name if name else source).read_bytes() for name in inside}
        for number in range(each):
            place = folder / f"{kind}-{number}{source.suffix}"
            victim = generator.choice(inside)
            for name, content in contents.items():
                target = place / name if name else place
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(mutated(content, generator) if name == victim else content)
            there, start = set(folder.rglob("*")), time.process_time()
            try:
                found = outcome(lambda: open_checkpoint(place))
                if number % 3 == 0:
                    outcome(lambda: load_checkpoint(place))
                    written = folder / f"written-{kind}-{number}{'.pth' if number % 2 else ''}"
                    done = outcome(lambda: convert(place, written, "isl-org" if number % 2 else "dpt_nb"))
                    assert done == "opened" or not written.exists()
                    there |= {written, *written.rglob("*")}
            except Exception as error:
                raise AssertionError(f"seed {seed}, {place.name}, {victim}: {type(error).__name__}: {error}") from error
            assert time.process_time() - start < 10 and grown() - before < 2**31, place.name
            assert set(folder.rglob("*")) <= there, place.name
            counted[kind, found] = counted.get((kind, found), 0) + 1
    return counted


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_open_or_have_clear_errors(kinds, tmp_path):
    counted = try_mutations(kinds, 0, 12, tmp_path)
    for kind in kinds:
        assert sum(count for (each, found), count in counted.items() if each == kind and found != "opened") >= 3, (
            counted
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_checkpoints(seed, kinds, tmp_path):
    counted = try_mutations(kinds, seed, 80, tmp_path)
    assert sum(counted.values()) == 80 * len(kinds)


def test_pipes_and_endless_files_are_refused(kinds, tmp_path):
    for name, content in [("config.json", "{}"), ("model.safetensors", None)]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(content) if content and name != "config.json" else None
        os.mkfifo(folder / name)
        for opening in (DPT.from_pretrained, load_checkpoint):
            assert outcome(lambda: opening(folder)) != "opened"
    os.symlink("/dev/zero", tmp_path / "zero.pth")
    assert outcome(lambda: load_checkpoint(tmp_path / "zero.pth")) == "CheckpointError"


def test_written_files_have_the_usual_permissions(kinds, tmp_path):
    for mask in (0o022, 0o027):
        folder, before = tmp_path / f"{mask:o}", os.umask(mask)
        try:
            folder.mkdir()
            (folder / "neighbour").write_text("a file like any other")
            for name, to in [
                ("isl.pth", "isl-org"),
                ("isl.safetensors", "isl-org"),
                ("hf", "transformers"),
                ("own", "dpt_nb"),
            ]:
                convert(kinds["own"][0], folder / name, to)
            DPT.from_pretrained(kinds["own"][0]).save_pretrained(folder / "saved")
        finally:
            os.umask(before)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
        assert len(modes) > 5 and set(modes.values()) == {0o666 & ~mask}, modes
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()} == {0o777 & ~mask}


def test_setgid_folders_keep_their_group(kinds, tmp_path):
    group = next((number for number in os.getgroups() if number != os.getgid()), 12345 if os.geteuid() == 0 else None)
    if group is None:
        pytest.skip("needs a second group")
    folder = tmp_path / "shared"
    folder.mkdir()
    os.chown(folder, -1, group)
    folder.chmod(0o2775)
    for _ in range(2):
        DPT.from_pretrained(kinds["own"][0]).save_pretrained(folder)
    convert(kinds["own"][0], folder / "hf", "transformers")
    assert {path.stat().st_gid for path in folder.rglob("*")} == {group} and (
        folder / "hf"
    ).stat().st_mode & stat.S_ISGID


FULL = """
import resource, signal, sys
from dpt_nb.commands import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # half of one would be written, and read by every later process
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(sys.argv[1:]))
"""


def full_disk(*words, folder):
    "A command whose files may not grow beyond 50 kB; the files there before and after."
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    done = command_forked(sys.executable, "-c", FULL, *words, folder=folder)
    after = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert done.returncode == 1 and "Traceback" not in done.stderr, f"{done.returncode}\n{done.stderr}"
    assert "File too large" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert after == before and not [path for path in folder.rglob("*") if path.name.startswith(".")], sorted(after)
    return done


@pytest.mark.parametrize(
    "name, to", [("new.pth", "isl-org"), ("new.safetensors", "isl-org"), ("new", "dpt_nb"), ("there", "transformers")]
)
def test_conversion_on_a_full_disk_leaves_what_was_there(name, to, kinds, tmp_path):
    convert(kinds["own"][0], tmp_path / "there", "dpt_nb")
    full_disk("dpt_convert", kinds["own"][0], name, "--to", to, "--force", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new.onnx", "new.pt2"])
def test_export_on_a_full_disk_has_a_clear_error(name, kinds, tmp_path):
    full_disk("dpt_export", kinds["own"][0], name, "--size", "32x32", folder=tmp_path)
