"The same on a GPU as on the CPU. Skipped where there is none."

import json

import pytest
import torch

from dpt_nb.data.scene_sets import Scenes
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import PROTOCOLS
from dpt_nb.inference.predictor import Predictor
from dpt_nb.network.dpt import DPT
from dpt_nb.network.zoo import create_model
from dpt_nb.objective.depth_losses import DepthLoss
from dpt_nb.objective.segmentation_losses import SegmentationLoss
from dpt_nb.scenes.raycast import render
from dpt_nb.scenes.scenes import random_scene
from dpt_nb.training.recipe_fields import change_recipe
from dpt_nb.training.recipes import get_recipe
from dpt_nb.training.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def exact():
    "float32 convolutions and products in full precision, so that devices can be compared."
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


SMALL_BEIT = dict(backbone_arguments=dict(embed_dim=64, depth=4, num_heads=2), taps=[0, 1, 2, 3])
SMALL_SWIN = dict(
    backbone_arguments=dict(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)), channels=[32, 64, 128, 256]
)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("dpt_tiny", {}),
        ("vit_tiny_patch16_224", {}),
        ("beit_base_patch16_224", SMALL_BEIT),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN),
        ("swinv2_tiny_window8_256", SMALL_SWIN),
    ],
)
def test_the_same_prediction(name, changes):
    torch.manual_seed(0)
    model = create_model(name, heads={"depth": dict(output="exp"), "label": dict(num_classes=12)}, **changes).eval()
    image = torch.rand(2, 3, 200, 333)
    on_cpu, on_gpu = Predictor(model, "cpu", flip=True).predict(image), None
    on_gpu = Predictor(model, "cuda", flip=True).predict(image)
    for head in on_cpu:
        assert on_gpu[head].is_cuda
        assert (on_cpu[head] - on_gpu[head].cpu()).abs().max() <= 1e-3 * on_cpu[head].abs().max()


def test_the_same_losses():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (1 + torch.rand(2, 1, 24, 32, generator=generator) for _ in range(2))
    target[:, :, ::3] = 0
    logits, label = (
        torch.randn(2, 5, 24, 32, generator=generator),
        torch.randint(0, 5, (2, 24, 32), generator=generator),
    )
    for loss, pair in [(DepthLoss(), (prediction, target)), (SegmentationLoss(), (logits, label))]:
        assert loss(*(tensor.cuda() for tensor in pair)).item() == pytest.approx(loss(*pair).item(), rel=1e-5)


def test_scenes_render_on_the_device():
    scene = random_scene("rooms", 3)
    here, there = render(scene), render(scene.to("cuda"))
    assert (here["depth"] - there["depth"].cpu()).abs().max() < 1e-3
    assert (here["label"] != there["label"].cpu()).float().mean() < 1e-3
    assert ((here["normal"] - there["normal"].cpu()).abs().amax(0) > 1e-3).float().mean() < 1e-3


def test_training_judging_and_going_on(tmp_path):
    recipe = change_recipe(
        get_recipe("rooms_tiny"),
        [
            "loop.steps=8",
            "data.batch_size=4",
            "data.train.count=12",
            "data.held_out.count=4",
            "keep.validate_every=4",
            "keep.save_steps=4",
        ],
    )
    report = train(recipe, tmp_path / "run", tmp_path / "data", progress=False)
    assert report["device"] == torch.cuda.get_device_name()
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    last.unlink()
    again = train(recipe, tmp_path / "run", tmp_path / "data", resume=True, progress=False)
    assert again["abs_rel"] == pytest.approx(report["abs_rel"], rel=0.02)
    held_out = Scenes(tmp_path / "data", "rooms", 4, "held_out", progress=False)
    judged = evaluate(
        Predictor(DPT.from_pretrained(tmp_path / "run" / "model"), "cuda"), held_out, PROTOCOLS["rooms"], progress=False
    )
    assert judged["abs_rel"] == pytest.approx(
        json.loads((tmp_path / "run" / "report.json").read_text())["abs_rel"], rel=0.02
    )
