"Whether every link of a built site leads to a file, and to a place in it; and whether a page needs the network."

import re
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

TAG = re.compile(r"<[a-zA-Z][^>]*>")
ATTRIBUTE = re.compile(r'\s(href|src|id)="([^"]*)"')
ELSEWHERE = re.compile(r"(?!file:)[a-z][a-z+.-]+:|//", re.IGNORECASE)  # https:, mailto:, data:


def attributes(page: Path) -> tuple[set[str], list[tuple[str, str, str]]]:
    "The places of a page, and what it points to: tag, attribute, address."
    places, pointed = set(), []
    for tag in TAG.findall(page.read_text(encoding="utf-8")):
        for name, value in ATTRIBUTE.findall(tag):
            if name == "id":
                places.add(unescape(value))
            else:
                pointed.append((tag[1:].split()[0].rstrip(">"), name, unescape(value)))
    return places, pointed


def fetches(tag: str, address: str) -> bool:
    "Whether a browser asks for an address by itself: `<a>` and `<link rel=canonical>` only name one."
    if tag == "link":
        return address.endswith((".css", ".js", ".woff2", ".ico", ".png", ".svg"))
    return tag in ("script", "img", "iframe", "source", "video") and not address.startswith("data:")


def broken_links(
    site: Path,  # folder of the built site
) -> list[str]:  # a sentence each
    "Links that lead nowhere, and scripts, styles and pictures that would be fetched from the network."
    site = site.resolve()
    pages = [page for page in sorted(site.rglob("*.html")) if "_static" not in page.parts]  # templates are there
    read = {page: attributes(page) for page in pages}
    wrong = []
    for page, (_, pointed) in read.items():
        own = page.relative_to(site)
        for tag, name, address in pointed:
            if ELSEWHERE.match(address):
                if fetches(tag, address):
                    wrong.append(f"{own}: <{tag} {name}> needs the network: {address}")
                continue
            place, _, anchor = address.partition("#")
            target = (page.parent / unquote(place.split("?")[0])).resolve() if place else page
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                wrong.append(f"{own}: nothing is at {address}")
            elif anchor and target in read and unquote(anchor) not in read[target][0]:
                wrong.append(f"{own}: no such place: {address}")
    return wrong


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    print(*found[:50], f"{len(found)} broken links", sep="\n")
    sys.exit(bool(found))
