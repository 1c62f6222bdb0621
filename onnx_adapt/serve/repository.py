"""The adapters in a folder or object store: checked, and kept for as long as they are served.

A *version* is the content of a file that passed the check, under a name that never means
anything else: `fr@3f2a9c01b2d4`. A file that is replaced makes a new version; until that has
passed, the old one is served, from a copy of our own.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.files import read_adapter
from onnx_adapt.adapter.fitting import (
    manifest_misfits,
    refuse_misfits,
    replaceable_of,
    required_manifest,
)
from onnx_adapt.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdaptError,
    RequestError,
    SaveError,
    SlotError,
    reason,
)
from onnx_adapt.formats import FORMATS
from onnx_adapt.model.file import Model, open_model
from onnx_adapt.model.whole_files import write_files
from onnx_adapt.serve.aliases import FILE, Aliases, changed, read_aliases, write_aliases
from onnx_adapt.serve.choice import is_name

_log = logging.getLogger(__name__)

_ALIASES = "@aliases"
"""What the file of aliases is seen under: no adapter can be called so."""


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
        feeds: Whether what runs the model feeds what adapters need besides their weights.

    Raises:
        AdaptError: If the model has no swappable slots, or there is no such folder.
    """

    def __init__(
        self, model: str, location: str, copies: Path, base: str, *, feeds: bool = True
    ) -> None:
        self._check = checker(open_model(model))
        self._feeds = feeds
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
        self._aliases: Aliases = {}
        self._alias_problem = ""
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
            aliases = [i for i in listed if PurePosixPath(i["name"]).name == FILE]
            for info in listed:
                path = PurePosixPath(info["name"])
                if info["type"] == "file" and path.suffix in FORMATS:
                    found.setdefault(path.stem, []).append(info)
            for name in self._versions.keys() - found.keys():
                self._forget(name)
            known = {*found, _ALIASES}
            self._seen = {name: stamp for name, stamp in self._seen.items() if name in known}
            self._take_aliases(aliases)
            self._serve({name: self._entry(name, infos) for name, infos in found.items()})

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
            raise RequestError(entry.reason, hint="put a file that fits in its place")

    def unload(self, name: str) -> None:
        """Serve an adapter no more, until it is loaded.

        Raises:
            AdapterNotFoundError: If there is none of this name.
        """
        with self._lock:
            entry = self._present(name)
            alias = name in self._aliases
            if not alias:
                self._off.add(name)
                self._serve({**self._own(), name: _off(entry)})
        if alias:
            self.point(name, None)

    def point(self, name: str, adapter: str | None) -> None:
        """Let an alias mean an adapter; '' is what it meant before, None is nothing.

        Raises:
            RequestError: If it meant nothing before, that adapter is not served, or the
                file of aliases is bad or cannot be written.
        """
        with self._lock:
            path = f"{self._root}/{FILE}"
            try:
                known = read_aliases(self._files.cat_file(path))
            except FileNotFoundError:
                known = {}
            except (OSError, RequestError) as error:
                raise RequestError(f"{FILE}: {reason(error)}", hint="mend it first") from error
            wanted = changed(known, name, adapter)
            if name in wanted:
                version, why = self._meant(wanted[name].adapter, self._own())
                if not version:
                    raise RequestError(why, hint="put a file that fits in its place")
            try:
                _write(self._files, path, write_aliases(wanted))
            except (OSError, SaveError) as error:
                why = f"{FILE} cannot be written: {reason(error)}"
                raise RequestError(why, hint="change it where it is", status=500) from error
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

    def _take_aliases(self, infos: list[dict[str, Any]]) -> None:
        """Take up the file of aliases if it is new; while it is bad, the last good one."""
        if not infos:
            self._aliases, self._alias_problem = {}, ""
            self._seen.pop(_ALIASES, None)
        elif self._seen.get(_ALIASES) != (stamp := repr(sorted(infos[0].items()))):
            try:
                self._aliases = read_aliases(self._files.cat_file(infos[0]["name"]))
                self._alias_problem = ""
            except (OSError, RequestError) as error:
                self._alias_problem = f"{FILE}: {reason(error)}"
                _log.warning("aliases stay as they were: %s", self._alias_problem)
            self._seen[_ALIASES] = stamp

    def _own(self) -> dict[str, Entry]:
        """What there is besides aliases."""
        return {name: e for name, e in self.entries.items() if name not in self._aliases}

    def _serve(self, own: Mapping[str, Entry]) -> None:
        """Serve some adapters, and what aliases mean of them."""
        aliased = {}
        for name, alias in self._aliases.items():
            version, why = self._meant(alias.adapter, own)
            aliased[name] = Entry(name, version, why or self._alias_problem)
        self.entries = dict(sorted({**own, **aliased}.items()))

    def _meant(self, adapter: str, own: Mapping[str, Entry]) -> tuple[str, str]:
        """The version that an alias means, or '' and why it means none."""
        name = adapter.partition("@")[0]
        if name not in own:
            return "", f"there is no adapter {name!r}"
        version = own[name].version
        if not version:
            return "", f"adapter {name!r} is not served: {own[name].reason}"
        if adapter in (name, version):
            return version, ""
        if any(path.stem == adapter for path in self._versions[name]):
            return adapter, ""
        return "", f"there is no version {adapter!r}: the file is {version!r} now"

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
        if self._seen.get(name) != stamp:
            reason = self._refusal(name, infos)
            self._seen[name] = stamp
            if reason:
                _log.warning("adapter %r is refused: %s", name, reason)
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
            data = self._files.cat_file(infos[0]["name"])
            adapter = read_adapter(data, Path(path.name))
            self._check(adapter)
            if not self._feeds:
                _refuse_unfed(adapter)
        except AdaptError as error:
            return error.message
        except OSError as error:
            return f"cannot be read: {error}"
        self._keep(name, path.suffix, data)
        return ""

    def _keep(self, name: str, suffix: str, data: bytes) -> None:
        """Copy a version, and keep the one before: requests for it may be under way."""
        digest = hashlib.sha256(data).hexdigest()[:12]
        path = self._copies / f"{name}@{digest}{suffix}"
        known = self._versions.get(name, [])
        if path not in known:  # else it may be mapped, and must not be written again
            path.write_bytes(data)
        kept = [item for item in known if item != path]
        pinned = {alias.adapter for alias in self._aliases.values()}
        for old in kept[:-1]:
            if old.stem not in pinned:
                old.unlink()
        stay = [old for old in kept[:-1] if old.stem in pinned]
        self._versions[name] = [*stay, *kept[-1:], path]

    def _forget(self, name: str) -> None:
        for path in self._versions.pop(name):
            path.unlink()


def _refuse_unfed(adapter: Adapter) -> None:
    """Refuse an adapter that would be without effect, or wrong, by its weights alone."""
    if adapter.invocation_tokens or adapter.initial_state:
        what = "invocation tokens" if adapter.invocation_tokens else "a first past"
        raise AdapterError(f"it has {what}, which onnxruntime-genai does not feed")


def _write(files: Any, path: str, data: bytes) -> None:
    """Write a file whole or not at all, as object stores do by themselves."""
    if "file" in files.protocol:
        write_files([(Path(path), [data])])
    else:
        files.pipe_file(path, data)


def _off(entry: Entry) -> Entry:
    return replace(entry, version="", reason="it was unloaded")


def checker(model: Model) -> Callable[[Adapter], None]:
    """What raises an AdapterError unless an adapter fits the swappable slots of a model.

    Raises:
        SlotError: If the model has none.
    """
    manifest = required_manifest(model)
    slots = tuple(slot for slot in manifest.slots if slot.swappable)
    weights = tuple(weight for weight in manifest.weights if weight.swappable)
    if not slots and not weights:
        raise SlotError(
            f"the slots of {model.label} are baked: their weights are constants",
            hint="insert without --baked to swap adapters",
        )
    swappable = replace(manifest, slots=slots, weights=weights)
    replaceable = replaceable_of(model, weights)

    def check(adapter: Adapter) -> None:
        refuse_misfits(manifest_misfits(swappable, replaceable, adapter), adapter, model.label)

    return check
