"""The adapters in a folder or object store: checked, and kept for as long as they are served.

A *version* is the content of a file that passed the check, under a name that never means
anything else: `fr@3f2a9c01b2d4`. A file that is replaced makes a new version; until that has
passed, the old one is served, from a copy of our own.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from onnx_adapt.adapter.files import encode_adapter, read_adapter
from onnx_adapt.errors import (
    AdapterNotFoundError,
    AdaptError,
    RequestError,
)
from onnx_adapt.formats import FORMATS
from onnx_adapt.model.file import open_model
from onnx_adapt.serve.alias_file import AliasFile
from onnx_adapt.serve.checks import checker, refuse_unfed
from onnx_adapt.serve.choice import is_name
from onnx_adapt.serve.copies import whole

_log = logging.getLogger(__name__)

_MAPPED = next(suffix for suffix, row in FORMATS.items() if row.mapped)
"""The format of adapter files that ONNX Runtime and onnxruntime-genai map into memory."""


class _NotNowError(Exception):
    """Why a file cannot be taken at this time; it is tried again at the next sweep."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the repository has under one name.

    Attributes:
        name: The adapter's name: its file's, without the suffix.
        version: The version that is served, or '' if none is.
        reason: Why the file is not served as it is, or ''.
    """

    name: str
    version: str = ""
    reason: str = ""


class Repository:
    """Adapters by name, out of a folder or object store.

    Args:
        model: The path of the adapted model, which adapters must fit.
        location: The folder: a path, or a URL that fsspec opens.
        copies: A local folder to keep the versions in; nobody else writes there.
        base: What the base is called: no adapter can be.
        feeds: Whether what runs the model feeds what adapters need besides their weights. If
            not, it takes them mapped into memory, and versions are kept in that format.
        settle_s: How long a file must have been as it is before it is read: one that is
            written in place is the old one and the new one, in parts, meanwhile.

    Raises:
        AdaptError: If the model has no swappable slots, or there is no such folder.
    """

    def __init__(
        self,
        model: str,
        location: str,
        copies: Path,
        base: str,
        *,
        feeds: bool = True,
        settle_s: float = 0.1,
    ) -> None:
        self._check = checker(open_model(model))
        self._feeds = feeds
        self._settle_s = settle_s
        self._location = location
        self._files, self._root = fsspec.core.url_to_fs(location)
        if not self._files.isdir(self._root):
            raise RequestError(
                f"there is no folder {location}", hint="make it; adapters are put there"
            )
        self._copies = copies
        self._base = base
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}
        self._versions: dict[str, list[Path]] = {}
        self._off: set[str] = set()
        self._aliases = AliasFile(self._files, self._root, self._content)
        self.entries: Mapping[str, Entry] = {}

    def sweep(self) -> None:
        """Take up what appeared, changed or went since the last time."""
        with self._lock:
            try:
                self._files.invalidate_cache()
                listed = self._files.ls(self._root, detail=True)
            except OSError as error:  # a store that is away for a while takes nothing with it
                _log.warning("cannot list %s: %s", self._location, error)
                return
            found: dict[str, list[dict[str, Any]]] = {}
            followed = list(filter(None, map(self._followed, listed)))
            for info in followed:
                path = PurePosixPath(info["name"])
                if info["type"] == "file" and path.suffix in FORMATS:
                    found.setdefault(path.stem, []).append(info)
            if gone := self._versions.keys() - found.keys():
                self._serve({key: e for key, e in self._own().items() if key not in gone})
                for name in gone:
                    self._forget(name)
            self._seen = {name: stamp for name, stamp in self._seen.items() if name in found}
            own = {name: self._entry(name, infos) for name, infos in found.items()}
            self._aliases.look(followed)
            self._serve(own)

    def load(self, name: str) -> None:
        """Check an adapter's file again, and serve it.

        Raises:
            AdapterNotFoundError: If there is no such file.
            RequestError: If it is refused; an older version is served on.
        """
        with self._lock:
            self._seen.pop(name, None)
            self._off.discard(name)
        self.sweep()
        entry = self._present(name)
        if entry.reason:
            status = 400 if name in self._seen or name in self._aliases else 503
            hint = "put a file that fits in its place" if status == 400 else "try again"
            raise RequestError(entry.reason, hint=hint, status=status)

    def unload(self, name: str) -> None:
        """Serve an adapter no more, until it is loaded.

        Raises:
            AdapterNotFoundError: If there is none of this name.
        """
        with self._lock:
            entry = self._present(name)
            if name not in self._aliases:
                self._off.add(name)
                self._serve({**self._own(), name: _off(entry)})
                return
        self.point(name, None)

    def point(self, name: str, adapter: str | None) -> None:
        """Let an alias mean an adapter; '' is what it meant before, None is nothing.

        Raises:
            RequestError: If it meant nothing before, that adapter is not served, or the
                file of aliases is bad or cannot be written.
        """
        with self._lock:
            self._aliases.change(name, adapter, lambda item: self._version(item, self._own()))
        self.sweep()

    def read(self, version: str) -> tuple[str, bytes]:
        """The file of a version: what to call it, and its bytes.

        Raises:
            AdapterNotFoundError: If the version is not kept any more.
            FileNotFoundError: If a sweep removes it meanwhile.
        """
        path = self.path(version)
        return path.name, path.read_bytes()

    def path(self, version: str) -> Path:
        """Where the file of a version is, for as long as it is kept.

        Raises:
            AdapterNotFoundError: If it is not kept any more.
        """
        for path in self._versions.get(version.rpartition("@")[0], []):
            if path.stem == version:
                return path
        raise AdapterNotFoundError(
            f"adapter version {version!r} is gone", hint="ask again for the present one"
        )

    def _followed(self, info: dict[str, Any]) -> dict[str, Any] | None:
        """What a link leads to, as Kubernetes mounts files; None if it leads nowhere."""
        try:
            found: dict[str, Any] = info
            if info.get("islink"):
                found = self._files.info(info["name"])
        except OSError:
            return None
        return found

    def _own(self) -> dict[str, Entry]:
        """What there is besides aliases."""
        return {name: e for name, e in self.entries.items() if name not in self._aliases}

    def _serve(self, own: Mapping[str, Entry]) -> None:
        """Serve some adapters, and what aliases mean of them."""
        meant = self._aliases.meant(lambda adapter: self._version(adapter, own))
        aliases = {name: Entry(name, *found) for name, found in meant.items()}
        self.entries = dict(sorted({**own, **aliases}.items()))

    def _version(self, adapter: str, own: Mapping[str, Entry]) -> str:
        """The version that an adapter means, which may be named by its version itself."""
        name = adapter.partition("@")[0]
        why = f"there is no adapter {name!r}"
        if name in own:
            version = own[name].version
            if version and adapter in (name, version, *self._kept(name)):
                return version if adapter == name else adapter
            why = f"adapter {name!r} is not served: {own[name].reason}"
            if version:
                why = f"there is no version {adapter!r}: the file is {version!r} now"
        raise RequestError(why, hint="put a file that fits in its place")

    def _kept(self, name: str) -> list[str]:
        return [path.stem for path in self._versions.get(name, [])]

    def _present(self, name: str) -> Entry:
        if name not in self.entries:
            raise AdapterNotFoundError(
                f"there is no adapter {name!r}", hint=f"put its file into {self._location}"
            )
        return self.entries[name]

    def _entry(self, name: str, infos: list[dict[str, Any]]) -> Entry:
        """What is served under a name, after a look at its file if that is new."""
        stamp = repr(sorted((info["name"], sorted(info.items())) for info in infos))
        reason = self.entries[name].reason if name in self.entries else ""
        if self._seen.get(name) != stamp or self._lost(name):
            try:
                reason, self._seen[name] = self._refusal(name, infos), stamp
                if reason:
                    _log.warning("adapter %r is refused: %s", name, reason)
            except _NotNowError as error:
                self._seen.pop(name, None)
                if reason != (reason := str(error)):
                    _log.warning("adapter %r is not taken yet: %s", name, reason)
        kept = self._versions.get(name, [])
        entry = Entry(name, kept[-1].stem if kept else "", reason)
        return _off(entry) if name in self._off else replace(entry, reason=reason)

    def _refusal(self, name: str, infos: list[dict[str, Any]]) -> str:
        """Make a version of a file; or why it cannot be one."""
        if not is_name(name):
            return "the file's name: letters, digits, '.', '_' and '-' will do"
        if name == self._base:
            return f"the base is called {name!r}"
        if len(infos) > 1:
            files = [PurePosixPath(info["name"]).name for info in infos]
            return f"several files have this name: {', '.join(sorted(files))}"
        path = PurePosixPath(infos[0]["name"])
        try:
            data = self._content(infos[0])
            adapter = read_adapter(data, Path(path.name))
            self._check(adapter)
            suffix, kept = path.suffix, data
            if not self._feeds:
                refuse_unfed(adapter)
                if suffix != _MAPPED:
                    suffix, kept = _MAPPED, encode_adapter(adapter, Path(name + _MAPPED))
        except AdaptError as error:
            return error.message
        try:
            self._keep(name, f"{hashlib.sha256(data).hexdigest()[:12]}{suffix}", kept)
        except OSError as error:
            raise _NotNowError(f"cannot be kept: {error}") from error
        return ""

    def _content(self, info: Mapping[str, Any]) -> bytes:
        """The bytes of a file that nobody writes just now."""
        name, written = info["name"], info.get("mtime")
        try:
            if isinstance(written, float) and time.time() - written < self._settle_s:
                time.sleep(self._settle_s)
                self._refuse_changed(info)  # what is a pipe now would be read for ever
            data: bytes = self._files.cat_file(name)
            self._refuse_changed(info)
        except _NotNowError:
            raise
        except Exception as error:  # the libraries of object stores may raise anything
            raise _NotNowError(f"cannot be read: {error}") from error
        return data

    def _refuse_changed(self, info: Mapping[str, Any]) -> None:
        """Refuse a file that is not as it was; object stores change theirs at once."""
        if "mtime" in info:
            now = self._files.info(info["name"])
            if (now["type"], now["mtime"]) != (info["type"], info["mtime"]):
                raise _NotNowError("it is being written")

    def _keep(self, name: str, version: str, data: bytes) -> None:
        """Copy a version, and keep the one before: requests for it may be under way."""
        path = self._copies / f"{name}@{version}"
        known = self._versions.get(name, [])
        if not path.exists():  # else it may be mapped, and must not be written again
            with whole(path):
                path.write_bytes(data)
        kept = [item for item in known if item != path]
        pinned = [old for old in kept[:-1] if old.stem in self._aliases.pinned]
        for old in kept[:-1]:
            if old not in pinned:
                old.unlink(missing_ok=True)
        self._versions[name] = [*pinned, *kept[-1:], path]

    def _forget(self, name: str) -> None:
        for path in self._versions.pop(name):
            path.unlink(missing_ok=True)

    def _lost(self, name: str) -> bool:
        """Whether somebody removed our copy, such as what cleans temporary folders."""
        kept = self._versions.get(name, [])
        return bool(kept) and not kept[-1].exists()


def _off(entry: Entry) -> Entry:
    return replace(entry, version="", reason="it was unloaded")
