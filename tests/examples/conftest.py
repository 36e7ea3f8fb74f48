"""Fixtures of these tests."""

from tests.support.small_text import background, tokenizer  # noqa: F401
