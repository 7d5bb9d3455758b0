"""``python -m gspn``: the same as the command ``gspn``."""

from gspn.cli import app

app(prog_name="gspn")
