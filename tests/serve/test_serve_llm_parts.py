"""Texts take turns, end when nobody waits for them, and are told when they are sure."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from disk_models import refused
from genai_models import FOLDER
from llm_models import NAMES, Truth, made
from serve_clients import server
from tokenizers.pre_tokenizers import ByteLevel

import onnx_adapt as oa
from onnx_adapt.errors import ModelFileError, RequestError, RunError
from onnx_adapt.serve.llm.facts import read_facts
from onnx_adapt.serve.llm.model import LanguageModel
from onnx_adapt.serve.llm.orders import Order, Sampling
from onnx_adapt.serve.llm.texts import Answer
from onnx_adapt.serve.llm.turns import Turns
from onnx_adapt.serve.repository import Repository

GREEDY = Sampling(temperature=0)
PROMPT = "the dog ran to the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LanguageModel]:
    model = LanguageModel(read_facts(folder / "llama"), 1)
    for name in NAMES[1:]:
        (path,) = (folder / "adapters").glob(f"{name}.*")
        mapped = oa.save_adapter(oa.load_adapter(path), folder / f"mapped/{name}.onnx_adapter")
        model.load(name, mapped)
    return model


def order(truth: Truth, name: str, most: int, prompt: str = PROMPT) -> Order:
    adapter = "" if name == "llama" else name
    return Order(truth.tokenizer.encode(prompt).ids, most, GREEDY, adapter)


def turns(
    model: LanguageModel, most: int = 4, waiting: int = 9, patience: float = 60
) -> Turns:
    return Turns(model.start, model.shares, ThreadPoolExecutor(1), most, waiting, patience)


def test_a_short_text_ends_before_a_long_one_that_began_earlier(
    model: LanguageModel, truth: Truth
) -> None:
    told: list[str] = []

    async def follow(turns: Turns, name: str, most: int) -> list[int]:
        tokens = []
        async for token in turns.tokens(order(truth, name, most)):
            told.append(name)
            tokens.append(token)
        return tokens

    async def both() -> list[list[int]]:
        shared = turns(model)
        return await asyncio.gather(follow(shared, "narrow", 40), follow(shared, "mixed", 3))

    found = asyncio.run(both())
    assert found == [truth.tokens("narrow", PROMPT, 40), truth.tokens("mixed", PROMPT, 3)]
    assert sorted(told[:6]) == ["mixed"] * 3 + ["narrow"] * 3


def test_a_text_that_nobody_waits_for_ends_and_lets_its_adapter_go(
    model: LanguageModel, truth: Truth, folder: Path
) -> None:
    async def leave() -> None:
        shared = turns(model, most=1)
        waiting = asyncio.create_task(anext(shared.tokens(order(truth, "llama", 2))))
        async with aclosing(shared.tokens(order(truth, "narrow", 50))) as tokens:
            await anext(tokens)
            with pytest.raises(RunError, match="still in use"):
                model.unload("narrow")
        assert await waiting == truth.tokens("llama", PROMPT, 1)[0]
        model.unload("narrow")
        model.load("narrow", folder / "mapped/narrow.onnx_adapter")

    asyncio.run(leave())


def test_a_text_for_which_too_many_wait_is_refused_and_one_that_waits_too_long(
    model: LanguageModel, truth: Truth
) -> None:
    async def wait() -> list[BaseException | int]:
        shared = turns(model, most=1, waiting=2, patience=0)
        texts = [shared.tokens(order(truth, "llama", 9)) for _ in range(3)]
        return await asyncio.gather(*map(anext, texts), return_exceptions=True)

    found = asyncio.run(wait())
    assert [error.status for error in found if isinstance(error, RequestError)] == [
        504,
        504,
        503,
    ]


def test_a_long_prompt_is_read_in_pieces_with_the_same_result(
    model: LanguageModel, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = truth.tokens("mixed", PROMPT, 12)
    monkeypatch.setattr("onnx_adapt.serve.llm.generation._PIECE", 3)
    generation = model.start([order(truth, "mixed", 12)])
    steps = []
    while generation.left:
        steps.append(generation.step())
    assert steps == [{}, {}, {}, *({0: token} for token in expected)]


def test_a_failure_of_the_model_is_told_to_who_waits(model: LanguageModel) -> None:
    async def fail() -> None:
        await anext(turns(model).tokens(Order((), 3, GREEDY)))

    with pytest.raises(RequestError, match="the model failed") as caught:
        asyncio.run(fail())
    assert caught.value.status == 500


def bytes_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of single bytes, as they are in texts of all the world."""
    text = "ab 日é😀"
    signs = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    vocabulary = {sign: i for i, sign in enumerate(dict.fromkeys(signs))}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    found.decoder = tokenizers.decoders.ByteLevel()
    found.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return found


def test_pieces_of_a_text_make_the_whole_whatever_its_bytes_are() -> None:
    tokenizer, rng = bytes_tokenizer(), np.random.default_rng(0)
    rows = [tokenizer.encode("日é😀a 日").ids]
    rows += [rng.integers(0, tokenizer.get_vocab_size(), 12).tolist() for _ in range(200)]
    for row in rows:
        for prompt in ([], tokenizer.encode("a日").ids, [row[0]]):
            answer = Answer(tokenizer, prompt, ())
            pieces = [answer.add(token) for token in row]
            assert "".join(pieces) + answer.finish() == tokenizer.decode(row), (prompt, row)


def test_a_character_is_told_when_its_last_byte_is_there() -> None:
    tokenizer = bytes_tokenizer()
    answer = Answer(tokenizer, [], ())
    pieces = [answer.add(token) for token in tokenizer.encode("é😀a").ids]
    assert pieces == ["", "é", "", "", "", "😀", "a"]


def test_text_is_held_back_while_it_may_begin_a_stop_string() -> None:
    tokenizer = bytes_tokenizer()

    def told(text: str, *stops: str) -> list[str]:
        answer = Answer(tokenizer, [], stops)
        pieces = []
        for token in tokenizer.encode(text).ids:
            pieces.append(answer.add(token))
            if answer.stopped:
                return pieces
        return [*pieces, answer.finish()]

    assert told("ab aab a", "aab") == ["", "ab", " ", "", "", ""]
    assert told("baab", "aa ") == ["b", "", "", "aab", ""]
    assert told("ba", "ab") == ["b", "", "a"]
    assert told("bab", "b") == [""]


def test_a_leading_space_of_an_answer_is_kept() -> None:
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1}, "▁a"))
    found.decoder = tokenizers.decoders.Metaspace()
    answer = Answer(found, [0], ())
    assert answer.add(1) + answer.add(0) + answer.finish() == " b a"


def test_adapters_that_must_be_fed_more_than_weights_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    adapter = oa.load_adapter(folder / "adapters/narrow.safetensors")
    (tmp_path / "in").mkdir()
    past = {"past_key_values.0.key": np.zeros((1, 2, 3, 16), np.float32)}
    oa.save_adapter(replace(adapter, initial_state=past), tmp_path / "in/a.safetensors")
    path = str(folder / "llama/model.onnx")
    repository = Repository(path, str(tmp_path / "in"), tmp_path, "llama", feeds=False)
    repository.sweep()
    assert "it has a first past" in repository.entries["a"].reason


def test_versions_are_kept_as_they_are_mapped_so_that_a_miss_converts_nothing(
    folder: Path, tmp_path: Path
) -> None:
    path = str(folder / "llama/model.onnx")
    repository = Repository(path, str(folder / "adapters"), tmp_path, "llama", feeds=False)
    repository.sweep()
    kept = repository.path(repository.entries["narrow"].version)
    assert kept.suffix == ".onnx_adapter"
    given = oa.load_adapter(folder / "adapters/narrow.safetensors").feeds()
    for name, array in oa.load_adapter(kept).feeds().items():
        assert np.array_equal(array, given.pop(name))
    assert given == {}


def test_a_model_without_a_chat_template_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llama", tmp_path / "llama")
    template = tmp_path / "llama/chat_template.jinja"
    messages = [{"role": "user", "content": "hi"}]
    template.write_text("{{ raise_exception('only poems') }}", encoding="utf-8")
    with pytest.raises(RequestError, match="refuses the messages: only poems"):
        LanguageModel(read_facts(tmp_path / "llama"), 1).templated(messages)
    template.unlink()
    with pytest.raises(RequestError, match="has no chat template"):
        LanguageModel(read_facts(tmp_path / "llama"), 1).templated(messages)


def test_a_folder_that_is_no_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot read"):
        read_facts(tmp_path)
    facts = json.loads((folder / "llama/genai_config.json").read_bytes())
    del facts["model"]["decoder"]["filename"]
    for text in ("{", json.dumps(facts), "[]"):
        (tmp_path / "genai_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelFileError, match="does not describe a single decoder"):
            read_facts(tmp_path)


def test_options_that_do_not_go_together_are_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for options, words in (
        ([], "give MODEL, or --llm FOLDER"),
        (["m.onnx", "--llm", "llama"], "not both"),
        (["m.onnx", "--max-waiting", "3"], "--max-waiting needs --llm"),
        (["--llm", "llama", "--replicas", "2"], "--replicas means nothing with --llm"),
        (["--llm", "llama", "--max-batch-size", "64"], "means nothing with --llm"),
        (["--llm", str(FOLDER / "tinyllama")], "has no slots"),
        (["--llm", "adapters"], "cannot read"),
    ):
        assert words in refused("serve", "--adapters", "adapters", *options).error


def test_a_newcomer_gets_from_the_page_to_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parent.parent
    page = (tests.parent / "docs/serving-llm.md").read_text(encoding="utf-8")
    made, curl, client = (
        re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[-1]
        for language in ("python", "sh", "py")
    )
    (tmp_path / "tests").symlink_to(tests)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", made], check=True)
    assert "```sh\nonnx-adapt serve --llm llama --adapters adapters\n```" in page
    with server(None, tmp_path / "adapters", "--llm", "llama") as served:
        here = curl.replace("localhost:8000", served.address).replace("curl", "curl -s")
        done = subprocess.run(["sh", "-ec", here], check=True, capture_output=True)
        assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0
        code = client.replace("localhost:8000", served.address)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        lines = [line.partition(" ")[2] for line in done.stdout.decode().splitlines()]
        assert len(lines) == len(set(lines)) == 3
