"""The choice of an instruction set: in a block, by the environment, and across threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from gspn.ops.cpu.library import isa
from propagate_cases import make_arguments, run
from support import run_python


def test_a_block_chooses_and_gives_back() -> None:
    before = isa()
    assert before in instruction_sets()
    for name in instruction_sets():
        with instruction_set(name):
            assert isa() == name
            with instruction_set("baseline"):
                assert isa() == "baseline"
            assert isa() == name
    with pytest.raises(RuntimeError, match="in the block"), instruction_set("baseline"):
        raise RuntimeError("in the block")
    assert isa() == before


def test_an_unknown_one_is_refused_with_those_that_run_here() -> None:
    before = isa()
    with pytest.raises(ValueError, match=r"name='sse9'.*baseline"), instruction_set("sse9"):
        pass
    assert isa() == before


@pytest.mark.parametrize("name", instruction_sets())
def test_the_environment_chooses_for_the_process(name) -> None:
    run_python(f"from gspn.ops.cpu.library import isa; assert isa() == {name!r}", GSPN_ISA=name)


def test_an_unknown_one_in_the_environment_is_refused() -> None:
    run_python(
        """
import torch, gspn
try:
    gspn.available_impls(torch.zeros(1))
except ValueError as error:
    assert "GSPN_ISA='sse9'" in str(error) and "baseline" in str(error), error
else:
    raise AssertionError("accepted")
""",
        GSPN_ISA="sse9",
    )


def test_every_set_computes_the_same_function_while_another_thread_switches() -> None:
    arguments, grad = make_arguments(1, 20, 9, 7, 3, 4, torch.float64)
    directions = ",".join(gspn.DIRECTIONS)
    expected = run(arguments, grad, directions, None, "reference")
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            for name in instruction_sets():
                with instruction_set(name):
                    time.sleep(1e-4)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(10):
            torch.testing.assert_close(run(arguments, grad, directions, None, "cpu"), expected)
    finally:
        stop.set()
        thread.join()
