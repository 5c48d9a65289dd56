"""Paragraphs that stand in another text as well, in whole or in part."""

import re
from collections.abc import Iterable

# Words in a row that two texts share only if one was copied from the other: Brown et al. 2020, "Language Models are
# Few-Shot Learners", appendix C.
WINDOW = 13
FEWEST_WORDS = 8  # of a paragraph that is looked for within others: shorter ones are headings and phrases


class KnownText:
    """The words of some paragraphs, to look others up in; case, punctuation and line breaks do not count."""

    def __init__(self, paragraphs: Iterable[str]) -> None:
        known = [_words(paragraph) for paragraph in paragraphs]
        self._text = "\n".join(_joined(words) for words in known)
        self._windows = {window for words in known for window in _windows(words)}
        self._short = {_joined(words) for words in known if FEWEST_WORDS <= len(words) < WINDOW}

    def overlaps(self, paragraph: str) -> bool:
        """True if it shares ``WINDOW`` words in a row with a known paragraph, or either stands whole in the other."""
        words = _words(paragraph)
        text = _joined(words)
        if len(words) < WINDOW:
            return text in self._text or any(known in text for known in self._short)
        return any(window in self._windows for window in _windows(words)) or any(
            known in text for known in self._short
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _joined(words: list[str]) -> str:
    return f" {' '.join(words)} "


def _windows(words: list[str]) -> Iterable[str]:
    return (" ".join(words[start : start + WINDOW]) for start in range(len(words) - WINDOW + 1))
