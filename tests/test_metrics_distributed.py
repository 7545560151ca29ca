"Two real processes with unequal shares must agree on the means over the whole set."
import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from dpt_nb.metrics import DepthMetrics, SegmentationMetrics


def _set():
    "Five depth images (one without measurements) and five label maps, the same in every process."
    generator = torch.Generator().manual_seed(0)
    target = 10 * torch.rand(5, 1, 12, 16, generator=generator)
    target[3] = 0
    prediction = target * torch.exp(0.3 * torch.randn(target.shape, generator=generator))
    label = torch.randint(0, 4, (5, 12, 16), generator=generator)
    label[:, :2] = 255
    logits = torch.randn(5, 6, 12, 16, generator=generator)
    return prediction, target, logits, label


def _judge(images):
    "Both metrics over some images of the set, one image at a time."
    prediction, target, logits, label = _set()
    depth, segmentation = DepthMetrics(max_depth=20.0), SegmentationMetrics(6)
    for k in images:
        depth.update(prediction[k : k + 1], target[k : k + 1])
        segmentation.update(logits[k : k + 1], label[k : k + 1])
    return depth.compute(), segmentation.compute()


def _process(rank, meeting, folder):
    "One of two processes: the first judges one image, the second four."
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        torch.save(_judge([[0], [1, 2, 3, 4]][rank]), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_with_unequal_shares_agree():
    whole_depth, whole_segmentation = _judge(range(5))
    assert (whole_depth["images"], whole_depth["skipped"]) == (4, 1)
    assert whole_segmentation["class_iou"][5] == 0.0  # predicted, never true
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, args=(str(Path(folder) / "meeting"), folder), nprocs=2)
        for rank in range(2):
            depth, segmentation = torch.load(Path(folder) / f"{rank}.pt")
            assert depth.keys() == whole_depth.keys()
            for name, value in whole_depth.items():
                assert math.isclose(depth[name], value, rel_tol=1e-12), name
            assert segmentation == whole_segmentation
