"""Text with special tokens among it, encoded at once by the tokenizers library."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtrain.tokenizer.marked_text import EMPTY, MarkedIds, Piece, joined

if TYPE_CHECKING:
    import tokenizers


def hidden_name(id: int) -> str:
    """The name of a special token between two noncharacters, which no text contains."""
    return f"\U0010fffe{id}\U0010ffff"


class HiddenNames:
    """An encoder of pieces: the library finds the tokens in the text itself, by hidden names.

    So it treats the text before and after them as in a text that holds their own names: a space put before each stretch
    or before the first alone, white space that a token takes with it.  A name that somebody typed remains text.

    Args:
        tokenizer: the tokenizer with hidden names.
        marks: all tokens that can stand among text, by name.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", marks: Mapping[str, int]) -> None:
        self.tokenizer = tokenizer
        self.names = {id: name for name, id in marks.items()}
        self.hidden = {id: hidden_name(id) for id in self.names if tokenizer.token_to_id(hidden_name(id)) == id}

    def __call__(self, pieces: Sequence[Piece]) -> MarkedIds:
        pieces = joined(pieces)
        texts = [piece if isinstance(piece, str) else self._name(piece) for piece in pieces]
        if not texts:
            return EMPTY
        # Not `encode`, which holds Python's lock.
        (encoding,) = self.tokenizer.encode_batch(["".join(texts)], add_special_tokens=False)
        ids = np.array(encoding.ids, np.uint32)
        if not len(ids):
            return EMPTY
        starts, ends = self._places(np.array(encoding.offsets, np.int64), pieces, texts)
        self._place_marks(ids, starts, ends, pieces)
        return MarkedIds(ids, starts, ends)

    def _name(self, id: int) -> str:
        return self.hidden.get(id) or self.names[id]

    def _places(
        self, offsets: np.ndarray, pieces: Sequence[Piece], texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in the text that was encoded as places in the pieces."""
        is_mark = np.array([isinstance(piece, int) for piece in pieces])
        begins = np.cumsum([0, *map(len, texts)])[:-1]
        sizes = [1 if isinstance(piece, int) else len(piece) for piece in pieces]
        places = np.cumsum([0, *sizes])[:-1]

        def place_of(at: np.ndarray) -> np.ndarray:
            piece = np.searchsorted(begins, at, side="right") - 1
            return places[piece] + np.where(is_mark[piece], 0, at - begins[piece])

        starts = place_of(offsets[:, 0])
        last = place_of(np.maximum(offsets[:, 1] - 1, offsets[:, 0]))
        return starts, np.where(offsets[:, 1] > offsets[:, 0], last + 1, starts)

    def _place_marks(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, pieces: Sequence[Piece]) -> None:
        """Give each token among the text its own place, without white space that it takes from the text."""
        place, wanted = 0, []
        for piece in pieces:
            if isinstance(piece, int) and piece in self.hidden:
                wanted.append((piece, place))
            place += len(piece) if isinstance(piece, str) else 1
        found = np.flatnonzero(np.isin(ids, list(self.hidden)))
        if ids[found].tolist() != [id for id, _ in wanted]:
            missing = next(iter({id for id, _ in wanted} - set(ids.tolist())), wanted[0][0] if wanted else None)
            raise ValueError(
                f"the tokenizer does not find its token {self.names.get(missing or 0, missing)!r} in every text (it is "
                "found as a whole word alone, or is part of another), so a conversation has no certain ids; take "
                "another data.template"
            )
        starts[found] = [place for _, place in wanted]
        ends[found] = starts[found] + 1
