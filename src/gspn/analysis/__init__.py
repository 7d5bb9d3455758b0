"""Looking at what the operators do: explicit affinities on tiny grids."""

from .affinity import affinity_matrix

__all__ = ["affinity_matrix"]
