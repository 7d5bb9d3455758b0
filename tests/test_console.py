"""Names in what is printed and drawn: nothing that a terminal would obey, and no formula."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from rich.markup import escape
from rich.table import Table

from gspn._console import Console, default_console
from gspn.cli.messages import facts_table, failed, titled_table, warn, wrote

NAMES = [
    "\x1b[31mred",
    "a\rb",
    "\x9b2J",
    "\u202egnp.x",
    "\udcff",
    "[red]",
    ":cat:",
    "\x07",
    "\x1b]0;title\x07",
    "\u2028",
]


def printed(*things: object) -> str:
    out = io.StringIO()
    for thing in things:
        Console(file=out, width=200).print(thing)
    return out.getvalue()


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_are_escaped_however_they_are_printed(name, capsys):
    table = Table(escape(name), title=escape(name), caption=escape(name))
    table.add_row(escape(name))
    titled = titled_table(name, [escape(name)])
    titled.add_row(escape(name))
    text = printed(escape(name), f"[bold]{escape(name)}[/]", table, titled, facts_table({name: name}))
    warn(name), failed(name), wrote(name)
    default_console().print(escape(name))
    shown = capsys.readouterr()
    for one in (text, shown.out, shown.err):
        assert all(letter.isprintable() or letter == "\n" for letter in one), one
        one.encode()
        if name in ("[red]", ":cat:"):
            assert name in one


def test_formulas_and_controls_in_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from gspn._figures import label, save_figure

    figure = Figure()
    axes = figure.subplots()
    axes.set_xticks(range(len(NAMES) + 1), [label(name) for name in [*NAMES, r"$\frac$ 5 $x^$"]])
    save_figure(figure, tmp_path / "x.png")
    assert [one.get_text() for one in axes.get_xticklabels()][-1] == r"\$\frac\$ 5 \$x^\$"


def test_names_in_a_grid_of_images():
    image = pytest.importorskip("PIL.Image")
    from gspn.tasks.diffusion.image_grid import draw_grid

    one = image.new("RGB", (64, 64))
    for name in [*NAMES, "a\nb"]:
        assert draw_grid([[one]], names=[name], titles=[name], captions=[[name]]).height > 64


def test_other_libraries_are_quiet_within_commands_alone(capsys):
    tqdm = pytest.importorskip("tqdm")
    import warnings

    from gspn.cli.app import own_output

    with own_output():
        list(tqdm.tqdm(range(3), desc="loading"))
        warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="diffusers.models")
        warnings.warn("one\x1b\ntwo", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: one\\x1b two\n"
    list(tqdm.tqdm(range(3), desc="loading"))
    assert "loading" in capsys.readouterr().err
