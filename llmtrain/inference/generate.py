"""Sampling text from a model."""

import codecs
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.inference.decoding import Decoder, graph_recorder, log
from llmtrain.model import LanguageModel

NOT_FINITE = -1  # in place of a token that cannot be chosen


class SamplingFailed(RuntimeError):
    """No next token can be chosen; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token."""

    temperature: float  # 0: the most likely token
    top_k: int  # sample among this many of the most likely tokens; 0: among all
    top_p: float  # sample among the most likely tokens that together have this probability; 1: among all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token id from ``logits`` ``(vocabulary,)``; the host reads one number of the device.

        Temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020) over what is left.  Raises
        :class:`SamplingFailed` for logits that are not numbers.
        """
        likeliest = logits.argmax()
        is_finite = logits.take(likeliest).isfinite()  # argmax finds a nan before any number
        if self.temperature == 0:
            return self._read(torch.where(is_finite, likeliest, NOT_FINITE))
        before = generator.get_state() if self.temperature < 1 else None
        logits = logits.float() / self.temperature
        is_drawn = logits.take(likeliest).isfinite()  # else: a temperature next to 0
        if 0 < self.top_k < logits.numel():
            threshold = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(0)
            preceding = probabilities.cumsum(0) - probabilities  # always keeps the most likely token
            logits = logits.scatter(0, order, ordered.masked_fill(preceding >= self.top_p, -torch.inf))
        drawn = draw(logits.softmax(0), generator)
        # a choice without a draw is read as a number below NOT_FINITE
        result = torch.where(is_drawn, drawn, NOT_FINITE - 1 - likeliest)
        token = self._read(torch.where(is_finite, result, NOT_FINITE))
        if token >= 0:
            return token
        if before is not None:
            generator.set_state(before)
        return NOT_FINITE - 1 - token

    @staticmethod
    def _read(token: Tensor) -> int:
        """Read a token from the device."""
        number = int(token)
        if number == NOT_FINITE:
            raise SamplingFailed("the model's output is not finite, so that no token can be chosen: training diverged")
        return number


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index from ``probabilities`` ``(n,)``, 0-dimensional: as torch.multinomial, without its two checks on the
    host."""
    return (probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)).argmax()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    dtype: torch.dtype,
    end_of_text: int,
    stops: Collection[int] = (),
    report: Callable[[str], None] = log.warning,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids that continue ``prompt``; ``end_of_text`` and ``stops`` end it, unyielded.

    ``dtype`` is that of the cache of keys and values.  Enter the precision's autocast around the whole iteration, so
    that the weights are cast once.  All random numbers come from ``generator``.  When the model's context is full, its
    last half is read again and generation continues from there, so the length is not limited.  ``report`` is called
    with a message if generation is slower than it should be.
    """
    recorder = graph_recorder(next(model.parameters()).device, max_tokens)
    ids = list(prompt) or [end_of_text]
    was_training = model.training
    model.eval()
    try:
        decoder = None
        for _ in range(max_tokens):
            if decoder is None or decoder.is_full:
                keep = model.context_length if decoder is None else max(model.context_length // 2, 1)
                unread = ids[-keep:]
                decoder = Decoder(model, dtype, recorder=recorder, report=report)
            else:
                unread = ids[-1:]
            token = sampling.choose(decoder.read(unread), generator)
            if token == end_of_text or token in stops:
                return
            ids.append(token)
            yield token
    finally:
        model.train(was_training)


def stream_text(
    ids: Iterator[int], decode_bytes: Callable[[Sequence[int]], bytes], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text of ``ids`` piece by piece, up to the first of ``stops``, which is not yielded.

    A character whose bytes are spread over several tokens is yielded when it is complete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""  # text that may be the beginning of a stop
    for token in ids:
        held += decoder.decode(decode_bytes([token]))
        if (ends := [end for stop in stops if (end := held.find(stop)) >= 0]) != []:
            yield held[: min(ends)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        out, held = held[: len(held) - keep], held[len(held) - keep :]
        if out:
            yield out
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def without_first_space(pieces: Iterable[str]) -> Iterator[str]:
    """The text of ``pieces`` without the space that many tokenizers and templates put before a response."""
    has_begun = False
    for piece in pieces:
        piece, has_begun = piece if has_begun else piece.removeprefix(" "), has_begun or bool(piece)
        if piece:
            yield piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
