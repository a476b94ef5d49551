"""Sphinx extension: the index of subjects.

A chapter marks the place where a concept is introduced by {index}`halo exchange`.  The directive ``{subject-index}`` makes
of all these places, and of the terms of the glossary, an alphabetical list of concepts with the titles of the chapters.
The names of the package, of which Sphinx's general index has thousands, are left out.

The forms that Sphinx knows may be used: ``{index}`exchange <halo; exchange>``` is an entry below another one, ``pair: a; b``
are two of them, ``see: a; b`` points to another entry, and an exclamation mark before an entry makes it the main one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from tools.sphinx_tangle import book


class Place(NamedTuple):
    """A place in the book where a subject is treated."""

    page: str
    anchor: str
    main: bool


@dataclass
class Subject:
    """An entry of the index."""

    words: str
    places: list[Place] = field(default_factory=list)
    see: set[str] = field(default_factory=set)
    below: dict[str, Subject] = field(default_factory=dict)

    def under(self, words: str) -> Subject:
        return self.below.setdefault(key(words), Subject(words))


def key(words: str) -> str:
    """What entries are sorted by, and are the same by: no case, no accents, no signs before the first letter."""
    plain = unicodedata.normalize("NFKD", words.casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    start = next((number for number, letter in enumerate(plain) if letter.isalnum()), 0)
    return plain[start:]


def subjects(env: BuildEnvironment) -> Subject:
    """All entries of the book, below one without words."""
    top = Subject("")
    entries = env.get_domain("index").entries
    order = {name.removesuffix(".md"): number for number, name in enumerate(book().order)}
    for page in sorted(entries, key=lambda page: (order.get(page, len(order)), page)):
        for kind, value, anchor, main, _ in entries[page]:
            if anchor.startswith(
                ("index-", "term-")
            ):  # written by an author, and not by the reference of the package
                for path, see in paths(kind, value):
                    subject = top
                    for words in path:
                        subject = subject.under(words)
                    if see:
                        subject.see.add(see)
                    else:
                        subject.places.append(Place(page, anchor, bool(main)))
    return top


def paths(kind: str, value: str) -> Iterator[tuple[list[str], str]]:
    """The entries, from the outermost inwards, that an entry of Sphinx means; and to what they refer, if they do."""
    parts = [part.strip() for part in value.split(";")]
    match kind, parts:
        case "pair", [one, other]:
            yield [one, other], ""
            yield [other, one], ""
        case "triple", [one, two, three]:
            yield [one, f"{two} {three}"], ""
            yield [two, f"{three}, {one}"], ""
            yield [three, f"{one} {two}"], ""
        case (("see" | "seealso"), [one, other]):
            yield [one], other
        case _:
            yield parts, ""


class subject_index(nodes.General, nodes.Element):
    """Where the index will stand, once all pages are known."""


class SubjectIndex(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return [subject_index()]


class Page:
    """Makes the nodes of the index, for one page of the output."""

    def __init__(self, app: Sphinx, page: str) -> None:
        self.app, self.page = app, page

    def __call__(self, top: Subject) -> list[nodes.Node]:
        letters: dict[str, list[Subject]] = {}
        for words in sorted(top.below):
            letters.setdefault(words[:1].upper() if words[:1].isalpha() else "#", []).append(top.below[words])
        jumps = nodes.paragraph(classes=["subject-letters"])
        body: list[nodes.Node] = [jumps]
        for letter, found in letters.items():
            anchor = f"subjects-{letter.lower() if letter != '#' else 'signs'}"
            if len(jumps):
                jumps += nodes.Text(" · ")
            jumps += nodes.reference("", letter, refid=anchor, internal=True)
            body.append(nodes.rubric("", letter, ids=[anchor]))
            body.append(self.listed(found))
        return body

    def listed(self, found: list[Subject]) -> nodes.Node:
        items = nodes.bullet_list(classes=["subjects"])
        for subject in found:
            line = nodes.paragraph("", subject.words)
            for link in self.links(subject):
                line += [nodes.Text(", "), link]
            item = nodes.list_item("", line)
            if subject.below:
                item += self.listed([subject.below[words] for words in sorted(subject.below)])
            items += item
        return items

    def links(self, subject: Subject) -> Iterator[nodes.Node]:
        """The titles of the chapters; where one has several places, the others by their numbers."""
        seen: dict[str, int] = {}
        for place in sorted(subject.places, key=lambda place: not place.main):
            seen[place.page] = number = seen.get(place.page, 0) + 1
            title = self.app.env.titles[place.page].astext() if number == 1 else str(number)
            words = nodes.strong("", title) if place.main else nodes.inline("", title)
            yield make_refnode(self.app.builder, self.page, place.page, place.anchor, words)
        for other in sorted(subject.see):
            yield nodes.inline("", "", nodes.emphasis("", "see "), nodes.Text(other))


def fill(app: Sphinx, doctree: nodes.document, page: str) -> None:
    for place in list(doctree.findall(subject_index)):
        place.replace_self(Page(app, page)(subjects(app.env)))


def note_page(app: Sphinx, doctree: nodes.document) -> None:
    """Remember which page has the index: it is written again whenever another one has changed."""
    pages = app.env.subject_pages = getattr(app.env, "subject_pages", set())  # type: ignore[attr-defined]
    pages.discard(app.env.docname)
    if any(True for _ in doctree.findall(subject_index)):
        pages.add(app.env.docname)


def write_again(app: Sphinx, env: BuildEnvironment) -> list[str]:
    return sorted(getattr(env, "subject_pages", set()) & env.found_docs)


def merge(app: Sphinx, env: BuildEnvironment, pages: Any, other: Any) -> None:
    env.subject_pages = getattr(env, "subject_pages", set()) | getattr(other, "subject_pages", set())  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(subject_index)
    app.add_directive("subject-index", SubjectIndex)
    app.connect("doctree-read", note_page)
    app.connect("env-merge-info", merge)
    app.connect("env-updated", write_again)
    app.connect("doctree-resolved", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
