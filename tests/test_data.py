"Data sets from a shell: every miniature made, checked, shown and read; every fault tried; the published lists counted where they are at hand."
import contextlib
import io
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, command, command_here
from PIL import Image
from torch.utils.data import DataLoader

from dpt_nb.commands import main
from dpt_nb.datasets import DatasetError, make_folder
from dpt_nb.kitti_nyu import KITTI_CAMERAS, split_lines
from dpt_nb.loading import DATASETS, MINIATURES, Mixture, open_dataset, training_loader
from dpt_nb.transforms import NYU_WINDOW, Colour, Compose, Crop, Flip, KBCrop, Pad, Resize, Rotate

SPLITS = REPOSITORY.parent / "shared" / "splits"
WAYS = {  # data set → ways to open it: split and options
    "kitti": [("train", []), ("held_out", []), ("train", ["benchmark=official"]), ("held_out", ["benchmark=official"]), ("test", ["benchmark=official"])],
    "nyu": [("train", []), ("held_out", []), ("train", ["layout=labeled"]), ("held_out", ["layout=labeled", "labels=raw"])],
    "ade20k": [("train", []), ("held_out", [])],
    "pascal_context": [("train", []), ("held_out", ["classes=60"])],
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


def test_the_command_from_a_shell(tmp_path):
    command("dpt_data", "make", "folder", "mine", "--count", 16, folder=tmp_path, check=0)
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
    dataset = open_dataset(name, miniatures / name, split, **{key: int(value) if value.isdigit() else value for key, value in chosen.items()})
    for sample in (dataset[index] for index in range(len(dataset))):
        size = sample["image"].shape[1:]
        assert sample["image"].dtype == torch.float32 and sample["image"].shape[0] == 3 and 0 <= sample["image"].min() and sample["image"].max() <= 1
        assert set(sample) == {"image", "meta", *dataset.gives}
        if "depth" in sample:
            assert sample["depth"].shape == (1, *size) and sample["depth"].dtype == torch.float32 and sample["depth"].isfinite().all() and sample["depth"].min() >= 0
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
    "kitti": [KBCrop(), Rotate(probability=1.0), Flip(), Crop(352, 704), Colour()],
    "nyu": [NYU_WINDOW, Rotate(probability=1.0), Flip(), Crop(416, 544), Colour()],
    "ade20k": [Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()],
    "pascal_context": [Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()],
    "folder": [Flip(), Crop(64, 64), Colour()],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_batches_come_out_alike_whatever_the_workers(name, miniatures):
    dataset = open_dataset(name, miniatures / name, "train")
    read = lambda workers: [batch["image"] for batch in training_loader(dataset, 2, 0, Compose(*PIPELINES[name]), stop=4, workers=workers)]
    assert all(torch.equal(first, second) for first, second in zip(read(0), read(2), strict=True))


def test_real_sets_mix_with_scenes_as_inverse_depth(miniatures, tmp_path):
    kitti, nyu = open_dataset("kitti", miniatures / "kitti", "train"), open_dataset("nyu", miniatures / "nyu", "train")
    rooms = open_dataset("rooms", tmp_path, "train", progress=False, count=3)
    mixture = Mixture(kitti, nyu, rooms, weights=[1, 1, 2])
    loader = training_loader(mixture, 8, 0, Compose(Resize(96, 96), Pad(96, 96), Crop(96, 96), Flip()), stop=200)
    seen = [name for batch in loader for name in batch["meta"]["data"]]
    for name, share in {"KITTI": 0.25, "NYUv2": 0.25, "rooms": 0.5}.items():
        assert abs(seen.count(name) / 200 - share) < 4 * (share * (1 - share) / 200) ** 0.5
    batch = next(iter(loader))
    assert set(batch) == {"image", "inverse_depth", "intrinsics", "meta"} and batch["inverse_depth"].max() < 2  # nothing nearer than half a metre


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


@pytest.mark.parametrize("name, value, finding", [
    ("kitti", 0, "no depth: 1"), ("nyu", 0, "no depth: 1"), ("folder", 0, "no depth: 1"),
    ("ade20k", 0, "no label: 1"), ("ade20k", 200, "label out of range: 1"), ("pascal_context", 77, "label out of range: 1"),
])
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


@pytest.mark.parametrize("name", MINIATURES)
def test_a_missing_root_or_list_gets_the_expected_tree(name, miniatures, tmp_path):
    done = typed("check", name, tmp_path / "nowhere", check=1)
    assert "nowhere" in done.stderr and "Expected" in done.stderr and "obtained from" in done.stderr and "Traceback" not in done.stderr
    if name in ("kitti", "nyu"):
        root = tmp_path / name
        shutil.copytree(miniatures / name, root)
        next(root.glob("*train.txt")).unlink()
        done = typed("check", name, root, check=1)
        assert "train.txt" in done.stderr and "├──" in done.stderr


def test_mistakes_get_a_sentence_and_nothing_is_written_over(miniatures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence in [
        (["check", "kiti", "x"], "There is no data set called 'kiti'"), (["make", "rooms", "x"], "no miniature of 'rooms'"),
        (["make", "kitti", miniatures / "kitti"], "not an empty folder"), (["check", "nyu", miniatures / "nyu", "--set", "layout"], "OPTION=VALUE"),
        (["check", "nyu", miniatures / "nyu", "--set", "layout=raw"], "Choose from sync, labeled"), (["check", "kitti", miniatures / "kitti", "--split", "val"], "no split 'val'"),
        (["show", "folder", miniatures / "folder", "--set", "scale=3"], "cannot be opened with"), (["show", "folder", miniatures / "folder", "--out", "a.txt"], "ends in .png"),
        (["check", "folder", miniatures / "folder", "--workers", -1], "0 or more are possible"), (["check", "folder", miniatures / "folder", "--set", "split=train"], "--split train"),
        (["check", "folder", miniatures / "folder", "--set", "depth_scale=abc"], "a depth_scale above 0"), (["check", "folder", miniatures / "folder", "--set", "inverse=maybe"], "inverse from true, false"),
        (["make", "folder", "new", "--count", -1], "at least one picture"), (["make", "kitti", "new", "--count", 1], "at least 2"), (["make", "folder", "new", "--set", "seed=3"], "--seed 3"),
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
        typed("check", "nyu", miniatures / "nyu", "--set", "layout=labeled", "--set", f"labels={labels}", "--workers", 0, check=0)


@pytest.mark.parametrize("name", ["kitti", "ade20k", "folder"])
def test_training_does_not_begin_on_a_set_with_a_file_missing(name, miniatures, tmp_path):
    root = tmp_path / name
    shutil.copytree(miniatures / name, root)
    gone = open_dataset(name, root, "train").entries[-1].image
    gone.unlink()
    with pytest.raises(DatasetError, match=gone.name):
        open_dataset(name, root, "train")


def test_pictures_straight_below_the_root_are_found_though_the_first_is_missing(miniatures, tmp_path):
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
    assert DATASETS["kitti"].expected[("eigen", "held_out")] == len(kitti) and DATASETS["kitti"].expected_truth[("eigen", "held_out")] == 652


def test_a_worker_that_meets_a_bad_file_names_it(tmp_path):
    dataset = open_dataset("folder", make_folder(tmp_path / "own", count=3), "train", held_out=0.0)
    dataset.entries[1].depth.write_bytes(b"nothing")
    with pytest.raises(Exception, match="000001.png"):
        list(DataLoader(dataset, batch_size=1, num_workers=1))
