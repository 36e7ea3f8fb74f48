"""Fixtures of these tests."""

from tests.support.command import run  # noqa: F401
