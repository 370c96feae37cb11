"""Fixtures of this wing."""

from tests.agents import start_nodes  # noqa: F401 - a fixture
