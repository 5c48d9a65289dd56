"""Paragraphs that stand in another text, whole or in part."""

import pytest

from llmtrain.data.sources.overlap import KnownText

KNOWN = ["The lamp of the lighthouse burned all night, and nobody came to put it out.", "See also:", "Notes"]


@pytest.mark.parametrize(
    ("paragraph", "overlaps"),
    [
        (KNOWN[0], True),
        ("he said the LAMP of the\nlighthouse burned -- all night; then he left", True),  # case, marks, line breaks
        ("The lamp of the lighthouse burned all day, and nobody came to see it.", False),  # 7 words in a row
        ("burned all night", True),  # a short one within a known one
        ("burned all nights", False),
        ("see also", True),
        ("also", True),
        ("also notes", False),  # of two paragraphs
        ("Whoever reads these notes should know that there is no lamp in the lighthouse.", False),
    ],
)
def test_shared_words_in_a_row_are_found(paragraph: str, overlaps: bool) -> None:
    assert KnownText(KNOWN).overlaps(paragraph) == overlaps


def test_nothing_overlaps_with_no_text() -> None:
    assert not KnownText([]).overlaps(KNOWN[0])
