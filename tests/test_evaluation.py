"Two real processes that share a data set, evenly, unevenly or not at all, must report what one process reports that judges it alone."
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch.utils.data import Dataset

from dpt_nb.evaluation import EvaluationError, Protocol, evaluate

PROTOCOLS = {
    "metres": Protocol(max_depth=20.0, crop="garg"),
    "pixels": Protocol(max_depth=20.0, crop="eigen", average="pixel", align="median"),
    "inverse": Protocol(max_depth=20.0, align="least_squares"),
}
COUNTS = (5, 1)  # shares of 3 and 2, and of 1 and none
SIZES = [(12, 16), (12, 16), (16, 12), (12, 16), (12, 16)]


class Pictures(Dataset):
    "Pictures of two sizes with depth and labels, the same in every process; picture 3 has no truth of either kind."

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator, size = torch.Generator().manual_seed(index), SIZES[index]
        depth = 19 * torch.rand(1, *size, generator=generator) * (torch.rand(1, *size, generator=generator) < 0.6)
        label = torch.randint(0, 4, size, generator=generator)
        label[:2] = 255
        if index == 3:
            depth, label = torch.zeros_like(depth), torch.full_like(label, 255)
        return dict(image=torch.rand(3, *size, generator=generator), depth=depth, label=label, meta=dict(path=f"picture {index}"))


class FromColours:
    "Maps made of the picture's colours alone."

    def __init__(self, head):
        self.head = head

    def predict(self, image):
        depth = 1 + 15 * image[:, :1]
        maps = {"depth": depth, "inverse_depth": 1 / depth}
        return {self.head: maps[self.head], "label": torch.cat([image, 1 - image], dim=1)}


def judge(batch_size, **options):
    "Every protocol on every count of pictures."
    head = {"inverse": "inverse_depth"}
    return {(name, count): evaluate(FromColours(head.get(name, "depth")), Pictures(count), protocol, batch_size, progress=False, **options) for name, protocol in PROTOCOLS.items() for count in COUNTS}


def process(rank, meeting, folder):
    "One of two processes, which judges its share, and then everything by itself."
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        with pytest.raises(EvaluationError, match="shared by 3 processes, and 2 are running"):
            judge(2, share=(rank, 3))
        with pytest.raises(EvaluationError, match="Not one of the 2 pictures has"):
            evaluate(FromColours("depth"), torch.utils.data.Subset(Pictures(5), [3, 3]), PROTOCOLS["metres"], progress=False, share=(rank, 2))
        torch.save(dict(shared=judge(2, share=(rank, 2)), alone=judge(3)), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def assert_same(result, expected, what):
    "Equal keys in equal order, and numbers to 1e-6."
    assert list(result) == list(expected), what
    for key, value in result.items():
        for one, other in zip(value, expected[key], strict=True) if isinstance(value, list) else [(value, expected[key])]:
            assert one == other or math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12), f"{what}, {key}: {value} instead of {expected[key]}"


def test_two_processes_agree_with_one():
    whole = judge(16)
    for (name, count), numbers in whole.items():
        assert (numbers["images"], numbers["skipped"]) == ((4, 1) if count == 5 else (1, 0)), name
        assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float)), name
    assert whole["metres", 5]["abs_rel"] != whole["pixels", 5]["abs_rel"]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, args=(str(Path(folder) / "meeting"), folder), nprocs=2)
        for rank in range(2):
            for way, results in torch.load(Path(folder) / f"{rank}.pt").items():
                assert results.keys() == whole.keys()
                for case, numbers in results.items():
                    assert_same(numbers, whole[case], f"{way}, {case}, process {rank}")


def test_batch_size_changes_nothing():
    whole = judge(16)
    for batch_size in (1, 3):
        for case, numbers in judge(batch_size).items():
            assert_same(numbers, whole[case], f"batches of {batch_size}, {case}")
