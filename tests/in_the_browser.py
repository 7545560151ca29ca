"""The buttons at the top of every lesson that open it on Colab or Binder, and the cell below them that installs the
library where it is not there: the same in every lesson, written from settings.ini.

`python tests/in_the_browser.py [NOTEBOOK …]` writes both where they are missing or were changed; all lessons without
any.
"""

import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

from dpt_nb.images.files import atomic_write
from dpt_nb.workbench.course import lesson_names, read_lesson

HERE = Path(__file__).resolve().parents[1]
EXTRAS = {"19_fast_lane": "[int8]"}  # what a lesson needs besides
BUTTONS, INSTALL = "browser-buttons", "browser-install"  # ids of the two cells
CODE = """#| hide
# @title In the browser: install LIBRARY where it is missing { display-mode: "form" }
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

if importlib.util.find_spec("LIBRARY") is None:
    for version in ("tags/vVERSION", "heads/BRANCH"):
        source = f"LIBRARYEXTRAS @ ADDRESS/archive/refs/{version}.zip"
        if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source]).returncode == 0:
            break
    importlib.invalidate_caches()
    sys.modules.setdefault("nbdev", SimpleNamespace(nbdev_export=lambda: None))  # no clone to write the library into
if "google.colab" in sys.modules:
    from google.colab import output

    output.enable_custom_widget_manager()"""


def settings() -> dict:
    "What settings.ini says of the project."
    parser = ConfigParser(delimiters=["="])
    parser.read(HERE / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def install_code(
    lesson: str = "",  # its path in the repository
) -> str:
    "Installs the library from its version's tag, and from the branch while there is no such tag."
    known = settings()
    words = dict(LIBRARY=known["lib_name"], ADDRESS=known["git_url"], VERSION=known["version"], BRANCH=known["branch"])
    words["EXTRAS"] = EXTRAS.get(Path(lesson).stem, "")
    return re.sub("|".join(words), lambda word: words[word[0]], CODE)


def buttons(
    lesson: str,  # its path in the repository
) -> str:
    "Two figures that are links. They lie beside the notebooks: nothing is fetched to show them."
    known, figures = settings(), "../" * (lesson.count("/") - 1) + "figures"
    place = f"{known['user']}/{known['repo']}"
    colab = f"https://colab.research.google.com/github/{place}/blob/{known['branch']}/{lesson}"
    binder = f"https://mybinder.org/v2/gh/{place}/{known['branch']}?labpath={quote(lesson, safe='')}"
    return (
        f"[![Open this lesson in Colab]({figures}/open_in_colab.svg)]({colab})\n"
        f"[![Open this lesson in Binder]({figures}/open_in_binder.svg)]({binder})"
    )


def browser_cells(
    lesson: str,  # its path in the repository
) -> list[dict]:  # as a notebook stores them
    "The buttons, and the cell that installs; folded, without outputs."
    shown = dict(cell_type="markdown", id=BUTTONS, metadata={}, source=buttons(lesson).splitlines(keepends=True))
    code = dict(cell_type="code", id=INSTALL, execution_count=None, outputs=[])
    folded = dict(jupyter=dict(source_hidden=True))
    return [shown, code | dict(metadata=folded, source=install_code(lesson).splitlines(keepends=True))]


def lessons() -> list[Path]:
    "The numbered notebooks, then the stories that end in a quiz."
    stories = [name for name in lesson_names() if name.startswith("stories/") and read_lesson(name).quiz]
    return [*sorted((HERE / "nbs").rglob("[0-9][0-9]_*.ipynb")), *(HERE / "nbs" / f"{name}.ipynb" for name in stories)]


def with_browser_cells(notebook: dict, lesson: str) -> dict:  # as JSON; lesson: its path in the repository
    "The same notebook with the two cells below its title."
    title, *others = (cell for cell in notebook["cells"] if cell.get("id") not in (BUTTONS, INSTALL))
    return notebook | dict(cells=[title, *browser_cells(lesson), *others])


def main(paths: list[str]) -> None:
    "Write the notebooks that change, as nbdev does."
    for path in map(Path.resolve, map(Path, paths or lessons())):
        stored = path.read_text(encoding="utf-8")
        notebook = with_browser_cells(json.loads(stored), path.relative_to(HERE).as_posix())
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if text != stored:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(path.relative_to(HERE))


if __name__ == "__main__":
    main(sys.argv[1:])
