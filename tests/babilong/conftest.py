"""Fixtures of these tests."""

from tests.support.command import run  # noqa: F401
from tests.support.small_text import background, tokenizer, trailing  # noqa: F401
