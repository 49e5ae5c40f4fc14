"""``python -m studies [STUDY ...]``, from a clone."""

import sys
from collections.abc import Sequence

from stablemask.cli.main import exit_code, run_with_options


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    from . import command  # here, where the libraries that it imports have been told to be quiet

    return run_with_options(command.run, argv, "python -m studies", command.__doc__)


if __name__ == "__main__":
    sys.exit(main())
