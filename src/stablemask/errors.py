"""The exceptions that carry a message for the user rather than a bug for us."""


class InputError(ValueError):
    """Bad input: one sentence that names what is wrong and what would be right.

    The command line prints it as a single line and exits with code 2; in Python it is an ordinary
    ``ValueError``.
    """


class RunError(RuntimeError):
    """A run that began well cannot go on, such as a loss that is no longer finite.

    The command line prints it as a single line and exits with code 1.
    """
