"""The adapters of a session: loaded by name, the least recently used evicted."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.adapter.blending import blend, refuse_odd_weights
from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError, AdapterNotFoundError
from onnx_adapt.session import loaded
from onnx_adapt.session.loaded import Loaded
from onnx_adapt.session.mixing import Pack, pack, row_feeds
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.words import nearest

Source = Adapter | str | os.PathLike[str]

_BLENDS = 16
"""Blends that are kept; making one again costs a copy of its weights."""

_PACKS = 8
"""Sets of adapters side by side that are kept; each is a copy of all their weights."""

Shares = tuple[tuple[Loaded, float], ...]
"""Adapters with their weights in a blend; empty is the base."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What a session has loaded under one name.

    Attributes:
        name: The name to run it by.
        path: The file it came from, or None.
        bytes: Of its weights.
        last_used: When a run last asked for it, in seconds since the epoch.
    """

    name: str
    path: Path | None
    bytes: int
    last_used: float


@dataclass(frozen=True, slots=True, eq=False)
class _Origin:
    """Where an adapter of a name came from; the next one of that name has another."""

    path: Path | None
    allow_partial: bool


class AdapterCache:
    """Adapters by name, for many threads.

    A run holds the adapter it uses, so one that is evicted, unloaded or replaced under a
    run is freed when that run ends.

    Args:
        check: Takes an adapter, whether it may be partial and whether it is a blend. Raises
            if it does not fit the model; gives weights that keep the slots off that a
            partial one does not cover.
        base_values: The base's own values of replaceable weights, for blends.
        max_adapters: How many may be loaded, or None.
        max_bytes: How many bytes of weights may be loaded, or None.
    """

    def __init__(
        self,
        check: Callable[[Adapter, bool, bool], Mapping[str, Any]],
        base_values: Callable[[], Mapping[str, Array]],
        max_adapters: int | None,
        max_bytes: int | None,
    ) -> None:
        for label, limit in (("max_adapters", max_adapters), ("max_bytes", max_bytes)):
            if limit is not None and (type(limit) is not int or limit < 1):
                raise AdapterError(
                    f"{label} is {limit!r}", hint="give a number from 1, or None"
                )
        self._check = check
        self._base_values = base_values
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._adapters: OrderedDict[str, Loaded] = OrderedDict()
        self._blends: OrderedDict[Shares, Loaded] = OrderedDict()
        self._packs: OrderedDict[tuple[Loaded, ...], tuple[Pack, Loaded] | None] = (
            OrderedDict()
        )
        self._origins: dict[str, _Origin] = {}

    def load(self, name: str, source: Source, *, allow_partial: bool) -> LoadedAdapter:
        """Load and check an adapter; it takes the place of one of the same name."""
        if not isinstance(name, str) or not name:
            raise AdapterError(f"{name!r} is no name for an adapter", hint="give a text")
        fresh = self._read(source, allow_partial=allow_partial)
        self._refuse_too_large(name, fresh)
        with self._lock:
            self._origins[name] = _Origin(fresh.path, allow_partial)
            self._put(name, fresh)
        return _described(name, fresh)

    def _read(self, source: Source, *, allow_partial: bool, blended: bool = False) -> Loaded:
        adapter, fresh = loaded.read(source)
        fresh.rest = self._check(adapter, allow_partial, blended)
        return fresh

    def _refuse_too_large(self, name: str, fresh: Loaded) -> None:
        if self._max_bytes is not None and fresh.size > self._max_bytes:
            raise AdapterError(
                f"adapter {name!r} has {fresh.size} bytes of weights; max_bytes is "
                f"{self._max_bytes}",
                hint="raise max_bytes",
            )

    def _put(self, name: str, fresh: Loaded) -> None:
        self._adapters[name] = fresh
        self._adapters.move_to_end(name)
        self._evict()

    def _evict(self) -> None:
        """Keep to the limits: what can be made again goes first, then the least used."""
        for made, most in ((self._packs, _PACKS), (self._blends, _BLENDS)):
            while len(made) > most or (made and self._over_bytes()):
                made.popitem(last=False)
        most = self._max_adapters or len(self._adapters)
        while len(self._adapters) > most or (len(self._adapters) > 1 and self._over_bytes()):
            self._adapters.popitem(last=False)
        present = set(self._adapters.values()) if self._blends or self._packs else set()
        for recipe in [key for key in self._blends if not {a for a, _ in key} <= present]:
            del self._blends[recipe]
        for used in [key for key in self._packs if not present.issuperset(key)]:
            del self._packs[used]

    def _over_bytes(self) -> bool:
        if self._max_bytes is None:
            return False
        packed = [item[1] for item in self._packs.values() if item]
        held = [*self._adapters.values(), *self._blends.values(), *packed]
        return sum(item.size for item in held) > self._max_bytes

    def use(self, name: str) -> Loaded:
        """The adapter of a name, for a run; one that was evicted is read again.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
            AdapterError: If its file was written into while it was mapped.
        """
        while True:
            with self._lock:
                found = self._adapters.get(name)
                origin = self._origins.get(name)
                if found is not None:
                    self._adapters.move_to_end(name)
                    found.last_used = time.time()
            if found is not None:
                found.refuse_overwritten()
                return found
            if origin is None or origin.path is None:
                raise self._not_found(name, evicted=origin is not None)
            fresh = self._read(origin.path, allow_partial=origin.allow_partial)
            if self._put_again(name, origin, fresh):
                return fresh

    def _put_again(self, name: str, origin: _Origin, fresh: Loaded) -> bool:
        """Keep what was read for a name, unless something else got the name meanwhile."""
        with self._lock:
            if self._origins.get(name) is not origin:
                return False
            self._put(name, fresh)
            return True

    def _not_found(self, name: str, *, evicted: bool) -> AdapterNotFoundError:
        if evicted:
            return AdapterNotFoundError(
                f"adapter {name!r} was evicted, and it came from no file",
                hint="load it again, or raise max_adapters or max_bytes",
            )
        known = list(self._origins)  # other threads load and unload meanwhile
        close = nearest(name, known) if isinstance(name, str) else []
        return AdapterNotFoundError(
            f"no adapter is called {name!r}",
            hint=f"did you mean {', '.join(close)}?" if close else "load it first",
        )

    def shares(self, recipe: Mapping[str, float]) -> Shares:
        """The adapters of a blend with their weights; those with weight 0 are left out.

        Where all weights are 0 the first stays: a blend of nothing is the base, which the
        model's default need not be.

        Raises:
            AdapterError: If a name is unknown, or a weight no finite number.
        """
        refuse_odd_weights(recipe.values())
        used = [(self.use(name), float(weight)) for name, weight in recipe.items()]
        return tuple(share for share in used if share[1]) or tuple(used[:1])

    def blend(self, shares: Shares) -> Loaded | None:
        """The exact blend of some adapters, made once and kept while they are loaded.

        Returns:
            The blend, or None if there is nothing to blend: the model as it is.

        Raises:
            AdapterError: If they cannot be blended.
        """
        if not shares:
            return None
        if len(shares) == 1 and shares[0][1] == 1:
            return shares[0][0]
        with self._lock:
            if shares in self._blends:
                self._blends.move_to_end(shares)
                return self._blends[shares]
        adapters = [item.adapter for item, _ in shares]
        base = self._base_values() if any(a.replaced for a in adapters) else None
        mixed = blend(adapters, [weight for _, weight in shares], base=base)
        result = self._read(mixed, allow_partial=True, blended=True)
        with self._lock:
            self._blends[shares] = result
            self._evict()
        return result

    def mix(
        self, slots: Sequence[Slot], rows: Sequence[Shares]
    ) -> tuple[dict[str, Any], Loaded] | None:
        """What one run of a batched model needs to give each row its own adapters.

        Returns:
            What each row has of its own, and the adapters of all rows side by side; None if
            they cannot share a run.
        """
        used = tuple(sorted({item for shares in rows for item, _ in shares}, key=id))
        found = self._packed(slots, used)
        if found is None:
            return None
        packed, weights = found
        each = np.zeros((len(rows), len(used)))
        for row, shares in enumerate(rows):
            for item, weight in shares:
                each[row, used.index(item)] = weight
        own = row_feeds(packed, each)
        return {name: loaded.as_ort_value(value) for name, value in own.items()}, weights

    def _packed(
        self, slots: Sequence[Slot], key: tuple[Loaded, ...]
    ) -> tuple[Pack, Loaded] | None:
        """Adapters side by side, made once and kept while they are loaded."""
        with self._lock:
            if key in self._packs:
                self._packs.move_to_end(key)
                return self._packs[key]
        result = None
        with suppress(AdapterError):
            packed = pack(slots, [item.adapter for item in key])
            result = (packed, loaded.read(packed.adapter)[1])
        with self._lock:
            self._packs[key] = result
            self._evict()
        return result

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it end with it."""
        with self._lock:
            if name not in self._origins:
                raise self._not_found(name, evicted=False)
            del self._origins[name]
            self._adapters.pop(name, None)
            self._evict()

    def reload(self, name: str | None) -> tuple[str, ...]:
        """Read files again that were replaced; the old adapter stays if the new is bad."""
        with self._lock:
            present, origins = dict(self._adapters), dict(self._origins)
        if name is None:
            chosen = [item for item, found in present.items() if found.replaced]
        elif name not in origins:
            raise self._not_found(name, evicted=False)
        elif origins[name].path is None:
            raise AdapterError(
                f"adapter {name!r} came from no file", hint="load the new one by this name"
            )
        else:
            chosen = [name]
        done, bad = [], []
        for item in chosen:
            try:
                if self._reread(item, origins[item]):
                    done.append(item)
            except AdapterError as error:
                bad.append((item, error))
        if bad:
            told = "; ".join(f"{item!r}: {error.message}" for item, error in bad)
            also = f" (read again: {', '.join(done)})" if done else ""
            raise AdapterError(f"the old adapter stays for {told}{also}", hint=bad[0][1].hint)
        return tuple(done)

    def _reread(self, name: str, origin: _Origin) -> bool:
        assert origin.path is not None
        fresh = self._read(origin.path, allow_partial=origin.allow_partial)
        self._refuse_too_large(name, fresh)
        return self._put_again(name, origin, fresh)

    def list(self) -> dict[str, LoadedAdapter]:
        """What is loaded, the least recently used first."""
        with self._lock:
            return {name: _described(name, item) for name, item in self._adapters.items()}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._origins.clear()
            self._adapters.clear()
            self._blends.clear()
            self._packs.clear()


def _described(name: str, item: Loaded) -> LoadedAdapter:
    return LoadedAdapter(name, item.path, item.size, item.last_used)
