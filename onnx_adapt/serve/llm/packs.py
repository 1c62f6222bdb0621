"""Adapters side by side, for generators whose rows have an adapter each.

A generator feeds the tensors of all adapters that are active. Two are for mixed rows: the
weights of the rows' adapters side by side, which other generators use as well, and the mask
that says which of them count in which row.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.files import load_adapter, save_adapter
from onnx_adapt.adapter.fitting import for_file
from onnx_adapt.errors import RunError
from onnx_adapt.serve.llm.orders import Order
from onnx_adapt.session.mixing import Pack, pack, row_feeds
from onnx_adapt.slot.manifest import Manifest
from onnx_adapt.slot.places import owners

_KEPT = 4
"""Sets of adapters that stay side by side when no generator uses them."""


class Packs:
    """Puts adapters side by side, once for each set of them.

    Args:
        manifest: The slots of the model; all are batched.
        load: Loads a file under a name.
        unload: Unloads what has a name; RunError if a generator uses it.
    """

    def __init__(
        self,
        manifest: Manifest,
        load: Callable[[str, Path], None],
        unload: Callable[[str], None],
    ) -> None:
        self._manifest = manifest
        self._slots = owners(manifest.slots)
        self._load = load
        self._unload = unload
        self._packs: OrderedDict[tuple[str, ...], tuple[str, Pack]] = OrderedDict()
        self._count = 0

    def rows(self, orders: Sequence[Order], paths: Mapping[str, Path]) -> tuple[str, str]:
        """Load what a generator of these rows needs: names of its two adapters.

        Args:
            orders: The texts, some of them perhaps without an adapter.
            paths: The file of each adapter.

        Raises:
            AdaptError: If the adapters cannot be side by side, or no file can be written.
        """
        names = tuple(sorted({order.adapter for order in orders} - {""}))
        folder = paths[names[0]].parent
        if names not in self._packs:
            own = [for_file(self._manifest, load_adapter(paths[name])) for name in names]
            packed = pack(self._slots, own)
            loaded = self._loaded(folder, packed.adapter)
            self._packs[names] = loaded, replace(packed, adapter=Adapter(loaded, {}))
        self._packs.move_to_end(names)
        self._drop_unused()
        weights, packed = self._packs[names]
        shares = np.array([[name == o.adapter for name in names] for o in orders], np.float64)
        feeds = row_feeds(packed, shares)
        masks = {
            item.slot.name: {n: feeds[item.slot.weight(n)] for n in item.slot.row_parts}
            for item in packed.slots
        }
        return weights, self._loaded(folder, Adapter("rows", masks))

    def _loaded(self, folder: Path, adapter: Adapter) -> str:
        """Load an adapter by way of a file, which is mapped and needs no name after that."""
        self._count += 1
        name = f"rows#{self._count}"
        path = save_adapter(adapter, folder / f"{name}.onnx_adapter")
        try:
            self._load(name, path)
        finally:
            with contextlib.suppress(PermissionError):  # Windows keeps what is mapped
                path.unlink()
        return name

    def _drop_unused(self) -> None:
        for names in list(self._packs)[:-_KEPT]:
            with contextlib.suppress(RunError):  # a generator uses it
                self._unload(self._packs[names][0])
                del self._packs[names]
