"""The command line: `main.py` finds the command, `parser.py` reads its options, one file a command.

A command is a module with a one-line ``SUMMARY`` and a ``run(options)`` whose annotation names the
dataclass of its options.
"""
