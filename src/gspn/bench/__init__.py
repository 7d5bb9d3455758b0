"""Benchmarks: a correctness check first, then times side by side in one run, then a table that can be kept.

``timing`` takes times and memory, ``accuracy_check`` decides which results are accurate enough to be timed,
``environment`` states the machine, and ``report`` has the results, their CSV and their plots. ``size_sweep`` times
candidates on growing maps. Each benchmark is a module of its own: ``line_scan``, ``propagate``, ``mixer``, ``models``
and ``unet``. ``import gspn`` imports nothing of this.
"""
