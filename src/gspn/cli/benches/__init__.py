"""The commands of ``gspn bench``, one a module."""
