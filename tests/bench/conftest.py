"""Benchmarks of tests do not read a buffer of the size of the last-level cache before each call."""

import pytest

from gspn.bench import timing


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 16)
