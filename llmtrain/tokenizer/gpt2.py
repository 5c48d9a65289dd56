"""GPT-2's tokenizer (Radford et al. 2019), from merge ranks that come with the package: never the network."""

from dataclasses import dataclass
from pathlib import Path

import tiktoken

from llmtrain.tokenizer import TokenizerConfig
from llmtrain.tokenizer.bpe import BPE, END_OF_TEXT, PATTERNS, read_ranks

RANKS = Path(__file__).with_name("gpt2.tiktoken")


@dataclass(frozen=True)
class GPT2(TokenizerConfig):
    """50,257 ids: 50,256 byte-level BPE tokens and ``<|endoftext|>``, 50256."""

    def build(self) -> BPE:
        ranks = read_ranks(RANKS)
        special_tokens = {END_OF_TEXT: len(ranks)}
        return BPE(
            tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special_tokens)
        )
