"Sphinx, as the book needs it. `build.py` writes the pages that it reads."

import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for pages.slug
parser = ConfigParser(delimiters=["="])
parser.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project, author = settings["lib_name"], settings["author"]
copyright, release = settings["copyright"], settings["version"]
html_title = project
html_baseurl = settings["doc_host"] + settings["doc_baseurl"] + "/"

extensions = ["myst_nb"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
myst_enable_extensions = ["dollarmath", "attrs_block", "fieldlist"]
myst_heading_anchors = 6
myst_heading_slug_func = "pages.slug"  # anchors as JupyterLab makes them, so that a link works in both
nb_execution_mode = "off"  # the outputs are those that are stored
nb_merge_streams = True
nb_ipywidgets_js = {}  # no script from elsewhere
nb_number_source_lines = False

html_theme = "sphinx_book_theme"
html_theme_options = dict(
    repository_url=settings["git_url"],
    use_repository_button=True,
    use_download_button=False,
    show_navbar_depth=1,
    collapse_navbar=True,
    show_toc_level=2,
    home_page_in_toc=True,
    navbar_persistent=[],  # the search stands in the sidebar
    pygments_light_style="a11y-high-contrast-light",
    pygments_dark_style="a11y-high-contrast-dark",
)
html_context = dict(default_mode="auto")  # as the reader's system is
CARDS = HERE.parents[1] / settings["lib_name"] / "workbench" / "cards" / "custom.css"  # figures on a dark page
html_static_path = [str(HERE / "book.css"), str(CARDS), *map(str, HERE.glob("token_explorer*.js"))]
html_css_files = ["book.css", "custom.css"]
html_favicon = str(HERE / "favicon.svg")
html_copy_source = False
smartquotes = False  # "add" is a word of Python
html_use_index = False  # the search finds names
html_show_sphinx = False
add_module_names = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"


def inline_math(self, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


class NamesLeadToTheReference(SphinxPostTransform):
    "A function or class that a text names in code leads to where it is described."

    default_priority = 5  # before links are resolved

    def run(self) -> None:
        places = {}
        for place, described in self.env.domains["py"].objects.items():
            if described.objtype in ("function", "class"):
                places.setdefault(place.split(".")[-1], []).append(place)
        for text in list(self.document.findall(nodes.Text)):
            if text == " -- ":  # Sphinx's own, between a parameter and what is said of it
                text.parent.replace(text, nodes.Text(" – "))
        for code in list(self.document.findall(nodes.literal)):
            name = code.astext().removesuffix("()")
            told_apart = name != name.lower() or "_" in name  # `size` is a word as well
            if told_apart and len(places.get(name, [])) == 1 and isinstance(code.parent, nodes.paragraph):
                link = dict(refdomain="py", reftype="obj", reftarget=places[name][0], refexplicit=True, refwarn=True)
                code.replace_self(pending_xref("", code.deepcopy(), refdoc=self.env.docname, **link))


def setup(app) -> dict:
    "Formulas are MathML, which every browser draws by itself: no script, no fonts, and the color of the text."
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.config.html_math_renderer = "mathml"
    app.add_post_transform(NamesLeadToTheReference)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
