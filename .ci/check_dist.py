"""Whether the sdist and the wheel in a folder hold what they should, and the wheel imports on its own.

    python .ci/check_dist.py dist [VERSION]

Prints one line, or raises. VERSION, of a tag, must be that of the package, of a heading in the changelog and of the citation.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src"
# Compiled, or of a machine: never in a distribution.
UNWANTED = re.compile(r"\.(so|pyd|pyc|o)$|__pycache__|/\.venv/|^runs/")


def main(folder: str, tag: str = "") -> None:
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    if tag:
        changelog = (SOURCES.parent / "CHANGELOG.md").read_text(encoding="utf-8")
        heading = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)
        _expect(tag.removeprefix("v") == version, f"the tag {tag} is not the version {version}")
        _expect(heading is not None, f"CHANGELOG.md has no dated heading for {version}")
        citation = (SOURCES.parent / "CITATION.cff").read_text(encoding="utf-8")
        _expect(f"\nversion: {version}\n" in citation, f"CITATION.cff is not of {version}")
    packaged = {
        str(path.relative_to(SOURCES)) for path in _ours() if not UNWANTED.search(str(path))
    }
    for needed in ("stablemask/py.typed", "stablemask/backends/native/library.cpp"):
        _expect(needed in packaged, f"{needed} is gone")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        root = f"{sdist.name.removesuffix('.tar.gz')}/"
        source = {name.removeprefix(root) for name in archive.getnames()}
    _expect(packaged <= shipped, f"not in the wheel: {sorted(packaged - shipped)}")
    metadata = f"stablemask-{version}.dist-info/"
    others = {name for name in shipped - packaged if not name.startswith(metadata)}
    _expect(not others, f"in the wheel, and no part of the package: {sorted(others)}")
    in_source = {f"src/{name}" for name in packaged} | {
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Makefile",
    }
    _expect(in_source <= source, f"not in the sdist: {sorted(in_source - source)}")
    unwanted = [name for name in shipped | source if UNWANTED.search(name)]
    _expect(not unwanted, f"should not be shipped: {unwanted}")
    _install(wheel, version)
    print(f"stablemask {version}: {len(shipped)} files in the wheel, {len(source)} in the sdist")


def _ours() -> list[Path]:
    return [path for path in SOURCES.glob("stablemask/**/*") if path.is_file()]


def _install(wheel: Path, version: str) -> None:
    """Alone: what is imported before it is used must need nothing else, PyTorch neither."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
        subprocess.run(pip, check=True)
        told = subprocess.run(
            [f"{folder}/bin/stablemask", "--version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        _expect(told == f"stablemask {version}", f"the installed command says {told!r}")
        code = "import stablemask; print(stablemask.__version__)"
        subprocess.run([f"{folder}/bin/python", "-c", code], check=True, stdout=subprocess.DEVNULL)


def _expect(true: bool, message: str) -> None:
    if not true:
        raise SystemExit(message)


if __name__ == "__main__":
    main(*sys.argv[1:])
