"""Commands that we print to be copied: they work as they stand, in an active environment or in none."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

_CLONE = Path(__file__).parents[2]


def runnable(command: str) -> str:
    """A command line that begins with ``stablemask`` or ``pip``, as the present shell can run it.

    Where the name alone would not be found, or is another environment's, the path of ours stands in its
    place, relative to the working directory where it lies below that.
    """
    name, space, rest = command.partition(" ")
    ours = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found is not None and ours.exists() and Path(found).samefile(ours):
        return command
    if ours.exists():
        return shlex.quote(_short(ours)) + space + rest
    return f"{shlex.quote(_short(Path(sys.executable)))} -m {command}"


def pip_install(extra: str) -> str:
    """The command that brings an optional part of the package, which is installed from a clone."""
    if (_CLONE / "pyproject.toml").is_file():
        return runnable(f"pip install -e {shlex.quote(f'{_short(_CLONE)}[{extra}]')}")
    return f"pip install '.[{extra}]' in a clone of stablemask"


def _short(path: Path) -> str:
    below = os.path.relpath(path)
    return str(path) if re.match(r"\.\.(/|$)", below) else below
