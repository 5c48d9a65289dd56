"""A small vocabulary for English about Python, from merge ranks that come with the package.

``benchmarks/vocabulary.py`` made them from the training text of ``data=python_prose``.
"""

from dataclasses import dataclass
from pathlib import Path

import tiktoken

from llmtrain.tokenizer import TokenizerConfig
from llmtrain.tokenizer.bpe import BPE, END_OF_TEXT, PATTERNS, read_ranks

RANKS = Path(__file__).with_name("python4096.tiktoken")


@dataclass(frozen=True)
class Python4096(TokenizerConfig):
    """4,096 ids: 4,095 byte-level BPE tokens, of words split as GPT-2 does, and ``<|endoftext|>``, 4095."""

    def build(self) -> BPE:
        ranks = read_ranks(RANKS)
        special_tokens = {END_OF_TEXT: len(ranks)}
        return BPE(
            tiktoken.Encoding(
                "python4096", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special_tokens
            )
        )
