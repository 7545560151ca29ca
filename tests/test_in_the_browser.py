"""A lesson on Colab or Binder: its first cell installs the library from a wheel, in an environment that has all else,
and the lesson's imports are the wheel's."""

import ast
import json
import os
import re
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import REPOSITORY, running_lab
from in_the_browser import BUTTONS, EXTRAS, INSTALL, install_code, lessons, settings, with_browser_cells

from dpt_nb.workbench.lab import card_sheet, write_settings

BINDER = REPOSITORY / ".binder"


def test_the_cells_are_written_once_and_below_the_title():
    notebook = dict(cells=[dict(id="title", source="# A"), dict(id="text", source="B")], nbformat=4)
    made = with_browser_cells(notebook, "nbs/wing/00_lesson.ipynb")
    assert [cell["id"] for cell in made["cells"]] == ["title", BUTTONS, INSTALL, "text"]
    assert with_browser_cells(made, "nbs/wing/00_lesson.ipynb") == made
    spoilt = dict(made, cells=[cell | dict(source="changed") for cell in made["cells"]])
    assert with_browser_cells(spoilt, "nbs/wing/00_lesson.ipynb")["cells"][1:3] == made["cells"][1:3]


def test_the_cell_does_nothing_where_the_library_is():
    "Neither pip nor a widget manager is called, and nothing is imported that was not there."
    watched = (
        "import sys; sys.executable = 'not to be called'\n" + install_code() + "\nassert 'nbdev' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", watched], check=True, cwd=REPOSITORY, env=dict(os.environ, PYTHONPATH="."))


COLAB = """import sys
from types import ModuleType, SimpleNamespace

called = []
colab = ModuleType("google.colab")
colab.output = SimpleNamespace(enable_custom_widget_manager=lambda: called.append("widgets"))
sys.modules |= {"google": ModuleType("google"), "google.colab": colab}
"""


def test_on_colab_the_first_cell_lets_widgets_be_shown():
    (cell,) = (
        "".join(cell["source"])
        for cell in json.loads((REPOSITORY / "nbs/network/04_reassemble.ipynb").read_text(encoding="utf-8"))["cells"]
        if cell["id"] == INSTALL
    )
    watched = f"{COLAB}\n{cell}\nassert called == ['widgets'], called"
    subprocess.run([sys.executable, "-c", watched], check=True, cwd=REPOSITORY, env=dict(os.environ, PYTHONPATH="."))


def test_binder_installs_torch_for_processors_and_then_this_clone():
    asked = [
        line for line in (BINDER / "requirements.txt").read_text().splitlines() if not line.startswith(("#", "--"))
    ]
    known = settings()
    assert set(asked) <= {*known["requirements"].split(), *known["dev_requirements"].split()}
    assert {re.match(r"\w+", each)[0] for each in asked} == {"torch", "torchvision", "jupyterlab"}
    started = BINDER / "postBuild"
    assert started.stat().st_mode & stat.S_IXUSR and "pip install --no-cache-dir '.[" in started.read_text()
    assert all(extra.strip("[]") in started.read_text() for extra in EXTRAS.values()), "what a lesson needs besides"
    assert '\npython -m dpt_nb.workbench.lab --settings "$HOME/.jupyter"\n' in started.read_text(), "the style sheet"
    version = re.fullmatch(r"python-(\d+)\.(\d+)\n", (BINDER / "runtime.txt").read_text())
    assert tuple(map(int, version.groups())) >= tuple(map(int, known["min_python"].split(".")))


@pytest.mark.slow
def test_binders_jupyterlab_has_the_style_sheet_and_the_hook(tmp_path):
    notebook = dict(cells=[], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path / "lesson.ipynb").write_text(stored := json.dumps(notebook, indent=1) + "\n")
    write_settings(tmp_path / "config")
    with running_lab(tmp_path) as (folder, address, token):

        def ask(path: str, **more) -> str:
            words = {"Authorization": f"token {token}"}
            with urlopen(Request(f"http://{address}/{path}", headers=words, **more), timeout=300) as answer:
                return answer.read().decode()

        assert ask("custom/custom.css") == card_sheet() and "custom/custom.css" in ask("lab")
        read = dict(type="notebook", content=notebook | dict(metadata=dict(language_info=dict(name="python"))))
        ask("api/contents/lesson.ipynb", method="PUT", data=json.dumps(read).encode())
        assert (folder / "lesson.ipynb").read_text() == stored


def built_wheel(folder: Path) -> Path:
    "The library's wheel, of a copy of what is packed: setuptools leaves a folder beside its source."
    source = folder / "source"
    shutil.copytree(REPOSITORY / "dpt_nb", source / "dpt_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def all_but_the_library(folder: Path) -> Path:
    "A folder with links to everything that is installed here, the library itself left out."
    folder.mkdir()
    name = settings()["lib_name"]
    for home in map(Path, {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for path in home.iterdir() if home.is_dir() else ():
            own = re.match(rf"(__editable__.*)?{name}\b", path.name) or path.suffix in (".pth", ".egg-link")
            if not own and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
def test_a_lesson_runs_where_the_library_was_not_installed(tmp_path):
    wheel = built_wheel(tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (home,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    uninstall = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]  # an old one hides the other
    subprocess.run(uninstall, check=True)
    (home / "all_else.pth").write_text(f"{all_but_the_library(tmp_path / 'all_else')}\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    environment |= dict(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, IN_TEST="1", MPLBACKEND="agg")

    def run(code: str) -> str:
        words = [str(python), "-c", code]
        return subprocess.run(
            words, check=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        ).stdout

    assert (
        run("import importlib.util as u; print(u.find_spec('dpt_nb'), u.find_spec('torch') is not None)")
        == "None True\n"
    )
    notebook = json.loads((REPOSITORY / "nbs/network/04_reassemble.ipynb").read_text(encoding="utf-8"))
    (cell,) = ("".join(cell["source"]) for cell in notebook["cells"] if cell["id"] == INSTALL)
    (address,) = re.findall(r'f"[^"]*https://[^"]+/{version}\.zip"', cell)
    offered = {f"tags/v{settings()['version']}": tmp_path / "no_such_tag.zip", f"heads/{settings()['branch']}": wheel}
    asked = cell.replace(address, f"{ {name: path.as_uri() for name, path in offered.items()} }[version]")
    shown = "import dpt_nb, nbdev, sys; nbdev.nbdev_export(); print(dpt_nb.__file__, dpt_nb.__version__)"
    places = f"\nfrom dpt_nb.network.reassemble import Reassemble\n{shown}"
    place, version = run(asked + places).split()
    assert Path(place).is_relative_to(home) and version == settings()["version"]
    imports = [
        ast.unparse(node)
        for each in notebook["cells"]
        if each["cell_type"] == "code"
        for node in ast.parse("".join(each["source"])).body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dpt_nb")
    ]
    begun = "from dpt_nb.all import create_model\ncreate_model('dpt_tiny_scenes', pretrained=True)"
    run("\n".join([cell, *imports, begun]))


def test_every_lesson_is_asked_for_at_its_own_place():
    for path in lessons():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        shown = "".join(next(cell["source"] for cell in cells if cell["id"] == BUTTONS))
        place = path.relative_to(REPOSITORY).as_posix()
        assert f"/{place})" in shown and f"labpath={place.replace('/', '%2F')})" in shown
        for figure in re.findall(r"!\[[^]]+\]\(([^)]+)\)", shown):
            assert (path.parent / figure).is_file()
