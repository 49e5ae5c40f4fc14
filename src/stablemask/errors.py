"""The one exception for mistakes in what a user hands us."""


class InputError(ValueError):
    """Bad input: one sentence that names what is wrong and what would be right.

    The command line prints it as a single line and exits with code 2; in Python it is an ordinary
    ``ValueError``.
    """
