"""Texts that are rows of one generator are those that each is alone, adapter by adapter."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from llm_models import NAMES, Truth, made
from serve_clients import server
from waiting import LONG

import onnx_adapt as oa
from onnx_adapt.serve.llm.facts import read_facts
from onnx_adapt.serve.llm.generation import Generation
from onnx_adapt.serve.llm.model import LanguageModel
from onnx_adapt.serve.llm.orders import Order, Sampling
from onnx_adapt.serve.llm.padding import padding_changes_nothing
from onnx_adapt.serve.llm.rows import Rows
from onnx_adapt.serve.llm.turns import Turns

ALL = (*NAMES, "half", "minus")
GREEDY = Sampling(temperature=0)
PROMPTS = (
    "the dog ran to the cat",
    "a cat",
    "one adapter for each task sat on the sea",
    "mat",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made(tmp_path_factory.mktemp("rows"), batched=True)
    narrow = folder / "adapters/narrow.safetensors"
    for name, weight in (("half", 0.5), ("minus", -1)):
        oa.save_adapter(oa.blend([narrow], [weight]), folder / f"adapters/{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth(folder)


class Watched(LanguageModel):
    """A model that remembers the adapters of the rows of each generator."""

    def __init__(self, folder: Path) -> None:
        super().__init__(read_facts(folder / "llama"), 1)
        self.started: list[list[str]] = []
        for name in ALL[1:]:
            (path,) = (folder / "adapters").glob(f"{name}.*")
            adapter = oa.load_adapter(path)
            self.load(name, oa.save_adapter(adapter, folder / f"mapped/{name}.onnx_adapter"))

    def start(self, orders: Sequence[Order]) -> Generation:
        generation = super().start(orders)
        self.started.append([order.adapter for order in orders])
        return generation


@pytest.fixture
def model(folder: Path) -> Watched:
    return Watched(folder)


def turns(model: LanguageModel, most: int = 16) -> Turns:
    return Turns(model.start, model.shares, ThreadPoolExecutor(1), most, 99, LONG)


def order(truth: Truth, name: str, prompt: str, most: int, how: Sampling = GREEDY) -> Order:
    adapter = "" if name == "llama" else name
    return Order(truth.tokenizer.encode(prompt).ids, most, how, adapter)


async def followed(tokens: AsyncGenerator[int, None]) -> list[int]:
    return [token async for token in tokens]


def test_48_texts_at_once_are_those_that_each_is_alone(model: Watched, truth: Truth) -> None:
    jobs = [(ALL[i % 5], PROMPTS[i % 4], 4 + i % 31) for i in range(48)]

    async def everything() -> list[list[int]]:
        shared = turns(model)
        tasks = [followed(shared.tokens(order(truth, *job))) for job in jobs]
        return await asyncio.gather(*tasks)

    assert asyncio.run(everything()) == [truth.tokens(*job) for job in jobs]
    assert max(map(len, model.started)) == 8
    assert max(len(set(rows)) for rows in model.started) >= 4


def test_a_long_row_is_read_again_when_those_beside_it_have_ended(
    model: Watched, truth: Truth
) -> None:
    jobs = [("narrow", "a cat", 3), ("llama", "the mat", 2), ("narrow", "the dog", 50)]
    jobs += [("mixed", "a dog", 3)]

    async def everything() -> list[list[int]]:
        shared = turns(model)
        tasks = [followed(shared.tokens(order(truth, *job))) for job in jobs]
        return await asyncio.gather(*tasks)

    expected = [truth.tokens(*job) for job in jobs]
    assert len(expected[2]) > 12
    assert asyncio.run(everything()) == expected
    assert [sorted(rows) for rows in model.started] == [
        ["", "mixed", "narrow", "narrow"],
        ["narrow"],
    ]


def test_who_leaves_ends_a_row_and_not_those_beside_it(model: Watched, truth: Truth) -> None:
    async def leave() -> list[int]:
        shared = turns(model)
        rest = asyncio.create_task(followed(shared.tokens(order(truth, "mixed", "a cat", 30))))
        async with aclosing(shared.tokens(order(truth, "narrow", "mat", 50))) as tokens:
            for _ in range(2):
                await anext(tokens)
        return await rest

    assert asyncio.run(leave()) == truth.tokens("mixed", "a cat", 30)
    assert sorted(model.started[0]) == ["mixed", "narrow"]
    for name in ALL[1:]:
        model.unload(name)  # no generator uses it any more


def test_an_adapter_that_cannot_be_beside_others_does_not_harm_their_texts(
    model: Watched, truth: Truth, folder: Path
) -> None:
    broken = oa.load_adapter(folder / "adapters/narrow.safetensors")
    weights = {
        name: {p: a * np.inf for p, a in w.items()} for name, w in broken.weights.items()
    }
    path = oa.save_adapter(replace(broken, weights=weights), folder / "broken.onnx_adapter")
    model.load("broken", path)
    orders = [order(truth, name, "a cat", 6) for name in ("broken", *NAMES)]

    async def everything() -> list[list[int]]:
        shared = turns(model)
        return await asyncio.gather(*(followed(shared.tokens(o)) for o in orders))

    assert asyncio.run(everything())[1:] == [truth.tokens(n, "a cat", 6) for n in NAMES]
    assert ["broken"] in model.started
    assert not model.shares(orders[:1], orders[1])
    model.unload("broken")


def test_rows_share_what_belongs_to_their_generator() -> None:
    rows = Rows(context=64, pad=1)
    first = Order([5] * 10, 20, GREEDY, "fr")

    def taken(orders: Sequence[Order] = (first,), **changes: Any) -> bool:
        return rows.take(orders, replace(first, **changes))

    drawn = Sampling(temperature=0.7)
    penal = Sampling(temperature=0, repetition_penalty=1.2)
    assert taken(adapter="de", most=5, prompt=[5] * 8)
    assert taken(sampling=Sampling(temperature=0, seed=3))  # draws nothing
    assert not taken(sampling=drawn)
    assert rows.take([replace(first, sampling=drawn)], replace(first, sampling=drawn))
    seeded = replace(first, sampling=replace(drawn, seed=3))
    assert not rows.take([seeded], seeded)
    penalised = replace(first, sampling=penal)
    assert rows.take([penalised], penalised)
    assert not rows.take([penalised], replace(penalised, prompt=[5] * 9))
    assert not taken(prompt=[5, 1, 5])
    assert not taken(prompt=[5, 5])  # too much padding
    assert not taken(prompt=[5] * 45)  # 45 + 20 pass the context
    assert not taken([first] * 8)
    others = [replace(first, adapter=name) for name in ("", "a", "b", "c", "d")]
    assert taken(others, adapter="d")
    assert not taken(others, adapter="e")
    exact = Rows(context=64, pad=1, padded=False)
    assert exact.take([first], first)
    assert not exact.take([first], replace(first, prompt=[5] * 9))


def test_a_model_is_tried_for_what_padding_changes(folder: Path) -> None:
    facts = read_facts(folder / "llama")
    model = og.Model(str(folder / "llama"))

    class Left:
        """A generator that gets padding in front, which GroupQueryAttention counts as text."""

        def __init__(self, generator: og.Generator) -> None:
            self._generator = generator

        def __getattr__(self, name: str) -> Any:
            return getattr(self._generator, name)

        def append_tokens(self, prompts: np.ndarray) -> None:
            ends = (prompts != facts.pad).sum(1)
            size = prompts.shape[1]
            moved = [np.roll(r, size - e) for r, e in zip(prompts, ends, strict=True)]
            self._generator.append_tokens(np.stack(moved))

    def generator(**options: Any) -> og.Generator:
        params = og.GeneratorParams(model)
        params.set_search_options(**options)
        return og.Generator(model, params)

    assert padding_changes_nothing(generator, facts)
    assert not padding_changes_nothing(lambda **options: Left(generator(**options)), facts)


def test_a_server_answers_a_batch_with_stops_streams_and_usage(
    folder: Path, truth: Truth
) -> None:
    jobs = [(ALL[i % 5], PROMPTS[i % 4], 6 + i % 17, i % 2 == 1) for i in range(24)]
    with server(None, folder / "adapters", "--llm", str(folder / "llama")) as served:

        def text(name: str, prompt: str, most: int, stream: bool) -> str:
            whole = truth.text(name, prompt, most)
            document = {"model": name, "prompt": prompt, "max_tokens": most, "temperature": 0}
            document |= {"stop": whole[2:6] or "zzz", "stream": stream}
            url = f"http://{served.address}/v1/completions"
            request = urllib.request.Request(url, json.dumps(document).encode())
            with urllib.request.urlopen(request, timeout=LONG) as response:
                lines = response.read().decode().split("\n\n")
            lines = [line.removeprefix("data: ") for line in lines if line]
            found = [json.loads(line) for line in lines if line != "[DONE]"]
            if not stream:
                assert 0 < found[0]["usage"]["completion_tokens"] <= most
            return "".join(piece["choices"][0]["text"] for piece in found)

        with ThreadPoolExecutor(24) as threads:
            found = list(threads.map(lambda job: text(*job), jobs))
        assert "share" not in served.said()
    wholes = [truth.text(*job[:3]) for job in jobs]
    assert found == [
        whole[: whole.index(whole[2:6])] if whole[2:6] else whole for whole in wholes
    ]
