"""Prose of sources and help pages, read without running them."""

from pathlib import Path

import pytest

from llmtrain.data.sources.python_prose import library_files, missing_parts, paragraphs_of

MODULE = '''#! /usr/bin/env python
"""A module that explains itself in one long sentence of prose.

    >>> this(example, is_code)  # and so it is left out, although it is quite long

A second paragraph, which is wrapped
over two lines, as paragraphs in docstrings are.
Short one.
"""
raise SystemExit("a source is read, never run")
\f
# A comment that goes on for
# two lines is one paragraph of the text.
TEXT = """
# This line looks like a comment to the eye, but it is within a string.
"""

class Class:  # comments behind code are notes for its next reader and not prose of their own
    def method(self):
        r"""Do something that takes a \\d and a docstring of more than eight words."""
        # x = compute(y, z); self._a[0] = x + 1; del x, y, z; return self._a
        # - The first of a list of points that a comment makes about something.
        # - The second of a list of points that a comment makes about something.
'''
PROSE = [
    "A module that explains itself in one long sentence of prose.",
    "A second paragraph, which is wrapped over two lines, as paragraphs in docstrings are. Short one.",
    "A comment that goes on for two lines is one paragraph of the text.",
    "Do something that takes a \\d and a docstring of more than eight words.",
    "- The first of a list of points that a comment makes about something.",
    "- The second of a list of points that a comment makes about something.",
]
PAGE = """<html><head><title>A title of a page that has as many words as that</title></head><body>
<p>A paragraph of <em>a page</em> in HTML &amp; its marks are left out.</p><p>Short.</p>
<ul><li>An item of a list in a page, of words in a row<a href="#x">¶</a></li></ul></body></html>"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder like that of a library, with what was added to it."""
    for name in ("json/__init__.py", "json/test/more.py", "idlelib/help.html", "idlelib/__init__.py", "argparse.py",
                 "site-packages/theirs.py", "test/ours.py", "mine.py", "email/page.rst", "email/data.bin"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PAGE if name.endswith("html") else MODULE, encoding="utf-8")
    return tmp_path


def test_docstrings_and_comments_are_found_in_order(library: Path) -> None:
    assert paragraphs_of(library / "argparse.py") == PROSE


def test_the_text_of_a_page_is_found(library: Path) -> None:
    assert paragraphs_of(library / "idlelib/help.html") == [
        "A title of a page that has as many words as that",
        "A paragraph of a page in HTML & its marks are left out.",
        "An item of a list in a page, of words in a row",
    ]


def test_the_files_are_those_of_the_library(library: Path) -> None:
    found = [str(file.relative_to(library)) for file in library_files(library)]
    assert found == ["argparse.py", "email/page.rst", "idlelib/__init__.py", "idlelib/help.html", "json/__init__.py"]


def test_a_library_in_a_zip_file_has_no_files(tmp_path: Path) -> None:
    assert library_files(tmp_path / "python311.zip") == []


def test_parts_that_are_not_there_are_named(library: Path) -> None:
    assert "idlelib" not in missing_parts(library)
    assert {"pydoc_data", "tkinter", "ensurepip"} <= set(missing_parts(library))


@pytest.mark.parametrize("content", [b"def broken(:\n", b"# \xff\xfe is not UTF-8 and has as many words as it takes\n"])
def test_a_file_that_is_no_source_has_no_prose(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.py").write_bytes(content)
    assert paragraphs_of(tmp_path / "x.py") == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.py: No such file"):
        paragraphs_of(tmp_path / "gone.py")
