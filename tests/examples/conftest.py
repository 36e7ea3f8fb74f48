"""Fixtures of these tests."""

from tests.support.small_text import background, tokenizer, trailing  # noqa: F401
