"""The recipes that repeat the Toolbox's published runs, beside what mmcv 1.3.13 and the Toolbox's code do, written anew
in double precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dpt_nb.data.sampling import training_loader
from dpt_nb.network.zoo import create_model
from dpt_nb.objective.depth_losses import SILogLoss
from dpt_nb.training.batch_loss import batch_fractions, batch_loss
from dpt_nb.training.optim import build_optimizer, build_schedule, parameter_groups
from dpt_nb.training.paper_recipes import TOOLBOX_POINTS
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipe_parts import build_losses, build_transforms
from dpt_nb.training.recipes import RECIPES, difference_table, get_recipe, recipe_differences, recipe_table
from dpt_nb.training.train_state import kaiming_decoder, total_steps

PUBLISHED = {"kitti": (23158, 1447, 34728), "nyu": (24231, 1514, 36336)}  # training images, steps an epoch, steps
LOG_LINES = {  # of the Toolbox's logs: (epoch, step within it) → rate as printed
    "kitti": {
        (1, 50): "4.005e-06",
        (2, 50): "8.803e-06",
        (8, 200): "9.998e-05",
        (8, 250): "1.000e-04",
        (15, 400): "6.226e-05",
        (24, 1400): "4.092e-08",
    },
    "nyu": {(1, 50): "4.005e-06", (10, 1500): "9.335e-05", (24, 1500): "4.007e-08"},
}


class TwoParts(nn.Module):
    "A backbone and a decoder of two numbers."

    def __init__(self):
        super().__init__()
        self.backbone, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)


def between(start, end, share):
    "From one number to another along half a cosine."
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def one_cycle(done, total, largest=1e-4, rise=0.3, first=25.0, last=100.0):
    "Rate and first beta of mmcv's OneCycle hooks before a step, when so many are done."
    top = rise * total - 1
    if done <= top:
        return between(largest / first, largest, done / top), between(0.95, 0.85, done / top)
    share = (done - top) / (total - 1 - top)
    return between(largest, largest / first / last, share), between(0.85, 0.95, share)


def rates_and_betas(recipe, steps):
    "What the optimiser has at each step: (rate, first beta) of each group."
    optimizer = build_optimizer(recipe, TwoParts())
    schedule, found = build_schedule(recipe, optimizer, steps), []
    for _ in range(steps):
        found.append([(group["lr"], group["betas"][0]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["kitti", pytest.param("nyu", marks=pytest.mark.slow)])
def test_every_rate_of_the_published_run(name):
    images, per_epoch, steps = PUBLISHED[name]
    recipe = get_recipe(f"{name}_vitb")
    assert total_steps(recipe, images) == steps == 24 * per_epoch
    found, expected = rates_and_betas(recipe, steps), [[one_cycle(done, steps)] for done in range(steps)]
    assert np.abs(np.array(found) / np.array(expected) - 1).max() < 1e-9  # of every step, every group, rate and beta
    for (epoch, place), printed in LOG_LINES[name].items():
        assert {f"{rate:.3e}" for rate, _ in found[(epoch - 1) * per_epoch + place - 1]} == {printed}


@pytest.mark.slow
def test_every_rate_by_the_config():
    recipe = get_recipe("kitti_vitb_config")
    steps = total_steps(recipe, 23158)
    groups = parameter_groups(TwoParts(), 0.01, 1e-4, recipe.optimizer.backbone, 1.0, recipe.optimizer.no_weight_decay)
    shares = [group["lr"] / 1e-4 for group in groups]
    assert steps == 34737 and sorted(shares) == pytest.approx([0.1, 1.0])
    expected = [
        [(rate * share, beta) for share in shares] for rate, beta in (one_cycle(done, steps) for done in range(steps))
    ]
    assert np.abs(np.array(rates_and_betas(recipe, steps)) / np.array(expected) - 1).max() < 1e-9


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_epoch_leaves_its_last_images_out(name):
    images, per_epoch, _ = PUBLISHED[name]
    loader = training_loader(range(images), 16, 0, stop=2 * per_epoch * 16, per_epoch=per_epoch * 16)
    keys = list(loader.sampler)
    assert (
        len(loader) == 2 * per_epoch
        and [sum(epoch == number for epoch, _ in keys) for number in (0, 1)] == [per_epoch * 16] * 2
    )
    left_out = [set(range(images)) - {index for epoch, index in keys if epoch == number} for number in (0, 1)]
    assert [len(left) for left in left_out] == [images % 16] * 2 and left_out[0] != left_out[1]


def decaying(name):
    "Which parameters of the recipe's network weight decay pulls at."
    recipe = get_recipe(name)
    with torch.device("meta"):
        model = create_model(recipe.model.name, **recipe.model.changes)
    groups, chosen = (
        build_optimizer(recipe, model).param_groups,
        {id(parameter): own for own, parameter in model.named_parameters()},
    )
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    assert sum(len(group["params"]) for group in groups) == len(chosen)
    return set(chosen.values()), {
        chosen[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]
    }


def test_what_decays_in_the_run_and_by_the_config():
    every, in_the_run = decaying("kitti_vitb")
    assert every - in_the_run == {"backbone.vit.pos_embed", "backbone.vit.cls_token"}
    every, by_the_config = decaying("kitti_vitb_config")
    exempt = every - by_the_config
    assert exempt == {name for name in every if ".norm" in name} | {"backbone.vit.pos_embed", "backbone.vit.cls_token"}
    assert len(exempt) == 2 + 2 * 2 * 12 + sum(name.startswith("backbone.vit.norm.") for name in every)
    assert "backbone.vit.blocks.0.attn.qkv.bias" in by_the_config and "backbone.vit.blocks.11.norm2.bias" in in_the_run


def sigloss(prediction, target, warming):
    "The Toolbox's SigLoss of one GPU's images, in double precision."
    known = target > 0
    g = torch.log(prediction[known].double() + 1e-3) - torch.log(target[known].double() + 1e-3)
    scale = 0.15 * g.mean() ** 2
    return (scale if warming else g.var() + scale).sqrt()


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_silog_is_the_mean_over_eight_gpus_of_two_images(pieces):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(16, 1, 6, 9, generator=generator) * 60 * (torch.rand(16, 1, 6, 9, generator=generator) < 0.3)
    prediction = (torch.rand(16, 1, 6, 9, generator=generator) * 60 + 0.1).requires_grad_()
    target = target * torch.linspace(0.1, 1, 16)[:, None, None, None]  # the images' rulers disagree
    losses = build_losses(get_recipe("kitti_vitb"))
    for step in (0, 99, 100):
        parts = [{"depth": part} for part in target.chunk(pieces)]
        found = 0.0
        for part, guess, fraction in zip(parts, prediction.chunk(pieces), batch_fractions(parts, losses)):
            backward, shown = batch_loss({"depth": guess}, part, losses, step, fractions=fraction)
            found = found + backward
        expected = torch.stack(
            [sigloss(*pair, step < 100) for pair in zip(prediction.split(2), target.split(2))]
        ).mean()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = [torch.autograd.grad(loss, prediction, retain_graph=True)[0].double() for loss in (found, expected)]
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()
    pooled = SILogLoss(eps=1e-3)(prediction, target)
    assert abs(pooled.item() / found.item() - 1) > 0.01, "the pooled loss is the same, so nothing was tested"


@pytest.mark.parametrize("name, brightness", [("kitti", (0.9, 1.1)), ("nyu", (0.75, 1.25))])
def test_colors_change_on_0_to_255(name, brightness):
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    color = build_transforms(get_recipe(f"{name}_vitb")).transforms[-1]
    differences = []
    for seed in range(20):
        found = color(dict(image=image), torch.Generator().manual_seed(seed))["image"]
        drawn = torch.Generator().manual_seed(seed)
        uniform = lambda low, high, count=1: (low + (high - low) * torch.rand(count, generator=drawn).double()).numpy()
        levels = image.double().numpy() * 255
        if uniform(0, 1).item() < 0.5:
            levels = levels ** uniform(0.9, 1.1) * uniform(*brightness)
            levels = np.clip(levels * uniform(0.9, 1.1, 3)[:, None, None], 0, 255)
        differences.append(np.abs(found.double().numpy() - levels / 255).max())
    assert max(differences) < 1e-5
    strong, weak = (build_transforms(get_recipe(f"{name}_vitb{end}")).transforms[-1] for end in ("", "_config"))
    change = lambda transform: np.mean(
        [
            (transform(dict(image=image), torch.Generator().manual_seed(seed))["image"] - image).abs().mean().item()
            for seed in range(40)
        ]
    )
    assert change(strong) > 1.2 * change(weak)


def test_the_decoder_begins_as_mmcv_draws_it():
    torch.manual_seed(0)
    model = create_model("dpt_base", **get_recipe("kitti_vitb").model.changes)
    before = {name: value.clone() for name, value in model.named_parameters()}
    kaiming_decoder(model)
    drawn = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    modules = dict(model.named_modules())
    convolutions = {name.rpartition(".")[0] for name in drawn}
    # mmcv's ConvModules: four projections, four 3×3, seven residual units of two, four projections in the fusion,
    # one before the head
    assert len(convolutions) == 4 + 4 + 7 * 2 + 4 + 1
    for name in convolutions:
        weight, bias = modules[name].weight, modules[name].bias
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        scaled = (weight.double() / math.sqrt(2 / fan_out)).flatten()
        assert scaled.mean().abs() < 5 / len(scaled) ** 0.5 and abs(scaled.var() - 1) < 8 / len(scaled) ** 0.5
        assert abs((scaled**4).mean() - 3) < 0.1, "a normal distribution has a kurtosis of 3, a uniform one of 1.8"
        assert bias is None or not bias.any()
    assert not any(name.startswith("backbone.") or "resample" in name or "read." in name for name in drawn)
    assert {name for name in before if name.startswith("heads.")} - drawn == {
        f"heads.depth.convolution{number}.{kind}" for number in (1, 2, 3) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_difference_has_its_source(name):
    run, config = get_recipe(f"{name}_vitb"), get_recipe(f"{name}_vitb_config")
    differences = recipe_differences(run, config)
    assert {row["field"] for row in differences} == set(TOOLBOX_POINTS)
    table = difference_table(run, config)
    for row in differences:
        assert (
            row["one"][1] in table
            and row["other"][1] in table
            and row["one"][1].startswith(("mmcv 1.3.13", "Toolbox "))
        )
        assert row["one"][1] in recipe_table(run) and row["other"][1] in recipe_table(config)


def test_the_norms_of_the_run_have_a_larger_eps():
    for name, eps in (("kitti_vitb", 1e-5), ("kitti_vitb_config", 1e-6)):
        with torch.device("meta"):
            model = create_model("dpt_base", **get_recipe(name).model.changes)
        assert {block.norm1.eps for block in model.backbone.vit.blocks} == {eps}


def test_changing_one_recipe_changes_no_other():
    before = {name: recipe_table(recipe) for name, recipe in RECIPES.items()}
    change_recipe(
        get_recipe("kitti_vitb"),
        ["losses.depth.images_per_group=4", "model.changes.layer_norm_eps=1e-3", "data.transforms=[]"],
    )
    assert {name: recipe_table(recipe) for name, recipe in RECIPES.items()} == before
