"""The length of training, and its periodic evaluation and samples."""

import math
from dataclasses import dataclass
from fractions import Fraction

from llmtrain.base.checks import unicode_text
from llmtrain.base.format import counted, visible
from llmtrain.base.options import Option, RunFacts
from llmtrain.inference.generate import Sampling
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoopConfig(Option):
    """The ``loop`` group."""

    max_steps: int | None
    epochs: float | None
    whole_batches: bool
    max_tokens: int | None
    max_minutes: float | None
    eval_every: int
    eval_batches: int | None
    eval_train_batches: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int
    sample_temperature: float
    sample_top_k: int

    def __post_init__(self) -> None:
        if self.max_steps is None and self.epochs is None and self.max_tokens is None:
            raise ValueError("max_steps=null, epochs=null and max_tokens=null: give one of them")
        if self.max_tokens is not None and (self.max_steps is not None or self.epochs is not None):
            other = "max_steps" if self.max_steps is not None else "epochs"
            raise ValueError(
                f"max_tokens={self.max_tokens}: {other}={getattr(self, other)} is a length of the run, too; give one, "
                f"loop.{other}=null or loop.max_tokens=null"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: must be at least 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs}: must be above 0")
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(f"max_minutes={self.max_minutes}: must be above 0, or null for no limit")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError(f"eval_batches={self.eval_batches}: must be at least 1, or null for the whole split")
        for key in ("eval_every", "eval_train_batches", "sample_every", "sample_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be 0 (never) or more")
        unicode_text(sample_prompt=self.sample_prompt)
        try:
            self.sampling()
        except ValueError as error:
            raise ValueError(f"sample_{error}") from None

    def check_prompt(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if ``tokenizer`` cannot encode the prompt of the samples that the run takes."""
        if not self.sample_every:
            return
        try:
            tokenizer.encode(self.sample_prompt)
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ValueError(
                f"loop.sample_prompt={visible(self.sample_prompt)!r}: the tokenizer cannot encode it ({error}); take a "
                "prompt of the kind of the training text, or no samples: loop.sample_every=0"
            ) from error

    def sampling(self) -> Sampling:
        """The choice of the next token of a sample."""
        return Sampling(self.sample_temperature, self.sample_top_k, 1.0)

    def times(self, factor: int) -> str:
        """The override for ``factor`` times the length: ``loop.max_steps=2000``."""
        if self.max_tokens is not None:
            return f"loop.max_tokens={factor * self.max_tokens}"
        if self.epochs is not None:
            return f"loop.epochs={factor * self.epochs:g}"
        return f"loop.max_steps={factor * (self.max_steps or 1)}"

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.epochs is not None and run.steps == self.max_steps and run.epochs < self.epochs:
            ends = f"loop.max_steps={self.max_steps} ends the run first, after {run.epochs:.3g} epochs"
            unread["epochs"] = f"{ends}; loop.max_steps=null"
        if self.epochs is not None and self.max_steps is not None and run.steps < self.max_steps:
            ends = f"loop.epochs={self.epochs:g} ends the run first, after {counted(run.steps, 'step')}"
            unread["max_steps"] = f"{ends}; loop.epochs=null"
        if self.whole_batches and self.epochs is None:
            unread["whole_batches"] = "is about the end of loop.epochs, which is null; loop.epochs=1"
        if self.eval_every > run.steps:
            unread["eval_every"] = (
                f"{run.end}, so that only its start and end are evaluated; loop.eval_every={run.tenth}"
            )
        if not run.evaluates:
            keys = ("eval_batches", "eval_train_batches", *["eval_every"] * (self.eval_every > 0))
            unread |= dict.fromkeys(keys, run.no_evaluation)
        if self.sample_every > run.steps:
            unread["sample_every"] = f"{run.end}, where one sample is taken in any case; loop.sample_every={run.tenth}"
        if self.sample_temperature == 0:
            unread["sample_top_k"] = (
                "with loop.sample_temperature=0 it is always the most likely token; loop.sample_temperature=0.8"
            )
        if not self.sample_every:
            keys = ("sample_prompt", "sample_tokens", "sample_temperature", "sample_top_k")
            why = f"no text is sampled with loop.sample_every=0; loop.sample_every={run.tenth}"
            unread |= dict.fromkeys(keys, why)
        return unread

    def end_position(self, sequences: int) -> int:
        """Sequences that ``epochs`` passes over ``sequences`` visit; ``epochs`` is read as the decimal that it is."""
        assert self.epochs is not None
        return math.ceil(Fraction(repr(self.epochs)) * sequences)
