"""The digest of sequences, by which runs on the same validation data are known."""

import numpy as np
import pytest

from llmtrain.data.sequences import Stream

IDS = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint16)


def test_the_digest_of_a_stream_is_that_of_its_tokens() -> None:
    whole = Stream([IDS], 64)
    assert whole.digest() == Stream(np.split(IDS, [10, 10, 70_000]), 64).digest()  # in files of any size
    assert whole.digest() == Stream([IDS], 1024).digest()  # in sequences of any length
    assert whole.digest() != Stream([IDS[:-1]], 64).digest()
    assert whole.digest() != Stream([IDS[::-1]], 64).digest()


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_short_streams_have_a_digest(tokens: int) -> None:
    assert len(Stream([IDS[:tokens]], 4).digest()) == 8
