"""The command line: it parses, calls one library function, prints and exits."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from onnx_adapt import __version__
from onnx_adapt.cli.outputs import be_quiet, drop_output, print_json, say
from onnx_adapt.errors import AdaptError, MismatchError, UncheckedWarning

_COMMANDS = (
    *("sites", "insert", "remove", "slots", "verify", "check"),
    *("report", "convert", "fill", "extract", "run", "build", "pack", "pack-rows", "export"),
    *("merge", "compress", "subtract", "quantize", "inspect", "diff", "suggest"),
    *("train", "train-graph"),
    *("serve", "completion"),
)

COMPLETE_VARIABLE = "_ONNX_ADAPT_COMPLETE"
"""The environment variable by which completion scripts ask for completions."""

_INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended: 128 and the number of the signal."""

_HELP = "`onnx-adapt --help` lists the commands"


def _be_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        be_quiet(ctx)


_QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_be_quiet,
    help="Print nothing but errors on stderr.",
)
"""An option of the program and of every command, as people write it at either place."""


class _Commands(click.Group):
    """The commands, each in a module of its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"onnx_adapt.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        if _QUIET not in command.params:
            command.params.append(_QUIET)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            meant = difflib.get_close_matches(name, _COMMANDS, 1, 0.5)
            guess = f" (Did you mean '{meant[0]}'?)" if meant else ""
            ctx.fail(f"No such command '{name}'.{guess}")
        found, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:  # as completions parse
            _refuse_repeated(click.Context(command, ctx, found), rest)
        return found, command, rest


def _refuse_repeated(ctx: click.Context, args: list[str]) -> None:
    """Refuse an option that takes one value and is given several: click takes the last."""
    *_, given = ctx.command.make_parser(ctx).parse_args(list(args))
    for param in given:
        takes_one = isinstance(param, click.Option) and not (
            param.multiple or param.is_flag or param.count
        )
        if takes_one and given.count(param) > 1:
            ctx.fail(f"Option '{param.opts[-1]}' is given more than once.")


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[_QUIET],
)
@click.version_option(__version__, prog_name="onnx-adapt")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Insert adapters into exported ONNX models, prove them, and remove them again.

    \b
      onnx-adapt sites model.onnx
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense
      onnx-adapt verify model.onnx model.adapted.onnx

    `onnx-adapt completion bash` (or zsh, fish) prints a completion script for your shell.

    Exit status: 0 if it is done, 1 if a check failed, 2 if it could not be done. With --json
    an error is a JSON document as well.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main() -> None:
    """Run the command line; every failure is an `error:` line, never a traceback."""
    _show_notes()
    if sys.stdout is None:
        sys.exit(fail("standard output is closed", "send it to /dev/null instead"))
    try:
        status = cli.main(
            prog_name="onnx-adapt", complete_var=COMPLETE_VARIABLE, standalone_mode=False
        )
    except AdaptError as error:
        _print_error(error.message, error.hint, type(error).__name__)
        status = fail(error.message, error.hint)
        if isinstance(error, MismatchError):
            status = 1
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "onnx-adapt"
        hint = f"see `{where} --help`"
        _print_error(error.format_message(), hint, "UsageError")
        status = fail(error.format_message(), hint)
    except click.ClickException as error:
        status = fail(error.format_message(), _HELP)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; nothing was changed")
        status = _INTERRUPTED
    except MemoryError as error:
        status = fail(f"not enough memory: {error}", "choose smaller sizes")
    except OSError as error:
        _print_error(str(error), "", "OSError")
        drop_output()
        status = fail(str(error), "check the path, the permissions and the free space")
    sys.exit(status or 0)


def _print_error(message: str, hint: str, kind: str) -> None:
    """Print an error as the document that a script asked for with `--json`."""
    if "--json" in sys.argv[1:]:
        with contextlib.suppress(AdaptError):
            print_json({"error": {"kind": kind, "message": message, "hint": hint}})


def _show_notes() -> None:
    """Print what the library logs and the warnings it issues."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"note: {record.getMessage()}")

    logging.getLogger("onnx_adapt").addHandler(Notes(logging.WARNING))
    shown = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *a: Any, **kw: Any) -> None:
        if issubclass(category, UncheckedWarning):
            say(f"warning: {message}")
        else:
            shown(message, category, *a, **kw)

    warnings.simplefilter("always", UncheckedWarning)
    warnings.showwarning = tell


def fail(message: str, hint: str = "") -> int:
    """Print an error and its hint; return the exit status.

    The command has ended by now, so `--quiet` does not hide this.
    """
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")
    return 2
