"""Why an implementation cannot run: the words an explicit request's exception says."""

from __future__ import annotations


class NotInstalled(str):
    """A reason that an install command would remove: an explicit request raises ImportError for it."""
