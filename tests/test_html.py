"Pages of HTML that nbconvert and JupyterLab make of a notebook: what is folded in it is folded there."

import shutil
import subprocess
import sys
from urllib.request import Request, urlopen

from bs4 import BeautifulSoup
from conftest import REPOSITORY

from dpt_nb.workbench.exercises import read_exercises

LESSON = REPOSITORY / "nbs" / "network" / "04_reassemble.ipynb"


def folds_of(page):
    "The words of each fold of a page, by what is read on it, and what is left when all are closed."
    soup, folds = BeautifulSoup(page, "html.parser"), {}
    for fold in soup.select("details.folded"):
        assert not fold.has_attr("open")
        name = fold.summary.extract().get_text(strip=True)
        folds.setdefault(name, []).append(fold.extract().get_text())
    return folds, soup.get_text()


def look_at(page):
    "Answers with their outputs in closed folds; checks folded, what they say seen."
    folds, left = folds_of(page)
    exercises = read_exercises(LESSON)
    assert len(folds["Answer"]) == len(folds["Check of your answer"]) == len(exercises) == 3
    assert "# answer" not in left and "# checks" not in left
    for exercise, answer in zip(exercises, folds["Answer"]):
        printed = "".join("".join(output.get("text", "")) for output in exercise.outputs).strip().splitlines()
        assert "# answer" in answer and all(line in answer for line in printed)
        assert exercise.begins.startswith("Not yet: ") and exercise.begins.splitlines()[0] in left
    assert "class Reassemble" in left  # what a lesson is about is open


def test_nbconvert_folds_what_the_notebook_folds(tmp_path):
    words = [sys.executable, "-m", "nbconvert", "--config", "nbs/jupyter_nbconvert_config.py", "--to", "html"]
    subprocess.run([*words, "--output-dir", str(tmp_path), str(LESSON)], cwd=REPOSITORY, check=True)
    look_at((tmp_path / "04_reassemble.html").read_text(encoding="utf-8"))


def test_jupyterlab_folds_what_it_saves_as_html(server):
    folder, address, token = server
    shutil.copy(LESSON, folder)
    asked = Request(f"http://{address}/nbconvert/html/{LESSON.name}", headers={"Authorization": f"token {token}"})
    with urlopen(asked, timeout=300) as page:
        look_at(page.read().decode())


def test_the_template_is_shipped():
    assert '"workbench/templates/*/*"' in (REPOSITORY / "setup.py").read_text(encoding="utf-8")
