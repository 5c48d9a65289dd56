"""English prose in Python's standard library: docstrings, comments and help pages, without importing a module."""

import ast
import inspect
import io
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SUFFIXES = (".py", ".rst", ".html")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # other packages, and tests
DISTRIBUTED_APART = ("distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "venv")
FEWEST_WORDS = 8  # of a paragraph: shorter ones are headings, signatures and labels
PROSE_SHARE = 0.7  # of a paragraph's words that are words of English, not code
WORD = re.compile(r"[(\"'`]*[A-Za-z][a-z]*(?:[-'’/][A-Za-z]?[a-z]*)*[)\"'`]*[.,;:!?]*[)\"'`]*$|[-–—]+$|\d+[.,)]?$")
BLOCK_TAGS = {"p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "section", "div", "tr"}


def library_files(folder: Path) -> list[Path]:
    """Source files and help pages of the standard library in ``folder``, sorted by path; not what was added to it."""
    if not folder.is_dir():  # the library in a zip file
        return []
    names = [entry for entry in folder.iterdir() if entry.name.removesuffix(".py") in sys.stdlib_module_names]
    files = [entry for entry in names if entry.suffix == ".py" and entry.is_file()]
    for package in names:
        if package.is_dir() and package.name not in LEFT_OUT:
            files += [file for file in package.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    relative = {file.relative_to(folder).as_posix(): file for file in files}
    return [file for name, file in sorted(relative.items()) if not LEFT_OUT & set(name.split("/"))]


def missing_parts(folder: Path) -> list[str]:
    """Packages of this version's library that are not in ``folder``: some distributions ship them apart."""
    expected = [name for name in DISTRIBUTED_APART if name in sys.stdlib_module_names]
    return [name for name in expected if not any((folder / name).glob("*.py"))]


def paragraphs_of(file: Path) -> list[str]:
    """The paragraphs of prose in ``file``, in order, each a line; none of a file that cannot be decoded.

    Raises ValueError, naming the file, if it cannot be read.
    """
    try:
        if file.suffix == ".py":
            with tokenize.open(file) as opened:
                blocks = _python_blocks(opened.read())
        else:
            text = file.read_text(encoding="utf-8")
            blocks = iter([_html_text(text) if file.suffix == ".html" else text])
        return [paragraph for block in blocks for paragraph in _paragraphs(block)]
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):  # on purpose, as in test data
        return []
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error


def _python_blocks(source: str) -> Iterator[str]:
    """Docstrings and blocks of comment lines of a module, in their order."""
    comments: list[str] = []
    begins_block = True  # no statement since the beginning of the module or of an indented block
    string = ""  # a literal that is a docstring if its statement ends with it
    for kind, text, _, _, line in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.COMMENT and line.lstrip().startswith("#"):
            comments.append(text.lstrip("#!:"))
        elif comments and (kind != tokenize.NL or not line.strip()):  # a NL ends each comment, or is an empty line
            yield "\n".join(comments)
            comments = []
        if kind == tokenize.STRING and begins_block:
            string, begins_block = text, False
        elif kind == tokenize.NEWLINE and string:
            yield _docstring(string)
            string = ""
        elif kind == tokenize.INDENT:
            begins_block = True
        elif kind not in (tokenize.COMMENT, tokenize.NL):
            string, begins_block = "", False


def _docstring(literal: str) -> str:
    """The text of a string literal without its indentation; "" of bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in somebody else's strings
        value = ast.literal_eval(literal)
    return inspect.cleandoc(value) if isinstance(value, str) else ""


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)])\s)", text):
        words = block.split()
        prose = sum(1 for word in words if WORD.match(word))
        if len(words) >= FEWEST_WORDS and prose >= PROSE_SHARE * len(words) and ">>>" not in block:
            yield " ".join(words)


class _TextOfHTML(HTMLParser):
    """The text of a page, with an empty line where a block begins."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _html_text(page: str) -> str:
    parser = _TextOfHTML()
    parser.feed(page)
    return "".join(parser.parts).replace("¶", "")
