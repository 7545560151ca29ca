"""The workbench in a real browser: JupyterLab opens the notebook, every page is looked at, a patch is clicked, a slider
moves, points in space are turned, a photograph is sent, a training run is started and interrupted; and a lesson's quiz,
by keyboard alone."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import FAINT, REPOSITORY, SHORT, darkest_and_brightest, stop, wait_until
from ipywidgets import FloatSlider, IntSlider
from PIL import Image

from dpt_nb.workbench.course import read_lesson
from dpt_nb.workbench.loss_lab import LossLab
from dpt_nb.workbench.scene_maker import SceneMaker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FIRST_TABS = ("Token", "Heads", "Maps", "Readouts", "Places", "Merging", "Fusion")
TABS = (*FIRST_TABS, "Points", "Scenes", "Losses", "Compare", "Training")
SLIDERS = (FloatSlider, IntSlider)
COUNT_FIGURES = """figure => {
    window.figures = 0;
    new MutationObserver(() => window.figures++).observe(figure, {attributes: true, attributeFilter: ["src"]});
}"""
IDLE = "() => [...document.querySelectorAll('.dpt-nb-busy')].every(each => !each.offsetParent)"
PIXELS = """image => {
    const canvas = Object.assign(document.createElement("canvas"),
        {width: image.naturalWidth, height: image.naturalHeight});
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""
PATIENCE = 300_000  # milliseconds: a busy machine reads PyTorch slowly


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def workbench(server, browser):
    "The workbench's notebook, run, in a page of JupyterLab; what the browser complained of is in `page.complaints`."
    folder, address, token = server
    shutil.copy(REPOSITORY / "nbs" / "workbench" / "workbench.ipynb", folder)
    page = browser.new_page(viewport=dict(width=1500, height=1300))
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.set_default_timeout(PATIENCE)
    page.goto(f"http://{address}/lab/tree/workbench.ipynb?token={token}")
    run_all(page)
    page.get_by_role("tab", name=TABS[0]).wait_for()
    yield page
    page.close()


def run_all(page):
    "Run every cell of the notebook that is open, once its kernel is there: asked earlier, JupyterLab would ask back."
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("| Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def open_tab(page, name):
    "Open a page of the workbench; its figure is there. Where its sentence stands."
    page.get_by_role("tab", name=name, exact=True).click()
    page.locator("img.widget-image:visible").first.wait_for()
    return page.locator(".jp-OutputArea [role=status]:visible, .jp-OutputArea [role=alert]:visible").first


def choose_example(page, name, example):
    "A rendered scene on a page, whatever it showed, a photograph for example. Where its sentence stands."
    said = open_tab(page, name)
    kind, number = example.split()
    page.get_by_role("button", name=example, exact=True).locator("visible=true").click()
    chosen = page.get_by_role("slider", name="number", exact=True).locator("visible=true").first
    wait_until(lambda: chosen.get_attribute("aria-valuetext") == number, seconds=60)
    page.wait_for_function(IDLE)
    return said


def wait_for_change(page, said, before):
    "The sentence below the figure, as soon as it is another."
    deadline = time.monotonic() + PATIENCE / 1000
    busy = said.locator("xpath=..").locator(".dpt-nb-busy")  # stands beside the sentence while the page computes
    while (now := said.inner_text()) == before or busy.count():
        assert time.monotonic() < deadline, f"the page still says: {now}"
        page.wait_for_timeout(50)
    return now


def wait_for_other_figure(page, figure, drawn):
    "The words may be shown before the browser has unpacked the figure that they belong to."
    deadline = time.monotonic() + PATIENCE / 1000
    while figure.screenshot() == drawn:
        assert time.monotonic() < deadline, "the figure is still the one before"
        page.wait_for_timeout(50)


def test_every_page_opens_without_a_complaint(workbench, tmp_path_factory):
    screenshots = os.environ.get("DPT_NB_SCREENSHOTS") or tmp_path_factory.mktemp("pages")
    for number, name in enumerate(TABS):
        said = open_tab(workbench, name)
        assert said.get_attribute("role") == "status", f"{name}: {said.inner_text()}"
        assert workbench.locator(".widget-html:visible", has_text="Look for:").count() == 1
        workbench.wait_for_timeout(500)
        workbench.screenshot(path=f"{screenshots}/{number}-{name.replace(' ', '_')}.png")
    assert not workbench.complaints


def test_a_clicked_patch_changes_the_figure(workbench):
    said, figure = open_tab(workbench, TABS[0]), workbench.locator("img.widget-image:visible").first
    before, drawn, box = said.inner_text(), figure.screenshot(), figure.bounding_box()
    figure.click(position=dict(x=box["width"] * 0.06, y=box["height"] * 0.3))
    first = wait_for_change(workbench, said, before)
    wait_for_other_figure(workbench, figure, drawn)
    figure.click(position=dict(x=box["width"] * 0.12, y=box["height"] * 0.4))
    wait_for_change(workbench, said, first)


def test_a_slider_moves_and_the_number_changes_by_keyboard_alone(workbench):
    said = open_tab(workbench, "Scenes")
    figure = workbench.locator("img.widget-image:visible").first
    before, drawn = said.inner_text(), figure.screenshot()
    slider = workbench.locator(".widget-slider:visible", has_text="field of view")
    shown = slider.locator(".widget-readout").inner_text()
    slider.get_by_role("slider").focus()
    for _ in range(5):
        workbench.keyboard.press("ArrowRight")
    now = wait_for_change(workbench, said, before)
    assert slider.locator(".widget-readout").inner_text() != shown
    assert "AbsRel" in now and now.split(",")[0] != before.split(",")[0]
    wait_for_other_figure(workbench, figure, drawn)


@pytest.mark.parametrize(
    "name, control", [("Scenes", "number"), pytest.param("Losses", "room", marks=pytest.mark.slow)]
)
def test_what_is_shown_is_what_python_computes_for_the_values_shown(workbench, name, control):
    said = open_tab(workbench, name)
    before, slider = said.inner_text(), workbench.locator(".widget-slider:visible", has_text=control)
    workbench.locator("img.widget-image:visible").first.evaluate(COUNT_FIGURES)
    slider.get_by_role("slider").focus()
    workbench.keyboard.press("ArrowRight")
    wait_for_change(workbench, said, before)
    workbench.wait_for_timeout(1500)  # what the browser would send back has come
    assert workbench.evaluate("window.figures") == 1, "one press, one drawing"
    sliders = workbench.locator(".widget-slider:visible")
    words = [slider.locator(".widget-label").inner_text() for slider in sliders.all()]
    shown = [float(slider.locator(".widget-readout").inner_text().replace(",", "")) for slider in sliders.all()]
    page = dict(Scenes=SceneMaker, Losses=LossLab)[name]()
    names = {each.description: own for own, each in page.controls.items() if isinstance(each, SLIDERS)}
    page.set_controls(number=int(shown[words.index(control)]))
    page.set_controls(**{names[word]: value for word, value in zip(words, shown) if word != control})
    without_time = lambda words: re.sub(r"<[^>]*>|\(\d+ ms\)", "", words).strip()
    assert without_time(said.inner_text()) == without_time(html.unescape(page.said.value))


def test_tabs_open_by_keyboard(workbench):
    open_tab(workbench, TABS[0])
    workbench.get_by_role("tab", name=TABS[0], exact=True).focus()
    workbench.keyboard.press("ArrowRight"), workbench.keyboard.press("Enter")
    workbench.locator("h3:visible", has_text="All heads at a glance").wait_for()
    workbench.keyboard.press("Tab")  # into the page: its first control
    assert workbench.evaluate("document.activeElement.tagName") == "SELECT"


def test_a_fault_is_a_sentence_and_the_page_goes_on(workbench):
    said = open_tab(workbench, "Training")
    field = workbench.get_by_label("changes", exact=True).locator("visible=true")
    before = said.inner_text()
    field.fill("loop.stepps=3"), field.press("Tab")
    told = wait_for_change(workbench, said, before)
    assert "loop.stepps" in told and workbench.locator(".jp-OutputArea [role=alert]:visible").count() == 1
    field.fill(""), field.press("Tab")
    wait_for_change(workbench, said, told)
    assert workbench.locator(".jp-OutputArea [role=alert]:visible").count() == 0


def test_beside_an_error_the_figure_is_grey_and_the_words_have_the_contrast_of_all_words(workbench):
    said, figure = open_tab(workbench, "Scenes"), workbench.locator("img.widget-image:visible").first
    color = "element => getComputedStyle(element).color"
    before, usual = said.inner_text(), said.evaluate(color)
    workbench.locator(".widget-slider:visible", has_text="camera height").get_by_role("slider").focus()
    workbench.keyboard.press("End")
    told = wait_for_change(workbench, said, before)
    wrong = workbench.locator(".jp-OutputArea [role=alert]:visible")
    assert "choose a height in between" in told and wrong.evaluate(color) == usual
    assert float(figure.evaluate("image => getComputedStyle(image).opacity")) < 0.5
    workbench.get_by_role("button", name="as generated").click()
    wait_for_change(workbench, said, told)
    assert float(figure.evaluate("image => getComputedStyle(image).opacity")) == 1


def test_a_key_that_jupyterlab_knows_does_nothing_while_a_slider_has_the_focus(workbench):
    open_tab(workbench, TABS[0])
    slider = workbench.get_by_role("slider", name="row", exact=True).locator("visible=true")
    slider.focus()
    cells = workbench.locator(".jp-Notebook .jp-Cell").count()
    for key in ("x", "a", "b"):  # cut, a cell above, a cell below
        workbench.keyboard.press(key)
    workbench.wait_for_timeout(500)
    assert workbench.locator(".jp-Notebook .jp-Cell").count() == cells
    assert workbench.locator("img.dpt-nb-figure:visible").get_attribute("alt").startswith("What a token sees: image")


def test_the_figure_is_read_by_pointer_and_by_arrow_keys_and_enter_clicks(workbench):
    said = open_tab(workbench, "Scenes")
    figure, tip = workbench.locator("img.dpt-nb-figure:visible"), workbench.locator(".dpt-nb-tip:visible")
    box = figure.bounding_box()
    figure.hover(position=dict(x=box["width"] * 0.15, y=box["height"] * 0.3))
    tip.wait_for()
    assert re.search(r"^[a-z ]+, \d+\.\d\d m away$", tip.inner_text()), tip.inner_text()
    said = open_tab(workbench, TABS[0])
    before = said.inner_text()
    workbench.locator("img.dpt-nb-figure:visible").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        workbench.keyboard.press(key)
    tip.wait_for()
    assert "row" in tip.inner_text() and workbench.locator(".dpt-nb-cross:visible").count() == 1
    workbench.keyboard.press("Enter")
    wait_for_change(workbench, said, before)


@pytest.mark.slow
def test_the_line_between_two_predictions_moves_by_keyboard(workbench):
    open_tab(workbench, "Compare")
    line = workbench.get_by_role("slider", name="between the first and the second")
    cut = "() => document.querySelector('.dpt-nb-over img + img').style.clipPath"
    line.focus()
    before = workbench.evaluate(cut)
    workbench.keyboard.press("Home"), workbench.keyboard.press("ArrowRight")
    assert (before, workbench.evaluate(cut)) == ("inset(0px 50% 0px 0px)", "inset(0px 99% 0px 0px)")
    sizes = "[...document.querySelectorAll('.dpt-nb-over img')].map(image => [image.naturalWidth, image.naturalHeight])"
    assert workbench.evaluate(sizes) == [[128, 96], [128, 96]]


@pytest.mark.slow
def test_a_table_wider_than_the_window_can_be_scrolled_to_its_last_column(server, browser):
    folder, address, token = server
    shutil.copy(REPOSITORY / "nbs" / "network" / "zoo.ipynb", folder)
    page = browser.new_page(viewport=dict(width=900, height=900))
    page.set_default_timeout(PATIENCE)
    page.goto(f"http://{address}/lab/workspaces/tables/tree/zoo.ipynb?token={token}")
    table = page.locator(".jp-OutputArea table").first
    table.scroll_into_view_if_needed()
    last = table.locator("th").last
    around = page.locator(".jp-OutputArea-output", has=page.locator("table")).first.bounding_box()
    end = lambda box: box["x"] + box["width"]
    assert end(last.bounding_box()) > end(around), "no table was wider than its room"
    last.scroll_into_view_if_needed()
    assert end(last.bounding_box()) <= end(around) + 1
    page.close()


@pytest.mark.slow
def test_an_upright_photograph_is_compared_with_its_titles_and_captions_beside_it(workbench, tmp_path):
    said = open_tab(workbench, "Compare")
    before = said.inner_text()
    Image.linear_gradient("L").resize((120, 240)).convert("RGB").save(tmp_path / "upright.png")
    with workbench.expect_file_chooser() as chosen:
        workbench.locator(".jupyter-widgets.widget-upload:visible").click()
    chosen.value.set_files(tmp_path / "upright.png")
    wait_for_change(workbench, said, before)
    workbench.wait_for_function(IDLE)
    figure = workbench.locator("img.dpt-nb-figure:visible").first
    data = figure.evaluate(PIXELS)
    picture = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("L")
    width, height = picture.size
    edges = [(0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height)]
    assert all(picture.crop(edge).getextrema()[0] > 250 for edge in edges), "something is cut at the figure's edge"
    captions, images = workbench.locator(".dpt-nb-ends"), workbench.locator(".dpt-nb-over")
    ends = captions.bounding_box()
    assert ends["y"] + ends["height"] <= images.bounding_box()["y"]
    sizes = "all => all.map(each => each.naturalHeight / each.naturalWidth)"
    assert workbench.locator(".dpt-nb-over img").evaluate_all(sizes) == [2, 2]


@pytest.mark.slow
def test_colors_say_what_they_mean_by_a_legend_and_a_unit(workbench):
    open_tab(workbench, "Scenes")
    workbench.wait_for_function(IDLE)
    words = workbench.locator(".dpt-nb-legend:visible").first.inner_text()
    assert "wall" in words and "floor" in words
    choose_example(workbench, TABS[0], "rooms 12")
    figure, tip = workbench.locator("img.dpt-nb-figure:visible"), workbench.locator(".dpt-nb-tip:visible")
    box = figure.bounding_box()
    figure.hover(position=dict(x=box["width"] * 0.5, y=box["height"] * 0.25))
    tip.wait_for()
    assert re.search(r"[\d.]+ % of its attention", tip.inner_text()), tip.inner_text()


@pytest.mark.slow
def test_points_turn_by_arrow_keys_and_come_back(workbench):
    open_tab(workbench, "Points")
    canvas = workbench.locator("canvas:visible")
    pixels = "canvas => canvas.toDataURL()"
    canvas.focus()
    before = canvas.evaluate(pixels)
    workbench.keyboard.press("ArrowLeft"), workbench.keyboard.press("ArrowUp")
    turned = canvas.evaluate(pixels)
    assert workbench.get_by_text("turned 5° to the left and 5° up").count() == 1 and turned != before
    workbench.keyboard.press("0")
    assert canvas.evaluate(pixels) == before
    with workbench.expect_download() as saved:
        workbench.get_by_role("button", name="save points").click()
    with open(saved.value.path(), "rb") as file:
        assert file.read(4) == b"ply\n"


DROP = """([page, name, numbers]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(numbers)], name));
    page.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.mark.slow
def test_a_photograph_is_sent_or_dropped_and_every_page_has_it(workbench, photographs):
    said = open_tab(workbench, TABS[0])
    before = said.inner_text()
    with workbench.expect_file_chooser() as chosen:
        workbench.locator(".jupyter-widgets.widget-upload:visible").click()
    chosen.value.set_files(photographs / "color.jpg")
    sent = wait_for_change(workbench, said, before)
    assert sent.startswith("The patch in row")  # nobody knows what is in it
    open_tab(workbench, "Maps")
    words = workbench.get_by_text("image", exact=True)
    kind = workbench.locator(".widget-dropdown:visible").filter(has=words).locator("select")
    assert kind.input_value() == "yours"
    said = open_tab(workbench, "Maps")
    before, page = said.inner_text(), workbench.locator(".dpt-nb-page:visible").element_handle()
    workbench.evaluate(DROP, [page, "turned.jpg", list((photographs / "turned.jpg").read_bytes())])
    now = wait_for_change(workbench, said, before)
    workbench.evaluate(DROP, [page, "notes.txt", [63]])
    assert "notes.txt" in wait_for_change(workbench, said, now)


LAID_OUT = """() => {
    const page = [...document.querySelectorAll(".dpt-nb-page")].find(each => each.offsetParent);
    const seen = [...document.querySelector(".dpt-nb-tabs").querySelectorAll("*")].filter(each => each.offsetParent);
    const wide = each => each.scrollWidth > each.clientWidth + 1;
    const css = getComputedStyle, figure = page.querySelector("img.dpt-nb-figure");
    const clips = each => each.matches(".widget-label, .lm-TabBar-tabLabel") && css(each).overflow != "visible";
    return {
        scrolling: seen.filter(each => /auto|scroll/.test(css(each).overflowX) && wide(each)).map(at => at.className),
        clipped: seen.filter(each => clips(each) && wide(each)).map(each => each.textContent),
        unnamed: seen.filter(each => each.matches("[role=slider]:not([aria-label])")).length,
        undescribed: seen.filter(each => each.matches("img") && !each.alt).length,
        scale: figure.getBoundingClientRect().width / figure.naturalWidth,
    };
}"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 900])
def test_every_page_is_legible_where_there_is_less_room(workbench, width):
    workbench.set_viewport_size(dict(width=width, height=1000))
    try:
        for name in TABS:
            open_tab(workbench, name)
            workbench.wait_for_function(IDLE)
            workbench.wait_for_function(f"({LAID_OUT})().scale > 0.7", timeout=60_000)  # else its letters are small
            workbench.wait_for_function(IDLE)
            found = workbench.evaluate(LAID_OUT)
            found.pop("scale")
            assert not any(found.values()), f"{name}: {found}"
    finally:
        workbench.set_viewport_size(dict(width=1500, height=1300))


@pytest.mark.slow
def test_a_tab_that_opens_leaves_the_notebook_where_it_is(workbench):
    open_tab(workbench, TABS[0])
    top = "() => document.querySelector('.jp-WindowedPanel-outer').scrollTop"
    workbench.locator("h3:visible").first.scroll_into_view_if_needed()
    before = workbench.evaluate(top)
    for name in (TABS[3], TABS[0]):
        open_tab(workbench, name)
        assert workbench.evaluate(top) == before


@pytest.mark.slow
def test_another_network_keeps_the_patch_and_says_nothing_of_the_one_before(workbench):
    said = choose_example(workbench, TABS[0], "rooms 12")
    slider = workbench.get_by_role("slider", name="number", exact=True).locator("visible=true")
    before = said.inner_text()
    slider.focus(), workbench.keyboard.press("ArrowRight")
    wait_for_change(workbench, said, before)
    number = slider.get_attribute("aria-valuetext")
    assert workbench.get_by_text("In the network that comes along, block 0").count() == 1
    field = workbench.get_by_label("network", exact=True).locator("visible=true")
    field.fill("dpt_tiny"), field.press("Tab")
    workbench.get_by_text("dpt_tiny: ").wait_for()
    open_tab(workbench, TABS[0])
    slider.wait_for()
    assert slider.get_attribute("aria-valuetext") == number
    assert workbench.get_by_text("In the network that comes along, block 0").count() == 0
    field.fill(""), field.press("Tab")
    workbench.get_by_text("In the network that comes along, block 0").wait_for()


@pytest.mark.slow
def test_an_example_is_chosen_by_keyboard(workbench):
    said = open_tab(workbench, TABS[0])
    before, example = said.inner_text(), workbench.get_by_role("button", name="streets 21").locator("visible=true")
    assert (
        workbench.locator(".dpt-nb-examples:visible img").evaluate_all("all => all.map(each => each.naturalWidth)")
        == [64] * 8
    )
    example.focus(), workbench.keyboard.press("Enter")
    wait_for_change(workbench, said, before)
    slider = workbench.get_by_role("slider", name="number", exact=True).locator("visible=true")
    kind = workbench.locator(".widget-dropdown:visible").filter(has_text="image").locator("select").first
    assert (kind.input_value(), slider.get_attribute("aria-valuetext")) == ("streets", "21")


@pytest.mark.slow
def test_the_figure_is_enlarged_and_read_as_before(workbench):
    open_tab(workbench, TABS[0])
    figure, tip = workbench.locator("img.dpt-nb-figure:visible"), workbench.locator(".dpt-nb-tip:visible")
    width = lambda: figure.bounding_box()["width"]

    def read():
        box = figure.bounding_box()
        workbench.mouse.move(0, 0)
        figure.hover(position=dict(x=box["width"] * 0.2, y=box["height"] * 0.25))
        tip.wait_for()
        return tip.inner_text()

    before, words = width(), read()
    figure.focus(), workbench.keyboard.press("+")
    assert width() > 1.4 * before and read() == words
    workbench.get_by_role("button", name="larger").locator("visible=true").click()
    workbench.wait_for_function(
        "before => document.activeElement && [...document.images].some(each => "
        "each.offsetParent && each.width > 2 * before)",
        arg=before,
    )
    for _ in range(2):
        workbench.get_by_role("button", name="smaller").locator("visible=true").click()
    workbench.wait_for_function(
        "before => [...document.images].every(each => each.width <= before + 1 || !each.offsetParent)", arg=before
    )
    assert abs(width() - before) < 1


@pytest.mark.slow
def test_a_large_network_is_stopped_by_a_button_and_by_a_newer_question(workbench):
    said = open_tab(workbench, TABS[0])
    field = workbench.get_by_label("network", exact=True).locator("visible=true")
    stop_button = workbench.get_by_role("button", name="stop computing")
    field.fill("dpt_large"), field.press("Tab")
    stop_button.wait_for()
    assert workbench.locator("img.dpt-nb-figure:visible").count() == 1, "the page is there before its answer"
    stop_button.click()
    workbench.get_by_text("Stopped: what is shown belongs to other settings").wait_for()
    assert stop_button.count() == 0 or not stop_button.is_visible()
    slider = workbench.get_by_role("slider", name="number", exact=True).locator("visible=true")
    slider.focus()
    for _ in range(3):
        workbench.keyboard.press("ArrowRight")
    stop_button.wait_for(), stop_button.wait_for(state="hidden")
    said = workbench.locator(".jp-OutputArea [role=status]:visible").first
    assert "spreads its attention" in said.inner_text() or "patch" in said.inner_text()
    field.fill(""), field.press("Tab")
    workbench.get_by_text("In the network that comes along, block 0").wait_for()


def follow(browser, page, address):
    "Another window, at an address that the first one gave; the notebook is run there."
    other = browser.new_page(viewport=dict(width=1500, height=1300))
    other.set_default_timeout(PATIENCE)
    other.goto(address)
    run_all(other)
    return other


@pytest.mark.slow
def test_a_link_leads_back_to_what_was_seen(workbench, browser, server):
    said = choose_example(workbench, "Maps", "rooms 12")
    before = said.inner_text()
    slider = workbench.get_by_role("slider", name="number", exact=True).locator("visible=true")
    slider.focus(), workbench.keyboard.press("ArrowRight")
    told = wait_for_change(workbench, said, before)
    workbench.get_by_role("button", name="copy a link").click()
    workbench.wait_for_function("location.hash.startsWith('#dpt_nb=')")
    path, state = workbench.url.split("#")
    assert server[2] not in workbench.url, "the token is no part of what is handed on"
    other = follow(browser, workbench, f"{path}?token={server[2]}#{state}")
    try:
        other.get_by_role("tab", name="Maps", exact=True, selected=True).wait_for()
        without_time = lambda words: re.sub(r"\(\d+ ms\)", "", words)
        there = other.locator(".jp-OutputArea [role=status]:visible", has_text="ms)").first
        there.wait_for()
        assert without_time(there.inner_text()) == without_time(told)
    finally:
        other.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the window is read again", "the kernel is started again"])
def test_afterwards_nothing_is_stuck(workbench, way):
    if way == "the window is read again":  # of a notebook that was saved, as it is every two minutes
        workbench.get_by_role("menuitem", name="File", exact=True).click()
        workbench.get_by_role("menuitem", name=re.compile(r"^Save Notebook\b(?! As)")).click()
        workbench.wait_for_timeout(2000)
        workbench.reload()
    else:
        workbench.get_by_role("menuitem", name="Kernel", exact=True).click()
        workbench.get_by_role("menuitem", name="Restart Kernel and Run All Cells").click()
        workbench.get_by_role("button", name="Confirm Kernel Restart").click()
    workbench.get_by_role("tab", name=TABS[0], exact=True).wait_for()
    for name in ("Scenes", TABS[0]):
        said = open_tab(workbench, name)
        workbench.wait_for_function(IDLE)
        before = said.inner_text()
        slider = workbench.get_by_role("slider", name="number", exact=True).locator("visible=true")
        slider.focus(), workbench.keyboard.press("ArrowRight")
        wait_for_change(workbench, said, before)
        assert workbench.locator(".jp-OutputArea [role=alert]:visible").count() == 0


def train_until_stopped(page, folder):
    "Start a run in `folder`, a Path, from the training page, and stop it once it steps; its checkpoint is there."
    said = open_tab(page, "Training")
    for label, text in (
        ("changes", " ".join([*SHORT, "loop.steps=400", "keep.save_steps=400", "keep.validate_every=5"])),
        ("folder", folder.name),
    ):
        field = page.get_by_label(label, exact=True).locator("visible=true")
        field.fill(text), field.press("Tab")
    page.get_by_role("button", name="start", exact=True).click()
    deadline = time.monotonic() + PATIENCE / 1000
    for button, words in ((None, "Step"), ("stop", "The last checkpoint is of step")):
        if button:
            page.get_by_role("button", name=button, exact=True).click()
        while words not in said.inner_text():
            assert time.monotonic() < deadline, said.inner_text()
            page.wait_for_timeout(100)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["step"] < 400 and (folder / "checkpoints" / f"step-{rows[-1]['step']:08d}.pt").exists()
    assert page.get_by_role("button", name="go on", exact=True).is_enabled()


@pytest.mark.slow
def test_the_training_room_starts_and_is_interrupted(workbench, server):
    train_until_stopped(workbench, server[0] / "room")


@pytest.mark.slow
def test_the_same_notebook_is_a_page_of_its_own(browser, tmp_path):
    pytest.importorskip("voila", reason="voila is not installed: pip install 'dpt_nb[page]'")
    shutil.copy(REPOSITORY / "nbs" / "workbench" / "workbench.ipynb", tmp_path)
    words = [sys.executable, "-m", "dpt_nb.workbench.serve", "workbench.ipynb", "--no-browser"]
    with open(tmp_path / "log", "w") as log:
        serving = subprocess.Popen(
            words,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env=os.environ
            | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", IPYTHONDIR=str(tmp_path / "ipython"))
            | dict(DPT_NB_PROGRESS=str(tmp_path / "progress.json"))
            | {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "RUNTIME")},
        )
    try:
        address = wait_until(
            lambda: re.search(r"(http://\S+token=\w+)\n", (tmp_path / "log").read_text()), serving, tmp_path / "log"
        )[1]
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.get_by_role("tab", name=TABS[0]).wait_for()
        page.locator("img.widget-image:visible").first.wait_for()
        assert page.locator("text=import Workbench").count() == 0, "code is shown"
        assert page.locator("text=Shift+Enter").count() == 0, "there is no cell to run"
        assert page.locator("a[href$='.ipynb']").count() == 0, "a notebook that is not served"
        train_until_stopped(page, tmp_path / "room")
        page.reload()  # another kernel: what was typed is there, the run that lies elsewhere too, and nothing starts
        page.get_by_role("tab", name=TABS[0]).wait_for()
        said = open_tab(page, "Training")
        assert "The last checkpoint is of step" in said.inner_text()
        field = lambda label: page.get_by_label(label, exact=True).locator("visible=true").input_value()
        assert field("folder") == "room" and "loop.steps=400" in field("changes")
        assert page.get_by_role("button", name="go on", exact=True).is_enabled()
        page.close()
    finally:
        stop(serving)


def git(folder, *words):
    "What git says in a folder."
    own = ["-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    return subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def save(page, path):
    "Save the notebook that is open, as JupyterLab does by itself every two minutes; its file is written."
    before = path.stat().st_mtime_ns
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name=re.compile(r"^Save Notebook\b(?! As)")).click()
    wait_until(lambda: path.stat().st_mtime_ns != before and path.read_text().endswith("}\n"), seconds=60)


@pytest.fixture
def reading(server, browser, tmp_path_factory):
    "A lesson in a clone, open at 1280 pixels with its kernel connected: the page and the lesson's file."
    folder, address, token = server
    lesson = folder / "clone" / "04_reassemble.ipynb"
    lesson.parent.mkdir()
    shutil.copy(REPOSITORY / "nbs" / "network" / lesson.name, lesson)
    git(lesson.parent, "init", "--quiet"), git(lesson.parent, "add", lesson.name)
    git(lesson.parent, "commit", "--quiet", "--message", "The course")
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(PATIENCE)
    page.goto(f"http://{address}/lab/workspaces/reading/tree/clone/{lesson.name}?token={token}")
    count = len(json.loads(lesson.read_text(encoding="utf-8"))["cells"])
    wait_until(lambda: page.locator(".jp-Notebook .jp-Cell").count() == count, seconds=60)
    page.get_by_text("| Idle").wait_for()
    yield page, lesson
    page.close()
    shutil.rmtree(lesson.parent)


@pytest.mark.slow
def test_reading_leaves_a_clone_as_it_is_and_what_was_run_is_saved(reading):
    page, lesson = reading
    page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    page.locator(".jp-InputPlaceholder:visible").last.click()  # an answer
    save(page, lesson)
    assert git(lesson.parent, "diff") == ""
    cell = page.locator(".jp-CodeCell:visible").last
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a"), page.keyboard.type("6 * 7"), page.keyboard.press("Shift+Enter")
    page.locator(".jp-OutputArea-executeResult", has_text="42").wait_for()
    save(page, lesson)
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    (ran,) = (cell for cell in cells if cell["source"] == ["6 * 7"])
    assert ran["outputs"][0]["data"] == {"text/plain": ["42"]}
    before = json.loads(git(lesson.parent, "show", f"HEAD:{lesson.name}"))["cells"]
    assert [cell["outputs"] for cell in cells[:20] if "outputs" in cell] == [
        cell["outputs"] for cell in before[:20] if "outputs" in cell
    ]


@pytest.mark.slow
def test_no_cell_of_code_scrolls_sideways(reading):
    page, lesson = reading
    longest = 0
    for cell in page.locator(".jp-Notebook .jp-CodeCell").all():
        cell.scroll_into_view_if_needed()
        if cell.locator(".jp-InputPlaceholder").count():
            cell.locator(".jp-InputPlaceholder").click()
        cell.locator(".cm-scroller").wait_for()
        size = cell.locator(".cm-scroller").evaluate("each => [each.scrollWidth, each.clientWidth]")
        words = cell.locator(".cm-content").inner_text()
        assert size[0] <= size[1], f"{size[0]} pixels in {size[1]}: {words[:80]}"
        longest = max(longest, *map(len, words.splitlines()), 0)
    assert longest > 110, "no line was as long as those that scrolled"


QUIZ = """import os

os.environ["DPT_NB_PROGRESS"] = "progress.json"
from dpt_nb.workbench.quiz import quiz

quiz("network/04_reassemble")"""


@pytest.mark.slow
def test_a_quiz_is_answered_by_keyboard_alone(server, browser, tmp_path_factory):
    folder, address, token = server
    cell = dict(cell_type="code", id="quiz", metadata={}, execution_count=None, outputs=[], source=QUIZ)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
    notebook = dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)
    (folder / "quiz.ipynb").write_text(json.dumps(notebook))
    page = browser.new_page(viewport=dict(width=1300, height=1100))
    page.set_default_timeout(PATIENCE)
    # A workspace of its own: JupyterLab would open the notebooks of the tests before it too, and run one of them
    page.goto(f"http://{address}/lab/workspaces/quiz/tree/quiz.ipynb?token={token}")
    run_all(page)
    buttons = page.locator("button.dpt-nb-choice")
    focus_says = lambda beginning: page.wait_for_function(  # a mark and its sentence come one after the other
        "beginning => document.activeElement.innerText.trim().startsWith(beginning)", arg=beginning
    )
    buttons.first.wait_for()
    buttons.first.focus()  # from here on keys only
    for number, question in enumerate(read_lesson("network/04_reassemble").quiz, 1):
        for place, (choice, _) in enumerate(question.choices):
            focus_says(f"{'abcd'[place]}) {choice}")
            if place == question.right:
                page.keyboard.press("Enter" if number == 1 else "Space")
                page.locator("[role=status]", has_text=f"Right: {question.choices[place][1]}").wait_for()
                focus_says("✓")
            page.keyboard.press("Tab")
    page.keyboard.press("Space")
    kept = lambda: json.loads((folder / "progress.json").read_text())["lessons"]["network/04_reassemble"]
    wait_until(lambda: kept().get("read"), seconds=60)
    assert kept()["quiz"] == {str(number): dict(tries=1, solved=True) for number in (1, 2, 3)}
    screenshots = os.environ.get("DPT_NB_SCREENSHOTS") or tmp_path_factory.mktemp("quiz")
    page.screenshot(path=f"{screenshots}/quiz.png")
    page.close()


DARK = """import os

os.environ["DPT_NB_PROGRESS"] = "progress.json"
from dpt_nb.workbench.quiz import quiz
from dpt_nb.workbench.tokens import TokenExplorer

display(TokenExplorer(), quiz("network/04_reassemble"))"""
THEMES = "config/lab/user-settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"


def stored_figure(notebook):
    "The first output of a lesson that is a figure."
    cells = json.loads((REPOSITORY / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return next(output for output in outputs if "image/png" in output.get("data", ()))


@pytest.mark.slow
def test_figures_and_words_are_readable_in_jupyterlabs_dark_theme(server, browser, tmp_path_factory):
    folder, address, token = server
    dark = folder / THEMES
    dark.parent.mkdir(parents=True, exist_ok=True)
    dark.write_text(json.dumps(dict(theme="JupyterLab Dark")))
    cell = lambda source, *outputs: dict(
        cell_type="code", id=f"a{len(source)}", metadata={}, execution_count=None, outputs=outputs, source=source
    )
    cells = [cell("", stored_figure("network/beit.ipynb")), cell(DARK)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
    (folder / "dark.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    screenshots = os.environ.get("DPT_NB_SCREENSHOTS") or tmp_path_factory.mktemp("dark")
    page = browser.new_page(viewport=dict(width=1300, height=1900))
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(f"http://{address}/doc/tree/dark.ipynb?token={token}")
        page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        stored = page.locator(".jp-RenderedImage img").first
        stored.wait_for()
        darkest, brightest = darkest_and_brightest(stored.screenshot())
        assert darkest < 40 and brightest < 235, "a white slab on a dark page"
        page.screenshot(path=f"{screenshots}/dark-stored.png")
        run_all(page)
        page.locator("button.dpt-nb-choice").first.wait_for()
        figure = page.locator("img.widget-image:visible").first
        figure.wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{screenshots}/dark-live.png")
        darkest, brightest = darkest_and_brightest(figure.screenshot())
        assert darkest < 40 and brightest < 235
        assert page.evaluate(FAINT, ".jp-OutputArea *") == {}
    finally:
        dark.unlink()
        page.close()


TRACKS = """() => {
    const devices = navigator.mediaDevices, ask = devices.getUserMedia.bind(devices);
    window.tracks = [];
    devices.getUserMedia = async (wish) => (await ask(wish).then(got => (window.tracks.push(...got.getTracks()), got)));
}"""


@pytest.mark.slow
def test_a_photograph_is_taken_with_the_camera_and_the_camera_is_off_before_and_after(workbench, browser, server):
    button = lambda page, name: page.get_by_role("button", name=name, exact=True).locator("visible=true")
    open_tab(workbench, TABS[0])
    button(workbench, "take a photograph").focus(), workbench.keyboard.press("Enter")
    workbench.get_by_text(re.compile("No camera was found|may not use the camera")).locator("visible=true").wait_for()
    pretended = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    another = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox", *pretended])
    try:
        page = follow(another, workbench, f"http://{server[1]}/lab/tree/workbench.ipynb?token={server[2]}")
        page.get_by_role("tab", name=TABS[0]).wait_for()
        page.evaluate(TRACKS)
        states = lambda: page.evaluate("window.tracks.map(track => track.readyState)")
        said, press = open_tab(page, TABS[0]), page.keyboard.press
        before, seen = said.inner_text(), page.locator(".dpt-nb-camera video:visible")
        assert states() == []
        button(page, "take a photograph").focus(), press("Enter")
        seen.wait_for()
        assert states() == ["live"]
        press("Escape"), seen.wait_for(state="hidden")
        assert states() == ["ended"] and said.inner_text() == before
        press("Enter"), seen.wait_for()  # the button has the focus again
        page.wait_for_function("document.querySelector('.dpt-nb-camera video:not([hidden])').videoWidth")
        press("Enter")
        assert wait_for_change(page, said, before).startswith("The patch in row")
        assert states() == ["ended"] * 2 and seen.count() == 0
        kind = page.locator(".widget-dropdown:visible").filter(has_text="image").locator("select").first
        assert kind.input_value() == "yours"
        button(page, "take a photograph").click(), seen.wait_for()
        page.get_by_role("tab", name="Scenes", exact=True).click()
        page.wait_for_function("window.tracks.every(track => track.readyState == 'ended')")
    finally:
        another.close()


SLABS = """() => [...document.querySelectorAll(".dpt-nb-tabs *:not(img)")].filter(each => {
    const box = each.getBoundingClientRect(), [red, green, blue, alpha = 1] =
        getComputedStyle(each).backgroundColor.match(/[\\d.]+/g).map(Number);
    return each.checkVisibility() && alpha > 0.5 && red + green + blue > 450 && box.width * box.height > 2000;
}).map(each => `${each.tagName} .${each.className}`)"""


@pytest.fixture(scope="module")
def dark(server, browser):
    "The workbench in JupyterLab's dark theme, in a page of its own."
    folder, address, token = server
    theme = folder / THEMES
    theme.parent.mkdir(parents=True, exist_ok=True)
    theme.write_text(json.dumps(dict(theme="JupyterLab Dark")))
    shutil.copy(REPOSITORY / "nbs" / "workbench" / "workbench.ipynb", folder / "night.ipynb")
    page = browser.new_page(viewport=dict(width=1500, height=1300))
    page.set_default_timeout(PATIENCE)
    page.goto(f"http://{address}/lab/workspaces/night/tree/night.ipynb?token={token}")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    theme.unlink()
    run_all(page)
    page.get_by_role("tab", name=TABS[0]).wait_for()
    yield page
    page.close()


def looks_dark(page, name):
    "Words can be read, figures are dimmed, and no part of a page is a slab."
    page.wait_for_function(IDLE)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # colors change slowly
    assert page.evaluate(FAINT, ".dpt-nb-tabs *") == {}, name
    assert page.evaluate(SLABS) == [], name
    for figure in page.locator("img.widget-image:visible").all():
        darkest, brightest = darkest_and_brightest(figure.screenshot())
        assert darkest < 40 and brightest < 235, f"{name}: a white slab on a dark page"


@pytest.mark.slow
@pytest.mark.parametrize("name", TABS)
def test_every_page_is_readable_in_the_dark(dark, name):
    open_tab(dark, name)
    looks_dark(dark, name)


@pytest.mark.slow
def test_a_run_that_has_ended_is_shown_in_the_dark_and_does_not_go_on(dark, demo):
    open_tab(dark, "Training")
    for label, text in (("folder", str(demo / "runs" / "demo")), ("changes", " ".join(SHORT))):
        field = dark.get_by_label(label, exact=True).locator("visible=true")
        field.fill(text), field.press("Tab")
    dark.get_by_text("Step 6 of 6").locator("visible=true").wait_for()
    enabled = {name: dark.get_by_role("button", name=name, exact=True).is_enabled() for name in ("go on", "stop")}
    assert enabled == {"go on": False, "stop": False}
    bar = dark.locator(".widget-hprogress:visible .progress-bar")
    assert bar.bounding_box()["width"] > 60, "six steps of six"
    assert dark.locator("img.widget-image:visible").count() == 2, "the curves, and what the run drew last"
    looks_dark(dark, "Training")


@pytest.mark.slow
def test_around_the_points_the_ground_is_the_themes(dark):
    open_tab(dark, "Points")
    canvas = dark.locator("canvas:visible")
    canvas.focus()
    for _ in range(20):
        dark.keyboard.press("-")
    picture = Image.open(io.BytesIO(canvas.screenshot())).convert("L")
    assert max(picture.getpixel((20, y)) for y in range(20, picture.height - 20)) < 100
