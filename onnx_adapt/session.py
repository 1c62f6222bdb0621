"""AdapterSession: one ONNX Runtime session, adapters swapped, blended and mixed per call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_adapt.adapter import Adapter
from onnx_adapt.adapter_cache import AdapterCache, LoadedAdapter, Source
from onnx_adapt.batches import (
    BatchAxis,
    count_rows,
    find_batch,
    join_rows,
    take_rows,
)
from onnx_adapt.binding import AdapterBinding
from onnx_adapt.dtypes import Array
from onnx_adapt.engine import start, swappable
from onnx_adapt.errors import AdapterError, RunError
from onnx_adapt.fitting import Replaceable, manifest_misfits, refuse_misfits
from onnx_adapt.loaded import Loaded, read
from onnx_adapt.manifest import KEY, Manifest, manifest_from_text
from onnx_adapt.ort import failures, shortened

if TYPE_CHECKING:
    from onnx_adapt.model_file import Model

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

    Example:
        >>> import numpy as np, tempfile, onnx_adapt as oa
        >>> case = "tests/cases/peft_bert_lora_default_ts"
        >>> base = oa.open_model(f"{case}/base.onnx")
        >>> trained = oa.load_checkpoint(f"{case}/adapter", base, name="fr")
        >>> model = oa.insert(base, checkpoint=trained)
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
        self._model = model
        self._failures = failures()
        self._label, self._session = start(model, providers, session_options)
        self.inputs = {item.name: item for item in self._session.get_inputs()}
        self.outputs = {item.name: item for item in self._session.get_outputs()}
        self._inputs = {name: item.shape for name, item in self.inputs.items()}
        self._outputs = {name: item.shape for name, item in self.outputs.items()}
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        self._manifest = manifest_from_text(text) if text else None
        self.batch_axes = find_batch(self._inputs, self._outputs, batch_axis)
        self._cache = AdapterCache(self._check, self._base_values, max_adapters, max_bytes)
        self._swappable: tuple[Manifest, Replaceable] | None = None
        for name, source in (adapters or {}).items():
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
        self._cache.clear()
        self._session = None

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
                list with one of these for each row of the batch.
            outputs: The outputs to compute; by default all.

        Returns:
            Arrays by output name.

        Raises:
            AdapterNotFoundError: If no adapter has the name.
            AdapterError: If adapters cannot be used so.
            RunError: If the model does not take the feeds.
        """
        names = self._asked(outputs)
        if isinstance(adapter, str | Adapter | Mapping) or adapter is None:
            values = self._run_one(names, feeds, self._chosen(adapter))
            return dict(zip(names, values, strict=True))
        if not isinstance(adapter, Sequence | np.ndarray) or not len(adapter):
            raise AdapterError(
                f"adapter is {adapter!r}",
                hint="give a name, a blend {name: weight}, or a list with one for each row",
            )
        rows = list(adapter)  # an array makes new objects whenever it is read
        once = {id(row): self._chosen(row) for row in rows}
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
        names = self._asked(outputs)
        chosen = self._chosen(adapter)
        fed = {**feeds, **self._weights(feeds, chosen)}
        try:
            values = self._live().run_with_ort_values(names, fed)
        except self._failures as error:
            raise self._refused(error) from error
        return dict(zip(names, values, strict=True))

    def io_binding(self) -> AdapterBinding:
        """A binding of inputs and outputs to memory, for `run_with_iobinding`."""
        return AdapterBinding(self._live(), self._failures)

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
        chosen = self._chosen(adapter)
        binding.run(self._weights(binding.inputs, chosen), chosen)

    def _live(self) -> Any:
        if self._session is None:
            raise RunError("the session is closed", hint="make a new AdapterSession")
        return self._session

    def _asked(self, outputs: Sequence[str] | None) -> list[str]:
        if outputs is None:
            return list(self._outputs)
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if unknown := [name for name in names if name not in self._outputs]:
            raise RunError(
                f"{self._label} has no output {unknown[0]!r}",
                hint=f"it has {', '.join(self._outputs)}",
            )
        return names

    def _chosen(self, adapter: Choice) -> Loaded | None:
        if adapter is None:
            return None
        if isinstance(adapter, str):
            return self._cache.use(adapter)
        if isinstance(adapter, Adapter):
            self._check(adapter, allow_partial=False)
            return read(adapter)[1]
        if isinstance(adapter, Mapping) and adapter:
            return self._cache.blend(adapter)
        raise AdapterError(
            f"{adapter!r} is no adapter",
            hint="give None, a name, an Adapter, or a blend {name: weight}",
        )

    def _run_one(
        self, names: list[str], feeds: Mapping[str, Any], chosen: Loaded | None
    ) -> Any:
        session = self._live()
        try:
            if chosen is None:
                return session.run(names, feeds)
            self._refuse_overlap(feeds, chosen)
            if chosen.options is not None:
                return session.run(names, feeds, chosen.options)
            return session.run(names, {**feeds, **chosen.values})
        except self._failures as error:
            raise self._refused(error) from error

    def _run_rows(
        self, names: list[str], feeds: Mapping[str, Any], rows: list[Loaded | None]
    ) -> dict[str, Any]:
        """One run for each adapter of a batch, on the rows that want it."""
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        count_rows(self.batch_axes, arrays, len(rows))
        groups: dict[Loaded | None, list[int]] = {}
        for i, chosen in enumerate(rows):
            groups.setdefault(chosen, []).append(i)
        if len(groups) == 1:
            return dict(zip(names, self._run_one(names, arrays, rows[0]), strict=True))
        results = []
        for chosen, members in groups.items():
            part = (
                arrays
                if self.batch_axes.fixed
                else take_rows(self.batch_axes, arrays, members)
            )
            results.append((members, self._run_one(names, part, chosen)))
        return join_rows(self.batch_axes, names, results)

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

    def _refused(self, error: Exception) -> RunError:
        if isinstance(error, RunError | AdapterError):
            raise error
        wanted = ", ".join(f"{name} {shape}" for name, shape in self._inputs.items())
        return RunError(
            f"{self._label} does not run: {shortened(error)}",
            hint=f"do the inputs fit? The model asks for {shortened(wanted)}",
        )

    def _check(self, adapter: Adapter, allow_partial: bool) -> None:
        """Raise unless an adapter fits the slots of the model that can be fed."""
        if self._swappable is None:
            self._swappable = swappable(self._manifest, self._live(), self._label)
        manifest, replaceable = self._swappable
        found = manifest_misfits(manifest, replaceable, adapter, allow_partial=allow_partial)
        refuse_misfits(found, adapter, self._label)

    def _base_values(self) -> dict[str, Array]:
        """The base's own values of weights that adapters replace, out of the model file."""
        from onnx_adapt.model_file import Model, open_model, read_tensor

        model = self._model if isinstance(self._model, Model) else open_model(self._model)
        stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
        weights = self._manifest.weights if self._manifest else ()
        return {
            weight.name: read_tensor(
                model, stored[weight.original if weight.copied else weight.name]
            )
            for weight in weights
        }
