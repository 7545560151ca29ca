"""Two real processes with unequal shares of a set, even no share at all, must agree on every metric with one process
that has it all."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from dpt_nb.objective.depth_edges import BoundaryFScore
from dpt_nb.objective.depth_metrics import DepthMetrics
from dpt_nb.objective.ordinal_pairs import WHDR
from dpt_nb.objective.segmentation_metrics import SegmentationMetrics

SHARES = [
    ([0], [1, 2, 3, 4]),
    ([0, 1, 2, 3, 4], []),
    ([], [0, 1, 2, 3, 4]),
    ([3], [0, 1, 2, 4]),
]  # image 3 has nothing to judge


def _set():
    """Five images, the same in every process: depth, labels, and ordinal pairs in uneven numbers. Image 3 has no truth
    of any kind."""
    generator = torch.Generator().manual_seed(0)
    target = 10 * torch.rand(5, 1, 12, 16, generator=generator)
    target[2] *= torch.rand(12, 16, generator=generator) < 0.3
    target[3] = 0
    prediction = target * torch.exp(0.3 * torch.randn(target.shape, generator=generator)) + 0.01
    label = torch.randint(0, 4, (5, 12, 16), generator=generator)
    label[:, :2] = 255
    label[3] = 255
    logits = torch.randn(5, 6, 12, 16, generator=generator)
    number = (3, 9, 1, 0, 20)
    points = [
        torch.stack(
            (torch.randint(0, 12, (k, 2), generator=generator), torch.randint(0, 16, (k, 2), generator=generator)),
            dim=-1,
        )
        for k in number
    ]
    relation = [torch.randint(-1, 2, (k,), generator=generator) for k in number]
    weight = [torch.rand(k, generator=generator) for k in number]
    return dict(
        depth=(prediction, target),
        inverse_depth=(1 / prediction, target),
        label=(logits, label),
        pairs=(prediction, points, relation, weight),
    )


def _metrics():
    "Every class in every way to average, and the part of the set that it judges."
    metrics = {
        f"depth {average} {align}": (
            "inverse_depth" if align == "least_squares" else "depth",
            DepthMetrics(max_depth=20.0, average=average, align=align),
        )
        for average in ("image", "pixel")
        for align in (None, "median", "least_squares")
    }
    metrics |= {
        f"pairs {average}": ("pairs", WHDR("depth", "ratio", 0.1, average=average)) for average in ("pair", "image")
    }
    metrics |= {
        f"edges {average}": ("depth", BoundaryFScore("depth", max_depth=20.0, average=average))
        for average in ("image", "pair")
    }
    return metrics | {"labels": ("label", SegmentationMetrics(6))}


def _judge(images):
    "All metrics over some images of the set, one image at a time."
    judged, metrics = _set(), _metrics()
    for k in images:
        for part, metric in metrics.values():
            metric.update(*(x[k : k + 1] for x in judged[part]))
    return {name: metric.compute() for name, (_, metric) in metrics.items()}


def _process(rank, meeting, folder):
    "One of two processes, which judges its share of every division of the set."
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        torch.save([_judge(share[rank]) for share in SHARES], Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_unequal_shares_agree():
    whole = _judge(range(5))
    for name, result in whole.items():
        assert (result["images"], result["skipped"]) == (4, 1), name
        assert all(math.isfinite(value) for value in result.values() if isinstance(value, float)), name
    assert whole["labels"]["class_iou"][5] == 0.0  # predicted, never true
    assert whole["depth image None"]["rmse"] != whole["depth pixel None"]["rmse"]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, args=(str(Path(folder) / "meeting"), folder), nprocs=2)
        for rank in range(2):
            for share, results in zip(SHARES, torch.load(Path(folder) / f"{rank}.pt"), strict=True):
                assert results.keys() == whole.keys()
                for name, result in results.items():
                    assert result.keys() == whole[name].keys()
                    for key, value in result.items():
                        expected = whole[name][key]
                        close = (
                            value == expected
                            or isinstance(value, float)
                            and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-12)
                        )
                        assert close, f"{name}, {key}, shares {share}, process {rank}: {value} instead of {expected}"
