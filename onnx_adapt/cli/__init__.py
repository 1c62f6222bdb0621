"""The command line: it parses, calls one library function, prints and exits."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

import click

from onnx_adapt import __version__
from onnx_adapt.errors import AdaptError, MismatchError

_COMMANDS = (
    *("sites", "insert", "remove", "slots", "verify", "check"),
    *("convert", "fill", "extract", "build"),
)


class _Commands(click.Group):
    """The commands, each in a module of its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"onnx_adapt.cli.{cmd_name}").command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnx-adapt")
def cli() -> None:
    """Put adapters into exported ONNX models, prove them, take them out again.

    \b
      onnx-adapt sites model.onnx
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense
      onnx-adapt verify model.onnx model.adapted.onnx

    Exit status: 0 done, 1 ran and the answer is no, 2 could not do it.
    """


def main() -> None:
    """Run the command line; every failure is an `error:` line, never a traceback."""
    _show_notes()
    try:
        status = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except AdaptError as error:
        status = fail(error.message, error.hint)
        if isinstance(error, MismatchError):
            status = 1
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "onnx-adapt"
        status = fail(error.format_message(), f"see `{where} --help`")
    except click.ClickException as error:
        status = fail(error.format_message(), "")
    except (click.Abort, KeyboardInterrupt):
        status = fail("interrupted; nothing was changed", "") or 130
    except BrokenPipeError:
        # The reader went away (`| head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status or 0)


def _show_notes() -> None:
    """Show what the library logs, such as sites that a glob left out."""
    from onnx_adapt.cli.show import plain

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(f"note: {plain(record.getMessage())}", err=True)

    logging.getLogger("onnx_adapt").addHandler(Notes(logging.WARNING))


def fail(message: str, hint: str) -> int:
    """Print an error and what to do about it; return the exit status."""
    from onnx_adapt.cli.show import plain

    click.echo(f"error: {plain(message)}", err=True)
    if hint:
        click.echo(f"hint: {plain(hint)}", err=True)
    return 2
