"""Paragraphs that stand in another text as well, in whole or in part."""

import re
from collections.abc import Iterable, Iterator

# Words in a row that two texts hardly share by chance.  Brown et al. 2020 ("Language Models are Few-Shot Learners",
# appendix C) take 13 to tell copies; in a text about one subject 8 also find sentences that were copied and edited.
WINDOW = 8


class KnownText:
    """The words of some paragraphs, to look others up in; case, punctuation and line breaks do not count."""

    def __init__(self, paragraphs: Iterable[str]) -> None:
        known = [_words(paragraph) for paragraph in paragraphs]
        self._windows = {window for words in known for window in _windows(words)}
        self._text = "\n".join(_joined(words) for words in known)

    def overlaps(self, paragraph: str) -> bool:
        """True if it shares ``WINDOW`` words in a row with a known paragraph or, being shorter, stands whole in one."""
        words = _words(paragraph)
        if len(words) < WINDOW:
            return _joined(words) in self._text
        return any(window in self._windows for window in _windows(words))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _windows(words: list[str]) -> Iterator[str]:
    return (" ".join(words[start : start + WINDOW]) for start in range(len(words) - WINDOW + 1))


def _joined(words: list[str]) -> str:
    return f" {' '.join(words)} "
