"""`onnx-adapt completion`."""

from __future__ import annotations

import click

from onnx_adapt.cli.outputs import emit, say

_INTO = {
    "bash": "echo 'eval \"$(onnx-adapt completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(onnx-adapt completion zsh)\"' >> ~/.zshrc   # after compinit",
    "fish": "onnx-adapt completion fish > ~/.config/fish/completions/onnx-adapt.fish",
}


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(list(_INTO)))
def command(shell: str) -> None:
    """Print a script that makes SHELL complete commands, options, files and names.

    \b
      eval "$(onnx-adapt completion bash)"                 # in ~/.bashrc
      eval "$(onnx-adapt completion zsh)"                  # in ~/.zshrc, after compinit
      onnx-adapt completion fish > ~/.config/fish/completions/onnx-adapt.fish

    Names of nodes, modules and slots are read from the model that is already on the line:
    `onnx-adapt insert model.onnx --after enc<TAB>`.
    """
    from click.shell_completion import get_completion_class

    from onnx_adapt.cli import COMPLETE_VARIABLE, cli

    kind = get_completion_class(shell)
    assert kind is not None
    emit(kind(cli, {}, "onnx-adapt", COMPLETE_VARIABLE).source())
    say(f"to load it in every shell: {_INTO[shell]}")
