"""The file of aliases beside the adapters: read when it changes, and changed when asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from onnx_adapt.errors import RequestError, SaveError, reason
from onnx_adapt.model.whole_files import write_files
from onnx_adapt.serve.aliases import Aliases, changed, read_aliases, write_aliases

FILE = "aliases.json"
"""The name of the file."""

_log = logging.getLogger(__name__)

Find = Callable[[str], str]
"""Finds the version that an adapter means; raises a RequestError if none is served."""


class AliasFile:
    """The aliases of a repository; while the file is bad, the last good ones.

    Args:
        files: The file system that it is in, as fsspec has it.
        folder: The folder that it is in.
        read: Reads a file that is listed, unless somebody writes it just now.
    """

    def __init__(
        self, files: Any, folder: str, read: Callable[[Mapping[str, Any]], bytes]
    ) -> None:
        self._files = files
        self._path = f"{folder}/{FILE}"
        self._read = read
        self._aliases: Aliases = {}
        self._problem = ""
        self._seen = ""

    @property
    def pinned(self) -> set[str]:
        """The adapters, and versions of some, that aliases mean."""
        return {alias.adapter for alias in self._aliases.values()}

    def __contains__(self, name: str) -> bool:
        """Whether there is an alias of this name."""
        return name in self._aliases

    def look(self, listed: Sequence[Mapping[str, Any]]) -> None:
        """Take up the file if it is new among the files that are listed."""
        infos = [info for info in listed if PurePosixPath(info["name"]).name == FILE]
        stamp = repr([sorted(info.items()) for info in infos])
        if stamp == self._seen:
            return
        before, self._problem = self._problem, ""
        try:
            self._aliases = read_aliases(self._read(infos[0])) if infos else {}
            self._seen = stamp
        except RequestError as error:
            self._problem, self._seen = f"{FILE}: {reason(error)}", stamp
        except Exception as error:  # what cannot be read at this time is tried again
            self._problem, self._seen = f"{FILE}: {error}", ""
        if self._problem not in ("", before):
            _log.warning("aliases stay as they were: %s", self._problem)

    def meant(self, find: Find) -> dict[str, tuple[str, str]]:
        """The version that each alias means, or '', and what is wrong with it."""
        found: dict[str, tuple[str, str]] = {}
        for name, alias in self._aliases.items():
            try:
                found[name] = find(alias.adapter), self._problem
            except RequestError as error:
                found[name] = "", error.message
        return found

    def change(self, name: str, adapter: str | None, find: Find) -> None:
        """Let an alias mean an adapter; '' is what it meant before, None is nothing.

        Raises:
            RequestError: If it meant nothing before, that adapter is not served, or the
                file is bad or cannot be written.
        """
        known: Aliases = {}
        try:
            known = read_aliases(self._files.cat_file(self._path))
        except FileNotFoundError:
            pass
        except (OSError, RequestError) as error:
            raise RequestError(f"{FILE}: {reason(error)}", hint="mend it first") from error
        wanted = changed(known, name, adapter)
        if name in wanted:
            find(wanted[name].adapter)
        try:
            self._write(write_aliases(wanted))
        except (OSError, SaveError) as error:
            why = f"{FILE} cannot be written: {reason(error)}"
            raise RequestError(why, hint="change it where it is", status=500) from error

    def _write(self, data: bytes) -> None:
        """Write the file whole or not at all, as object stores do by themselves."""
        if "file" in self._files.protocol:
            write_files([(Path(self._path), [data])])
        else:
            self._files.pipe_file(self._path, data)
