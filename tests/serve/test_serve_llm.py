"""The texts that a server writes are those of the model alone, adapter by adapter."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from llm_models import END, NAMES, Truth, made
from serve_clients import Server, server
from waiting import LONG

import onnx_adapt as oa

PROMPTS = (
    "the dog ran to the cat",
    "a cat",
    "one adapter for each task sat on the sea",
    "mat",
)
HI: list[Any] = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Server]:
    options = ["--llm", str(folder / "llama"), "--max-generators", "5", "--max-waiting", "60"]
    with server(None, folder / "adapters", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[openai.OpenAI]:
    url = f"http://{served.address}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=LONG) as client:
        yield client


def asked(served: Server, path: str, document: Any) -> tuple[int, Any]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    request = urllib.request.Request(f"http://{served.address}/v1/{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as response:
            text = response.read()
            return response.status, json.loads(text) if text.startswith(
                b"{"
            ) else text.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_48_requests_at_once_get_the_texts_that_each_gets_alone(
    served: Server, truth: Truth
) -> None:
    jobs = [(NAMES[i % 3], PROMPTS[i % 4], 4 + i % 31) for i in range(48)]
    url = f"http://{served.address}/v1"

    async def whole(client: openai.AsyncOpenAI, name: str, prompt: str, most: int) -> str:
        found = await client.completions.create(
            model=name, prompt=prompt, max_tokens=most, temperature=0
        )
        assert found.usage is not None
        assert found.usage.completion_tokens <= most
        return found.choices[0].text

    async def streamed(client: openai.AsyncOpenAI, name: str, prompt: str, most: int) -> str:
        chunks = await client.completions.create(
            model=name, prompt=prompt, max_tokens=most, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everything() -> list[str]:
        options: Any = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": LONG}
        async with openai.AsyncOpenAI(**options) as client:
            tasks = [(whole, streamed)[i % 2](client, *job) for i, job in enumerate(jobs)]
            return await asyncio.gather(*tasks)

    expected = [truth.text(*job) for job in jobs]
    assert asyncio.run(everything()) == expected
    firsts = [truth.text(name, PROMPTS[0], 16) for name in NAMES]
    assert len(set(firsts)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_continues_what_the_template_makes_of_messages(
    client: openai.OpenAI, truth: Truth, name: str
) -> None:
    messages: list[Any] = [{"role": "system", "content": "a dog"}, *HI]
    prompt = "system a dog user the cat sat assistant"
    tokens, expected = truth.tokens(name, prompt, 9), truth.text(name, prompt, 9)
    finish = "stop" if tokens[-1] == END else "length"
    options: dict[str, Any] = {"model": name, "messages": messages, "temperature": 0}
    found = client.chat.completions.create(**options, max_completion_tokens=9)
    assert found.choices[0].message.content == expected
    assert (found.choices[0].finish_reason, found.model) == (finish, name)
    assert found.usage is not None
    assert found.usage.completion_tokens == len(tokens)
    assert found.usage.prompt_tokens == len(truth.tokenizer.encode(prompt).ids)
    chunks = list(
        client.chat.completions.create(
            **options, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == found.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == expected
    assert chunks[-2].choices[0].finish_reason == finish


def test_without_a_number_a_chat_goes_on_to_the_end_of_the_context(
    client: openai.OpenAI,
) -> None:
    found = client.chat.completions.create(model="mixed", messages=HI, temperature=0)
    assert found.usage is not None
    assert found.usage.total_tokens == 64 or found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string_that_several_tokens_make(
    client: openai.OpenAI, truth: Truth, stream: bool
) -> None:
    whole = truth.text("narrow", PROMPTS[0], 16)
    stop = whole[5:11]
    options: dict[str, Any] = {"model": "narrow", "prompt": PROMPTS[0], "temperature": 0}
    options |= {"stop": ["zzz", stop, whole[-1] + "\n"], "stream": stream, "max_tokens": 16}
    found = client.completions.create(**options)
    chunks = list(found) if stream else [found]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_chooses_the_same_tokens_again(client: openai.OpenAI) -> None:
    def text(seed: int | None, **options: Any) -> str:
        found = client.completions.create(
            model="narrow", prompt="the", max_tokens=40, seed=seed, **options
        )
        return found.choices[0].text

    assert text(7) == text(7) != text(8)
    assert text(-(2**63)) == text(-(2**63))
    assert text(None, temperature=2) != text(None, temperature=2)
    assert text(1, extra_body={"top_k": 1}) == text(2, temperature=0)


def test_several_prompts_have_an_answer_each(client: openai.OpenAI, truth: Truth) -> None:
    expected = [truth.text("mixed", prompt, 5) for prompt in PROMPTS]
    options: dict[str, Any] = {"model": "mixed", "max_tokens": 5, "temperature": 0}
    rows = [truth.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    for prompts in (list(PROMPTS), rows):
        found = client.completions.create(prompt=prompts, **options)
        assert [choice.text for choice in found.choices] == expected
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=rows, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


TEXT = {"model": "llama", "prompt": "a cat"}
CHAT = {"model": "llama", "messages": HI}


@pytest.mark.parametrize(
    ("path", "document", "status", "words"),
    [
        ("completions", b"{", 400, "no JSON"),
        ("completions", b"[]", 400, "no JSON object"),
        ("completions", {"prompt": "a"}, 400, "`model` is missing"),
        ("completions", {**TEXT, "model": "xx"}, 404, "'xx' is not in the repository"),
        ("completions", {"model": "llama"}, 400, "`prompt` is no text"),
        ("completions", {**TEXT, "prompt": ["a", 1]}, 400, "`prompt` is no text"),
        ("completions", {**TEXT, "prompt": ""}, 400, "no tokens"),
        ("completions", {**TEXT, "prompt": "\ud800"}, 400, "surrogate"),
        ("completions", {**TEXT, "prompt": [60]}, 400, "no token 60"),
        ("completions", {**TEXT, "prompt": [-1]}, 400, "no token -1"),
        ("completions", {**TEXT, "prompt": [5] * 64}, 400, "64 tokens; the prompt has 64"),
        ("completions", {**TEXT, "prompt": "a cat " * 99}, 400, "has 594 characters"),
        ("completions", {**TEXT, "max_tokens": 10**30}, 400, "context has 64 tokens"),
        ("completions", {**TEXT, "max_tokens": 0}, 400, "`max_tokens` is 0"),
        ("completions", {**TEXT, "max_tokens": 5.0}, 400, "`max_tokens` is 5.0"),
        ("completions", {**TEXT, "temperature": -1}, 400, "`temperature` is -1"),
        ("completions", {**TEXT, "temperature": True}, 400, "`temperature` is True"),
        ("completions", {**TEXT, "top_p": 1.5}, 400, "`top_p` is 1.5"),
        ("completions", {**TEXT, "seed": "x"}, 400, "`seed` is 'x'"),
        ("completions", {**TEXT, "stop": [""]}, 400, "`stop` has"),
        ("completions", {**TEXT, "stop": [1]}, 400, "`stop` is no text"),
        ("completions", {**TEXT, "stream": 1}, 400, "`stream` is 1"),
        ("completions", {**TEXT, "stream_options": {}}, 400, "belongs to `stream`"),
        ("completions", {**TEXT, "n": 2}, 400, "'n' is not supported"),
        ("completions", {**TEXT, "n": True}, 400, "'n' is not supported"),
        ("completions", {**TEXT, "logprobs": 0}, 400, "'logprobs' is not supported"),
        ("completions", {**TEXT, "tempreature": 0}, 400, "'tempreature' is not"),
        ("completions", {**TEXT, "prompt": ["a"] * 61}, 503, "60 texts wait already"),
        ("chat/completions", {"model": "llama"}, 400, "`messages` is no list"),
        ("chat/completions", {**CHAT, "messages": [{}]}, 400, "with a `role`"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "`content`"),
        ("chat/completions", {**CHAT, "tools": [{}]}, 400, "'tools' is not supported"),
        ("chat/completions", {**CHAT, "logprobs": True}, 400, "'logprobs' is not"),
        ("chat/completions", {**CHAT, "messages": HI * 20}, 400, "context has 64 tokens"),
        ("load_lora_adapter", {}, 400, "`lora_name` is missing"),
        ("load_lora_adapter", {"lora_name": "xx"}, 404, "no adapter 'xx'"),
        ("load_lora_adapter", {"lora_name": "llama"}, 400, "the base is loaded"),
        (
            "load_lora_adapter",
            {"lora_name": "narrow", "lora_path": "/etc/narrow.npz"},
            400,
            "`lora_path` is not the file",
        ),
        ("unload_lora_adapter", {"lora_name": "xx"}, 404, "no adapter 'xx'"),
    ],
)
def test_what_cannot_be_answered_is_an_error_that_openai_s_clients_read(
    served: Server, path: str, document: Any, status: int, words: str
) -> None:
    code, found = asked(served, path, document)
    assert code == status, found
    assert words in found["error"]["message"]
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert found["error"]["type"] == kind


def test_what_asks_for_nothing_more_is_taken(served: Server) -> None:
    extra = {"n": 1, "logprobs": None, "presence_penalty": 0.0, "user": "me", "echo": False}
    code, found = asked(served, "completions", {**TEXT, **extra, "max_tokens": 62})
    assert code == 200, found
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "cat"}]
    message = {"role": "user", "content": parts, "name": "me", "refusal": None}
    code, found = asked(served, "chat/completions", {**CHAT, "messages": [message]})
    assert code == 200, found


def test_adapters_are_loaded_and_unloaded_as_vllm_has_it(
    served: Server, client: openai.OpenAI, folder: Path, truth: Truth
) -> None:
    def text() -> str:
        found = client.completions.create(model="fr", prompt="a cat", temperature=0)
        return found.choices[0].text

    for name in ("narrow", "mixed"):
        path = folder / "adapters/fr.onnx_adapter"
        whole = next((folder / "adapters").glob(f"{name}.*"))
        oa.save_adapter(oa.load_adapter(whole), path)
        body = {"lora_name": "fr", "lora_path": str(path)}
        assert asked(served, "load_lora_adapter", body) == (
            200,
            "Success: LoRA adapter 'fr' added successfully.",
        )
        assert text() == truth.text(name, "a cat", 16)
    models = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    assert models == {"llama": None, "fr": "llama", "mixed": "llama", "narrow": "llama"}
    assert client.models.retrieve("fr").id == "fr"
    path.write_bytes(b"broken")
    code, found = asked(served, "load_lora_adapter", {"lora_name": "fr"})
    assert (code, text()) == (400, truth.text("mixed", "a cat", 16)), found
    code, told = asked(served, "unload_lora_adapter", {"lora_name": "fr"})
    assert (code, told) == (200, "Success: LoRA adapter 'fr' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="'fr' is not served: it was unloaded"):
        text()
    path.unlink()
