"""Bad input gets an exception of the stated type that shows the offending value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gspn

X = torch.zeros(2, 4, 5, 6)
TAPS = torch.zeros(2, 2, 3, 5, 6)

SEGMENTS_AND_IMPLS = [
    (dict(segment=1.5), TypeError, r"segment=1\.5 is a float.*int"),
    (dict(segment=np.int64(2)), TypeError, r"segment=.*int64; pass a number of lines as an int"),
    (dict(segment=torch.tensor(2)), TypeError, r"segment=tensor\(2\) is a Tensor"),
    (dict(segment=2**70), ValueError, r"segment=\d+ is more than"),
    (dict(impl=["cpu"]), TypeError, r"impl=\['cpu'\] is not an implementation; use one of auto"),
    (dict(impl=None), TypeError, r"impl=None is not an implementation"),
]

CASES = [
    (dict(x=torch.zeros(4, 5, 6)), ValueError, r"x\.shape=.*\[4, 5, 6\].*3 axes.*\[B, C, H, W\]"),
    (dict(taps=torch.zeros(2, 3, 5, 6)), ValueError, r"taps\.shape=.*\[2, 3, 5, 6\].*must be \[2, G, 3, 5, 6\]"),
    (dict(taps=torch.zeros(2, 2, 4, 5, 6)), ValueError, r"taps\.shape=.*\[2, 2, 4, 5, 6\]"),
    (dict(taps=torch.zeros(2, 2, 3, 6, 5)), ValueError, r"\[2, 2, 3, 6, 5\].*does not fit.*\[2, 2, 3, 5, 6\]"),
    (dict(taps=torch.zeros(1, 2, 3, 5, 6)), ValueError, r"\[1, 2, 3, 5, 6\].*does not fit"),
    (
        dict(taps=torch.zeros(2, 3, 3, 5, 6)),
        ValueError,
        r"\[2, 3, 3, 5, 6\].*\[2, 4, 5, 6\].*\[2, G, 3.*divide",
    ),
    (dict(taps=torch.zeros(2, 0, 3, 5, 6)), ValueError, r"\[2, 0, 3, 5, 6\].*must be \[2, G, 3.*divide"),
    (dict(lam=torch.zeros(2, 1, 5, 6)), ValueError, r"lam\.shape=.*\[2, 1, 5, 6\].*expand"),
    (dict(x=[1.0]), TypeError, "x is a list; pass a torch.Tensor"),
    (dict(taps=None), TypeError, "taps is a NoneType"),
    (dict(x=X.int()), TypeError, r"x\.dtype is torch\.int32.*\.float\(\)"),
    (dict(lam=torch.zeros(2, 4, 5, 6, dtype=torch.long)), TypeError, r"lam\.dtype is torch\.int64"),
    (dict(taps=TAPS.half()), TypeError, r"x\.dtype=torch\.float32 but taps\.dtype is torch\.float16"),
    (dict(lam=X.double()), TypeError, r"lam\.dtype is torch\.float64"),
    (dict(taps=TAPS.to("meta")), ValueError, r"x\.device=.*cpu.*taps\.device is meta"),
    (dict(segment=0), ValueError, r"segment=0 is below 1.*None"),
    (dict(segment=-3), ValueError, r"segment=-3"),
    (dict(segment=2.0), TypeError, r"segment=2\.0 is a float"),
    (dict(segment=True), TypeError, r"segment=True is a bool"),
    *SEGMENTS_AND_IMPLS,
    (dict(direction="north"), ValueError, r"direction='north'.*down, up, right, left"),
    (dict(direction=None), ValueError, r"direction=None"),
    (dict(direction=["down"]), ValueError, r"direction=\['down'\]"),
    (dict(impl="cuda"), ValueError, r"impl='cuda'.*auto, triton, cpu, reference"),
    (dict(impl="triton"), (NotImplementedError, ImportError), r"impl='triton' cannot run line_scan here"),
]


@pytest.mark.parametrize(("changed", "error", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_line_scan(changed, error, message) -> None:
    arguments = {"x": X, "taps": TAPS, "lam": None, "direction": "down"} | changed
    with pytest.raises(error, match=message):
        gspn.line_scan(arguments.pop("x"), arguments.pop("taps"), arguments.pop("lam"), **arguments)


def test_direction_is_named_at_the_call() -> None:
    with pytest.raises(TypeError, match="direction"):
        gspn.line_scan(X, TAPS)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("logits", "direction", "error", "message"),
    [
        ("logits", "down", TypeError, "logits is a str"),
        (TAPS.int(), "down", TypeError, r"logits\.dtype=torch\.int32"),
        (torch.zeros(2, 3, 5, 6), "down", ValueError, r"logits\.shape=.*\[B, G, 3, H, W\]"),
        (TAPS, "sideways", ValueError, "direction='sideways'"),
    ],
)
def test_stochastic_taps(logits, direction, error, message) -> None:
    with pytest.raises(error, match=message):
        gspn.stochastic_taps(logits, direction=direction)


def test_available_impls() -> None:
    with pytest.raises(TypeError, match="x is a str"):
        gspn.available_impls("cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"op='scan'.*line_scan"):
        gspn.available_impls(X, op="scan")


# --- propagate --------------------------------------------------------------------------------------------------------

PROXY = torch.zeros(2, 3, 5, 6)
GATE = torch.zeros(4, 4, 3)
PROPAGATE = dict(x=X, proxy=PROXY, tap_proj=torch.zeros(4, 2, 3, 3), lam_proj=GATE, u_proj=GATE, skip_proj=None)
PROPAGATE_CASES = [
    (dict(x=torch.zeros(4, 5, 6)), ValueError, r"x\.shape=.*3 axes.*\[B, C, H, W\]"),
    (dict(x=[1.0]), TypeError, "x is a list; pass a torch.Tensor"),
    (dict(x=X.int()), TypeError, r"x\.dtype is torch\.int32.*\.float\(\)"),
    (dict(proxy=PROXY.half()), TypeError, r"x\.dtype=torch\.float32 but proxy\.dtype is torch\.float16"),
    (dict(proxy=torch.zeros(2, 3, 6, 5)), ValueError, r"proxy\.shape=.*does not fit.*\[2, 3, 5, 6\]"),
    (dict(proxy=torch.zeros(2, 0, 5, 6)), ValueError, r"proxy\.shape=.*S at least 1"),
    (dict(proxy=PROXY.to("meta")), ValueError, r"x\.device=.*cpu.*proxy\.device is meta"),
    (dict(tap_proj=torch.zeros(4, 2, 2, 3)), ValueError, r"tap_proj\.shape=.*must be \[4, 2, 3, 3\]"),
    (dict(tap_proj=torch.zeros(3, 2, 3, 3)), ValueError, r"tap_proj\.shape=.*must be \[4, 2, 3, 3\].*each direction"),
    (dict(tap_proj=torch.zeros(4, 3, 3, 3)), ValueError, r"\[4, 3, 3, 3\].*\[2, 4, 5, 6\].*must be \[4, G, 3.*divide"),
    (dict(lam_proj=GATE[:, :2]), ValueError, r"lam_proj\.shape=.*\[4, 2, 3\].*must be \[4, 4, 3\]"),
    (dict(u_proj=None), TypeError, "u_proj is a NoneType"),
    (dict(u_proj=GATE.double()), TypeError, r"u_proj\.dtype is torch\.float64.*torch\.float32"),
    (dict(skip_proj=GATE[0]), ValueError, r"skip_proj\.shape=.*\[4, 3\].*must be \[4, 4, 3\]"),
    (dict(merge=torch.ones(3)), ValueError, r"merge\.shape=.*must be \[4\]"),
    *SEGMENTS_AND_IMPLS,
    (dict(directions=None), ValueError, "directions=None"),
    (dict(directions=3), ValueError, "directions=3"),
    (dict(directions=[["down"]]), ValueError, r"directions=\[\['down'\]\]"),
    (dict(directions=(d for d in ("down",))), ValueError, "directions=<generator"),
    (dict(merge=[1.0]), TypeError, "merge is a list"),
    (dict(merge=torch.ones(1)), ValueError, r"merge\.shape=.*must be \[4\]"),
    (dict(merge=torch.ones(4).double()), TypeError, r"merge\.dtype is torch\.float64"),
    (dict(merge=torch.ones(4, device="meta")), ValueError, r"merge\.device is meta"),
    (dict(u_proj=GATE[:1], merge=torch.ones(4)), ValueError, r"u_proj\.shape=.*\[1, 4, 3\].*must be \[4, 4, 3\]"),
    (dict(skip_proj=GATE[:1], merge=torch.ones(4)), ValueError, r"skip_proj\.shape=.*\[1, 4, 3\]"),
    (dict(directions=[]), ValueError, r"directions=\[\]: pass one or more"),
    (dict(directions=["down", "down"]), ValueError, "each once"),
    (dict(directions="down"), ValueError, "directions='down'"),
    (dict(segment=0), ValueError, r"segment=0 is below 1.*None"),
    (dict(segment=2.0), TypeError, r"segment=2\.0 is a float"),
    (dict(impl="cuda"), ValueError, r"impl='cuda'.*auto, triton, cpu, reference"),
    (dict(impl="triton"), (NotImplementedError, ImportError), r"impl='triton' cannot run propagate here"),
]


@pytest.mark.parametrize(("changed", "error", "message"), PROPAGATE_CASES, ids=range(len(PROPAGATE_CASES)))
def test_propagate(changed, error, message) -> None:
    with pytest.raises(error, match=message):
        gspn.propagate(**PROPAGATE | changed)
