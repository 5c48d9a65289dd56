"""What one process is asked to measure: all that it is told, and the only thing that crosses over to it.

Peers run with interpreters of their own, which may have none of our dependencies: the standard library alone.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Sizes:
    """The shape of the GPT-2 that every contestant builds."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int  # the tokenizer's
    padded_vocab_size: int  # up to a multiple of 64, which all compute with

    def flops_per_token(self, context: int) -> int:
        """Of a forward and a backward pass: 6 a weight of a matrix product, and attention's full square."""
        weights = 12 * self.num_layers * self.hidden_size**2 + self.vocab_size * self.hidden_size
        return 6 * weights + 12 * self.num_layers * self.hidden_size * context

    def products(self, rows: int) -> list[tuple[int, int, int]]:
        """The (rows, inputs, outputs) of the forward pass's matrix products."""
        hidden = self.hidden_size
        shapes = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
        return [(rows, inputs, outputs) for outputs, inputs in [*shapes, (self.padded_vocab_size, hidden)]]


@dataclass(frozen=True)
class Task:
    """One measurement.  Not every worker reads every field."""

    contestant: str  # where one worker serves several
    folder: str  # an empty one, for whatever the contestant writes
    device: str  # cpu | cuda
    threads: int
    precision: str  # fp32 | tf32 | bf16
    compiled: bool
    model: str  # our option
    tokenizer: str  # our option
    sizes: Sizes
    context: int  # tokens of a sequence
    batch_size: int  # sequences of an optimizer step, all in one forward pass
    warm_up: int  # steps left out of the figures
    steps: int  # steps measured; 0: only the time to the first
    block: int  # steps between two looks at the clock
    tokens: str  # file of token ids, uint16 and nothing else
    text: str  # file of documents, <|endoftext|> between them
    overrides: tuple[str, ...] = ()  # Hydra's, for ours
    prepare_process: bool = True  # ours: whether to set the allocator up, as the command does
    checkout: str | None = None  # folder of a peer that is no installed package
    launched: float = 0.0  # time.time() just before the process was started

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = json.loads(text)
        values["sizes"] = Sizes(**values["sizes"])
        values["overrides"] = tuple(values["overrides"])
        return cls(**values)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))
