"""The course as a site: what becomes of cells, links and parameters; and, where `make book` was run, the whole of it in
a real browser."""

import base64
import functools
import http.server
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from book_attention import MODEL, SCENES, quantized, read_explored, scene_attention, scene_image, weights
from conftest import FAINT, REPOSITORY, darkest_and_brightest
from fastcore.docments import docments
from in_the_browser import install_code, lessons
from PIL import Image

from dpt_nb.network.inside import attention_overlay
from dpt_nb.network.zoo import create_model

sys.path.insert(0, str(REPOSITORY / "nbs" / "book"))
import build  # noqa: E402
from links import broken_links  # noqa: E402
from pages import code_cell, from_the_top, lead_links, page_of, sentence, slug, write_pages  # noqa: E402
from reference import Module, described, directive, module_page  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOKED_AT = (
    "index",
    "token_explorer",
    "network/04_reassemble",
    "objective/09_losses",
    "training/report_page",
    "api/network/reassemble",
)
WORDS = "article *, .bd-sidebar-primary *, .bd-sidebar-secondary *"
PATIENCE = 300_000  # milliseconds, on a busy machine
ADDRESS = "https://example.org/blob/main"


def code(source, *outputs):
    return dict(cell_type="code", id="c", source=source, metadata={}, outputs=list(outputs), execution_count=None)


def shown(**kinds):
    return dict(
        output_type="display_data", metadata={}, data={name.replace("_", "/"): kind for name, kind in kinds.items()}
    )


def tags(source, *outputs):
    return code_cell(code(source, *outputs), "")["metadata"]["tags"]


@pytest.mark.parametrize(
    "source",
    [
        "#| default_exp network.dpt",
        "#| hide\nimport nbdev\n\nnbdev.nbdev_export()",
        "#| hide\nhome.cleanup()",
        install_code(),
        "",
    ],
)
def test_what_is_for_nbdev_alone_is_left_out(source):
    assert code_cell(code(source), "") is None


def test_code_loses_its_directives_and_keeps_everything_else():
    cell = code_cell(code("#| export\n#| slow\ndef double(x):\n    # twice\n    return 2 * x"), "")
    assert cell["source"] == "def double(x):\n    # twice\n    return 2 * x"
    assert cell["metadata"]["tags"] == ["exported"]


@pytest.mark.parametrize("source", ["# answer\nprint(42)", "#| slow\n# answer\nprint(42)"])
def test_an_answer_is_folded_together_with_what_it_prints(source):
    printed = dict(output_type="stream", name="stdout", text="42\n")
    cell = code_cell(code(source, printed), "")
    assert cell["metadata"]["tags"] == ["hide-cell"] and cell["source"] == "print(42)" and cell["outputs"] == [printed]
    assert cell["metadata"]["mystnb"]["code_prompt_show"] == "Answer"


def test_checks_and_imports_are_folded_and_a_test_is_not():
    assert tags("# checks\ndef check(x):\n    return x") == ["hide-cell"]
    assert tags("#| export\nimport torch\nfrom torch import nn") == ["exported", "hide-input"]
    assert tags("#| hide\nimport time\n\nfrom torch import nn") == ["hide-input"]
    assert tags("#| hide\ntest_eq(double(2), 4)") == ["hide-cell"]
    folded = code("figure") | dict(metadata=dict(jupyter=dict(source_hidden=True)))
    assert code_cell(folded, "")["metadata"]["tags"] == ["hide-input"]
    folded["metadata"]["jupyter"]["outputs_hidden"] = True  # an answer goes on
    assert code_cell(folded, "")["metadata"]["tags"] == ["hide-cell"]
    assert tags("test_eq(double(2), 4)") == tags("import torch\n\nprint(torch.pi)") == tags("%matplotlib inline") == []


def test_a_figure_stands_for_its_words_and_a_widget_for_a_sentence():
    view = {"application/vnd.jupyter.widget-view+json": {}}
    figure = shown(image_png="AAAA", text_plain="<Figure size 1000x200>")
    with_view, alone = shown(image_png="AAAA", text_plain="Page()"), shown(text_plain="HBox(children=…)")
    with_view["data"] |= view
    alone["data"] |= view
    kinds = [output["data"] for output in code_cell(code("page", figure, with_view, alone), "")["outputs"]]
    assert kinds[:2] == [{"image/png": "AAAA"}] * 2
    assert list(kinds[2]) == ["text/markdown"] and "JupyterLab" in kinds[2]["text/markdown"]


def test_a_figure_is_called_what_the_text_above_it_says_last():
    above = "## Levels\n\nFour maps. The *four* levels of [one room](a.ipynb), as `RGB`:\n\n| a | b |"
    assert sentence(above) == "The four levels of one room, as RGB"
    assert code_cell(code("figure"), above)["metadata"]["mystnb"]["image"]["alt"] == sentence(above)


def test_links_lead_to_pages_or_to_the_repository(tmp_path):
    home = tmp_path / "nbs" / "network"
    pages = {tmp_path / "nbs" / "data" / "a.ipynb", tmp_path / "nbs" / "figures" / "map.jpg"}
    lead = functools.partial(lead_links, home=home, pages=pages, root=tmp_path, address=ADDRESS)
    for kept in (
        "[a](../data/a.ipynb)",
        "[a](../data/a.ipynb#A-place)",
        "![map](../figures/map.jpg)",
        "[web](https://example.org/a.py)",
        "[here](#A-place)",
        "`table[a](b.py)` and\n```python\ntable[a](b.py)\n```\n",
    ):
        assert lead(kept) == kept
    assert lead("`x` [s](../../benchmarks/a.py#L3) `y`") == f"`x` [s]({ADDRESS}/benchmarks/a.py#L3) `y`"


def test_words_that_move_to_another_page_take_their_links_along():
    said = "as in [the loop](16_loop.ipynb#A-place), [zoe](../network/zoe.ipynb) and [BTS](https://example.org)"
    moved = (
        "as in [the loop](/training/16_loop.ipynb#A-place), [zoe](/network/zoe.ipynb) and [BTS](https://example.org)"
    )
    assert from_the_top(said, "training/validation.ipynb") == moved


def test_a_heading_has_the_anchor_that_links_in_jupyterlab_use():
    assert slug("Read: what to do with the class token") == "Read:-what-to-do-with-the-class-token"


def test_a_page_says_where_its_notebook_and_its_module_are(tmp_path):
    cells = [dict(cell_type="markdown", id="a", metadata={}, source="# Heads\n"), code("#| default_exp network.heads")]
    page = page_of(
        dict(cells=cells), tmp_path / "nbs" / "network" / "06_heads.ipynb", set(), tmp_path, ADDRESS, "dpt_nb"
    )
    assert len(page["cells"]) == 2 and len(cells) == 2
    assert f"({ADDRESS}/nbs/network/06_heads.ipynb)" in page["cells"][1]["source"]
    assert "{py:mod}`dpt_nb.network.heads`" in page["cells"][1]["source"]


def test_every_notebook_is_a_page_and_every_answer_folded(tmp_path):
    write_pages(REPOSITORY, tmp_path, ADDRESS, "dpt_nb", ["api/network"])
    folded, there = 0, 0
    for notebook in sorted((REPOSITORY / "nbs").rglob("[!.]*.ipynb")):
        page = tmp_path / notebook.relative_to(REPOSITORY / "nbs")
        cells = [cell for cell in json.loads(page.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert not [cell for cell in cells if re.search(r"^#\||nbdev_export\(", cell["source"], re.MULTILINE)], page
        folded += sum(cell["metadata"]["mystnb"].get("code_prompt_show") == "Answer" for cell in cells)
        stored = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        there += sum(bool(re.match(r"(#\|.*\n)*# answer", "".join(cell["source"]))) for cell in stored)
    assert folded == there > 90
    contents = (tmp_path / "index.ipynb").read_text(encoding="utf-8")
    listed = set(re.findall(r"^/([\w/]+)$", json.loads(contents)["cells"][-1]["source"], re.MULTILINE))
    for wing in (tmp_path / "wings").iterdir():
        listed |= set(re.findall(r"^/([\w/]+)$", wing.read_text(encoding="utf-8"), re.MULTILINE))
    names = {page.relative_to(tmp_path).with_suffix("").as_posix() for page in tmp_path.rglob("*.ipynb")}
    assert names - {"index"} <= listed


SOURCE = """
"Sizes."
__all__ = ["LARGEST", "Patch", "halve", "round_up"]
LARGEST = 1024  # pixels a side


def round_up(
    size: int,  # pixels
    # of the backbone
    patch: int = 16,  # pixels a side
    *more: str,
    exact=False,  # whether it may stay
) -> int:  # a multiple of `patch`
    "The next size that fits."
    return -(-size // patch) * patch  # not said of the answer


def halve(size: int, twice: bool = False) -> int:  # rounded up
    "Half."
    return -(-size // 2)


def _hidden(x): ...


@dataclass
class Patch(Base):
    "A square of pixels."

    side: int = 16  # pixels

    def _own(self): ...

    @property
    def area(self) -> int:
        "Its pixels."
        return self.side**2


@patch
def grow(
    self: Patch,
    by: float,  # times
):
    "A larger one."
"""


def test_the_reference_has_each_parameter_with_its_type_and_comment():
    largest, patch, halve, round_up = described(Module("dpt_nb.sizes", SOURCE))
    assert largest.said == "pixels a side" and ("value", "1024") in largest.options
    assert round_up.signature == "(size: int, patch: int=16, *more: str, exact=False) -> int"
    assert round_up.fields == [
        (":param size:", "pixels"),
        (":type size:", "int"),
        (":param patch:", "of the backbone pixels a side"),
        (":type patch:", "int"),
        (":param more:", ""),
        (":type more:", "str"),
        (":param exact:", "whether it may stay"),
        (":returns:", "a multiple of `patch`"),
    ]
    said = [(name, words) for name, words in halve.fields if words and not name.startswith(":type")]
    assert said == [(":returns:", "rounded up")]
    assert patch.signature == "(side: int = 16)" and (":param side:", "pixels") in patch.fields
    assert [(one.kind, one.name) for one in patch.inside] == [("property", "area"), ("method", "grow")]
    assert patch.inside[1].signature == "(by: float)" and "Bases: `Base`" in patch.said
    assert "_hidden" not in module_page(Module("dpt_nb.sizes", SOURCE), "sizes.ipynb")
    assert directive(patch).count("```````{py:method} grow(by: float)") == 1


@pytest.mark.parametrize("name", ["network.reassemble", "network.zoo", "objective.losses", "images.images"])
def test_the_reference_says_what_fastcore_reads_beside_the_parameters(name):
    module = importlib.import_module(f"dpt_nb.{name}")
    read = Module(module.__name__, Path(module.__file__).read_text(encoding="utf-8"))
    functions = [thing for thing in described(read) if thing.kind == "function" and "**" not in thing.signature]
    for thing in functions:
        own = {key.split()[-1].strip(":"): words for key, words in thing.fields if not key.startswith(":type")}
        theirs = {key: " ".join((words or "").split()) for key, words in docments(getattr(module, thing.name)).items()}
        answer = theirs.pop("return", "")
        assert own.pop("returns", "") == answer, thing.name
        assert {key: words for key, words in own.items() if words} == {k: w for k, w in theirs.items() if w}, thing.name
    assert functions


def test_a_link_that_leads_nowhere_is_told_and_so_is_what_needs_the_network(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.html").write_text('<p id="here"><a href="#here">a</a><a href="../b.html#there%20is">b</a>')
    (tmp_path / "b.html").write_text(
        '<p id="there is"><a href="one/a.html?q=1">a</a> <a href="https://example.org">c</a>'
    )
    assert broken_links(tmp_path) == []
    wrong = '<a href="c.html">c</a><a href="one/a.html#gone">a</a><script src="https://cdn.example.org/a.js"></script>'
    (tmp_path / "b.html").write_text(wrong)
    told = broken_links(tmp_path)
    assert len(told) == 4  # what a.html points to is gone as well
    assert any("nothing is at c.html" in one for one in told) and any("#gone" in one for one in told)
    assert any("needs the network: https://cdn.example.org/a.js" in one for one in told)


def test_what_the_book_needs_is_said_one_a_line():
    said = subprocess.run(
        [sys.executable, build.__file__, "--requirements"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert {re.split(r"[<>=]", line)[0] for line in said if line} >= {"sphinx", "myst-nb"}


def python_with_sphinx():
    "Which Python can build the book, if any."
    if importlib.util.find_spec("myst_nb") and importlib.util.find_spec("sphinx_book_theme"):
        return sys.executable
    own = REPOSITORY / ".venv-book" / "bin" / "python"
    return own if own.exists() else None


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The book, built from nothing (a warning or a broken link ends it), or one that DPT_NB_SITE names."
    if built := os.environ.get("DPT_NB_SITE"):
        return Path(built).resolve()
    python = python_with_sphinx()
    if python is None:
        pytest.skip("nothing to build the book with: run make book once, or pip install -e '.[book]'")
    home = tmp_path_factory.mktemp("book")
    words = [python, build.__file__, "--out", home / "site", "--work", home / "work"]
    built = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return home / "site"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        "Nothing is printed for each file."


@pytest.fixture(scope="module")
def address(site):
    "The site, served on this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser, address):
    "A page that may ask for nothing outside this machine; what the browser complains of is in `page.complaints`."
    page = browser.new_page(viewport=dict(width=1400, height=1000), base_url=address, color_scheme="light")
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and page.complaints.append(said.text))
    page.on("request", lambda asked: asked.url.startswith((address, "data:")) or page.complaints.append(asked.url))
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()
    assert not page.complaints


def open_all_folds(page):
    page.add_style_tag(content="* { animation: none !important; transition: none !important; }")  # no fading in
    page.evaluate("document.querySelectorAll('article details').forEach(fold => fold.open = true)")


@pytest.mark.slow
def test_words_are_readable_in_the_light_and_in_the_dark(page, tmp_path_factory):
    screenshots = os.environ.get("DPT_NB_SCREENSHOTS") or tmp_path_factory.mktemp("book_pages")
    for name in LOOKED_AT:
        page.goto(f"/{name}.html")
        for theme in ("light", "dark"):
            page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
            page.wait_for_timeout(500)  # colors change slowly
            page.screenshot(path=f"{screenshots}/{name.replace('/', '_')}-{theme}.png")
            open_all_folds(page)
            assert page.evaluate(FAINT, WORDS) == {}, f"{name}, {theme}"


@pytest.mark.slow
def test_the_theme_switch_makes_the_page_dark(page):
    page.goto("/network/04_reassemble.html")
    for name in ("Dark", "Light"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(".dropdown-menu:visible").get_by_text(name, exact=True).click()
        page.mouse.move(500, 500)
        page.wait_for_timeout(500)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(float, re.findall(r"[\d.]+", ground)[:3])) / 3
        assert page.evaluate("document.documentElement.dataset.theme") == name.lower()
        assert brightness < 60 if name == "Dark" else brightness > 200
    figure = page.locator(".cell_output img").first
    assert figure.get_attribute("alt").startswith("The ")


@pytest.mark.slow
def test_the_search_finds_a_word_and_leads_to_it(page):
    page.goto("/index.html")
    page.keyboard.press("Control+k")
    box = page.locator("input[type=search]:visible").first
    box.fill("reassemble")
    box.press("Enter")
    page.locator("#search-results li").first.wait_for()
    found = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert any(link.startswith("network/04_reassemble.html") for link in found)
    assert any(link.startswith("api/network/reassemble.html") for link in found)
    page.locator("#search-results li a[href^='network/04_reassemble.html']").first.click()
    page.locator("article h1", has_text="Reassemble").wait_for()


@pytest.mark.slow
def test_an_answer_and_its_output_are_seen_only_when_they_are_asked_for(page):
    page.goto("/network/04_reassemble.html")
    fold = page.locator("details", has=page.locator("summary", has_text=re.compile(r"^\s*Answer"))).first
    code, output = fold.locator(".cell_input"), fold.get_by_text("Right: every place gets the class token").last
    assert not code.is_visible() and not output.is_visible()
    assert not page.get_by_text("Not yet:").last.is_visible()  # what the check says before there is an answer
    fold.locator("summary").first.focus()
    page.keyboard.press("Enter")
    output.wait_for()
    assert code.is_visible() and "torch.eye(dim)" in code.inner_text()


@pytest.mark.slow
def test_formulas_are_drawn_without_a_script(page):
    page.goto("/objective/09_losses.html")
    formula = page.locator("math[display=block]", has_text="SILog").first
    box = formula.bounding_box()
    assert formula.locator("msqrt").count() == 1 and box["width"] > 150 and box["height"] > 15
    assert "$" not in "".join(page.locator("article p").all_inner_texts())


@pytest.mark.slow
def test_the_page_does_not_scroll_sideways(page):
    page.set_viewport_size(dict(width=900, height=900))
    for name in LOOKED_AT:
        page.goto(f"/{name}.html")
        open_all_folds(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 900, f"{name} is {wide} pixels wide"


@pytest.mark.slow
def test_lines_of_code_wrap_and_are_copied_whole(page):
    page.set_viewport_size(dict(width=1280, height=900))
    longest = 0
    for path in lessons():
        page.goto(f"/{path.relative_to(REPOSITORY / 'nbs').with_suffix('.html').as_posix()}")
        open_all_folds(page)
        code = page.locator("div.highlight pre:not(div.cell_output *)")
        wide = code.evaluate_all("all => all.filter(each => each.scrollWidth > each.clientWidth).map(e => e.innerText)")
        assert not wide, f"{path.stem}: {wide[0][:200]}"
        longest = max(longest, *(len(line) for text in code.all_inner_texts() for line in text.splitlines()))
    assert longest > 110, "no line was as long as those that scrolled"
    line = "    return show_images([image[0], *(map_colors(level[0]) for level in levels)]"
    page.goto("/network/04_reassemble.html")
    open_all_folds(page)
    cell = page.locator("div.cell_input pre", has_text="def draw_levels").first
    select = "cell => { getSelection().selectAllChildren(cell); return getSelection().toString(); }"
    assert any(each.startswith(line) and each.endswith(")") for each in cell.evaluate(select).splitlines())


@pytest.mark.slow
def test_a_figure_lies_on_a_dimmed_card_in_the_dark_alone(page):
    page.goto("/objective/09_losses.html")
    figure, seen = page.locator(".cell_output img").first, {}
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        page.wait_for_timeout(500)
        seen[theme] = darkest_and_brightest(figure.screenshot())
    assert seen["light"][1] == 255 and seen["dark"][1] < 235, "a white slab on a dark page"
    assert seen["dark"][0] < 40, "its words are as dark as before"
    assert figure.evaluate("image => parseFloat(getComputedStyle(image).borderTopLeftRadius)") > 0


WEIGHTS = "([scene, block, head, token]) => window.tokenExplorer.row(scene, block, head, token)"
SAID = "#token-explorer-said"


@pytest.fixture
def explorer(page):
    "The explorer without a kernel, its first figure drawn."
    page.goto("/token_explorer.html")
    page.wait_for_function("document.querySelector('#token-explorer-said').textContent.startsWith('The patch')")
    return page


def spoken(words):
    "What a sentence of the explorer says: who asks, over how many tokens, what share for patches, how much to whom."
    found = re.search(
        r"about (\d+) of 193 tokens in block (\d), (.*?)\. (\d+) % .* most, ([\d.]+) %, to row (\d+), column (\d+)",
        words,
    )
    spread, block, head, among, most, row, column = found.groups()
    return int(spread), int(block), head, int(among), float(most), (int(row), int(column))


def expected(table, block, head, token):
    "The same from stored weights `(blocks, heads, tokens, tokens)`; head 3: the mean."
    weights = table[block].mean(0)[token] if head == 3 else table[block, head, token]
    spread = np.exp(-(weights[weights > 0] * np.log(weights[weights > 0])).sum())
    place = divmod(int(weights[1:].argmax()), 16)
    name = "the mean of the heads" if head == 3 else f"head {head}"
    return round(spread), block, name, round(100 * weights[1:].sum()), round(100 * weights[1:].max(), 1), place


@pytest.mark.slow
def test_the_explorer_shows_the_stored_attention_by_mouse_and_by_keyboard_alone(explorer):
    tables = [weights(scene["attention"]) for scene in read_explored()["scenes"]]
    for scene, block, head, token in [(0, 0, 0, 1), (1, 3, 2, 192), (0, 2, 1, 0), (1, 1, 3, 77)]:
        table = tables[scene][block]
        wanted = table.mean(0)[token] if head == 3 else table[head, token]
        np.testing.assert_allclose(explorer.evaluate(WEIGHTS, [scene, block, head, token]), wanted, atol=1e-12)
    said = explorer.locator(SAID)
    at = lambda row, column: 1 + 16 * row + column
    assert spoken(said.inner_text()) == expected(tables[0], 0, 0, at(6, 4))
    image = explorer.locator("#token-explorer-image")
    box = image.bounding_box()
    image.click(position=dict(x=box["width"] * 7.5 / 16, y=box["height"] * 4.5 / 12))
    assert "row 4, column 7 " in said.inner_text() and spoken(said.inner_text()) == expected(tables[0], 0, 0, at(4, 7))
    down = explorer.evaluate("scrollY")
    keys = "ArrowDown ArrowDown ArrowLeft Home ArrowLeft ArrowRight ArrowUp"  # the left edge stops
    for key in keys.split():
        explorer.keyboard.press(key)
    assert "row 5, column 1 " in said.inner_text() and explorer.evaluate("scrollY") == down, "the page scrolled"
    drawn = explorer.locator("#token-explorer-map").screenshot()
    explorer.locator("#token-explorer-block").focus()
    explorer.keyboard.press("ArrowRight"), explorer.keyboard.press("Tab")
    for _ in range(3):
        explorer.keyboard.press("ArrowRight")
    assert spoken(said.inner_text()) == expected(tables[0], 1, 3, at(5, 1))
    assert explorer.locator("#token-explorer-map").screenshot() != drawn
    explorer.keyboard.press("Tab"), explorer.keyboard.press("Space")
    assert said.inner_text().startswith("The class token") and spoken(said.inner_text()) == expected(tables[0], 1, 3, 0)
    before = said.inner_text()
    explorer.locator("#token-explorer-scene").select_option("a street")
    explorer.wait_for_function(f"before => document.querySelector('{SAID}').textContent !== before", arg=before)
    assert spoken(said.inner_text()) == expected(tables[1], 1, 3, 0)


@pytest.mark.slow
def test_the_explorer_draws_what_the_lesson_draws(explorer):
    "Pixel for pixel, but for the frame."
    stored = read_explored()
    image = torch.tensor(np.array(Image.open(io.BytesIO(stored["scenes"][0]["pixels"])))).permute(2, 0, 1) / 255
    row = torch.tensor(weights(stored["scenes"][0]["attention"])[0, 0, 0, 1:]).reshape(12, 16)
    explorer.locator("#token-explorer-class").click()
    explorer.wait_for_function(f"document.querySelector('{SAID}').textContent.startsWith('The class token')")
    address = explorer.evaluate("document.querySelector('#token-explorer-map').toDataURL()")
    drawn = np.array(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB"))[::2, ::2]
    wanted = 255 * attention_overlay(image, row).permute(1, 2, 0).numpy()
    assert np.abs(drawn - wanted).max() < 2


@pytest.mark.slow
def test_the_explorer_works_from_a_file(browser, site):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((site / "token_explorer.html").as_uri())
    page.wait_for_function(f"document.querySelector('{SAID}').textContent.startsWith('The patch')")
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scene", range(2))
def test_what_the_explorer_has_stored_is_what_the_network_computes(scene):
    stored, (kind, number) = read_explored(), list(SCENES.values())[scene]
    image = scene_image(kind, number)
    pixels = np.array(Image.open(io.BytesIO(stored["scenes"][scene]["pixels"])))
    assert np.abs(pixels - 255 * image.permute(1, 2, 0).numpy()).max() < 1.01
    table, maps = scene_attention(create_model(MODEL, pretrained=True).eval(), image)
    assert (tuple(stored["grid"]), stored["prefix"], maps.class_token) == (maps.grid, maps.prefix, True)
    away = np.abs(weights(stored["scenes"][scene]["attention"]) - table.double().numpy()) / table.amax(-1, True).numpy()
    assert away.max() < 0.005, "the page promises half a percent of the row's largest"


def test_a_weight_in_a_byte_is_within_half_a_step_of_its_root():
    table = torch.softmax(4 * torch.randn(50, 193, generator=torch.Generator().manual_seed(0)), -1)
    largest = table.amax(-1, keepdim=True)
    stored = quantized(table)
    assert stored.dtype == np.uint8 and (stored.max(-1) == 255).all()
    assert (((stored / 255.0) - (table / largest).sqrt().numpy()) ** 2).max() <= (0.5 / 255) ** 2 * 1.001
    np.testing.assert_allclose(weights(stored).sum(-1), 1, atol=1e-12)
