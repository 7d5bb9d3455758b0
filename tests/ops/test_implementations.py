"""Which implementation runs: the automatic choice, explicit requests, and what a user is told."""

from __future__ import annotations

import pytest
import torch

import gspn
from gspn.ops import implementations
from support import run_python


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(implementations, "_auto_choice", {})


def test_lists_every_implementation_with_a_reason() -> None:
    impls = gspn.available_impls(torch.zeros(1), op="line_scan")
    assert list(impls) == ["triton", "cpu", "reference"]
    assert impls["reference"] is None
    assert impls["cpu"] is None
    assert "cpu" in impls["triton"] or "pip install" in impls["triton"]


def test_every_implementation_has_every_operator() -> None:
    for op in implementations.OPS:
        for name in ("cpu", "reference"):
            module = implementations.resolve(name, torch.zeros(1), op)
            assert callable(getattr(module, op))
            assert callable(getattr(module, f"{op}_backward"))


def test_the_operator_asked_about_is_propagate_unless_named() -> None:
    x = torch.zeros(1)
    assert gspn.available_impls(x) == gspn.available_impls(x, op="propagate")
    assert implementations.resolve("auto", x, "propagate").__name__ == "gspn.ops.cpu.propagate"


def test_auto_takes_the_compiled_kernels_on_cpu() -> None:
    assert implementations.resolve("auto", torch.zeros(1), "line_scan").__name__ == "gspn.ops.cpu.line_scan"


def test_reasons_name_the_dtype_and_device() -> None:
    x = torch.zeros(1, device="meta", dtype=torch.float8_e5m2)
    impls = gspn.available_impls(x, op="line_scan")
    assert "meta" in impls["cpu"]
    impls = gspn.available_impls(torch.zeros(1, dtype=torch.float8_e5m2), op="line_scan")
    assert "float8_e5m2" in impls["cpu"]


def test_without_the_compiled_kernels_auto_warns_once_and_says_how_to_get_them(monkeypatch) -> None:
    def missing() -> None:
        raise OSError("this install of gspn has no compiled kernels.")

    monkeypatch.setattr("gspn.ops.cpu.load", missing)
    x, taps = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3)
    with pytest.warns(RuntimeWarning, match=r"slow PyTorch loop on cpu.*no compiled kernels.*pip install") as caught:  # noqa: PT031
        gspn.line_scan(x, taps, direction="down")
        gspn.line_scan(x, taps, direction="up")
    assert len(caught) == 1
    with pytest.raises(ImportError, match=r"impl='cpu' cannot run line_scan here.*pip install"):
        gspn.line_scan(x, taps, direction="down", impl="cpu")


def test_an_explicit_request_never_falls_back() -> None:
    x = torch.ones(1, 1, 3, 3, dtype=torch.float8_e5m2)
    taps = torch.ones(1, 1, 3, 3, 3, dtype=torch.float8_e5m2)
    with pytest.raises(NotImplementedError, match=r"impl='cpu' cannot run line_scan here.*float8_e5m2"):
        gspn.line_scan(x, taps, direction="down", impl="cpu")


@pytest.mark.slow
def test_the_kernels_run_on_pytorch_threads() -> None:
    # A second OpenMP runtime in the process would keep a second team of threads on the same cores.
    run_python(
        """
import torch, gspn
torch.set_num_threads(2)
def runtimes():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
torch.randn(64, 64) @ torch.randn(64, 64)
before = runtimes()
x = torch.randn(8, 8, 64, 64)
def threads():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Threads")).split()[1])
x.clone().add_(1).exp_().sum()
torch.empty(1 << 22).normal_().exp_()
count = threads()
for direction in gspn.DIRECTIONS:
    gspn.line_scan(x, torch.rand(8, 8, 3, 64, 64), direction=direction, impl="cpu")
assert runtimes() == before, (runtimes(), before)
assert count > 1
assert threads() == count, (threads(), count)
""",
        OMP_NUM_THREADS="2",
    )


@pytest.mark.slow
def test_runs_inside_a_forked_data_loader_worker() -> None:
    # The parent's OpenMP threads do not survive a fork; a worker of torch.utils.data runs on one thread.
    run_python(
        """
import torch, gspn
torch.set_num_threads(2)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return gspn.line_scan(torch.ones(1, 4, 16, 16), torch.ones(1, 1, 3, 16, 16) / 3, direction="down")[0]

first = Data()[0]
loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context="fork")
assert all(torch.equal(batch[0], first) for batch in loader)
""",
        OMP_NUM_THREADS="2",
    )
