"""The script that learns a vocabulary."""

import base64
from pathlib import Path

from benchmarks.vocabulary import learn
from llmtrain.tokenizer.bpe import END_OF_TEXT
from llmtrain.tokenizer.tiktoken import Tiktoken

TEXT = "the lamp of the lighthouse, the lamp of the house; they light the lamp"


def test_the_most_frequent_pairs_are_merged_first(tmp_path: Path) -> None:
    ranks = learn([TEXT], 262)
    assert sorted(ranks.values()) == list(range(262))
    assert {bytes([byte]) for byte in range(256)} == {token for token, rank in ranks.items() if rank < 256}
    merges = [token for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 256]
    assert b"th" in merges[:2]  # or "he", as often
    assert b" the" in merges
    path = tmp_path / "learnt.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    tokenizer = Tiktoken(encoding=str(path), pattern="gpt2", end_of_text=END_OF_TEXT).build()
    assert tokenizer.decode(tokenizer.encode(TEXT).tolist()) == TEXT
    assert len(tokenizer.encode(TEXT)) < len(TEXT) * 0.75
