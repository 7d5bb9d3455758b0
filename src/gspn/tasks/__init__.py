"""Training and applying models: one package per task, on :mod:`~gspn.tasks.core` and :mod:`~gspn.tasks.diffusion`."""
