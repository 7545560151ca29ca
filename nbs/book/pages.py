"""Notebooks become pages: what is for nbdev and the kernel is left out, answers are folded together with what they
print, and links lead to pages, or to the repository. Needs nothing but Python."""

import ast
import copy
import json
import os
import re
from pathlib import Path

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```\s*$|^~~~.*?^~~~\s*$|`+[^`\n]*`+)", re.MULTILINE | re.DOTALL)
VIEW = "application/vnd.jupyter.widget-view+json"
FIGURES = ("image/png", "image/jpeg", "image/svg+xml")
WIDGET = "*Sliders stand here: they need a kernel, so run the notebook in JupyterLab.*"
BROWSER = re.compile(r"^# @title In the browser\b", re.MULTILINE)  # installs the library on Colab and Binder
EXPLORER = Path(__file__).with_name("token_explorer.md")  # a page that needs no kernel
EXPLORED = ("network/08_inside", "workbench/tokens")  # notebooks from which a line leads there
HOUSEKEEPING = re.compile(r"(import nbdev|(nbdev\.)?nbdev_export\(\)|\w+\.cleanup\(\))\Z")


def without_directives(source: str) -> str:
    "Code without the lines that speak to nbdev."
    return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")


def only_imports(source: str) -> bool:
    "Whether code imports and does nothing else."
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    except SyntaxError:  # a magic of IPython
        return False


def fold_of(
    source: str,  # as it stands in the notebook
    folded: dict,  # what JupyterLab folds of it
) -> tuple[str, str] | None:  # what is folded, in MyST-NB's words, and what is read on it
    "How a code cell is folded, if it is."
    code = without_directives(source)
    if re.match(r"# answer\b", code):
        return "hide-cell", "Answer"
    if re.match(r"# checks?\b", code):
        return "hide-cell", "Check of your answer"
    if only_imports(code):
        return "hide-input", "Imports"
    if re.search(r"^#\| hide", source, re.MULTILINE):
        return "hide-cell", "Helpers" if "import " in source else "More tests"
    if folded.get("outputs_hidden"):
        return "hide-cell", "More of the answer"
    return ("hide-input", "Code") if folded.get("source_hidden") else None


def shown_output(output: dict) -> dict | None:
    "An output as a page can show it: a figure without the words that stand for it, a sentence instead of a widget."
    data = output.get("data")
    if data is None:
        return output
    kinds = {kind: value for kind, value in data.items() if kind != VIEW}
    if any(kind in kinds for kind in FIGURES):
        kinds = {kind: value for kind, value in kinds.items() if not kind.startswith("text/")}
    elif VIEW in data:
        kinds = {"text/markdown": WIDGET}
    return output | {"data": kinds} if kinds else None


def sentence(markdown: str) -> str:
    "The last sentence of a text without its markup: what is read aloud for the figure below it."
    words = re.sub(r"<[^>]*>|^[#>|].*$|[*`$]", "", markdown, flags=re.MULTILINE)
    words = " ".join(re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", words).split())
    return re.split(r"(?<=[.?!])\s", words)[-1].rstrip(":")[:200] or "Figure"


def code_cell(
    cell: dict,  # of a notebook
    above: str,  # the markdown before it
) -> dict | None:  # None where nothing is left
    "A code cell as it stands on the page."
    source = "".join(cell["source"])
    code = without_directives(source)
    if BROWSER.search(code) or all(HOUSEKEEPING.match(line) for line in code.splitlines() if line.strip()):
        return None
    outputs = [shown for output in cell["outputs"] if (shown := shown_output(output))]
    metadata, tags = {"mystnb": {"image": {"alt": sentence(above)}}}, []
    if re.search(r"^#\| exporti?\b", source, re.MULTILINE):
        tags.append("exported")
    if fold := fold_of(source, cell["metadata"].get("jupyter", {})):
        kind, words = fold
        tags.append(kind)
        metadata["mystnb"] |= {"code_prompt_show": words, "code_prompt_hide": words}
        code = re.sub(r"\A# (answer|checks?)\s*\n", "", code)
    return cell | {"source": code, "outputs": outputs, "metadata": metadata | {"tags": tags}, "execution_count": None}


def lead_links(
    markdown: str,
    home: Path,  # folder of the notebook
    pages: set[Path],  # notebooks and pictures that the book has
    root: Path,  # of the repository
    address: str,  # of the repository's files, on the web
) -> str:
    "Links to what is no page lead to the repository; code is left alone."

    def lead(link):
        place, anchor = (home / link[1]).resolve(), link[2] or ""
        if place in pages:
            return link[0]
        return f"]({address}/{Path(os.path.relpath(place, root)).as_posix()}{anchor})"

    parts = CODE.split(markdown)  # text, code, text, …
    return "".join(part if number % 2 else LINK.sub(lead, part) for number, part in enumerate(parts))


def slug(heading: str) -> str:
    "The anchor of a heading, as JupyterLab makes it: one link works in both."
    return heading.replace(" ", "-")


def from_the_top(said: str, notebook: str) -> str:
    "Links of words that stand on another page: they were meant from where the notebook is."
    home = Path("/" + notebook).parent
    return LINK.sub(lambda link: f"]({os.path.normpath(home / link[1])}{link[2] or ''})", said)


def module_of(notebook: dict) -> str | None:
    "Which module of the library a notebook exports."
    source = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    found = re.search(r"^#\| default_exp ([\w.]+)", source, re.MULTILINE)
    return found and found[1]


def where_it_is(notebook: dict, path: Path, root: Path, address: str, library: str) -> dict:
    "A line that leads from the page to its notebook and to its module."
    place = path.relative_to(root).as_posix()
    line = f"{{.where}}\nNotebook [`{place}`]({address}/{place})"
    if module := module_of(notebook):
        line += f", library {{py:mod}}`{library}.{module}`"
    if place.removeprefix("nbs/").removesuffix(".ipynb") in EXPLORED:
        line += f", to be tried here: [what a token sees](/{EXPLORER.name})"
    return dict(cell_type="markdown", id="where", metadata={}, source=line)


def page_of(notebook: dict, path: Path, pages: set[Path], root: Path, address: str, library: str) -> dict:
    "A notebook as the book's page."
    cells, above = [], ""
    for cell in copy.deepcopy(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            above = lead_links("".join(cell["source"]), path.parent, pages, root, address)
            cells.append(cell | {"source": above})
        elif cell["cell_type"] == "code" and (shown := code_cell(cell, above)):
            cells.append(shown)
    cells.insert(1, where_it_is(notebook, path, root, address, library))
    return notebook | {"cells": cells}


def title_of(notebook: dict) -> tuple[str, str]:
    "A notebook's heading, and the line of summary under it."
    first = "".join(notebook["cells"][0]["source"])
    heading, summary = re.search(r"^# (.+)$", first, re.MULTILINE), re.search(r"^> (.+)$", first, re.MULTILINE)
    return heading[1], summary[1] if summary else ""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, text: str) -> Path:
    "Write a page; one that is the same is left alone, so that Sphinx does not read it again."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def contents(caption: str, names: list[str]) -> str:
    "A part of the table of contents, for the sidebar alone."
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"


def wing_page(wing: str, notebooks: dict[str, dict], said: str) -> str:
    "A wing: what it is for, its lessons and, as its part of the contents, its reference."
    rows = []
    for name, notebook in notebooks.items():
        title, summary = title_of(notebook)
        rows.append(f"- [{title}](/{name}.ipynb): {from_the_top(summary, name)}")
    reference = [name for name in notebooks if not is_lesson(name)]
    listed = "\n".join(f"/{name}" for name in reference)
    return f"# {wing.capitalize()}\n\n{said}\n\n" + "\n".join(rows) + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def is_lesson(name: str) -> bool:
    return re.match(r"\d\d_", Path(name).name) is not None


def in_order(index: dict) -> list[str]:
    "The notebooks as the front door's table has them."
    text = "\n".join("".join(cell["source"]) for cell in index["cells"])
    return list(dict.fromkeys(re.findall(r"^\|[^|]*\| \[[^]]*\]\(([\w/]+)\.ipynb\)", text, re.MULTILINE)))


def write_pages(
    root: Path,  # of the repository
    out: Path,  # folder of pages, for Sphinx
    address: str,  # of the repository's files, on the web
    library: str,  # the library's name
    reference: list[str],  # pages of the API reference, for the contents
) -> list[Path]:  # what was written
    "Every notebook as a page, a page for each wing, and the table of contents."
    nbs = root / "nbs"
    notebooks = {
        path.relative_to(nbs).with_suffix("").as_posix(): read(path) for path in sorted(nbs.rglob("[!.]*.ipynb"))
    }
    figures = sorted((nbs / "figures").iterdir())
    pages = {(nbs / f"{name}.ipynb").resolve() for name in notebooks} | {figure.resolve() for figure in figures}
    order = in_order(notebooks["index"])
    lessons = sorted(filter(is_lesson, order), key=lambda name: Path(name).name)
    stories = [name for name in order if name.startswith("stories/")]
    wings = [wing for wing in dict.fromkeys(name.split("/")[0] for name in order if "/" in name) if wing != "stories"]
    rest = sorted((name for name in order if "/" not in name), key="registry".__eq__)  # how names are kept, last
    written = [write(out / EXPLORER.name, EXPLORER.read_text(encoding="utf-8"))]
    for wing in wings:
        its = {name: notebooks[name] for name in order if name.split("/")[0] == wing}
        said = ast.get_docstring(ast.parse((root / library / wing / "__init__.py").read_text(encoding="utf-8")))
        written.append(write(out / "wings" / f"{wing}.md", wing_page(wing, its, said or "")))
    parts = {
        "Lessons": [f"/{name}" for name in lessons],
        "Stories": [f"/{name}" for name in stories],
        "Without a kernel": [f"/{EXPLORER.stem}"],
        "Use and extend": [f"/{name}" for name in [*rest, "glossary"]],
        "Wings, notebook by notebook": [f"/wings/{wing}" for wing in wings],
        "Functions and classes": [f"{Path(name).name} </{name}>" for name in reference],
    }
    for name, notebook in notebooks.items():
        page = page_of(notebook, nbs / f"{name}.ipynb", pages, root, address, library)
        if name == "index":
            listed = "\n".join(contents(caption, names) for caption, names in parts.items())
            page["cells"].append(dict(cell_type="markdown", id="contents", metadata={}, source=listed))
        text = json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True)
        written.append(write(out / f"{name}.ipynb", text + "\n"))
    for figure in figures:
        copied = out / "figures" / figure.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        if not copied.exists() or copied.read_bytes() != figure.read_bytes():
            copied.write_bytes(figure.read_bytes())
        written.append(copied)
    return written
