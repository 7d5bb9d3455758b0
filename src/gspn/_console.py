"""The console that everything is printed on."""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from ._files import printable


class Console(rich.console.Console):
    r"""Rich's console, for texts that contain names of files, classes and people's labels.

    Control characters, which a terminal would obey, and bytes that are not UTF-8 are escaped, in lines and in the cells
    of tables. ``:cat:`` stays what it is. Rich's markup is obeyed, so names need ``rich.markup.escape``.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> Console(file=out).print("a \x1b[31m :cat:")
        >>> out.getvalue()
        'a \\x1b[31m :cat:\n'
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's conversion of each string that is printed."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def default_console(*, stderr: bool = False) -> rich.console.Console:
    """A :class:`Console`, by the type that callers may pass instead; functions without one of theirs print on it."""
    return Console(stderr=stderr)
