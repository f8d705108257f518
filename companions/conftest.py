"""Fixtures that the tests of the companions share with those of infoard.py."""

from test_infoard import desk, lab  # noqa: F401
