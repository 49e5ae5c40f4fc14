"""The newest versions that the whole suite has passed with, and what is installed that is newer.

The oldest stand in pyproject.toml; ``make matrix`` runs both ends. A newer version is no error: it is
told in one line, so that wrong results can be traced to it.
"""

import functools
import re
import sys
from importlib.metadata import PackageNotFoundError, version

NEWEST_TESTED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "numpy": "2.4.6",
}


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def newer_than_tested() -> str | None:
    """One line that names what is installed in a newer version than was tested, None where nothing is."""
    newer = []
    for package, tested in NEWEST_TESTED.items():
        here = installed(package)
        if here is not None and release(here) > release(tested):
            newer.append(f"{package} {here} (tested up to {tested})")
    return f"newer than what stablemask was tested with: {', '.join(newer)}" if newer else None


@functools.cache
def tell_newer() -> None:
    """Print that line to stderr, once in a process."""
    if line := newer_than_tested():
        print(line, file=sys.stderr, flush=True)


def release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0): the numbers that are compared, and no more than three."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
