"""AdapterSession: one ONNX Runtime session, adapters swapped, blended and mixed per call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import manifest_misfits, refuse_misfits, warn_unchecked
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.batches import BatchAxis, count_rows, find_batch, join_rows, take_rows
from onnx_adapt.session.binding import AdapterBinding
from onnx_adapt.session.cache import AdapterCache, LoadedAdapter, Shares, Source
from onnx_adapt.session.engine import Engine, base_values, native
from onnx_adapt.session.loaded import Loaded, as_ort_value, read
from onnx_adapt.slot.weights import neutral_weights

if TYPE_CHECKING:
    from onnx_adapt.model.file import Model

Choice = str | Adapter | Mapping[str, float] | None
"""Which adapter: none, one by name, one in memory, or a blend of names with weights."""


class AdapterSession:
    """A model loaded once, and any number of adapters for it.

    Any number of threads may call one session. A run holds the adapter it uses, whatever
    others load, unload, evict or reload meanwhile.

    Args:
        model: The path of a model with slots, or such a model in memory.
        adapters: Adapters to load, by name: files or `Adapter`s.
        providers: ONNX Runtime's execution providers; by default the CPU.
        session_options: ONNX Runtime's options for the session; they are left as they are.
        max_adapters: How many adapters stay loaded. The least recently used is evicted; if
            it came from a file, it is read again when it is asked for.
        max_bytes: The same by the bytes of their weights.
        batch_axis: The batch axis of inputs and outputs, or that of each by name; by
            default it is found from the model's symbolic dimensions.

    Attributes:
        inputs: What must be fed, by name: ONNX Runtime's `name`, `shape` and `type`.
        outputs: The same of what comes out.
        batch_axes: Where the batch lies in them.

    Raises:
        RunError: If ONNX Runtime refuses the model.
        AdapterError: If an adapter does not fit.

    Warns:
        UncheckedWarning: If an adapter does not tell its base or its activations; once.

    Example:
        >>> import numpy as np, tempfile, onnx_adapt as oa
        >>> case = "tests/cases/peft_bert_lora_default_ts"
        >>> base = oa.open_model(f"{case}/base.onnx")
        >>> trained = oa.load_checkpoint(f"{case}/adapter", base, name="fr")
        >>> model = oa.insert_checkpoint(base, trained)
        >>> feeds = dict(np.load(f"{case}/inputs.npz"))
        >>> with oa.AdapterSession(model, {"fr": trained.adapter}) as session:
        ...     plain = session.run(feeds)["logits"]
        ...     french = session.run(feeds, adapter="fr")["logits"]
        >>> bool(np.allclose(french, np.load(f"{case}/expected.npz")["logits"], atol=1e-4))
        True
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        adapters: Mapping[str, Source] | None = None,
        *,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        max_adapters: int | None = None,
        max_bytes: int | None = None,
        batch_axis: BatchAxis = None,
    ) -> None:
        self._engine = Engine(model, providers, session_options)
        self.inputs = {item.name: item for item in self._engine.session.get_inputs()}
        self.outputs = {item.name: item for item in self._engine.session.get_outputs()}
        self.batch_axes = find_batch(self._engine.inputs, self._engine.outputs, batch_axis)
        self._base_values = base_values(model)
        self._told: set[str] = set()
        self._cache = AdapterCache(self._check, self._base_values, max_adapters, max_bytes)
        for name, source in dict(adapters or {}).items():
            self.load(name, source)

    def __enter__(self) -> AdapterSession:
        """Nothing more to do: the session stands."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Free the model and every adapter; runs that are under way end first."""
        self._engine.close()
        self._cache.clear()

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """What is loaded, the least recently used first."""
        return self._cache.list()

    def load(self, name: str, source: Source, *, allow_partial: bool = False) -> LoadedAdapter:
        """Load an adapter under a name, and check all there is to check about it, once.

        One that has the name already is replaced; runs under way end with the old one.

        Args:
            name: What to run it by.
            source: A `.safetensors`, `.onnx_adapter` or `.npz` file, or an `Adapter`.
            allow_partial: Leave slots that it has no weights for off.

        Raises:
            AdapterError: If the file is damaged, or does not fit the model: coverage,
                shapes, element types, base fingerprint, NaN.
        """
        _ = self._engine.session  # a closed one loads nothing
        return self._cache.load(name, source, allow_partial=allow_partial)

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it end with it.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
        """
        self._cache.unload(name)

    def reload(self, name: str | None = None) -> tuple[str, ...]:
        """Pick up adapter files that were replaced; runs under way end with the old ones.

        Args:
            name: Read this one again; by default all whose files are new.

        Returns:
            The names of those that were read again.

        Raises:
            AdapterError: If a new file is bad; the old adapter stays.
        """
        return self._cache.reload(name)

    def run(
        self,
        feeds: Mapping[str, Any],
        adapter: Choice | Sequence[Choice] = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Run the model once with an adapter, a blend, or one of them for each row.

        Args:
            feeds: Arrays by input name.
            adapter: None for the base; a name; an `Adapter`; a blend as name -> weight; or a
                list with one of these for each row of the batch. A list is one run for
                each adapter in it; where slots were inserted `batched`, one run for all.
            outputs: The outputs to compute; by default all.

        Returns:
            Arrays by output name.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
            AdapterError: If adapters cannot be used so.
            RunError: If the model does not take the feeds.
        """
        names = self._engine.asked(outputs)
        if isinstance(adapter, str | Adapter | Mapping) or adapter is None:
            values = self._run_one(names, feeds, self._chosen(adapter))
            return dict(zip(names, values, strict=True))
        listed = isinstance(adapter, Sequence) or (
            isinstance(adapter, np.ndarray) and adapter.ndim
        )
        if not listed or isinstance(adapter, bytes):
            raise AdapterError(
                f"adapter is {adapter!r}",
                hint="give a name, a blend {name: weight}, or a list with one for each row",
            )
        rows = list(adapter)
        once = {id(row): self._shares(row) for row in rows}
        return self._run_rows(names, feeds, [once[id(row)] for row in rows])

    def run_with_ort_values(
        self,
        feeds: Mapping[str, Any],
        adapter: Choice = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """`run` on OrtValues: nothing is copied on the way in or out.

        ONNX Runtime's own method does not see adapters that are active in run options;
        here the adapter's weights are fed.
        """
        names = self._engine.asked(outputs)
        chosen = self._chosen(adapter)
        values = {
            name: as_ort_value(value) if isinstance(value, np.ndarray) else value
            for name, value in native(feeds).items()
        }
        fed = {**values, **self._weights(feeds, chosen)}
        found = self._engine.run_with_ort_values(names, fed)
        return dict(zip(names, found, strict=True))

    def io_binding(self) -> AdapterBinding:
        """A binding of inputs and outputs to memory, for `run_with_iobinding`."""
        return AdapterBinding(self._engine.session)

    def run_with_iobinding(self, binding: AdapterBinding, adapter: Choice = None) -> None:
        """Run on bound memory; the outputs are where the binding says.

        ONNX Runtime's own binding does not see adapters that are active in run options;
        here the adapter's weights are bound with the rest, and no longer than for this run.

        Raises:
            AdapterError: If the binding is not from `io_binding`, or binds weights itself.
            RunError: If ONNX Runtime fails.
        """
        if not isinstance(binding, AdapterBinding):
            raise AdapterError(
                f"{type(binding).__name__} is no binding of this session",
                hint="ONNX Runtime's own would compute the base; use session.io_binding()",
            )
        if not binding.belongs_to(self._engine.session):
            raise AdapterError(
                "the binding is of another session", hint="use this session's io_binding()"
            )
        chosen = self._chosen(adapter)
        binding.run(self._weights(binding.inputs, chosen), chosen)

    def _chosen(self, adapter: Choice) -> Loaded | None:
        return self._cache.blend(self._shares(adapter))

    def _shares(self, adapter: Choice) -> Shares:
        if adapter is None:
            return ()
        self._engine.slots()  # a model without any has no adapters to be found
        if isinstance(adapter, str):
            return ((self._cache.use(adapter), 1),)
        if isinstance(adapter, Adapter):
            self._check(adapter, allow_partial=False)
            return ((read(adapter)[1], 1),)
        if isinstance(adapter, Mapping) and adapter:
            return self._cache.shares(adapter)
        raise AdapterError(
            f"{adapter!r} is no adapter",
            hint="give None, a name, an Adapter, or a blend {name: weight}",
        )

    def _run_one(
        self, names: list[str], feeds: Mapping[str, Any], chosen: Loaded | None
    ) -> Any:
        feeds = native(feeds)
        if chosen is None:
            return self._engine.run(names, feeds)
        self._refuse_overlap(feeds, chosen)
        if chosen.options is None:
            return self._engine.run(names, {**feeds, **chosen.values})
        fed = {**feeds, **chosen.rest} if chosen.rest else feeds
        return self._engine.run(names, fed, chosen.options)

    def _run_rows(
        self, names: list[str], feeds: Mapping[str, Any], rows: list[Shares]
    ) -> dict[str, Any]:
        """One run for all rows if the slots can; else one for the rows of each adapter."""
        arrays = {name: np.asarray(value) for name, value in native(feeds).items()}
        count_rows(self.batch_axes, arrays, len(rows))
        groups: dict[Shares, list[int]] = {} if rows else {(): []}
        for i, shares in enumerate(rows):
            groups.setdefault(shares, []).append(i)
        if len(groups) > 1 and (mixed := self._mixed(arrays, rows)) is not None:
            values = self._run_one(names, *mixed)
            return dict(zip(names, values, strict=True))
        results = []
        for shares, members in groups.items():
            whole = self.batch_axes.fixed or len(groups) == 1
            part = arrays if whole else take_rows(self.batch_axes, arrays, members)
            results.append((members, self._run_one(names, part, self._cache.blend(shares))))
        if len(groups) == 1:
            return dict(zip(names, results[0][1], strict=True))
        return join_rows(self.batch_axes, names, results)

    def _mixed(
        self, feeds: Mapping[str, Any], rows: list[Shares]
    ) -> tuple[dict[str, Any], Loaded] | None:
        """Feeds and weights for one run of all rows; None if they cannot share one."""
        slots = self._engine.slots()[0].slots
        batched = bool(slots) and all(slot.batched for slot in slots)
        mixed = self._cache.mix(slots, rows) if batched else None
        if mixed is None:
            return None
        own, weights = mixed
        if twice := own.keys() & feeds.keys():
            raise AdapterError(
                f"{min(twice)!r} is fed, and the list of adapters says it as well",
                hint="feed what each row has of its own, or give a list",
            )
        return {**feeds, **own}, weights

    def _weights(self, feeds: Mapping[str, Any], chosen: Loaded | None) -> Mapping[str, Any]:
        if chosen is None:
            return {}
        self._refuse_overlap(feeds, chosen)
        return chosen.values

    def _refuse_overlap(self, feeds: Mapping[str, Any], chosen: Loaded) -> None:
        """ONNX Runtime lets the adapter win over a feed, without a word."""
        if twice := chosen.names & feeds.keys():
            raise AdapterError(
                f"{min(twice)!r} is fed, and it is in the adapter as well",
                hint="feed weights, or give an adapter",
            )

    def _check(
        self, adapter: Adapter, allow_partial: bool, blended: bool = False
    ) -> dict[str, Any]:
        """Raise unless an adapter fits; what makes the base of all that it does not cover."""
        manifest, replaceable = self._engine.slots()
        found = manifest_misfits(manifest, replaceable, adapter, allow_partial=allow_partial)
        refuse_misfits(found, adapter, self._engine.label)
        if not blended:  # those it was made of have been warned of
            warn_unchecked(manifest, adapter, self._told)
        rest = {
            slot.weight(part): as_ort_value(array)
            for slot in manifest.slots
            if slot.name not in adapter.weights
            for part, array in neutral_weights(slot, slot.bottleneck).items()
        }
        filled = [w.name for w in manifest.weights if w.trained]
        missing = [name for name in filled if name not in adapter.replaced]
        own = self._base_values() if missing else {}
        return {**rest, **{name: as_ort_value(own[name]) for name in missing}}


"""The parts of a session: adapters loaded, blended, mixed, bound and run."""
