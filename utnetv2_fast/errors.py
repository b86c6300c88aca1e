"""The two ways in which a command can fail; everything else is a bug and keeps its traceback."""


class InputError(Exception):
    """The user's files or arguments cannot be used. One sentence: what is wrong with which file, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The work itself failed (a loss that is not finite, say). One sentence; the command line exits with code 1."""
