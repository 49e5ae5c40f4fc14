"""The command line: `main.py` finds the command, `parser.py` reads its options, one file a command.

Options stand in `options.py`, so that they are read before anything heavy is imported. A command is a module with a
``run(options)``.
"""
