"""The entry point of `roundoff`: it collects the commands, and shows an expected error as one message.

Nothing heavy is imported here, so that `roundoff --help` is fast.
"""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import click

from roundoff import __version__
from roundoff.actions.terminal import tolerant_streams
from roundoff.commands.build_tiny import build_tiny_command
from roundoff.commands.compare import compare_command
from roundoff.commands.eval import eval_command
from roundoff.commands.export import export_command
from roundoff.commands.extend import extend_command
from roundoff.commands.import_table import import_table_command
from roundoff.commands.list import list_command
from roundoff.commands.mismatch import mismatch_command
from roundoff.commands.plan import plan_command
from roundoff.commands.recommend import recommend_command
from roundoff.commands.report import report_command
from roundoff.commands.run import run_command
from roundoff.commands.runs import runs_command
from roundoff.commands.scan import scan_command
from roundoff.commands.show import show_command
from roundoff.commands.sweep import sweep_command
from roundoff.commands.tensorboard import tensorboard_command
from roundoff.commands.verl_config import verl_config_command
from roundoff.config import nearest
from roundoff.errors import RoundoffError


class Commands(click.Group):
    """The commands in the order in which a user needs them; for an unknown one the nearest is suggested."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order in which they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named first in the arguments, or an error with a suggestion."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], tuple(self.commands))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="roundoff")
def cli() -> None:
    """Will RL fine-tuning of a language model survive the arithmetic of its chip, and does a remedy help?

    Start with `roundoff run quickstart`, then `roundoff report`.
    """


for command in (
    list_command,
    show_command,
    run_command,
    sweep_command,
    extend_command,
    eval_command,
    export_command,
    report_command,
    compare_command,
    plan_command,
    import_table_command,
    runs_command,
    tensorboard_command,
    scan_command,
    mismatch_command,
    recommend_command,
    verl_config_command,
    build_tiny_command,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line: an expected error becomes one message and a non-zero exit code, without a traceback."""
    with tolerant_streams():
        _main()


def _main() -> None:
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except OSError as error:
        if isinstance(error, RoundoffError):
            _fail(str(error))
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.strerror}: {error.filename or 'while writing'}; nothing was left half-written")
    except Exception as error:  # only roundoff's own errors are expected; all others are raised
        if not isinstance(error, RoundoffError):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    click.secho(f"roundoff: {message}", fg="red", err=True)
    sys.exit(2)
