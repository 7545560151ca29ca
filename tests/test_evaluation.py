"""Two real processes that share a data set, evenly, unevenly or not at all, must report what one
process reports that evaluates it alone.
Predictions in files must be evaluated as BTS's `utils/eval_with_pngs.py` does."""

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from conftest import command_here
from PIL import Image
from torch.utils.data import Dataset

from dpt_nb.commands import main
from dpt_nb.data.registry import make_miniature
from dpt_nb.evaluation.evaluate import evaluate
from dpt_nb.evaluation.protocols import EvaluationError, Protocol
from dpt_nb.network.heads import HEADS, register_head


@pytest.fixture(autouse=True)
def heat():
    "A kind of prediction from outside, of which the library knows nothing; each process registers it."
    register_head("heat", words="heat", missing=-1)(torch.nn.Identity)
    yield
    HEADS.pop("heat"), HEADS.homes.pop("heat")


PROTOCOLS = {
    "metres": Protocol(max_depth=20.0, crop="garg"),
    "pixels": Protocol(max_depth=20.0, crop="eigen", average="pixel", align="median"),
    "inverse": Protocol(max_depth=20.0, align="least_squares"),
}
COUNTS = (5, 1)  # shares of 3 and 2, and of 1 and none
SIZES = [(12, 16), (12, 16), (16, 12), (12, 16), (12, 16)]


class Pictures(Dataset):
    "Images of two sizes with ground truth of four kinds, the same in every process; image 3 has none but of heat."

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator, size = torch.Generator().manual_seed(index), SIZES[index]
        depth = 19 * torch.rand(1, *size, generator=generator) * (torch.rand(1, *size, generator=generator) < 0.6)
        label = torch.randint(0, 4, size, generator=generator)
        label[:2] = 255
        normal = torch.nn.functional.normalize(torch.randn(3, *size, generator=generator), dim=0)
        normal[:, :, :3] = 0
        if index == 3:
            depth, label, normal = torch.zeros_like(depth), torch.full_like(label, 255), torch.zeros_like(normal)
        return dict(
            image=torch.rand(3, *size, generator=generator),
            depth=depth,
            label=label,
            normal=normal,
            heat=depth[:, :, ::2].repeat_interleave(2, 2) - 1,
            meta=dict(path=f"image {index}"),
        )


class FromColors:
    "Maps made of the image's colors alone."

    def __init__(self, head):
        self.head = head

    def predict(self, image):
        depth = 1 + 15 * image[:, :1]
        maps = {"depth": depth, "inverse_depth": 1 / depth}
        others = {"label": torch.cat([image, 1 - image], dim=1), "normal": image - 0.5, "heat": 9 * image[:, 1:2]}
        return {self.head: maps[self.head]} | others


def evaluate_all(batch_size, **options):
    "Every protocol on every count of images."
    head = {"inverse": "inverse_depth"}
    return {
        (name, count): evaluate(
            FromColors(head.get(name, "depth")), Pictures(count), protocol, batch_size, progress=False, **options
        )
        for name, protocol in PROTOCOLS.items()
        for count in COUNTS
    }


def process(rank, meeting, folder):
    "One of two processes, which evaluates its share, and then everything by itself."
    torch.set_num_threads(1)
    register_head("heat", words="heat", missing=-1)(torch.nn.Identity)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        with pytest.raises(EvaluationError, match="shared by 3 processes, and 2 are running"):
            evaluate_all(2, share=(rank, 3))
        with pytest.raises(EvaluationError, match="Not one of the 2 images has"):
            evaluate(
                FromColors("depth"),
                torch.utils.data.Subset(Pictures(5), [3, 3]),
                PROTOCOLS["metres"],
                progress=False,
                share=(rank, 2),
            )
        torch.save(dict(shared=evaluate_all(2, share=(rank, 2)), alone=evaluate_all(3)), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def assert_same(result, expected, what):
    "Equal keys in equal order, and numbers to 1e-6."
    assert list(result) == list(expected), what
    for key, value in result.items():
        for one, other in (
            zip(value, expected[key], strict=True) if isinstance(value, list) else [(value, expected[key])]
        ):
            assert one == other or math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12), (
                f"{what}, {key}: {value} instead of {expected[key]}"
            )


@pytest.mark.slow
def test_two_processes_agree_with_one():
    whole = evaluate_all(16)
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


def test_one_report_holds_every_kind_of_prediction():
    "Against numpy, in float64: angles, absolute errors and intersections of all pixels in one pool."
    report, pictures = evaluate_all(2)["metres", 5], [Pictures(5)[index] for index in range(5)]
    angles, errors, right = [], [], []
    for sample in pictures:
        image = sample["image"].double().numpy()
        normal, guess = sample["normal"].double().numpy(), image - 0.5
        known = np.abs(normal).sum(0) > 0
        cosine = (normal * guess).sum(0)[known] / np.linalg.norm(guess, axis=0)[known]
        angles += np.degrees(np.arccos(np.clip(cosine, -1, 1))).tolist()
        heat = sample["heat"].double().numpy()[0]
        errors += (9 * image[1] - heat)[heat != -1].tolist()
        label = sample["label"].numpy()
        right += (np.concatenate([image, 1 - image]).argmax(0) == label)[label != 255].tolist()
    assert math.isclose(report["mean_angle"], np.mean(angles), rel_tol=1e-6)
    assert abs(report["median_angle"] - np.median(angles)) < 0.1
    for threshold in (11.25, 22.5, 30):
        assert math.isclose(report[f"below_{threshold:g}"], np.mean(np.array(angles) < threshold), abs_tol=1e-9)
    assert math.isclose(report["heat_mae"], np.abs(errors).mean(), rel_tol=1e-6)
    assert math.isclose(report["heat_rmse"], np.sqrt(np.square(errors).mean()), rel_tol=1e-6)
    assert math.isclose(report["pixel_accuracy"], np.mean(right), rel_tol=1e-9)
    assert (report["images"], report["skipped"]) == (4, 1)  # depth's, though heat is known in all


def test_batch_size_changes_nothing():
    whole = evaluate_all(16)
    for batch_size in (1, 3):
        for case, numbers in evaluate_all(batch_size).items():
            assert_same(numbers, whole[case], f"batches of {batch_size}, {case}")


GARG, EIGEN = (0.40810811, 0.99189189, 0.03594771, 0.96405229), (0.3324324, 0.91351351, 0.0359477, 0.96405229)
COLUMNS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


def as_bts(predictions, truths, scale, cap, cut, rectangle):
    """What BTS's script does, in float64: clamp, lay the cut back into a whole image of zeros, mask by depth and
    rectangle; the mean over images."""
    rows = []
    for file in sorted(predictions.glob("*.png")):
        if "cmap" in file.stem or not (truth := truths(file.stem)).exists():
            continue
        depth, guess = (np.array(Image.open(path)).astype(np.float64) / scale for path in (truth, file))
        guess = np.minimum(np.maximum(guess, 1e-3), cap)
        height, width = depth.shape
        if cut:
            laid = np.zeros_like(depth)
            laid[height - 352 :, int((width - 1216) / 2) :][:, :1216] = guess
            guess = laid
        top, bottom, left, right = (
            rectangle
            if max(rectangle) > 1
            else [int(share * side) for share, side in zip(rectangle, (height, height, width, width))]
        )
        mask = np.zeros_like(depth, dtype=bool)
        mask[top:bottom, left:right] = True
        mask &= (depth > 1e-3) & (depth < cap)
        g, p = depth[mask], guess[mask]
        log, worse = np.log(p) - np.log(g), np.maximum(p / g, g / p)
        rows.append(
            [
                np.mean(np.abs(g - p) / g),
                np.mean((g - p) ** 2 / g),
                np.sqrt(np.mean((g - p) ** 2)),
                np.sqrt(np.mean(log**2)),
                np.mean(np.abs(np.log10(p) - np.log10(g))),
                100 * np.sqrt(np.mean(log**2) - np.mean(log) ** 2),
                *(np.mean(worse < 1.25**power) for power in (1, 2, 3)),
            ]
        )
    return dict(zip(COLUMNS, np.mean(rows, axis=0)))


def write_predictions(folder, names, scale, size):
    "Depths with every difficulty: zeros, beyond any cap, smooth and rough; a lone ramp for each image."
    folder.mkdir()
    for seed, name in enumerate(names):
        generator = np.random.default_rng(seed)
        ramp = np.linspace(1.4, 0.06, size[0])[:, None] * np.ones(size[1]) * (20 if scale == 256 else 4)
        depth = ramp * generator.lognormal(0, 0.2, size)
        depth[generator.random(size) < 0.02], depth[generator.random(size) < 0.02] = 0, 65
        Image.fromarray(np.round(depth * scale).clip(0, 65535).astype(np.uint16)).save(folder / name)
    (folder / "rgb_cmap.png").touch()  # BTS looks past these


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "Miniatures of KITTI and NYUv2, with predictions for both in BTS's names."
    home = tmp_path_factory.mktemp("stored")
    make_miniature("kitti", home / "kitti", count=8)
    make_miniature("nyu", home / "nyu", count=6, labeled=False)
    drives = [line.split()[0] for line in (home / "kitti" / "kitti_eigen_test.txt").read_text().splitlines()]
    write_predictions(
        home / "for_kitti", [f"{name.split('/')[1]}_{name.split('/')[-1]}" for name in drives], 256, (352, 1216)
    )
    scenes = [line.split()[0].strip("/") for line in (home / "nyu" / "nyu_test.txt").read_text().splitlines()]
    write_predictions(
        home / "for_nyu", [name.replace("/", "_").replace(".jpg", ".png") for name in scenes], 1000, (480, 640)
    )
    return home


def kitti_truth(home):
    return lambda stem: (
        home
        / "kitti"
        / "gt_depth"
        / stem.rpartition("_")[0]
        / "proj_depth"
        / "groundtruth"
        / "image_02"
        / f"{stem.rpartition('_')[2]}.png"
    )


def nyu_truth(home):
    return lambda stem: home / "nyu" / stem.split("_rgb_")[0] / f"sync_depth_{stem.split('_rgb_')[1]}.png"


@pytest.mark.parametrize(
    "data, protocol, truth, options, counts",
    [
        ("kitti", "kitti_eigen", kitti_truth, (256, 80, True, GARG), (3, 1)),
        ("kitti", "kitti_eigen_crop", kitti_truth, (256, 80, True, EIGEN), (3, 1)),
        ("nyu", "nyu", nyu_truth, (1000, 10, False, (45, 471, 41, 601)), (3, 0)),
    ],
)
def test_predictions_in_files_are_evaluated_as_bts_does(data, protocol, truth, options, counts, stored, tmp_path):
    expected = as_bts(stored / f"for_{data}", truth(stored), *options)
    done = command_here(
        "dpt_eval",
        "--predictions",
        stored / f"for_{data}",
        "--data",
        data,
        "--data-root",
        stored / data,
        "--protocol",
        protocol,
        "--out",
        tmp_path,
        folder=tmp_path,
        check=0,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["skipped"]) == counts and report["predictions"].endswith(f"for_{data}")
    row = re.search(r"for_" + data + r" +(.*)", done.stdout).group(1).split()
    for key, printed in zip(COLUMNS, row, strict=True):
        # a ratio of exactly 1.25, 5 to 4 in stored numbers, falls on one side or the other where metres are float32
        assert report[key] == pytest.approx(expected[key], abs=1e-4 if key.startswith("delta") else 0, rel=1e-6), key
        assert abs(float(printed) - expected[key]) < 1.01e-4, f"{key} is printed as {printed}, and is {expected[key]}"
    assert Image.open(tmp_path / "gallery-depth.png").width > 1000


def test_predictions_are_evaluated_without_the_images(stored, tmp_path, capsys):
    images = stored / "kitti" / "input"
    away = images.rename(stored / "input_away")
    try:
        assert (
            main(
                [
                    "dpt_eval",
                    "--predictions",
                    str(stored / "for_kitti"),
                    "--data",
                    "kitti",
                    "--data-root",
                    str(stored / "kitti"),
                    "--out",
                    str(tmp_path),
                ]
            )
            == 0
        )
    finally:
        away.rename(images)
    assert "3 images evaluated, 1 without ground truth left out" in capsys.readouterr().out


def spoil(name, make):
    "A change to one prediction of KITTI: `make` gets what was in it and gives what will be."

    def change(folder):
        file = folder / name
        Image.fromarray(make(np.array(Image.open(file)))).save(file)

    return change


FIRST = "2011_09_26_drive_0002_sync_0000000005.png"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            spoil(FIRST, lambda stored: np.pad(stored, ((23, 0), (13, 13)))),
            "has 375 rows and 1242 columns, and 352 and 1216 were expected",
        ),
        (
            spoil(FIRST, lambda stored: (stored // 256).astype(np.uint8)),
            "with L pixels, and a depth map is a 16-bit gray PNG",
        ),
        (spoil(FIRST, lambda stored: stored * 0), "holds 0 everywhere"),
        (lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:2000]), "is damaged or cut short"),
        (lambda folder: (folder / FIRST).unlink(), "1 of 3 predictions are missing"),
        (lambda folder: (folder / FIRST).rename(folder / "0000000005.png"), "but 0000000005.png is there"),
        (
            lambda folder: (folder / "2011_09_26_drive_0009_sync_0000000005.png").touch(),
            "belong to no image of the list",
        ),
        (
            lambda folder: [spoil(file.name, lambda stored: stored // 8)(folder) for file in folder.glob("2011*")],
            "Say with how many they were written (--scale)",
        ),
    ],
)
def test_predictions_that_do_not_fit_get_one_sentence(change, sentence, stored, tmp_path, capsys):
    folder = tmp_path / "for_kitti"
    folder.mkdir()
    for file in (stored / "for_kitti").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    assert (
        main(["dpt_eval", "--predictions", str(folder), "--data", "kitti", "--data-root", str(stored / "kitti")]) == 1
    )
    said = capsys.readouterr().err.split("\r")[-1]
    assert sentence in said and said.count("\n") == 1, said
