"""The student's copy: what is in it, and every exercise worked through by script, from blank to solved; the hints and
quizzes of every lesson."""

import ast
import json
import multiprocessing
import os
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import REPOSITORY
from forked import FORKS
from in_the_browser import lessons
from static_outputs import as_saved

from dpt_nb.workbench import student
from dpt_nb.workbench.course import CourseError, course_progress, lesson_names, read_lesson, read_progress
from dpt_nb.workbench.exercises import LOCKED, answer, check, is_answer, read_exercises, source_of
from dpt_nb.workbench.lab import CARDS

NOTEBOOKS = {
    path.relative_to(REPOSITORY / "nbs").with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((REPOSITORY / "nbs").rglob("[!.]*.ipynb"))
}
EXERCISES = {name: found for name, notebook in NOTEBOOKS.items() if (found := read_exercises(notebook))}
LESSONS = [path.relative_to(REPOSITORY / "nbs").with_suffix("").as_posix() for path in lessons()]
ASKED = [name for name in EXERCISES if name in LESSONS or name.startswith("stories/")]  # those that have hints
QUICK = "network/04_reassemble"  # worked through in the quick tests, too
SLOW = re.compile(r"#\|\s*slow")
WORKED = [name for name in EXERCISES if not name.startswith("stories/")]  # stories train for minutes


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A student's copy of the whole course."
    folder = tmp_path_factory.mktemp("course") / "student"
    student.write_student_copy(folder, REPOSITORY / "nbs")
    return folder


@pytest.fixture(autouse=True)
def progress(tmp_path, monkeypatch):
    "Progress of its own for each test; its file."
    monkeypatch.setenv("DPT_NB_PROGRESS", str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def codes(name, copy):
    "The cells of code of a student's notebook."
    cells = json.loads((copy / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [source_of(cell) for cell in cells if cell["cell_type"] == "code"]


# What a lesson asks


def test_every_exercise_of_a_lesson_has_two_hints():
    assert set(ASKED) <= set(lesson_names())
    for name in ASKED:
        hints = read_lesson(name).hints
        assert list(hints) == [exercise.number for exercise in EXERCISES[name]], name
        for number, found in hints.items():
            assert len(found) == len(set(found)) == 2 and all(len(hint) > 20 for hint in found), (name, number)


def test_every_lesson_has_a_quiz_of_three_questions_with_a_reason_for_every_choice():
    rights = []
    for name in LESSONS:
        asked = read_lesson(name).quiz
        assert len(asked) == 3, name
        for question in asked:
            choices, reasons = zip(*question.choices)
            assert len(set(choices)) == len(set(reasons)) == 4, (name, question.text)
            assert all(len(reason) > 10 and reason.endswith((".", "!")) for reason in reasons), (name, question.text)
            assert question.text.endswith(("?", ".")) and max(map(len, choices)) <= 110, (name, question.text)
            rights.append(question.right)
    assert set(rights) == {0, 1, 2, 3} and max(map(rights.count, range(4))) < len(rights) / 2


def test_the_reason_of_a_wrong_choice_does_not_give_the_right_one_away():
    for name in LESSONS:
        for question in read_lesson(name).quiz:
            right = question.choices[question.right][0].rstrip(".").lower()
            for place, (_, reason) in enumerate(question.choices):
                assert place == question.right or right not in reason.lower(), (name, question.text)


def test_every_lesson_calls_its_quiz_after_its_exercises():
    for name in LESSONS:
        sources = [source_of(cell) for cell in NOTEBOOKS[name]["cells"]]
        calls = [place for place, source in enumerate(sources) if f'quiz("{name}")' in source]
        assert len(calls) == 1 and calls[0] > EXERCISES[name][-1].place, name
        shown = NOTEBOOKS[name]["cells"][calls[0]]["outputs"][0]["data"]
        text = "".join(shown["text/plain"])
        assert all(question.text in text for question in read_lesson(name).quiz), f"{name}: run its quiz again"


# The copy


def test_a_copy_has_neither_answers_nor_checks_in_clear(copy):
    for name, exercises in EXERCISES.items():
        text = (copy / f"{name}.ipynb").read_text(encoding="utf-8")
        hidden = (copy / LOCKED / f"{name}.json").read_text(encoding="utf-8")
        assert not any(
            words in text for words in ("# checks", "<summary>Why</summary>", "<summary>Answers</summary>")
        ), name
        told = "\n".join(map(source_of, json.loads(text)["cells"]))
        for exercise in exercises:
            assert f'check(\\"{name}\\", {exercise.number}, ' in text, name
            for secret in (exercise.answer, exercise.why, exercise.checks):
                assert not secret or secret not in told, (name, exercise.number)
                assert not secret or json.dumps(secret)[1:-1] not in hidden, (name, exercise.number)


def test_what_is_read_stays_as_it_is_and_blanks_are_blank(copy):
    for name, exercises in EXERCISES.items():
        cells = json.loads((copy / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        before = NOTEBOOKS[name]["cells"][: exercises[0].place - 2]
        before = [cell for cell in before if not student.is_for_course(cell)]
        assert cells[: len(before)] == before, name
        for exercise in exercises:
            blank = next(cell for cell in cells if source_of(cell) == exercise.blank)
            assert blank["outputs"] == [], (name, exercise.number)
    for name in set(NOTEBOOKS) - set(EXERCISES):
        kept = json.loads((copy / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert kept == [cell for cell in NOTEBOOKS[name]["cells"] if not student.is_for_course(cell)], name
        assert "nbdev_export()" not in "".join(codes(name, copy)), name


def test_a_copy_that_jupyterlab_saves_unchanged_is_the_same_file(copy):
    "Or what was only opened would count as worked on, and stay behind when the course changes."
    for name in NOTEBOOKS:
        text = (copy / f"{name}.ipynb").read_text(encoding="utf-8")
        assert as_saved(json.loads(text)) == text, name


def test_a_copy_does_not_open_the_course_elsewhere(copy):
    for name in LESSONS:
        text = (copy / f"{name}.ipynb").read_text(encoding="utf-8")
        assert "mybinder.org" not in text and "pip" not in "".join(codes(name, copy)[:2]), name


def test_links_and_pictures_of_a_copy_lead_somewhere(copy):
    for name in NOTEBOOKS:
        cells = json.loads((copy / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        text = "\n".join(source_of(cell) for cell in cells if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
            place = (copy / name).parent / link
            outside = not place.resolve().is_relative_to(copy.resolve())  # a folder beside the notebooks
            assert place.exists() or (outside and (REPOSITORY / "nbs" / name).parent.joinpath(link).exists()), (
                f"{name}: {link}"
            )


def stored_in(tree):
    "Names that code assigns, at any depth."
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def bound_in(source):
    "Names that a cell defines for the cells below."
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif not isinstance(node, ast.With):  # what it binds is mostly its own
            names |= {
                each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            }
    return names


def test_no_cell_needs_what_only_an_answer_defines():
    for name in EXERCISES:
        cells = NOTEBOOKS[name]["cells"]
        known, missing = set(), set()
        for place, source in enumerate(map(source_of, cells)):
            if cells[place]["cell_type"] != "code":
                continue
            if student.belongs_to_answer(cells, place):
                missing |= bound_in(source) - known
                continue
            known |= bound_in(source)
            if not missing:
                continue
            tree = ast.parse(source)
            own = (
                stored_in(tree) | bound_in(source) | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            )
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert not used & missing - own, (name, source[:80], used & missing - own)
            missing -= known


def test_below_the_first_exercise_no_cell_takes_the_names_of_the_course(copy):
    for name in EXERCISES:
        cells = codes(name, copy)
        first = next(place for place, source in enumerate(cells) if "import answer, check" in source)
        for source in cells[first:]:
            assert not bound_in(source) & {"check", "answer"}, (name, source[:80])
    for name in LESSONS:
        assert not any("quiz" in bound_in(source) for source in codes(name, copy)), name


# Worked through


def right_version(exercise, shell):
    "What the instructor's answer gives its own checker, found by asking: the values of the first that is right."
    from IPython.display import display

    scope = dict(shell.user_ns, display=display)
    quick = exercise.answer.split("\n#| slow")[0]  # what follows shows more, of cells that were left out
    for cell in (exercise.blank, quick):  # an answer may show the blank's mistake beside its own
        exec(compile(cell, "<answer>", "exec"), scope)
    for node in ast.walk(ast.parse(quick)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == exercise.checker:
            try:
                values = [eval(ast.unparse(argument), scope) for argument in node.args]
            except NameError:  # of a loop or a function
                continue
            if str(scope[exercise.checker](*values)).startswith("Right"):
                return values
    raise AssertionError(f"no right version in the answer of exercise {exercise.number}")


def work_exercise(shell, name, exercise):
    "One exercise: as given, locked, wrong, hinted, opened, right. What was said."

    def run(source):
        ran = shell.run_cell(source, store_history=True)
        assert ran.exception is None, (name, exercise.number, source, ran.exception)
        return ran.result.result

    asked, hints = f'"{name}", {exercise.number}', read_lesson(name).hints if name in lesson_names() else {}
    names, hints = ", ".join(exercise.mine), hints.get(exercise.number, ())
    given = run(f"check({asked}, {names})")
    assert given.said.startswith("Not yet") and "as it was given" in given.more, (name, exercise.number, given)
    assert "Locked until" in str(run(f"answer({asked})"))
    run(f"{' = '.join(exercise.mine)} = None")
    tries = [run(f"check({asked}, {names})") for _ in range(3)]
    assert all(each.said.startswith("Not yet") for each in tries), (name, exercise.number, tries)
    for each, hint in zip(tries, hints):
        assert hint in each.more, (name, exercise.number, each)
    assert "The answer can be opened: answer(" in tries[-1].more
    assert str(run(f"answer({asked})")) == f"{exercise.answer}\n\n{exercise.why}".strip()
    shell.user_ns["right_version"] = right_version(exercise, shell)
    right = run(f"check({asked}, *right_version)")
    assert right.right and right.said.startswith("Right"), (name, exercise.number, right)
    facts = read_progress()["lessons"][name]["exercises"][str(exercise.number)]
    assert facts == dict(tries=4, solved=True), (name, exercise.number, facts)
    return right.said


def work_through(copy, name, folder):
    "A student's notebook from top to bottom, its exercises worked; runs in a fork. What was said of the right ones."
    multiprocessing.set_start_method("fork", force=True)  # as a kernel has it: lessons define what workers need
    os.environ["DPT_NB_PROGRESS"], os.environ["IN_TEST"] = str(folder / "progress.json"), "1"
    os.chdir((copy / name).parent)
    from execnb.shell import CaptureShell

    shell, exercises = CaptureShell(mpl_format="png"), {each.number: each for each in read_exercises(NOTEBOOKS[name])}
    shell.run("set_matplotlib_formats('png', dpi=20, bbox_inches=None)")
    answers = [source_of(cell) for cell in NOTEBOOKS[name]["cells"] if is_answer(cell)]
    left_out = "eval:" if any(SLOW.match(source) for source in answers) else "slow|eval:"  # what a slow answer needs
    said = []
    for source in codes(name, copy):
        if re.search(rf"(?m)^#\|\s*({left_out})", source):
            continue
        if found := re.fullmatch(r'check\("(.+)", (\d+), .+\)', source):
            said.append(work_exercise(shell, name, exercises[int(found[2])]))
        else:
            ran = shell.run_cell(source, store_history=True)
            assert ran.exception is None, (name, source[:200], ran.exception)
    return said


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in WORKED if name != QUICK)]
)
def test_a_copy_is_worked_through_from_blank_to_solved(copy, name, tmp_path, progress):
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:  # a lesson defines the library's own names anew
        said = pool.submit(work_through, copy, name, tmp_path).result()
    assert len(said) == len(EXERCISES[name])
    row = next(row for row in course_progress().rows if row.name == name)
    assert row.solved == len(said) and not row.read


CHECK_SUM = """# checks
def check_sum(mine):
    return "Right: 4." if mine == 4 else f"Not yet: found {mine}."


print(check_sum(my_sum))"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A copy of a course with one exercise; the working folder."
    cells = [
        ("markdown", "## Exercises\n\n**1.** What is two and two?"),
        ("code", "my_sum = None  # yours"),
        ("code", CHECK_SUM),
        ("code", "# answer\nprint(check_sum(4))"),
        ("markdown", "<details><summary>Why</summary>\n\nCount.\n\n</details>"),
    ]
    made = [dict(cell_type=kind, source=source, metadata={}) for kind, source in cells]
    for cell in made[1:4]:
        cell |= dict(outputs=[], execution_count=None)
    made[2]["outputs"] = [dict(output_type="stream", name="stdout", text="Not yet: found None.\n")]
    (tmp_path / "nbs" / "wing").mkdir(parents=True)
    for path in ("index", "wing/sums"):
        notebook = dict(cells=made if "/" in path else [], metadata={})
        (tmp_path / "nbs" / f"{path}.ipynb").write_text(json.dumps(notebook))
    student.write_student_copy(tmp_path / "student", tmp_path / "nbs")
    monkeypatch.chdir(tmp_path / "student" / "wing")
    return tmp_path


def test_a_cell_that_was_not_touched_is_no_try_and_a_none_that_was_written_is_one(small, monkeypatch):
    given = check("sums", 1, None)
    assert "as it was given" in given.more and read_progress()["lessons"] == {}
    namespace = dict(check=check, In=["", "my_sum = None  # yours", 'check("sums", 1, my_sum)'])
    assert "as it was given" in eval('check("sums", 1, None)', namespace).more
    namespace["In"].append("my_sum = None")
    assert "as it was given" not in eval('check("sums", 1, None)', namespace).more
    assert read_progress()["lessons"]["wing/sums"]["exercises"]["1"] == dict(tries=1, solved=False)


def test_one_setting_unlocks(small):
    from dpt_nb.workbench.course import unlock_answers

    assert "Locked until exercise 1" in str(answer("sums", 1))
    unlock_answers()
    assert "print(check_sum(4))" in str(answer("sums", 1)) and "Count." in str(answer("sums", 1))
    unlock_answers(False)
    assert "Locked until exercise 1" in str(answer("sums", 1))


def test_a_damaged_record_is_kept_aside_and_the_exercise_goes_on(small, progress):
    check("sums", 1, 3)
    whole = progress.read_text()
    progress.write_text(whole[:-20])
    with pytest.warns(UserWarning, match="is no record of progress .*: it is kept as progress-unreadable-1.json"):
        assert check("sums", 1, 4).right
    assert progress.with_name("progress-unreadable-1.json").read_text() == whole[:-20]
    assert read_progress()["lessons"]["wing/sums"]["exercises"]["1"] == dict(tries=1, solved=True)


def test_a_record_that_cannot_be_written_does_not_stop_a_lesson(small, progress, monkeypatch):
    monkeypatch.setenv("DPT_NB_PROGRESS", str(small / "nbs" / "index.ipynb" / "progress.json"))
    with pytest.warns(UserWarning, match="Progress could not be kept in"):
        assert check("sums", 1, 4).right
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert course_progress().totals()["exercises"][0] == 0


def test_work_is_not_overwritten(small):
    place, lesson = small / "student" / "wing" / "sums.ipynb", small / "nbs" / "wing" / "sums.ipynb"
    mine = place.read_text().replace("my_sum = None", "my_sum = 4")
    place.write_text(mine)
    assert student.write_student_copy(small / "student", small / "nbs").kept == ["wing/sums.ipynb"]
    lesson.write_text(lesson.read_text().replace("two and two", "one and three"))
    for _ in range(2):
        edition = student.write_student_copy(small / "student", small / "nbs")
        assert edition.beside == ["wing/sums.new.ipynb"] and place.read_text() == mine
    newer = place.with_name("sums.new.ipynb")
    assert "one and three" in newer.read_text()
    newer.write_text(newer.read_text().replace("my_sum = None", "my_sum = 5"))
    lesson.write_text(lesson.read_text().replace("one and three", "five less one"))
    assert student.write_student_copy(small / "student", small / "nbs").beside == ["wing/sums.new-2.ipynb"]
    assert "my_sum = 5" in newer.read_text() and place.read_text() == mine


def test_the_command_says_what_it_did_and_what_it_refuses(small, capsys, monkeypatch):
    monkeypatch.chdir(small)
    assert student.main(["copy", "--lessons", "nbs"]) == 0
    assert "copy: 2 files written." in capsys.readouterr().out
    assert student.main(["nbs", "--lessons", "nbs"]) == 2
    assert "nbs is inside nbs: choose a folder beside it." in capsys.readouterr().err
    assert student.main(["new"]) == 0 and student.main(["other", "--lessons", "new/wing"]) == 2
    assert "There are no notebooks in new/wing" in capsys.readouterr().err


def test_outside_a_copy_a_check_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError, match="is in no student's copy of the course: make student writes one"):
        check("network/04_reassemble", 1, None)


@pytest.mark.slow
def test_make_student_as_a_shell_runs_it(tmp_path):
    import subprocess
    import sys

    words = [sys.executable, "-m", "dpt_nb.workbench.student", tmp_path / "student", "--lessons", REPOSITORY / "nbs"]
    done = subprocess.run(list(map(str, words)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "student" / "index.ipynb").is_file() and "files written" in done.stdout


def test_the_library_ships_the_questions():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert '"workbench/questions/*/*"' in setup
    assert {path.suffix for path in Path(REPOSITORY, "dpt_nb", "workbench", "questions").rglob("*.*")} == {".yaml"}


def test_the_library_ships_how_figures_lie_on_a_dark_page():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert '"workbench/cards/*"' in setup and (CARDS / "custom.css").is_file()
