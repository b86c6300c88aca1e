"""The two ways in which a command can fail, and how it is stopped; all else is a bug and keeps its traceback."""


class InputError(Exception):
    """The user's files or arguments cannot be used. One sentence: what is wrong with which file, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The work itself failed (a loss that is not finite, say). One sentence; the command line exits with code 1."""


class DivergedError(RunError):
    """A training whose loss or gradient is no finite number any more. The same training would come to it again."""


class Stopped(Exception):  # noqa: N818 (no failure)
    """The work was asked to stop, and did so where it can go on: `where` is a sentence, `go_on` the command for it.

    The command line prints both and exits with 0.
    """

    def __init__(self, where: str, go_on: str = "the same command") -> None:
        super().__init__(where, go_on)
        self.where, self.go_on = where, go_on

    def __str__(self) -> str:
        return f"{self.where} Go on with {self.go_on}."
