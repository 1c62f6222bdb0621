"""The options of `onnx-adapt serve` for those who run many servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])

FLEET = ("preload", "pin")
"""Those that are for a server of one process alone."""

_OPTIONS = (
    click.option(
        "--preload",
        multiple=True,
        help="An adapter to load before the server is ready, or @FILE with one on each line; "
        "not on Ray.",
    ),
    click.option(
        "--pin",
        multiple=True,
        help="An adapter, or @FILE, to load before the server is ready and to keep loaded; "
        "not on Ray.",
    ),
    click.option(
        "--max-per-adapter",
        type=click.IntRange(0),
        default=0,
        help="How many requests for one adapter may be under way, those that wait included; "
        "more get a 429. By default there is no limit.",
    ),
    click.option(
        "--access-log",
        default="",
        help="Write a line of JSON for each request to this file, or to stderr with -.",
    ),
)


def fleet_options(command: _F) -> _F:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
