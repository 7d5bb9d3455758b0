"""The values of options that commands share."""

from __future__ import annotations

import pytest

from gspn._errors import UsageError
from gspn.cli.options import parse_size


@pytest.mark.parametrize(("text", "size"), [("640x480", (640, 480)), ("8X4", (8, 4)), ("64", (64, 64))])
def test_sizes_are_width_by_height(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "12x", "x12", "0", "4x0", "1x2x3", "-4", "4.5", "four"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="give WIDTHxHEIGHT"):
        parse_size(text)
