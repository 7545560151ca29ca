"""A folder of any kind: every format gives the same metres, and every wrong setting is found by its numbers."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_here
from PIL import Image

from dpt_nb.data.datasets import DatasetError
from dpt_nb.data.folder import Folder, make_folder
from dpt_nb.data.folder_recipe import settled
from dpt_nb.data.folder_survey import survey
from dpt_nb.data.scene_sets import render_view
from dpt_nb.data.stored_depth import read_stored
from dpt_nb.images.files import ImageError
from dpt_nb.training.recipe_files import read_recipe

SIZE = (96, 128)
COUNT = 6
FOCAL = 64 / math.tan(math.radians(30))  # the scenes' cameras see 60 degrees
CAMERA = [FOCAL, FOCAL, 63.5, 47.5]


@pytest.fixture(scope="module")
def scenes() -> dict[str, list]:  # kind → (colors `(H, W, 3)` uint8, metres `(H, W)` float64)
    def arrays(kind: str, seed: int):
        view = render_view(kind, seed, SIZE)
        return (view["image"] * 255).byte().permute(1, 2, 0).numpy(), view["depth"][0].numpy().astype(np.float64)

    return {kind: [arrays(kind, seed) for seed in range(COUNT)] for kind in ("rooms", "streets")}


def millimetres(metres: np.ndarray) -> np.ndarray:
    return np.round(metres * 1000).astype(np.uint16)


def save_array(path: Path, values: np.ndarray) -> None:
    "By whoever writes this format; none of it is ours."
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, values)
    elif path.suffix == ".pfm":
        path.write_bytes(b"Pf\n%d %d\n-1\n" % values.shape[::-1] + values[::-1].astype("<f4").tobytes())
    elif path.suffix == ".exr":
        import OpenEXR

        header = dict(compression=OpenEXR.ZIP_COMPRESSION, type=OpenEXR.scanlineimage)
        OpenEXR.File(header, {"Z": values}).write(str(path))
    elif path.suffix in (".txt", ".csv"):
        np.savetxt(path, values, delimiter="," if path.suffix == ".csv" else " ", header="x y z")
    else:
        Image.fromarray(values).save(path)


def write(root: Path, scenes: list, stored=millimetres, suffix: str = ".png", names=("rgb/{}.png", "depth/{}")) -> Path:
    for number, (colors, metres) in enumerate(scenes):
        image, depth = (root / name.format(f"{number:03}") for name in (names[0], names[1] + suffix))
        for path in (image, depth):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(image)
        save_array(depth, stored(metres))
    return root


def look(root: Path, **options):
    return survey([Folder(root, held_out=0.0, **options)])


def points(metres: np.ndarray) -> np.ndarray:
    "All measured pixels as points in the camera's frame, x right, y down, z forward, in a random order."
    rows, columns = np.nonzero(metres)
    z = metres[rows, columns]
    made = np.stack(((columns - CAMERA[2]) / FOCAL * z, (rows - CAMERA[3]) / FOCAL * z, z), 1)
    return np.random.default_rng(0).permutation(made)


def columns_rows_depth(metres: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(metres)
    return np.stack((columns, rows, metres[rows, columns]), 1)


FORMATS = {  # suffix, what is stored for metres, options, largest error in metres
    "16-bit PNG": (".png", millimetres, {}, 5.1e-4),
    "8-bit PNG": (
        ".png",
        lambda metres: np.round(metres * 10).clip(0, 255).astype(np.uint8),
        dict(depth_scale=10),
        0.051,
    ),
    "16-bit TIFF": (".tif", lambda metres: np.round(metres * 256).astype(np.uint16), dict(depth_scale=256), 2e-3),
    "float TIFF": (".tiff", lambda metres: metres.astype(np.float32), {}, 1e-5),
    "PFM": (".pfm", lambda metres: metres, {}, 1e-5),
    "npy": (".npy", lambda metres: metres, {}, 1e-5),
    "npy with a last axis": (".npy", lambda metres: metres.astype(np.float32)[..., None], {}, 1e-5),
    "npz": (".npz", lambda metres: millimetres(metres)[None], {}, 5.1e-4),
    "half npz": (".npz", lambda metres: metres.astype(np.float16), {}, 0.02),
    "points": (".txt", points, dict(camera=CAMERA), 1e-5),
    "points by field of view": (".csv", points, dict(camera=60), 1e-5),
    "columns and rows": (".txt", columns_rows_depth, dict(points="uvd"), 1e-5),
    "disparity": (
        ".tiff",
        lambda metres: np.where(metres > 0, 50 / np.maximum(metres, 1e-3), -1).astype(np.float32),
        dict(baseline_focal=50),
        1e-4,
    ),
    "disparity in a PNG": (
        ".png",
        lambda metres: np.where(metres > 0, np.round(256 * 50 / np.maximum(metres, 1e-3)), 0).astype(np.uint16),
        dict(baseline_focal=50, depth_scale=256),
        0.03,
    ),
    "inverse depth in 1/m": (
        ".npy",
        lambda metres: np.where(metres > 0, 1 / np.maximum(metres, 1e-3), np.nan),
        dict(baseline_focal=1),
        1e-4,
    ),
    "not a number, and 1e10": (
        ".npy",
        lambda metres: np.where(metres > 0, metres, np.where(np.arange(128) % 2, np.nan, 1e10)),
        dict(invalid=[1e10]),
        1e-5,
    ),
    "OpenEXR": (".exr", lambda metres: metres.astype(np.float32), {}, 1e-5),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_metres(scenes, tmp_path, name):
    suffix, stored, options, error = FORMATS[name]
    if suffix == ".exr" and find_spec("OpenEXR") is None:
        pytest.skip("OpenEXR is not installed")
    views = scenes["rooms" if "PNG" in name or "npz" in name else "streets"][:2]
    root = write(tmp_path, views, stored, suffix)
    found = Folder(root, held_out=0.0, **options)
    assert found.targets == (("depth", "intrinsics") if "camera" in options else ("depth",))
    for index, (_, metres) in enumerate(views):
        sample = found[index]
        read = sample["depth"][0].double().numpy()
        near = metres <= (6 if "disparity in" in name else 80)  # whole numbers of disparity are coarse far away
        assert (abs(read - metres)[near]).max() <= error, name
        assert ((read > 0) == (metres > 0))[near].all()
    assert any((metres == 0).any() for _, metres in scenes["streets"])  # the sky: something was not measured


def test_a_camera_says_the_same_in_every_way(scenes, tmp_path):
    root = write(tmp_path, scenes["streets"][:2], points, ".txt")
    (root / "K.txt").write_text(f"{FOCAL} 0 63.5\n0 {FOCAL} 47.5\n0 0 1\n")
    for number in range(2):
        path = root / "camera" / f"{number:03}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{{"fx": {FOCAL}, "fy": {FOCAL}, "cx": 63.5, "cy": 47.5}}')
    for camera in (CAMERA, 60, "K.txt", "camera/{}.json"):
        found = Folder(root, held_out=0.0, camera=camera)
        torch.testing.assert_close(
            found[1]["intrinsics"], torch.tensor([[FOCAL, 0, 63.5], [0, FOCAL, 47.5], [0, 0, 1]])
        )
        torch.testing.assert_close(found[1]["depth"][0].numpy(), scenes["streets"][1][1].astype(np.float32))
    with pytest.raises(DatasetError, match="holds points, and no camera says where they fall"):
        Folder(root, held_out=0.0)[0]
    with pytest.raises(DatasetError, match="does not say which lens"):
        Folder(root, held_out=0.0, camera="exif")[0]


def test_other_names_are_paired_by_patterns(scenes, tmp_path):
    names = ("scan/{}_color.png", "scan/{}_range")
    root = write(tmp_path, scenes["rooms"], names=names)
    (root / "scan" / "lonely_color.png").write_bytes((root / "scan" / "000_color.png").read_bytes())
    (root / "scan" / "blind_range.png").write_bytes((root / "scan" / "000_range.png").read_bytes())
    pair = ["scan/{}_color.png", "scan/{}_range.png"]
    splits = [Folder(root, split, pair=pair, held_out=0.4) for split in ("train", "held_out")]
    files = [{entry.image.name[:3]: entry.depth.name[:3] for entry in split.entries} for split in splits]
    assert all(one == other for split in files for one, other in split.items())
    assert len(files[0]) + len(files[1]) == COUNT and not files[0].keys() & files[1].keys() and files[1]
    assert [("lonely" in words, "blind" in words) for words in splits[0].left_out()] == [(True, False), (False, True)]
    with pytest.raises(DatasetError, match="none belong together"):
        Folder(root, pair=["scan/{}olor.png", "scan/{}ange.png"])


RIGHT = {  # what no setting is wrong with: suffix, what is stored, options
    "millimetres": (".png", millimetres, {}),
    "metres": (".npy", lambda metres: metres.astype(np.float32), {}),
    "TUM": (".npy", lambda metres: np.round(metres * 5000).astype(np.int32), dict(depth_scale=5000)),
    "KITTI": (".png", lambda metres: np.round(metres * 256).astype(np.uint16), dict(depth_scale=256)),
    "told": (
        ".npy",
        lambda metres: np.where(metres > 0, metres * 1000, 65535).astype(np.uint16),
        dict(invalid=[65535]),
    ),
    "-1": (".npy", lambda metres: np.where(metres > 0, metres, -1), {}),
    "disparity": (
        ".npy",
        lambda metres: np.where(metres > 0, 50 / np.maximum(metres, 1e-3), 0),
        dict(baseline_focal=50),
    ),
    "inverse": (".npy", lambda metres: np.where(metres > 0, 3 / np.maximum(metres, 1e-3) + 1, 0), dict(inverse=True)),
    "limit": (".png", millimetres, dict(max_depth=60)),
    "camera": (".png", millimetres, dict(camera=60)),
    "points": (".txt", points, dict(camera=60)),
}


def few(metres: np.ndarray) -> np.ndarray:
    "As a LiDAR measures: some lines, and nothing in the upper part of the image."
    lines = np.zeros(SIZE, bool)
    lines[40::4, ::2] = True
    return np.where(lines, metres, 0)


@pytest.mark.parametrize("kind", ["rooms", "streets"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_settings_are_left_alone(scenes, tmp_path, name, kind):
    suffix, stored, options = RIGHT[name]
    nearer = [(colors, np.where(metres < 60, metres, 0)) for colors, metres in scenes[kind]]  # 16 bits hold them
    found = look(write(tmp_path, nearer, stored, suffix), **options)
    assert [finding.sentence for finding in found.findings] == [] and not found.unreadable
    assert "the settings fit the numbers" in str(found)
    assert found.options(options) == options | (
        {}
        if suffix == ".txt" or name in ("metres", "-1", "disparity", "inverse")
        else dict(depth_scale=found.folder.depth_scale)
    )


WRONG = {  # suffix, what is stored, options, the setting that is found, what it is to be
    "ten times too far": (".png", millimetres, dict(depth_scale=100), "depth_scale", dict(depth_scale=1000)),
    "ten times too near": (".png", millimetres, dict(depth_scale=10_000), "depth_scale", dict(depth_scale=1000)),
    "KITTI's for millimetres": (
        ".png",
        lambda metres: np.round(metres * 256).astype(np.uint16),
        {},
        "depth_scale",
        dict(depth_scale=256),
    ),
    "millimetres for KITTI's": (".png", millimetres, dict(depth_scale=256), "depth_scale", dict(depth_scale=1000)),
    "TUM's for millimetres": (
        ".npy",
        lambda metres: np.round(metres * 5000).astype(np.int32),
        {},
        "depth_scale",
        dict(depth_scale=5000),
    ),
    "millimetres for metres": (".npy", lambda metres: metres * 1000, {}, "depth_scale", dict(depth_scale=1000)),
    "metres for millimetres": (
        ".npy",
        lambda metres: metres,
        dict(depth_scale=1000),
        "depth_scale",
        dict(depth_scale=1),
    ),
    "inverse for depth": (".npy", lambda metres: 1 / np.maximum(metres, 0.1), {}, "inverse", dict(inverse=True)),
    "disparity for depth": (
        ".png",
        lambda metres: np.where(metres > 0, 60_000 / np.maximum(metres, 1), 0).astype(np.uint16),
        {},
        "inverse",
        dict(inverse=True),
    ),
    "depth for inverse": (".npy", lambda metres: metres, dict(inverse=True), "inverse", {}),
    "depth for disparity": (".npy", lambda metres: metres, dict(baseline_focal=50), "inverse", {}),
    "65535 not told": (
        ".png",
        lambda metres: np.where(np.arange(128) % 9, metres * 1000, 65535).astype(np.uint16),
        {},
        "invalid",
        dict(invalid=[65535], depth_scale=1000),
    ),
    "-1 in 16 bits": (
        ".png",
        lambda metres: np.where(np.arange(128) % 9, metres * 1000, -1).astype(np.int64).astype(np.uint16),
        {},
        "invalid",
        dict(invalid=[65535], depth_scale=1000),
    ),
    "1e10 not told": (
        ".npy",
        lambda metres: np.where(np.arange(128) % 9, metres, 1e10).astype(np.float32),
        {},
        "invalid",
        dict(invalid=[1e10]),
    ),
    "cut off at 4 m": (".npy", lambda metres: metres.clip(max=4.0), {}, "invalid", None),  # most of a street
    "another number told": (
        ".png",
        lambda metres: np.where(np.arange(128) % 9, metres * 1000, 65535).astype(np.uint16),
        dict(invalid=[65534]),
        "invalid",
        dict(invalid=[65534, 65535], depth_scale=1000),
    ),
    "most is too far": (".png", millimetres, dict(max_depth=2.0), "max_depth", None),
    "another camera": (".txt", points, dict(camera=[10, 10, 63.5, 47.5]), "camera", {}),
    "a camera of another size": (".png", millimetres, dict(camera=[525, 525, 319.5, 239.5]), "camera", None),
    "points in millimetres": (".txt", lambda metres: points(metres) * 1000, dict(camera=60), "depth_scale", None),
    "columns for x": (".txt", columns_rows_depth, dict(camera=60), "points", dict(camera=60, points="uvd")),
    "x for columns": (".txt", points, dict(points="uvd"), "points", dict(points="xyz")),
}


@pytest.mark.parametrize("kind", ["rooms", "streets"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_found(scenes, tmp_path, name, kind):
    suffix, stored, options, setting, instead = WRONG[name]
    nearer = [(colors, np.where(metres < 60, metres, 0)) for colors, metres in scenes[kind]]
    found = look(write(tmp_path, nearer, stored, suffix), **options)
    assert setting in [finding.setting for finding in found.findings], str(found)
    assert f"WRONG {setting}: " in str(found)
    if instead and not (name == "TUM's for millimetres" and kind == "streets"):
        corrected = found.options(options)
        assert {key: corrected.get(key) for key in instead} == instead


def test_what_was_told_is_kept_and_every_change_is_said(scenes, tmp_path):
    root = write(
        tmp_path, scenes["rooms"], lambda metres: np.where(np.arange(128) % 9, metres * 256, 65535).astype("u2")
    )
    found, options = settled(root, {"depth_scale": 1000})
    assert options == dict(depth_scale=1000, invalid=[65535])
    assert "changed invalid=[65535]: 65535 (" in str(found) and "LIKELY WRONG depth_scale: " in str(found)
    assert "the settings fit the numbers" not in str(found)
    found, options = settled(root)
    assert options["depth_scale"] == 256 and "changed depth_scale=256.0, which is only likely: " in str(found)
    found, options = settled(root, {"invalid": [7]})
    assert options["invalid"] == [7] and "WRONG invalid: " in str(found)


@pytest.mark.parametrize("part", [0.1, 0.6])
def test_a_floor_at_one_distance_is_no_missing_measurement(scenes, tmp_path, part):
    def on_a_floor(metres):  # seen from above, in millimetres: all that is farther than most is the floor
        return np.where(metres > np.quantile(metres, 1 - part), 1800, 800 * metres / metres.max()).astype(np.uint16)

    found = look(write(tmp_path, scenes["rooms"], on_a_floor))
    (finding,) = [finding for finding in found.findings if finding.setting == "invalid"]
    assert not finding.sure and "1800 (" in finding.sentence
    assert finding.options == (dict(invalid=[1800]) if part < 0.3 else {})


@pytest.mark.parametrize("name", ["millimetres for KITTI's", "ten times too far", "disparity for depth"])
def test_a_wrong_setting_is_found_where_little_is_measured(scenes, tmp_path, name):
    suffix, stored, options, setting, _ = WRONG[name]
    sparse = [(colors, few(np.where(metres < 60, metres, 0))) for colors, metres in scenes["streets"]]
    found = look(write(tmp_path, sparse, stored, suffix), **options)
    assert found.sparse and "sparse; nothing in the upper 4" in str(found)
    assert setting in [finding.setting for finding in found.findings], str(found)


def test_swapped_pairs_are_found(scenes, tmp_path):
    root = write(tmp_path, scenes["rooms"])
    found = look(root, pair=["depth/{}.png", "rgb/{}.png"])
    assert len(found.unreadable) == COUNT and "they changed places" in found.findings[0].sentence
    (root / "colored").mkdir()
    for path in (root / "rgb").iterdir():
        (root / "colored" / path.name).write_bytes(path.read_bytes())
    found = look(root, pair=["rgb/{}.png", "colored/{}.png"])
    assert "is a picture in colors, not depth" in found.findings[0].sentence
    with pytest.raises(DatasetError, match="The image comes first and the depth second"):
        look(root, pair=["depth/{}.npy", "rgb/{}.jpg"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda metres: metres[::2, ::2], "one of them was resized"),
        (lambda metres: metres.T, "one of them is turned"),
        (lambda metres: metres[:, :-30], "register the depth to the image"),
    ],
)
def test_other_sizes_are_found(scenes, tmp_path, change, words):
    found = look(write(tmp_path, scenes["rooms"], lambda metres: change(metres), ".npy"))
    assert any(finding.setting == "sizes" and words in finding.sentence for finding in found.findings)


def test_8_bits_need_a_scale(scenes, tmp_path):
    root = write(tmp_path, scenes["rooms"], lambda metres: (metres * 10).astype(np.uint8))
    with pytest.raises(DatasetError, match="holds 8-bit numbers, and no unit is usual"):
        Folder(root)
    assert look(root, depth_scale=10).findings == []


def test_whole_disparity_needs_a_scale(scenes, tmp_path):
    root = write(tmp_path, scenes["rooms"], lambda metres: (5000 / metres.clip(0.5)).astype(np.uint16))
    with pytest.raises(DatasetError, match="how many units a pixel has is not said"):
        Folder(root, baseline_focal=50)
    with pytest.raises(DatasetError, match="speak of metres"):
        Folder(root, baseline_focal=50, inverse=True)
    for wrong in (dict(invalid=3), dict(max_depth=-1), dict(points="uv"), dict(camera=200), dict(invalid=["a"])):
        with pytest.raises(DatasetError):
            Folder(root, **wrong)


@pytest.mark.skipif(find_spec("OpenEXR") is None, reason="OpenEXR is not installed")
def test_a_damaged_openexr_file_is_named(tmp_path):
    save_array(tmp_path / "whole.exr", np.ones((40, 30), np.float32))
    for content in (b"no such file", (tmp_path / "whole.exr").read_bytes()[:-30]):
        (tmp_path / "cut.exr").write_bytes(content)
        with pytest.raises(ImageError, match="cut.exr cannot be opened as OpenEXR"):
            read_stored(tmp_path / "cut.exr")


def test_a_recipe_is_written_once_and_read_back(tmp_path):
    make_folder(tmp_path / "own", count=6)
    done = command_here("dpt_data", "init", "own", folder=tmp_path, check=0)
    recipe = read_recipe(tmp_path / "own.yaml")
    assert recipe.data.name == "folder" and recipe.data.train["depth_scale"] == 1000
    assert "dpt_train own.yaml --data-root own" in done.stdout
    before = (tmp_path / "own.yaml").read_text()
    assert "is there already" in command_here("dpt_data", "init", "own", folder=tmp_path, check=1).stderr
    assert (tmp_path / "own.yaml").read_text() == before
