"""The course as a static site: `make book` builds `_docs/` from the notebooks as they are stored. Nothing is executed,
nothing is fetched.

    python nbs/book/build.py [--out FOLDER]
    python nbs/book/build.py --requirements    what has to be installed, one a line
"""

import argparse
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from links import broken_links  # noqa: E402
from pages import in_order, module_of, read, write_pages  # noqa: E402
from reference import write_reference  # noqa: E402

ROOT = HERE.parents[1]


def settings() -> dict:
    "What settings.ini says of the project."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def modules(nbs: Path) -> dict[str, str]:
    "Which module each notebook exports, in the front door's order."
    names = in_order(read(nbs / "index.ipynb"))
    found = {name: module_of(read(nbs / f"{name}.ipynb")) for name in names}
    return {module: f"{name}.ipynb" for name, module in found.items() if module}


def prepare(pages: Path) -> None:
    "All pages, into a folder for Sphinx; what an earlier build left there and is gone now, is removed."
    known = settings()
    library, address = known["lib_name"], f"{known['git_url']}/blob/{known['branch']}"
    listed, reference = write_reference(ROOT, pages, library, modules(ROOT / "nbs"))
    written = {*reference, *write_pages(ROOT, pages, address, library, listed)}
    for path in pages.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()


def build(work: Path) -> int:
    "The site from its pages, beside them: how Sphinx ended. A warning is an error."
    sphinx = [sys.executable, "-m", "sphinx", "-b", "html", "-c", HERE, "-d", work / "doctrees", "-j", "auto", "-q"]
    return subprocess.run([*map(str, sphinx), "-W", "--keep-going", str(work / "pages"), str(work / "site")]).returncode


def main() -> int:
    options = argparse.ArgumentParser(description="Build the course as a static site.")
    options.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site")
    options.add_argument("--work", type=Path, default=ROOT / "_proc", help="folder of what it is built from")
    options.add_argument("--fresh", action="store_true", help="build every page anew")
    options.add_argument("--requirements", action="store_true", help="say what has to be installed, and stop")
    asked = options.parse_args()
    if asked.requirements:
        print(*settings()["book_requirements"].split(), sep="\n")
        return 0
    start = time.monotonic()
    if asked.fresh:
        shutil.rmtree(asked.work, ignore_errors=True)
    prepare(asked.work / "pages")
    if code := build(asked.work):
        return code
    if wrong := broken_links(asked.work / "site"):
        print(*wrong, f"{len(wrong)} broken links", sep="\n")
        return 1
    shutil.rmtree(asked.out, ignore_errors=True)
    shutil.copytree(asked.work / "site", asked.out, ignore=shutil.ignore_patterns(".buildinfo"))
    size = sum(path.stat().st_size for path in asked.out.rglob("*") if path.is_file())
    count = sum(1 for _ in asked.out.rglob("*.html"))
    print(f"{asked.out / 'index.html'}: {count} pages, {size / 1e6:.0f} MB, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
