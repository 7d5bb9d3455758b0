"""Measuring operators: a correctness check first, then times side by side in one run, then a table that can be kept.

``timing`` holds the clocks, ``check`` the rule an implementation has to pass before its time may be reported,
``bandwidth`` the ceiling, ``environment`` what a figure has to name, ``report`` the CSV and the plot. Each operator has
a module of its own with its cases: ``line_scan``. Nothing here is imported by ``import gspn``.
"""
