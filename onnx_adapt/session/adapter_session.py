"""AdapterSession: one session of ONNX Runtime in which each call chooses its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import for_file
from onnx_adapt.errors import AdapterError, ArgumentError
from onnx_adapt.session.adapter_feeds import adapter_feeds
from onnx_adapt.session.batches import BatchAxis, find_batch
from onnx_adapt.session.binding import AdapterBinding
from onnx_adapt.session.cache import AdapterCache, Shares, Source
from onnx_adapt.session.checking import check_adapter
from onnx_adapt.session.loaded_model import LoadedModel, base_values, checked_feeds
from onnx_adapt.session.ort_adapter import LoadedAdapter, OrtAdapter, as_ort_value, read
from onnx_adapt.session.runs import RowRuns, plan_rows, run_one, run_rows, weights_to_feed

if TYPE_CHECKING:
    from onnx_adapt.model.given import ModelLike

Choice = str | Adapter | Mapping[str, float] | None
"""Which adapter: none, one by name, one in memory, or a blend of names with weights."""


class AdapterSession:
    """A model loaded once, and any number of adapters for it.

    Any number of threads may call one session. A run keeps the adapter that it uses until
    it ends, even if another thread unloads, evicts or reloads that adapter meanwhile.

    Args:
        model: A model with slots, or its path.
        adapters: Adapters to load, by name: files or `Adapter`s.
        providers: ONNX Runtime's execution providers; by default the CPU.
        session_options: ONNX Runtime's options for the session; they are left as they are.
        max_adapters: How many adapters stay loaded. The least recently used is evicted; if
            it came from a file, it is read again when it is asked for.
        max_bytes: How many bytes of weights stay loaded; evicted in the same way.
        batch_axis: The batch axis of inputs and outputs, or that of each by name; by
            default it is found from the model's symbolic dimensions.

    Attributes:
        inputs: The inputs that must be fed, by name: ONNX Runtime's objects with `name`,
            `shape` and `type`.
        outputs: The outputs, by name, as the same kind of objects.
        batch_axes: The batch axis of each input and output.

    Raises:
        RunError: If ONNX Runtime refuses the model.
        AdapterError: If an adapter does not fit.

    Warns:
        UncheckedWarning: Once for an adapter that does not name its base or activations.

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
        model: ModelLike,
        adapters: Mapping[str, Source] | None = None,
        *,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        max_adapters: int | None = None,
        max_bytes: int | None = None,
        batch_axis: BatchAxis = None,
    ) -> None:
        if adapters is not None and not isinstance(adapters, Mapping):
            raise ArgumentError(
                f"adapters is a {type(adapters).__name__}, and each adapter needs a name",
                hint='give {"name": "path.safetensors"}',
            )
        self._model = LoadedModel(model, providers, session_options)
        self._inputs = {item.name: item for item in self._model.session.get_inputs()}
        self.inputs = {
            name: item for name, item in self._inputs.items() if name in self._model.inputs
        }
        self.outputs = {item.name: item for item in self._model.session.get_outputs()}
        self.batch_axes = find_batch(self._model.inputs, self._model.outputs, batch_axis)
        self._base_values = base_values(model)
        self._told: set[str] = set()
        self._cache = AdapterCache(
            self._own, self._check, self._base_values, max_adapters, max_bytes
        )
        for name, source in (adapters or {}).items():
            self.load(name, source)

    def __repr__(self) -> str:
        """The model, and the names of the loaded adapters."""
        names = ", ".join(self._cache.list()) or "none"
        return f"<AdapterSession of {self._model.label}, adapters: {names}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: ONNX Runtime's session is of this process alone."""
        raise ArgumentError(
            "a session cannot be pickled or copied: it belongs to its process",
            hint="open it again in the worker: AdapterSession(path, adapters)",
        )

    def __enter__(self) -> AdapterSession:
        """Return the session, which is loaded already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()

    def close(self) -> None:
        """Free the model and every adapter once the runs under way have ended."""
        self._model.close()
        self._cache.clear()

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name, the least recently used first."""
        return self._cache.list()

    def load(self, name: str, source: Source, *, allow_partial: bool = False) -> LoadedAdapter:
        """Load an adapter under a name, and check it against the model.

        It replaces an adapter of the same name; runs under way finish with the old one.

        Args:
            name: The name to run it by.
            source: An adapter file, in any of the formats, or an `Adapter`.
            allow_partial: Accept an adapter without weights for some slots, which stay off.

        Raises:
            AdapterError: If the file is damaged, or the adapter does not fit the model in
                its slots, shapes, element types or base, or holds NaN.
        """
        _ = self._model.session  # raises if the session is closed
        return self._cache.load(name, source, allow_partial=allow_partial)

    def unload(self, name: str) -> None:
        """Forget an adapter; runs under way finish with it.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
        """
        self._cache.unload(name)

    def reload(self, name: str | None = None) -> tuple[str, ...]:
        """Read adapter files again; runs under way finish with the old ones.

        Args:
            name: The adapter to read again; by default, every one whose file was replaced.

        Returns:
            The names of the adapters that were read again.

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
                each adapter in it; where slots were inserted `batched`, one run for all if
                that is faster (`rows_of_runs` tells).
            outputs: The outputs to compute; by default all.

        Returns:
            Arrays by output name.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
            AdapterError: If the adapters cannot be used like this.
            RunError: If the model does not take the feeds.
        """
        names = self._model.output_names(outputs)
        feeds = checked_feeds(feeds, self._inputs)
        if isinstance(adapter, str | Adapter | Mapping) or adapter is None:
            values = run_one(self._model, names, feeds, self._chosen(adapter))
            return dict(zip(names, values, strict=True))
        planned = self._planned(feeds, adapter)
        return run_rows(self._model, self._cache, self.batch_axes, names, planned)

    def rows_of_runs(
        self, feeds: Mapping[str, Any], adapter: Sequence[Choice]
    ) -> list[list[int]]:
        """Tell in how many runs `run` would run a list of adapters, and the rows of each.

        On slots that were inserted `batched` it is one run of all rows, or one for each
        adapter, whichever should take less time by the sizes of the batch, the adapters and
        the base. On other slots it is one run for each adapter.

        Example:
            >>> import numpy as np, onnx_adapt as oa
            >>> base = oa.open_model("models/dnsmos-p808.onnx")
            >>> model = oa.insert(base, after="mos_estimator_small_1/dense_4/MatMul_add")
            >>> (slot,) = oa.list_slots(model)
            >>> ones = {"down": np.ones((64, 4)), "up": np.ones((4, 64))}
            >>> fr = oa.make_adapter(model, "fr", {slot.name: ones})
            >>> feeds = {"input_1": np.ones((3, 900, 120), "float32")}
            >>> with oa.AdapterSession(model, {"fr": fr}) as session:
            ...     session.rows_of_runs(feeds, ["fr", None, "fr"])
            [[0, 2], [1]]
        """
        return self._planned(checked_feeds(feeds, self._inputs), adapter).rows

    def _planned(self, feeds: Mapping[str, Any], adapter: Any) -> RowRuns:
        listed = isinstance(adapter, Sequence) or (
            isinstance(adapter, np.ndarray) and adapter.ndim
        )
        if not listed or isinstance(adapter, str | bytes):
            raise AdapterError(
                f"adapter is {adapter!r}, no list",
                hint="give a name, a blend {name: weight}, or a list with one for each row",
            )
        rows = list(adapter)
        once = {id(row): self._shares(row) for row in rows}
        each = [once[id(row)] for row in rows]
        return plan_rows(self._model, self._cache, self.batch_axes, feeds, each)

    async def async_run(
        self,
        feeds: Mapping[str, Any],
        adapter: Choice | Sequence[Choice] = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Do what `run` does in a thread, while the event loop goes on."""
        return await asyncio.to_thread(self.run, feeds, adapter, outputs)

    def run_with_ort_values(
        self,
        feeds: Mapping[str, Any],
        adapter: Choice = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Run on OrtValues, so that nothing is copied on the way in or out.

        ONNX Runtime's own method ignores adapters that are active in run options. This one
        feeds the adapter's weights.
        """
        names = self._model.output_names(outputs)
        chosen = self._chosen(adapter)
        values = {
            name: as_ort_value(value) if isinstance(value, np.ndarray) else value
            for name, value in checked_feeds(feeds, self._inputs).items()
        }
        fed = {**values, **self._beside(values, chosen), **weights_to_feed(feeds, chosen)}
        found = self._model.run_with_ort_values(names, fed)
        return dict(zip(names, found, strict=True))

    def io_binding(self) -> AdapterBinding:
        """Make a binding of inputs and outputs to memory, for `run_with_iobinding`."""
        return AdapterBinding(self._model.session)

    def run_with_iobinding(self, binding: AdapterBinding, adapter: Choice = None) -> None:
        """Run on bound memory; the outputs are where the binding says.

        ONNX Runtime's own binding ignores adapters that are active in run options. This one
        binds the adapter's weights as well, for this run only.

        Raises:
            AdapterError: If the binding is not from `io_binding`, or binds weights itself.
            RunError: If ONNX Runtime fails.
        """
        if not isinstance(binding, AdapterBinding):
            raise AdapterError(
                f"{type(binding).__name__} is no binding of this session",
                hint="ONNX Runtime's own would compute the base; use session.io_binding()",
            )
        if not binding.belongs_to(self._model.session):
            raise AdapterError(
                "the binding is of another session", hint="use this session's io_binding()"
            )
        chosen = self._chosen(adapter)
        binding.refuse_first_past(chosen)
        bound = binding.inputs
        rest = {k: v for k, v in self._model.neutral.items() if k not in bound}
        rest |= self._beside(binding.readable, chosen)
        binding.run({**rest, **weights_to_feed(bound, chosen)}, chosen)

    def _beside(self, feeds: Mapping[str, Any], chosen: OrtAdapter | None) -> dict[str, Any]:
        """What an adapter needs fed beside its weights, as OrtValues."""
        more = adapter_feeds(chosen, feeds, self._model.all_slots, self._model.inputs)
        return {name: as_ort_value(value) for name, value in more.items()}

    def _chosen(self, adapter: Choice) -> OrtAdapter | None:
        return self._cache.blend(self._shares(adapter))

    def _shares(self, adapter: Choice) -> Shares:
        if adapter is None:
            return ()
        alone = isinstance(adapter, Adapter) and adapter.initial_state
        if self._cache.empty and not alone:
            self._model.slots()  # raises if the model takes no adapters
        if isinstance(adapter, str):
            return ((self._cache.use(adapter), 1),)
        if isinstance(adapter, Adapter):
            own = self._own(adapter)
            self._check(own, allow_partial=False)
            return ((read(own)[1], 1),)
        if isinstance(adapter, Mapping) and adapter:
            return self._cache.shares(adapter)
        raise AdapterError(
            f"{adapter!r} is no adapter",
            hint="give None, a name, an Adapter, or a blend {name: weight}",
        )

    def _own(self, adapter: Adapter) -> Adapter:
        """What this model takes of an adapter that is for several files."""
        return for_file(self._model.slots()[0], adapter) if adapter.other_bases else adapter

    def _check(
        self, adapter: Adapter, allow_partial: bool, blended: bool = False
    ) -> dict[str, Any]:
        told = None if blended else self._told  # the adapters of a blend were warned of before
        return check_adapter(self._model, adapter, self._base_values, allow_partial, told)
