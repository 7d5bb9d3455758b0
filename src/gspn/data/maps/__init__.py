"""Images with a map of the same size: a class or a number for each pixel."""
