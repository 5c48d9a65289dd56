"""Trained tokenizers as fixtures."""

from tests.helpers.tokenizers import byte_level as byte_level
from tests.helpers.tokenizers import llama as llama
from tests.helpers.tokenizers import unigram as unigram
