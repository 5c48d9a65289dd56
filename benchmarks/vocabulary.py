"""The vocabulary of ``tokenizer=python4096``, learnt from the training text of ``data=python_prose``.

    python -m benchmarks.vocabulary                 # writes llmtrain/tokenizer/python4096.tiktoken
    python -m benchmarks.vocabulary --output FILE --tokens 8191

The text depends on the version of Python: the file in the package was made with CPython 3.11.7, complete, and
tokenizers 0.23.3.  The text for validation takes no part.
"""

import argparse
import base64
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from llmtrain.data.python_prose import PythonProse
from llmtrain.tokenizer.bpe import PATTERNS, for_oniguruma
from llmtrain.tokenizer.python4096 import RANKS
from llmtrain.tokenizer.token_bytes import BYTE_OF

TOKENS = 4095  # with <|endoftext|> 4,096 ids


def main() -> None:
    """Learn the merges; write them as a ``.tiktoken`` file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="256 bytes and the rest merges")
    parser.add_argument("--output", type=Path, default=RANKS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        data = PythonProse(sequence_length=256, validation_fraction=0.15, shuffle=False, cache_dir=cache)
        ranks = learn((piece.text for piece in data.source().pieces()), arguments.tokens)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    arguments.output.write_text("".join(lines), encoding="ascii")


def learn(texts: Iterable[str], tokens: int) -> dict[bytes, int]:
    """Byte-level BPE of ``tokens`` tokens by rank; words are split as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(for_oniguruma(PATTERNS["gpt2"])), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    return {bytes(map(BYTE_OF.__getitem__, token)): id for id, token in by_id}


if __name__ == "__main__":
    main()
