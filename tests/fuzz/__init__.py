"""Damaged inputs for the public surface: the targets, by name. ``make fuzz`` runs them for as long as it is told."""

from __future__ import annotations

from . import commands, files, images, operators

TARGETS = {target.name: target for target in (images.TARGET, *operators.TARGETS, *files.TARGETS, commands.TARGET)}
