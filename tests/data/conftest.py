"""A tokenizer that every data test can use."""

import pytest

from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.byte import Byte
from llmtrain.tokenizer.gpt2 import GPT2


@pytest.fixture(scope="session")
def byte() -> Tokenizer:
    return Byte().build()


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return GPT2().build()
