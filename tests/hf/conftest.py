"""A trained tokenizer as a fixture."""

from tests.helpers.tokenizers import byte_level as byte_level
from tests.helpers.tokenizers import pieces as pieces
