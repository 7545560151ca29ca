"README.md is the front door, nbs/index.ipynb, rendered by nbconvert. `python tests/render_readme.py` writes it."

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

HERE = Path(__file__).resolve().parent.parent


def render() -> str:
    """The front door as markdown for the repository's root: hidden cells left out, links and pictures pointing into
    nbs/."""
    notebook = nbformat.read(HERE / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not re.match(r"#\|\s*hide", cell.source)]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return re.sub(r"\]\((?!https?:|#)", "](nbs/", text).strip() + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(render(), encoding="utf-8")
