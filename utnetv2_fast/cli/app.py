"""`utnetv2-fast`: the verbs, and how they end: 0 done or stopped, 1 failed, 2 the input cannot be used."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

import utnetv2_fast
from utnetv2_fast.cli.ablate import ablate
from utnetv2_fast.cli.attention import attention
from utnetv2_fast.cli.compare import compare
from utnetv2_fast.cli.console import print_json
from utnetv2_fast.cli.convert import convert
from utnetv2_fast.cli.cost import cost
from utnetv2_fast.cli.curve import curve
from utnetv2_fast.cli.demo import demo
from utnetv2_fast.cli.doctor import doctor
from utnetv2_fast.cli.domains import domains
from utnetv2_fast.cli.evaluate import evaluate
from utnetv2_fast.cli.info import info
from utnetv2_fast.cli.predict import predict
from utnetv2_fast.cli.prepare import prepare
from utnetv2_fast.cli.train import train
from utnetv2_fast.cli.verify import verify
from utnetv2_fast.errors import InputError, RunError, Stopped
from utnetv2_fast.ranks import ALONE, ranks_of_this_job

# What the user can put right without knowing the program: no room, no right, no such place.
USERS_OS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
FULL_MEMORY = "The memory of this machine is full; close other programs, or use a machine with more of it."

app = typer.Typer(
    name="utnetv2-fast",
    help="Segment medical scans with UTNetV2.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    *(train, predict, evaluate, prepare, verify, convert, demo),
    *(compare, curve, domains, ablate, cost, attention, info, doctor),
):
    app.command()(verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{utnetv2_fast.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors that are the user's to mend are one sentence, all others keep their traceback."""
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Stopped as stopped:
        if ranks_of_this_job().first:
            if "--json" in sys.argv:
                print_json({"stopped": str(stopped), "exit_code": 0})
            sys.stderr.write(f"{stopped}\n")
        sys.exit(0)
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        _fail(
            f"{error.filename}: a file stands where a folder is needed, or the other way round; name another path.", 2
        )
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            _fail(FULL_MEMORY, 1)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        _fail("The memory of the GPU is full; use a smaller --batch-size, or --device cpu.", 1)
    except MemoryError:
        _fail(FULL_MEMORY, 1)
    except OSError as error:
        if error.errno not in USERS_OS_ERRORS:
            raise
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    # Names in files may hold anything, also what moves the cursor of a terminal.
    message = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message)
    try:
        ranks = ranks_of_this_job()
    except InputError:  # and this is what the message says
        ranks = ALONE
    if "--json" in sys.argv and ranks.first:
        print_json({"error": message, "exit_code": code})
    sys.stderr.write(f"error{'' if ranks.count == 1 else f' (rank {ranks.rank})'}: {message}\n")
    sys.exit(code)
