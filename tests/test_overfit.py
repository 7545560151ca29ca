"A DPT with random weights overfits one room, edges included. `training.loop` shows it for another room."

import pytest
import torch
import torch.nn.functional as functional

from dpt_nb.network.zoo import create_model
from dpt_nb.objective.gradient_matching import gradient_matching_loss
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene


def sharpness(prediction, truth):
    "The predicted jump over three pixels at each depth edge of the truth, as a share of the true one; median."
    rise = lambda depth: depth.log()[..., 3:] - depth.log()[..., :-3]
    edges = (truth.log()[..., 2:-1] - truth.log()[..., 1:-2]).abs() > 0.15
    return (rise(prediction)[edges] / rise(truth)[edges]).median().item()


@pytest.mark.slow
def test_overfits_one_room():
    torch.manual_seed(1)
    room = render(random_scene("rooms", seed=5))
    image, truth = room["image"][None], room["depth"][None]
    model = create_model(
        "dpt_tiny",
        heads={"depth": dict(output="exp", hidden=16)},
        channels=[32, 64, 128, 128],
        taps=["stages.0", "stages.1", 1, 2],
        backbone_arguments=dict(
            depth=3,
            embed_dim=128,
            num_heads=4,
            resnet=dict(layers=[1, 2, 2], channels=[32, 64, 128], stem=16, pool=False),
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=450)
    for _ in range(450):
        prediction = model(image)["depth"]
        loss = (prediction.log() - truth.log()).abs().mean() + 10 * gradient_matching_loss(prediction, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        learned = model.eval()(image)["depth"]
    blurred = functional.avg_pool2d(truth, 3, stride=1, padding=1, count_include_pad=False)
    assert ((learned - truth).abs() / truth).mean() < 0.02
    assert sharpness(learned, truth) > sharpness(blurred, truth), "edges are softer than a 3×3 mean of the truth"
