"""Data sets of images with captions: ``base`` is their interface, ``parsing`` reads captions from unchecked files."""
