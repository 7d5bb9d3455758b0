"""Which implementation runs: the automatic choice, explicit requests, and what a user is told."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import gspn
from gspn.ops import implementations, triton
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


def test_auto_chooses_for_each_operator_device_and_dtype() -> None:
    assert implementations.resolve("auto", torch.zeros(1), "line_scan").__name__ == "gspn.ops.cpu.line_scan"
    assert implementations.resolve("auto", torch.zeros(1), "propagate").__name__ == "gspn.ops.cpu.propagate"
    for other in (torch.zeros(1, dtype=torch.float8_e5m2), torch.zeros(1, device="meta")):
        with pytest.warns(RuntimeWarning, match="slow PyTorch loop"):
            module = implementations.resolve("auto", other, "line_scan")
        assert module.__name__ == "gspn.ops.reference.line_scan"


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


OLD = SimpleNamespace(name="Tesla T4", major=7, minor=5, shared_memory_per_block_optin=64 << 10)
SMALL = SimpleNamespace(name="Small", major=8, minor=7, shared_memory_per_block_optin=48 << 10)
AMPERE = SimpleNamespace(name="A10", major=8, minor=6, shared_memory_per_block_optin=99 << 10)
MI100 = SimpleNamespace(name="MI100", major=9, minor=0, gcnArchName="gfx908:sramecc+:xnack-")
MI300 = SimpleNamespace(name="MI300X", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")


@pytest.fixture
def cards(monkeypatch):
    """A list of GPUs that PyTorch sees, each by its index."""
    cards = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "_installed", lambda: True)
    triton._why_not_card.cache_clear()
    yield cards
    triton._why_not_card.cache_clear()


@pytest.mark.parametrize(
    ("card", "hip", "reason"),
    [
        (OLD, None, r"compute capability 8.0 \(Ampere\) or later, and Tesla T4 has 7.5"),
        (SMALL, None, "64 KB of shared memory, and Small has 48 KB"),
        (MI100, "6.4", r"of AMD GPUs.*propagate are compiled for none, and MI100 is gfx908"),
    ],
)
def test_on_a_gpu_that_triton_cannot_use_auto_warns_once_and_says_why(cards, monkeypatch, card, hip, reason) -> None:
    cards[:] = [card]
    monkeypatch.setattr(torch.version, "hip", hip)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=f"slow PyTorch loop on cuda for torch.bfloat16: triton.*{reason}"):
        module = implementations.resolve("auto", x, "propagate")  # type: ignore[arg-type]
    assert module.__name__ == "gspn.ops.reference.propagate"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementations.resolve("auto", x, "propagate") is module  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=f"impl='triton' cannot run propagate here.*{reason}"):
        implementations.resolve("triton", x, "propagate")  # type: ignore[arg-type]


def test_amd_gpus_run_what_is_compiled_for_them(cards, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cards[:] = [MI300, MI100]
    assert triton.why_not(torch.device("cuda", 0), torch.float32, "line_scan") is None
    reason = triton.why_not(torch.device("cuda", 1), torch.float32, "line_scan")
    assert "compiled for gfx942 and gfx1100, and MI100 is gfx908" in str(reason)


def test_gpus_of_a_machine_need_not_be_alike(cards, monkeypatch) -> None:
    cards[:] = [AMPERE, OLD]
    monkeypatch.setattr(implementations, "_module", lambda backend, _: backend.__name__)
    first, second = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32) for i in (0, 1))
    assert implementations.resolve("auto", first, "propagate") == "gspn.ops.triton"  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match=r"Tesla T4 has 7\.5"):
        assert implementations.resolve("auto", second, "propagate") == "gspn.ops.reference"  # type: ignore[arg-type]
    assert triton.why_not(torch.device("cuda"), torch.float32, "propagate") is None


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
