"""The one door to onnxruntime-genai: a model, its adapters, and generators."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from onnx_adapt.errors import AdaptError, RequestError, RunError
from onnx_adapt.model.file import open_model
from onnx_adapt.serve.llm.facts import CONFIG, Facts
from onnx_adapt.serve.llm.generation import Generation, running
from onnx_adapt.serve.llm.orders import Order
from onnx_adapt.serve.llm.packs import Packs
from onnx_adapt.serve.llm.padding import padding_changes_nothing
from onnx_adapt.serve.llm.rows import ApartError, Rows
from onnx_adapt.slot.manifest import Manifest, read_manifest

_log = logging.getLogger(__name__)


class LanguageModel:
    """A model of onnxruntime-genai, and the adapters that are loaded.

    Args:
        facts: What its folder says.
        threads: How many threads a step uses.
        context: How many tokens a prompt and its answer can have; 0 is all that it has.

    Raises:
        RunError: If onnxruntime-genai does not load it.
    """

    def __init__(self, facts: Facts, threads: int, context: int = 0) -> None:
        self.facts = facts
        self._context = context or facts.context_length
        session = {"session_options": {"intra_op_num_threads": threads}}
        with _translated(f"{facts.folder} does not load"):
            config = og.Config(str(facts.folder))
            config.overlay(json.dumps({"model": {"decoder": session}}))
            self._model = og.Model(config)
            self._adapters = og.Adapters(self._model)
            self._tokenizer = og.Tokenizer(self._model)
        self._paths: dict[str, Path] = {}
        self._packs: Packs | None = None
        self._rows: Rows | None = None
        manifest = read_manifest(open_model(facts.model).proto)
        if manifest is not None and manifest.slots and all(s.batched for s in manifest.slots):
            self._share(manifest)

    def _share(self, manifest: Manifest) -> None:
        """Let texts share generators; at first it is tried how the model takes padding."""
        try:
            padded = padding_changes_nothing(self._generator, self.facts)
        except (RuntimeError, ValueError, TypeError) as error:
            _log.warning("%s runs no batch, so texts share none: %s", self.facts.model, error)
            return
        if not padded:
            _log.warning(
                "padding changes what %s computes: texts share a batch only if their prompts "
                "have one length",
                self.facts.model,
            )
        self._packs = Packs(manifest, self._loaded, self._unloaded)
        self._rows = Rows(self._context, self.facts.pad, padded=padded)

    def shares(self, orders: Sequence[Order], order: Order) -> bool:
        """Whether a text can be written by the generator of others, in a row of its own."""
        return self._rows is not None and self._rows.take(orders, order)

    def load(self, name: str, path: Path) -> None:
        """Load an adapter from an `.onnx_adapter` file, which stays until it is unloaded.

        Raises:
            RunError: If onnxruntime-genai does not take it.
        """
        self._loaded(name, path)
        self._paths[name] = path

    def _loaded(self, name: str, path: Path) -> None:
        with _translated("the adapter does not load"):
            self._adapters.load(str(path.absolute()), name)

    def unload(self, name: str) -> None:
        """Unload an adapter that no text is written with.

        Raises:
            RunError: If one is.
        """
        self._unloaded(name)
        self._paths.pop(name, None)
        if self._rows is not None:
            self._rows.forget(name)

    def _unloaded(self, name: str) -> None:
        with _translated("the adapter cannot be unloaded"):
            self._adapters.unload(name)

    def templated(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the model's chat template makes of messages.

        Raises:
            RequestError: If it has no template, or that refuses the messages.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(json.dumps(messages))
        except RuntimeError as error:
            if "Empty chat template" in str(error):
                raise RequestError(
                    "the model has no chat template, so it cannot tell messages apart",
                    hint=f"use /v1/completions, or put chat_template.jinja beside {CONFIG}",
                ) from error
            reason = str(error).splitlines()[0]
            raise RequestError(
                f"the model's chat template refuses the messages: {reason}",
                hint="see which roles it takes, and in which order",
            ) from error
        return text

    def start(self, orders: Sequence[Order]) -> Generation:
        """Begin to write texts with one generator.

        Raises:
            ApartError: If their adapters cannot be in rows of one generator.
            RequestError: If onnxruntime-genai fails.
        """
        active, done = self._active(orders)
        try:
            with running():
                length = max(len(o.prompt) for o in orders) + max(o.most for o in orders)
                options = orders[0].sampling.options() | {"batch_size": len(orders)}
                generator = self._generator(max_length=length, **options)
                # Before the prompt: what is read without it stays so in the cache.
                for name in active:
                    generator.set_active_adapter(self._adapters, name)
        except RequestError:
            done()
            raise
        return Generation(generator, orders, self.facts, done)

    def _generator(self, **options: Any) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(**options)
        return og.Generator(self._model, params)

    def _active(self, orders: Sequence[Order]) -> tuple[Sequence[str], Callable[[], None]]:
        """The adapters of a generator, and what is to be done when it is gone."""
        names = {order.adapter for order in orders}
        if len(names) == 1:
            return [name for name in names if name], lambda: None
        assert self._packs is not None
        assert self._rows is not None
        try:
            weights, masks = self._packs.rows(orders, self._paths)
        except AdaptError as error:
            self._rows.part(names)
            raise ApartError from error

        def done() -> None:
            with suppress(RunError):  # a generator that failed may still be there
                self._unloaded(masks)

        return (weights, masks), done


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise RunError(f"{what}: {error}", hint="see docs/genai.md") from error
