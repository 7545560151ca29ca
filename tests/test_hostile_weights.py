"What strangers may hand over as a model: configs and weights with anything in them are opened, or refused in one sentence, soon and within memory."
import copy
import json
import random
import resource
import time
import warnings
from dataclasses import asdict, fields

import pytest
import torch
from conftest import REPOSITORY

from dpt_nb.checkpoints import CheckpointError, load_checkpoint, open_checkpoint
from dpt_nb.models import NAMED, ConfigError, DPT, DPTConfig, config_for, config_from, count_multiply_adds, empty_model, list_models

SHIPPED = REPOSITORY / "dpt_nb" / "weights" / "dpt_tiny_scenes"
ABSURD = [
    None, True, 0, -1, 7, 10**9, 10**30, 10**400, 1.5, 1e308, float("nan"), float("inf"), -0.0, "", "x", "depth", "../../etc/passwd", "\ud800", "\0", "a" * 10**6, [], {}, [[]], [None] * 4,
    [10**9] * 4, [-1] * 4, ["stages.0"] * 4, [0.5] * 10**5, {"depth": None}, {"depth": []}, {"a": {"b": {"c": {}}}}, {"label": {"classes": 10**12}}, [0] * 2, [2**31] * 2, [1] * 3, [1e-320] * 3,
]
FOR_TIMM = [
    dict(depth=10**9), dict(embed_dim=10**9), dict(embed_dim=16384, depth=128), dict(num_heads=0), dict(num_heads=7), dict(num_heads=512), dict(patch_size=0), dict(patch_size=128), dict(patch_size=[1, 1]), dict(patch_size=1),
    dict(mlp_ratio=1e308), dict(mlp_ratio=64), dict(mlp_ratio=1e-300), dict(checkpoint_path="/etc/passwd"), dict(pretrained_cfg={"file": "/etc/passwd"}), dict(pretrained_cfg_overlay={"file": "/etc/passwd"}), dict(pretrained=True),
    dict(cache_dir="/"), dict(features_only=True), dict(in_chans=10**6), dict(num_classes=10**9), dict(img_size=10**6), dict(embed_layer="x"), dict(norm_layer="x"), dict(act_layer="no_such"), dict(scriptable=True),
    dict(resnet=dict(layers=[10**6], channels=[64])), dict(resnet=dict(layers=[128] * 8, channels=[16384] * 8)), dict(resnet=dict(layers=[1], channels=[64], groups=7)), dict(resnet=dict(layers=[], channels=[])),
    dict(resnet=dict(layers=[1, 1], channels=[64])), dict(resnet={}), dict(resnet=[]), dict(reg_tokens=64), dict(class_token=False), dict(pos_embed="none"), dict(global_pool="map"), dict(drop_path_rate=2.0), dict(init_values=1e300),
    dict(window_size=10**4), dict(depths=[128] * 8), dict(depths=[2, 2, 2, 2]), dict(qk_norm=True, scale_attn_norm=True), dict(dynamic_img_size=True), dict(no_embed_class=True), dict(kwargs=1), dict(device="cuda"), dict(dtype="float8"), {"": 1}, {"self": 1},
]
BACKBONES = [
    "hf-hub:someone/anything", "hf_hub:someone/anything", "local-dir:/etc", "local-dir:.", "../vit_base_patch16_384", "vit_base_patch16_384.", "vit_base_patch16_384.none", "vit_base_patch16_384/x", "no_such", "resnet50", "tresnet_m", "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224", "vit_giant_patch14_dinov2", "vit_gigantic_patch14_clip_224", "efficientnet_b0", "eva02_base_patch14_448", "xcit_nano_12_p8_224", "VIT_BASE_PATCH16_384", "vit_base_patch16_384\n", "résnet50",
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
    chosen = FOR_TIMM if each > 3 else generator.sample(FOR_TIMM, 30)
    for arguments in chosen:
        yield vit | dict(backbone_arguments=arguments)
        yield own | dict(backbone_arguments=own["backbone_arguments"] | arguments)
    for name in BACKBONES:
        yield vit | dict(backbone=name)
    for size in ([8192, 1024], [1, 8192], [16, 16], [2048, 4096]):
        for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "swinv2_tiny_window8_256", "resnet50"):
            yield vit | dict(backbone=name, image_size=size)
    for _ in range(mutations):
        config = own
        for _ in range(generator.randint(1, 3)):
            everywhere = list(places(config))
            config = put(config, generator.choice(everywhere), generator.choice(ABSURD)) if everywhere else config
        if generator.random() < 0.2:
            config = {key: value for key, value in config.items() if generator.random() > 0.1} | {generator.choice(["taps ", "__class__", "model_type", "depth"]): 1}
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
            built = outcome(lambda: count_multiply_adds(empty_model(config_from(json.loads((folder / "config.json").read_text(encoding="utf-8")), "a config"))))
            found = outcome(lambda: DPT.from_pretrained(folder))
            assert found == outcome(lambda: load_checkpoint(folder)) or found != "opened"
        except Exception as error:
            raise AssertionError(f"{shown}\n{type(error).__name__}: {error}") from error
        assert time.process_time() - start < 5, shown
        assert grown() - before < 2**30, shown
        counted[built, found] = counted.get((built, found), 0) + 1
    return counted


def test_hostile_configs_are_refused_in_a_sentence(tmp_path):
    counted = try_configs(hostile_configs(0, 1, 20), tmp_path)
    assert sum(counted.values()) >= 95 and sum(count for (_, found), count in counted.items() if found != "opened") > 85, counted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_hostile_configs_are_refused_in_a_sentence(seed, tmp_path):
    counted = try_configs(hostile_configs(seed, 12, 300), tmp_path)
    assert sum(counted.values()) > 600, counted


def test_every_named_network_still_has_a_config_that_opens(tmp_path):
    for name in list_models():
        config = asdict(config_for(name))
        assert config_from(json.loads(json.dumps(config)), name) == config_for(name)
    for name in ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "deit_base_distilled_patch16_384", "swin_large_patch4_window12_384", "beit_large_patch16_512", "convnext_large", "regnety_032", "resnetv2_50"):
        assert config_from(json.loads(json.dumps(asdict(config_for(name)))), name) == config_for(name)
    assert len(list_models()) == len(NAMED) > 25
