"""The adapters of a session by name; the least recently used are evicted."""

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
from onnx_adapt.session import ort_adapter
from onnx_adapt.session.mixing import Pack, pack, row_feeds
from onnx_adapt.session.ort_adapter import LoadedAdapter, OrtAdapter
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.words import nearest

Source = Adapter | str | os.PathLike[str]

_BLENDS = 16
"""How many blends are kept; to make one again costs a copy of its weights."""

_PACKS = 8
"""How many packs are kept; each is a copy of the weights of all its adapters."""

Shares = tuple[tuple[OrtAdapter, float], ...]
"""The adapters of a blend, each with its weight; an empty one is the base."""


@dataclass(frozen=True, slots=True, eq=False)
class _Origin:
    """Where the adapter of a name came from.

    Two of them are never equal, so that a name loaded anew is told from the one before.
    """

    path: Path | None
    allow_partial: bool


class AdapterCache:
    """Adapters by name, for many threads.

    A run refers to the adapter that it uses. An adapter that is evicted, unloaded or
    replaced meanwhile is freed when its last run ends.

    Args:
        own: Gives the part of an adapter that the model takes.
        check: Takes an adapter, whether it may be partial and whether it is a blend. It
            raises if the adapter does not fit the model, and returns the weights that keep
            slots off for which a partial adapter has none.
        base_values: The base's own values of replaceable weights, for blends.
        max_adapters: How many may be loaded, or None.
        max_bytes: How many bytes of weights may be loaded, or None.
    """

    def __init__(
        self,
        own: Callable[[Adapter], Adapter],
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
        self._own = own
        self._check = check
        self._base_values = base_values
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._adapters: OrderedDict[str, OrtAdapter] = OrderedDict()
        self._blends: OrderedDict[Shares, OrtAdapter] = OrderedDict()
        self._packs: OrderedDict[tuple[OrtAdapter, ...], tuple[Pack, OrtAdapter] | None] = (
            OrderedDict()
        )
        self._origins: dict[str, _Origin] = {}

    @property
    def empty(self) -> bool:
        """Whether no adapter is loaded."""
        return not self._adapters

    def load(self, name: str, source: Source, *, allow_partial: bool) -> LoadedAdapter:
        """Load and check an adapter; it replaces one of the same name."""
        if not isinstance(name, str) or not name:
            raise AdapterError(f"{name!r} is no name for an adapter", hint="give a text")
        fresh = self._read(source, allow_partial=allow_partial)
        self._refuse_too_large(name, fresh)
        with self._lock:
            self._origins[name] = _Origin(fresh.path, allow_partial)
            self._put(name, fresh)
        return fresh.described(name)

    def _read(
        self, source: Source, *, allow_partial: bool, blended: bool = False
    ) -> OrtAdapter:
        adapter, fresh = ort_adapter.read(source)
        own = self._own(adapter)
        if own is not adapter:
            fresh = ort_adapter.in_memory(own, fresh)
        fresh.rest = self._check(own, allow_partial, blended)
        return fresh

    def _refuse_too_large(self, name: str, fresh: OrtAdapter) -> None:
        if self._max_bytes is not None and fresh.size > self._max_bytes:
            raise AdapterError(
                f"adapter {name!r} has {fresh.size} bytes of weights; max_bytes is "
                f"{self._max_bytes}",
                hint="raise max_bytes",
            )

    def _put(self, name: str, fresh: OrtAdapter) -> None:
        self._adapters[name] = fresh
        self._adapters.move_to_end(name)
        self._evict()

    def _evict(self) -> None:
        """Keep to the limits: packs and blends go first, then the least recently used."""
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
        present = [*self._adapters.values(), *self._blends.values(), *packed]
        return sum(item.size for item in present) > self._max_bytes

    def use(self, name: str) -> OrtAdapter:
        """Get the adapter of a name for a run; one that was evicted is read again.

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

    def _put_again(self, name: str, origin: _Origin, fresh: OrtAdapter) -> bool:
        """Keep what was read for a name, unless the name was loaded anew meanwhile."""
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

        If all weights are 0, the first adapter stays, with weight 0. That blend is the base;
        with no adapter at all the model's defaults would be used, which can be a trained
        adapter.

        Raises:
            AdapterError: If a name is unknown, or a weight no finite number.
        """
        refuse_odd_weights(recipe.values())
        used = [(self.use(name), float(weight)) for name, weight in recipe.items()]
        return tuple(share for share in used if share[1]) or tuple(used[:1])

    def blend(self, shares: Shares) -> OrtAdapter | None:
        """Make the exact blend of some adapters, and keep it while they are loaded.

        Returns:
            The blend, or None for the model as it is.

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
    ) -> tuple[dict[str, Any], OrtAdapter] | None:
        """Find what one run of a batched model needs to give each row its own adapters.

        Returns:
            The feeds with a value for each row, and the adapters of all rows side by side;
            None if they cannot share a run.
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
        return {name: ort_adapter.as_ort_value(value) for name, value in own.items()}, weights

    def _packed(
        self, slots: Sequence[Slot], key: tuple[OrtAdapter, ...]
    ) -> tuple[Pack, OrtAdapter] | None:
        """Lay adapters side by side, and keep the result while they are loaded."""
        with self._lock:
            if key in self._packs:
                self._packs.move_to_end(key)
                return self._packs[key]
        result = None
        with suppress(AdapterError):
            packed = pack(slots, [item.adapter for item in key])
            result = (packed, ort_adapter.read(packed.adapter)[1])
        with self._lock:
            self._packs[key] = result
            self._evict()
        return result

    def unload(self, name: str) -> None:
        """Forget an adapter; runs under way finish with it."""
        with self._lock:
            if name not in self._origins:
                raise self._not_found(name, evicted=False)
            del self._origins[name]
            self._adapters.pop(name, None)
            self._evict()

    def reload(self, name: str | None) -> tuple[str, ...]:
        """Read replaced files again; if a new file is bad, the old adapter stays."""
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
        """The loaded adapters, the least recently used first."""
        with self._lock:
            return {name: item.described(name) for name, item in self._adapters.items()}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._origins.clear()
            self._adapters.clear()
            self._blends.clear()
            self._packs.clear()
