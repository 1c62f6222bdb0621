"""Adapters that are loaded before a server is ready, and those that stay loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.choice import is_alias, is_name

if TYPE_CHECKING:
    from onnx_adapt.serve.held import Recent

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Warm:
    """Adapters that are loaded before anybody asks for them.

    Attributes:
        preload: Those that are loaded at the start.
        pin: Those that are, and stay loaded. When what a name means changes, the new
            version is loaded, and the old one is as any other.
    """

    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()


COLD = Warm()
"""Adapters are loaded when they are asked for."""


def read_warm(preload: Sequence[str], pin: Sequence[str], most: int) -> Warm:
    """Adapters to load, each by its name or as `@FILE` with a name on each line.

    Args:
        preload: Those to load at the start.
        pin: Those to keep loaded.
        most: How many can be loaded.

    Raises:
        RequestError: If a file cannot be read, a name is none, or there are too many.

    Example:
        >>> read_warm(["fr"], ["de", "fr@stable"], 32)
        Warm(preload=('fr',), pin=('de', 'fr@stable'))
    """
    found = [tuple(dict.fromkeys(_names(given))) for given in (preload, pin)]
    count = len({*found[0], *found[1]})
    if count > most:
        raise RequestError(
            f"{count} adapters are to be loaded at the start, and {most} can be",
            hint="name fewer, or raise --max-adapters",
        )
    return Warm(*found)


def _names(given: Sequence[str]) -> list[str]:
    names: list[str] = []
    for item in given:
        names += _lines(item[1:]) if item.startswith("@") else [item]
    for name in names:
        if not is_name(name) and not is_alias(name):
            raise RequestError(
                f"{name[:100]!r} is no name of an adapter", hint="give a name, or @FILE"
            )
    return names


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} cannot be read: {error}", hint="a text with a name on each line"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


class Warmer:
    """Loads adapters before anybody asks for them.

    Args:
        warm: Which.
        hold: What keeps adapters loaded.
        version: Finds the version that a name means.
    """

    def __init__(self, warm: Warm, hold: Recent, version: Callable[[str], str]) -> None:
        self._warm = warm
        self._hold = hold
        self._version = version
        self._pinned: set[str] = set()

    async def begin(self) -> None:
        """Load them.

        Raises:
            AdaptError: If one is not served, or cannot be loaded.
        """
        try:
            versions = [self._version(name) for name in (*self._warm.preload, *self._warm.pin)]
        except AdapterNotFoundError as error:
            raise RequestError(
                f"what is to be loaded at the start is not there: {error.message}",
                hint="put its file into the folder, or name others as --preload and --pin",
            ) from error
        await self.follow()
        for version in versions:
            await self._hold(version)

    async def follow(self) -> None:
        """Pin what the names mean now."""
        versions = {found for name in self._warm.pin if (found := self._present(name))}
        if versions == self._pinned:
            return
        self._pinned = versions
        try:
            await self._hold.pin(versions)
        except AdaptError as error:  # who asks for it is told so too
            _log.warning("an adapter that is pinned is not loaded: %s", error.message)

    def _present(self, name: str) -> str:
        try:
            return self._version(name)
        except AdapterNotFoundError:
            return ""
