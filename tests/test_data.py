"Data sets from a shell: every miniature made, checked, shown and read; every fault tried; published lists counted."

import contextlib
import hashlib
import io
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, command_here
from PIL import Image
from torch.nn.functional import max_pool2d
from torch.utils.data import DataLoader

from dpt_nb.commands import main
from dpt_nb.data.checks import batch_warnings, check_datasets
from dpt_nb.data.datasets import DatasetError
from dpt_nb.data.folder import Folder, make_folder
from dpt_nb.data.kitti import KITTI_CAMERAS
from dpt_nb.data.lists import split_lines
from dpt_nb.data.registry import DATASETS, MINIATURES, open_dataset
from dpt_nb.data.sampling import Mixture, TransformedDataset, generator, training_loader
from dpt_nb.data.splits import check_splits, shared_options
from dpt_nb.data.transforms import NYU_WINDOW, ColorJitter, Compose, Crop, Flip, KBCrop, Pad, Rescale, Resize, Rotate
from dpt_nb.training.recipes import RECIPES

SPLITS = REPOSITORY.parent / "shared" / "splits"
WAYS = {  # data set → ways to open it: split and options
    "kitti": [
        ("train", []),
        ("held_out", []),
        ("train", ["benchmark=official"]),
        ("held_out", ["benchmark=official"]),
        ("test", ["benchmark=official"]),
    ],
    "nyu": [
        ("train", []),
        ("held_out", []),
        ("train", ["layout=labeled"]),
        ("held_out", ["layout=labeled", "labels=raw"]),
    ],
    "ade20k": [("train", []), ("held_out", [])],
    "pascal_context": [("train", []), ("held_out", ["num_classes=60"])],
    "folder": [("train", []), ("held_out", [])],
}


def typed(*words, check):
    "The command, entered in this process; `check` is the exit code expected."
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as wrong:
        code = main(["dpt_data", *map(str, words)])
    assert code == check, f"exit code {code}, expected {check}\n{printed.getvalue()}\n{wrong.getvalue()}"
    return SimpleNamespace(stdout=printed.getvalue(), stderr=wrong.getvalue())


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    "All miniatures, made through the command."
    folder = tmp_path_factory.mktemp("miniatures")
    for name in MINIATURES:
        done = typed("make", name, folder / name, "--count", 16 if name == "folder" else 4, check=0)
        assert f"holds a miniature of {name}" in done.stdout
    return folder


def test_the_command_makes_checks_and_shows(tmp_path):
    command_here("dpt_data", "make", "folder", "mine", "--count", 16, folder=tmp_path, check=0)
    done = command_here("dpt_data", "check", "folder", "mine", folder=tmp_path, check=0)
    assert done.stdout.count("nothing wrong") == 2 and "sample/s" in done.stderr  # the bar, with its rate
    command_here("dpt_data", "show", "folder", "mine", folder=tmp_path, check=0)
    assert Image.open(tmp_path / "folder-train.png").width > 500
    next((tmp_path / "mine" / "depth").iterdir()).unlink()
    assert "missing: 1" in command_here("dpt_data", "check", "folder", "mine", folder=tmp_path, check=1).stdout


@pytest.mark.parametrize("name", WAYS)
def test_a_miniature_is_checked_and_nothing_is_wrong(name, miniatures):
    done = typed("check", name, miniatures / name, "--workers", 0, check=0)
    assert done.stdout.count("nothing wrong") == 2, done.stdout
    samples = [int(found) for found in re.findall(r"(\d+) samples", done.stdout)]
    assert min(samples) >= 1 and all(samples)


@pytest.mark.parametrize("name, split, words", [(name, *way) for name, ways in WAYS.items() for way in ways])
def test_every_way_to_open_a_miniature_gives_samples_by_the_contract(name, split, words, miniatures):
    chosen = dict(word.split("=") for word in words)
    dataset = open_dataset(
        name,
        miniatures / name,
        split,
        **{key: int(value) if value.isdigit() else value for key, value in chosen.items()},
    )
    for sample in (dataset[index] for index in range(len(dataset))):
        size = sample["image"].shape[1:]
        assert (
            sample["image"].dtype == torch.float32
            and sample["image"].shape[0] == 3
            and 0 <= sample["image"].min()
            and sample["image"].max() <= 1
        )
        assert set(sample) == {"image", "meta", *dataset.targets}
        if "depth" in sample:
            assert (
                sample["depth"].shape == (1, *size)
                and sample["depth"].dtype == torch.float32
                and sample["depth"].isfinite().all()
                and sample["depth"].min() >= 0
            )
        if "label" in sample:
            assert sample["label"].shape == size and sample["label"].dtype == torch.int64
            known = sample["label"][sample["label"] != 255]
            assert known.min() >= 0 and (not dataset.classes or known.max() < len(dataset.classes))
        if "intrinsics" in sample:
            assert sample["intrinsics"].shape == (3, 3) and sample["intrinsics"][2].tolist() == [0, 0, 1]


def test_miniatures_are_shown(miniatures, tmp_path):
    for name in ("kitti", "ade20k", "folder"):
        done = typed("show", name, miniatures / name, "--count", 2, "--out", tmp_path / f"{name}.png", check=0)
        assert Image.open(tmp_path / f"{name}.png").width > 500 and "samples are drawn in" in done.stdout


PIPELINES = {
    "kitti": [KBCrop(), Rotate(probability=1.0), Flip(), Crop(352, 704), ColorJitter()],
    "nyu": [NYU_WINDOW, Rotate(probability=1.0), Flip(), Crop(416, 544), ColorJitter()],
    "ade20k": [Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()],
    "pascal_context": [Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()],
    "folder": [Flip(), Crop(64, 64), ColorJitter()],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_batches_come_out_alike_whatever_the_workers(name, miniatures):
    dataset = open_dataset(name, miniatures / name, "train")
    read = lambda workers: [
        batch["image"] for batch in training_loader(dataset, 2, 0, Compose(*PIPELINES[name]), stop=4, workers=workers)
    ]
    assert all(torch.equal(first, second) for first, second in zip(read(0), read(2), strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_one_resampling_of_files_is_the_chain_step_by_step(name, miniatures):
    dataset, chain = open_dataset(name, miniatures / name, "train"), Compose(*PIPELINES[name])
    for key in ((0, 0), (3, 1)):
        at_once = TransformedDataset(dataset, chain, seed=5)[key]
        stepwise = chain(dataset[key[1]], generator(5, *key))
        assert at_once.keys() == stepwise.keys() and at_once["meta"] == stepwise["meta"]
        assert at_once["image"].dtype == torch.float32 and at_once["image"].shape == stepwise["image"].shape
        assert (at_once["image"] - stepwise["image"]).abs().mean() < 2 / 255
        for entry in set(at_once) & {"depth", "label", "intrinsics"}:
            assert at_once[entry].dtype == stepwise[entry].dtype
            assert (at_once[entry] != stepwise[entry]).float().mean() < 1e-3  # rounding where two are equally near


def test_real_sets_mix_with_scenes_as_inverse_depth(miniatures, tmp_path):
    kitti, nyu = open_dataset("kitti", miniatures / "kitti", "train"), open_dataset("nyu", miniatures / "nyu", "train")
    rooms = open_dataset("rooms", tmp_path, "train", progress=False, count=3)
    mixture = Mixture(kitti, nyu, rooms, weights=[1, 1, 2])
    loader = training_loader(mixture, 8, 0, Compose(Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()), stop=200)
    seen = [name for batch in loader for name in batch["meta"]["data"]]
    for name, fraction in {"KITTI": 0.25, "NYUv2": 0.25, "rooms": 0.5}.items():
        assert abs(seen.count(name) / 200 - fraction) < 4 * (fraction * (1 - fraction) / 200) ** 0.5
    batch = next(iter(loader))
    assert (
        set(batch) == {"image", "inverse_depth", "intrinsics", "meta"} and batch["inverse_depth"].max() < 2
    )  # nothing nearer than half a metre


FAULTS = {  # what is done to a file of the miniature, and what the check has to call it
    "deleted": (lambda path: path.unlink(), "missing: 1"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "unreadable: 1"),
    "empty": (lambda path: path.write_bytes(b""), "unreadable: 1"),
    "resized": (lambda path: Image.open(path).resize((64, 48), Image.Resampling.NEAREST).save(path), "sizes differ: 1"),
}


def ground_truth(dataset):
    "The first sample's ground truth."
    return dataset.entries[0].depth or dataset.entries[0].label


@pytest.mark.parametrize("part", ["image", "truth"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["kitti", "nyu", "ade20k", "pascal_context", "folder"])
def test_a_fault_is_found_and_named(name, fault, part, miniatures, tmp_path):
    root = tmp_path / name
    shutil.copytree(miniatures / name, root, ignore=shutil.ignore_patterns("*.mat"))
    dataset = open_dataset(name, root, "train")
    path = dataset.entries[0].image if part == "image" else ground_truth(dataset)
    spoil, finding = FAULTS[fault]
    spoil(path)
    run_check(name, root, finding, path)


@pytest.mark.parametrize(
    "name, value, finding",
    [
        ("kitti", 0, "no depth: 1"),
        ("nyu", 0, "no depth: 1"),
        ("folder", 0, "no depth: 1"),
        ("ade20k", 0, "no label: 1"),
        ("ade20k", 200, "label out of range: 1"),
        ("pascal_context", 77, "label out of range: 1"),
    ],
)
def test_an_image_without_truth_and_labels_that_are_none_are_found(name, value, finding, miniatures, tmp_path):
    root = tmp_path / name
    shutil.copytree(miniatures / name, root, ignore=shutil.ignore_patterns("*.mat"))
    path = ground_truth(open_dataset(name, root, "train"))
    stored = Image.open(path)
    stored.point(lambda _: value).save(path) if stored.mode != "P" else Image.new("P", stored.size, value).save(path)
    run_check(name, root, finding, path)


def run_check(name, root, finding, path):
    "The report on the training split has to hold the finding and the file's number, and the exit code to be 1."
    done = typed("check", name, root, "--split", "train", "--workers", 0, check=1)
    assert finding in done.stdout and path.stem[-5:] in done.stdout and "samples" in done.stdout, done.stdout


@pytest.mark.parametrize("name", [name for name in MINIATURES if name in DATASETS])
def test_a_missing_root_or_list_gets_the_expected_tree(name, miniatures, tmp_path):
    done = typed("check", name, tmp_path / "nowhere", check=1)
    assert (
        "nowhere" in done.stderr
        and "Expected" in done.stderr
        and "obtained from" in done.stderr
        and "Traceback" not in done.stderr
    )
    if name in ("kitti", "nyu"):
        root = tmp_path / name
        shutil.copytree(miniatures / name, root)
        next(root.glob("*train.txt")).unlink()
        done = typed("check", name, root, check=1)
        assert "train.txt" in done.stderr and "├──" in done.stderr


def test_mistakes_get_a_clear_message_and_nothing_is_written_over(miniatures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence in [
        (["check", "kiti", "x"], "There is no data set called 'kiti'"),
        (["make", "rooms", "x"], "no miniature of 'rooms'"),
        (["make", "kitti", miniatures / "kitti"], "not an empty folder"),
        (["check", "nyu", miniatures / "nyu", "--set", "layout"], "OPTION=VALUE"),
        (["check", "nyu", miniatures / "nyu", "--set", "layout=raw"], "Choose from sync, labeled"),
        (["check", "kitti", miniatures / "kitti", "--split", "val"], "no split 'val'"),
        (["show", "folder", miniatures / "folder", "--set", "scale=3"], "cannot be opened with"),
        (["show", "folder", miniatures / "folder", "--out", "a.txt"], "ends in .png"),
        (["check", "folder", miniatures / "folder", "--workers", -1], "0 or more, at most 256, was expected"),
        (["check", "folder", miniatures / "folder", "--set", "split=train"], "--split train"),
        (["check", "folder", miniatures / "folder", "--set", "depth_scale=abc"], "a depth_scale above 0"),
        (["check", "folder", miniatures / "folder", "--set", "inverse=maybe"], "inverse from true, false"),
        (["make", "folder", "new", "--count", -1], "at least one image"),
        (["make", "kitti", "new", "--count", 1], "at least 2"),
        (["make", "folder", "new", "--set", "seed=3"], "--seed 3"),
    ]:
        done = typed(*words, check=1)
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_complete_asks_for_the_published_counts(miniatures):
    done = typed("check", "kitti", miniatures / "kitti", "--split", "held_out", "--complete", "--workers", 0, check=1)
    assert "2 samples (the published set has 697), 1 with ground truth (the published set has 652)" in done.stdout
    assert "nothing wrong with what is there" in done.stdout and "not those of the published set" in done.stderr


def test_nyu_takes_its_own_advice(miniatures):
    for labels in ("40", "raw", "none"):
        typed(
            "check",
            "nyu",
            miniatures / "nyu",
            "--set",
            "layout=labeled",
            "--set",
            f"labels={labels}",
            "--workers",
            0,
            check=0,
        )


@pytest.mark.parametrize("name", ["kitti", "ade20k", "folder"])
def test_training_does_not_begin_on_a_set_with_a_file_missing(name, miniatures, tmp_path):
    root = tmp_path / name
    shutil.copytree(miniatures / name, root)
    gone = open_dataset(name, root, "train").entries[-1].image
    gone.unlink()
    with pytest.raises(DatasetError, match=gone.name):
        open_dataset(name, root, "train")


def test_images_straight_below_the_root_are_found_though_the_first_is_missing(miniatures, tmp_path):
    root = tmp_path / "kitti"
    shutil.copytree(miniatures / "kitti", root)
    for day in (root / "input").iterdir():
        day.rename(root / day.name)
    first = open_dataset("kitti", root, "train").entries[0].image
    first.unlink()
    assert open_dataset("kitti", root, "train", verify=False).missing() == [first]


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not beside this checkout")
def test_the_published_lists_have_the_published_counts():
    kitti, nyu = split_lines(SPLITS / "kitti_eigen_test.txt"), split_lines(SPLITS / "nyu_test.txt")
    assert (len(kitti), sum(depth is not None for _, depth in kitti), len(nyu)) == (697, 652, 654)
    assert {image[:10] for image, _ in kitti} <= set(KITTI_CAMERAS)
    assert (
        DATASETS["kitti"].expected[("eigen", "held_out")] == len(kitti)
        and DATASETS["kitti"].expected_truth[("eigen", "held_out")] == 652
    )


def test_a_worker_that_meets_a_bad_file_names_it(tmp_path):
    dataset = open_dataset("folder", make_folder(tmp_path / "own", count=3), "train", held_out=0.0)
    dataset.entries[1].depth.write_bytes(b"nothing")
    with pytest.raises(Exception, match="000001.png"):
        list(DataLoader(dataset, batch_size=1, num_workers=1))


def both(name, root, train=None, held_out=None):
    "Both splits, opened as a recipe's options say."
    options = zip(("train", "held_out"), shared_options(train or {}, held_out or {}))
    return [open_dataset(name, root, split, verify=False, **given) for split, given in options]


def link_into(source, target):
    "A symbolic link in place of a file."
    target.unlink()
    target.symlink_to(source)


def hard_link_into(source, target):
    "A second name of the same file in place of another."
    target.unlink()
    os.link(source, target)


@pytest.mark.parametrize("link", [link_into, hard_link_into])
@pytest.mark.parametrize("name", ["kitti", "nyu", "ade20k", "pascal_context"])
def test_a_file_linked_into_the_other_split_is_refused(name, link, miniatures, tmp_path):
    root = tmp_path / name
    shutil.copytree(miniatures / name, root, ignore=shutil.ignore_patterns("*.mat"))
    train, held_out = both(name, root)
    check_splits(train, held_out)
    link(train.entries[0].image.resolve(), held_out.entries[-1].image)
    with pytest.raises(
        DatasetError, match=rf"^1 of the {len(held_out)} samples .*{train.entries[0].image.name}"
    ) as refused:
        check_splits(*both(name, root))
    assert refused.value.kind == "in both splits"


def test_lists_that_overlap_are_refused_with_their_number(miniatures, tmp_path):
    for name in ("kitti", "nyu", "pascal_context", "folder"):
        shutil.copytree(miniatures / name, tmp_path / name, ignore=shutil.ignore_patterns("*.mat"))
    for name, pattern in (("kitti", "kitti_eigen_{}.txt"), ("nyu", "nyu_{}.txt")):
        first, second = (tmp_path / name / pattern.format(split) for split in ("train", "test"))
        second.write_text(second.read_text() + first.read_text())
    lists = tmp_path / "pascal_context" / "VOCdevkit" / "VOC2010" / "ImageSets" / "SegmentationContext"
    (lists / "train.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    rows = [
        "image,depth,split",
        "rgb/000000.png,depth/000000.png,train",
        "rgb/000001.png,depth/000001.png,train",
        "rgb/./000001.png,depth/000001.png,held_out",
    ]
    (tmp_path / "folder" / "files.csv").write_text("\n".join(rows))
    for name, sentence in (
        ("kitti", "2 of the 4"),
        ("nyu", "2 of the 4"),
        ("pascal_context", "2 of the 2"),
        ("folder", "1 of the 1"),
    ):
        with pytest.raises(DatasetError, match=f"^{sentence} samples"):
            check_splits(*both(name, tmp_path / name))


def test_sets_of_a_mixture_do_not_lend_each_other_files(miniatures, tmp_path):
    (tmp_path / "again").symlink_to(miniatures / "folder")
    sets = lambda root, **more: dict(inverse=False, sets=dict(folder=dict(root=str(root), held_out=0.5), **more))
    rooms = dict(rooms=dict(count=2))
    check_splits(*both("mixture", tmp_path, sets(miniatures / "folder", **rooms), sets(miniatures / "folder", **rooms)))
    whole = dict(inverse=False, sets=dict(folder=dict(root=str(tmp_path / "again"), held_out=1.0)))
    with pytest.raises(DatasetError, match="samples of the validation split .*there as "):
        check_splits(*both("mixture", tmp_path, sets(miniatures / "folder", **rooms), whole))
    with pytest.raises(
        DatasetError, match="samples of the validation split"
    ):  # the same through different kinds of set
        check_splits(
            open_dataset("mixture", tmp_path, "train", **sets(miniatures / "folder", **rooms)),
            Folder(miniatures / "folder", held_out=0.5),
        )


def test_scenes_are_the_same_at_every_size_and_never_shared_by_the_splits(tmp_path):
    scenes = lambda split, size: open_dataset("rooms", tmp_path, split, progress=False, count=3, size=size)
    check_splits(scenes("train", (24, 32)), scenes("held_out", (24, 32)))
    with pytest.raises(DatasetError, match="^3 of the 3 samples"):
        check_splits(scenes("train", (24, 32)), scenes("train", (48, 64)))


def normals_of_depth(depth, intrinsics, step):
    "The cross product of points around each pixel in float64, without a border of `step` pixels."
    height, width = depth.shape[-2:]
    row, column = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    pixels = torch.stack((column, row, torch.ones_like(row)))
    points = (intrinsics.double().inverse() @ pixels.flatten(1)).view(3, height, width) * depth.double()
    inner = slice(step, -step)
    across = points[:, inner, 2 * step :] - points[:, inner, : -2 * step]
    along = points[:, 2 * step :, inner] - points[:, : -2 * step, inner]
    normal = torch.linalg.cross(along, across, dim=0)
    return normal / normal.norm(dim=0)


def test_normals_go_with_their_rooms_through_every_transform(tmp_path):
    options = dict(sets={kind: dict(count=4, normals=True) for kind in ("rooms", "streets")}, inverse=False)
    dataset = open_dataset("mixture", tmp_path, "train", progress=False, **options)
    assert dataset.targets == ("depth", "intrinsics", "normal")
    chain = Compose(Resize(144, 192, 16), Flip(), Rotate(20, 1.0), Rescale(0.8, 1.2), Pad(120, 160), Crop(120, 160))
    read = lambda workers: list(training_loader(dataset, 4, 0, chain, stop=8, workers=workers))
    batches = read(0)
    for first, second in zip(batches, read(2), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in ("image", *dataset.targets))
    samples = [{name: batch[name][place] for name in dataset.targets} for batch in batches for place in range(4)]
    angles, step = [], 8
    for sample in samples:
        normal, known = sample["normal"], sample["depth"][0] > 0
        assert torch.equal(normal.norm(dim=0) > 0, known) and (normal.norm(dim=0)[known] - 1).abs().max() < 1e-5
        spread = max_pool2d(normal[None], 2 * step + 1, 1) + max_pool2d(-normal[None], 2 * step + 1, 1)
        flat = (spread[0].amax(0) < 1e-3) & known[step:-step, step:-step]  # one surface all around
        apart = normals_of_depth(sample["depth"], sample["intrinsics"], step) - normal[:, step:-step, step:-step]
        angles.append(apart.norm(dim=0)[flat].rad2deg())
    angles = torch.cat(angles)  # the nearest pixel of a rotated map is up to half a pixel off, in a step of sixteen
    assert len(angles) > 30_000 and (angles < 10).float().mean() > 0.99  # 0.85 where normals are not mirrored or turned


@pytest.mark.parametrize(
    "train, held_out", [({}, dict(held_out=0.5)), (dict(held_out=0.5), {}), (dict(held_out=0.5), dict(held_out=0.5))]
)
def test_one_fraction_divides_a_folder(train, held_out, miniatures):
    splits = both("folder", miniatures / "folder", train, held_out)
    check_splits(*splits)
    of_hash = [
        int.from_bytes(hashlib.blake2b(f"{number:06d}".encode(), digest_size=8).digest(), "big") < 2**63
        for number in range(16)
    ]
    assert [len(split) for split in splits] == [16 - sum(of_hash), sum(of_hash)]
    with pytest.raises(DatasetError, match="samples of the validation split"):
        check_splits(Folder(miniatures / "folder"), Folder(miniatures / "folder", "held_out", held_out=0.5))


def test_options_that_differ_are_refused_and_those_that_may_differ_are_said_twice(miniatures):
    for train, held_out, sentence in [
        (dict(held_out=0.1), dict(held_out=0.2), "has to be one for both"),
        (dict(depth_scale=1), dict(depth_scale=1000), "has to be one for both"),
        (dict(num_classes=59), dict(num_classes=60), "has to be one for both"),
        (dict(benchmark="eigen"), dict(benchmark="official"), "has to be one for both"),
        ({}, dict(layout="labeled"), "Say it for the training split, too"),
        (dict(release="full"), {}, "Say it for the validation split, too"),
    ]:
        with pytest.raises(DatasetError, match=sentence):
            shared_options(train, held_out)
    assert both("pascal_context", miniatures / "pascal_context", {}, dict(num_classes=60))[0].classes[0] == "background"
    check_splits(*both("nyu", miniatures / "nyu", dict(layout="sync"), dict(layout="labeled")))
    for name, recipe in RECIPES.items():  # all recipes are as they were
        assert shared_options(recipe.data.train, recipe.data.held_out) == (recipe.data.train, recipe.data.held_out), (
            name
        )


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not beside this checkout")
def test_published_lists_against_themselves(tmp_path):
    for name, file, shared in (
        ("kitti", "kitti_eigen_test.txt", 652),
        ("nyu", "nyu_test.txt", 654),
    ):  # what has no ground truth is not trained on
        lines = (SPLITS / file).read_text().splitlines()
        for half, part in (("first", lines[::2]), ("second", lines[1::2])):
            (tmp_path / f"{half}.txt").write_text("\n".join(part))
        open_list = lambda path, split: open_dataset(name, tmp_path, split, verify=False, split_file=str(path))
        check_splits(open_list(tmp_path / "first.txt", "train"), open_list(tmp_path / "second.txt", "held_out"))
        with pytest.raises(DatasetError, match=f"^{shared} of the {len(lines)} samples"):
            check_splits(open_list(SPLITS / file, "train"), open_list(SPLITS / file, "held_out"))


def photographs(folder, count, seed, size=(60, 80)):
    "Images, depth in metres and labels, written by hand: blobs of color that differ from image to image."
    numbers = np.random.default_rng(seed)
    for part in ("rgb", "depth", "label"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = Image.fromarray(numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        Image.fromarray((np.asarray(image) * 0.8 + numbers.integers(0, 50, (*size, 3))).astype(np.uint8)).save(
            folder / "rgb" / f"{index}.png"
        )
        np.save(folder / "depth" / f"{index}.npy", numbers.uniform(1.0, 4.0, size).astype(np.float32))
        Image.fromarray(numbers.integers(0, 2, size, dtype=np.uint8)).save(folder / "label" / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "unit, given, likely",
    [
        (1, None, None),
        (1, 1, None),
        (1000, 1000, None),
        (256, 256, None),  # right
        (1, 1000, "depth_scale=1 (metres: 2.5"),
        (1000, 1, "depth_scale=1000 (millimetres: 2.5"),
        (1000, None, "depth_scale=1000 (millimetres: 2.5"),
        (100, 1, "depth_scale=100 (centimetres: 2.5"),
        (256, 1, "depth_scale=256 (as in KITTI: 2.5"),
        (0.001, None, "depth_scale=0.001 (kilometres: 2.5"),
    ],
)
def test_a_wrong_unit_is_said_with_the_likely_scale(unit, given, likely, tmp_path):
    root = photographs(tmp_path / "own", 3, seed=0)
    for file in (root / "depth").iterdir():
        np.save(file, np.load(file) * unit)
    options = [] if given is None else ["--set", f"depth_scale={given}"]
    done = typed(
        "check",
        "folder",
        root,
        "--set",
        "held_out=0",
        "--split",
        "train",
        "--workers",
        0,
        *options,
        check=int(likely is not None),
    )
    assert ("nothing wrong" in done.stdout) == (likely is None) and (
        likely is None or likely in done.stdout and "implausible depth: 1" in done.stdout
    ), done.stdout
    sample = open_dataset("folder", root, "train", held_out=0.0, **({} if given is None else dict(depth_scale=given)))
    batch = next(iter(DataLoader(sample, batch_size=3)))
    assert [likely in sentence for sentence in batch_warnings(batch, sample)] == ([] if likely is None else [True])


def test_files_of_two_kinds_have_no_common_scale(tmp_path):
    root = photographs(tmp_path / "own", 3, seed=0)
    stored = np.load(root / "depth" / "2.npy")
    (root / "depth" / "2.npy").unlink()
    Image.fromarray((stored * 1000).round().astype(np.uint16)).save(root / "depth" / "2.png")
    for options in ([], ["--set", "depth_scale=1"], ["--set", "depth_scale=1000"]):
        done = typed("check", "folder", root, "--split", "train", "--set", "held_out=0", *options, check=1)
        assert (
            "2.png holds whole numbers" in done.stderr
            and "one depth scale for both cannot be right" in done.stderr
            and done.stderr.count("\n") == 1
        )
    for file in (root / "depth").glob("*.npy"):
        np.save(file, (np.load(file) * 1000).round().astype(np.uint16))
    dataset = open_dataset("folder", root, "train", held_out=0.0)  # whole numbers throughout
    assert dataset.depth_scale == 1000 and abs(dataset[2]["depth"][0] - torch.from_numpy(stored)).max() <= 0.0005001


def test_a_mask_of_0_and_255_is_found_out(tmp_path):
    root = photographs(tmp_path / "own", 4, seed=1)
    (root / "classes.txt").write_text("road\ncrack\n")
    for file in (root / "label").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) * 255).save(file)
    stored = np.stack([np.asarray(Image.open(root / "label" / f"{index}.png")) for index in range(4)])
    words = ["check", "folder", root, "--split", "train", "--set", "held_out=0", "--workers", 0]
    done = typed(*words, check=1)
    assert (
        "mask: 1" in done.stdout
        and 'label_map={"0": 0, "255": 1}' in done.stdout
        and f"{(stored == 255).mean():.2%} of the pixels ignored" in done.stdout
    )
    dataset = open_dataset("folder", root, "train", held_out=0.0)
    assert any(
        "label_map" in sentence for sentence in batch_warnings(next(iter(DataLoader(dataset, batch_size=4))), dataset)
    )
    done = typed(*words, "--set", 'label_map={"0": 0, "255": 1}', check=0)
    shares = [
        re.search(rf"{index} {name} +([\d.]+)% in 4 of 4 samples", done.stdout)
        for index, name in enumerate(("road", "crack"))
    ]
    assert [float(found[1]) for found in shares] == [
        round(100 * (stored == number).mean(), 3) for number in (0, 255)
    ] and "0.00% of the pixels ignored" in done.stdout
    mapped = open_dataset("folder", root, "train", held_out=0.0, label_map={"0": 0, "255": 1})
    assert all(torch.equal(mapped[index]["label"], torch.from_numpy(stored[index] // 255).long()) for index in range(4))
    assert batch_warnings(next(iter(DataLoader(mapped, batch_size=4))), mapped) == []
    done = typed(*words, "--set", 'label_map={"0": 0}', check=1)
    assert "holds the number 255, and label_map names 0" in done.stdout


def test_images_that_are_there_twice_are_found_by_content(tmp_path):
    first, second = (
        photographs(tmp_path / split, count, seed) for split, count, seed in (("train", 6, 2), ("held_out", 6, 3))
    )
    image = lambda folder, index: folder / "rgb" / f"{index}.png"
    shutil.copy(image(first, 0), image(first, 1))  # byte for byte, within a split
    Image.open(image(first, 2)).save(image(second, 2), compress_level=1)  # other bytes, the same pixels
    for index, save in (
        (3, lambda image: image.save(second / "rgb" / "3.jpg", quality=70)),
        (4, lambda image: image.resize((40, 30), Image.Resampling.LANCZOS).save(second / "rgb" / "4.png")),
    ):
        image(second, index).unlink()
        save(Image.open(image(first, index)))
    np.save(second / "depth" / "4.npy", np.full((30, 40), 2.0, np.float32))
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(second / "label" / "4.png")
    train, held_out = check_datasets(
        [open_dataset("folder", tmp_path, split) for split in ("train", "held_out")], progress=False
    )
    assert [(problem.index, problem.kind) for problem in train.problems] == [(1, "duplicate")]
    assert [(problem.index, problem.kind) for problem in held_out.problems] == [
        (2, "in both splits"),
        (3, "near duplicate"),
        (4, "near duplicate"),
    ]
    for problem, names in zip(
        [*train.problems, *held_out.problems],
        [
            ("0.png", "1.png"),
            ("train/rgb/2.png", "held_out/rgb/2.png"),
            ("3.jpg", "3.png"),
            ("train/rgb/4.png", "held_out/rgb/4.png"),
        ],
    ):
        assert all(name in problem.sentence for name in names), problem.sentence


@pytest.mark.slow
def test_no_two_scenes_pass_for_one(tmp_path):
    rooms = [open_dataset("rooms", tmp_path, split, progress=False, count=60) for split in ("train", "held_out")]
    streets = [open_dataset("streets", tmp_path, split, progress=False, count=20) for split in ("train", "held_out")]
    for pair in (rooms, streets, [rooms[0], streets[1]]):
        assert [check.problems for check in check_datasets(pair, progress=False)] == [[], []]


def test_classes_that_training_never_sees_are_listed(tmp_path):
    for split, seed in (("train", 4), ("held_out", 5)):
        photographs(tmp_path / split, 2, seed)
    stored = np.asarray(Image.open(tmp_path / "held_out" / "label" / "0.png")).copy()
    stored[:10] = 7
    Image.fromarray(stored).save(tmp_path / "held_out" / "label" / "0.png")
    train, held_out = check_datasets(
        [open_dataset("folder", tmp_path, split) for split in ("train", "held_out")], progress=False
    )
    assert (
        held_out.labels[7] == 10 * 80 and held_out.having[7] == 1 and "in no training sample: class 7" in str(held_out)
    )
    assert train.problems == held_out.problems == [] and "nothing wrong" in str(held_out)
