"""The texts of the two tasks, and how the encoder reads them. No PyTorch here."""

from __future__ import annotations

import hashlib
import html
import io
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from fetch_models import fetch  # isort: skip

HERE = Path(__file__).resolve().parent
SOURCES = {
    "tweet": "tweets",
    "film review": "movieReviewSnippets",
    "product review": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}
SIZES = {"train": 6000, "dev": 1000, "test": 1000}
CLEAR = 0.5  # raters' mean from -4 to 4; nearer to 0 a mood is nobody's call
FEWEST_WORDS = 5
GIVEAWAYS = re.compile(r"@anonymous|http://url_removed")  # only in tweets

TOKENIZER = BertWordPieceTokenizer(str(HERE / "vocab.txt"), lowercase=True)
TOKENIZER.enable_truncation(64)
TOKENIZER.enable_padding()

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Snippet:
    """One sentence, the document it is from, and how 20 people rated its mood."""

    source: str
    document: str
    text: str
    rating: float


@dataclass(frozen=True)
class Split:
    """Texts, and the index of each one's class."""

    texts: list[str]
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """A question about a text, and the texts to learn it from and to test it on."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]

    def with_tests(self, count: int) -> Task:
        """Return the task with the first texts of its test alone."""
        test = self.splits["test"]
        return replace(self, splits={"test": Split(test.texts[:count], test.labels[:count])})


def load_tasks() -> dict[str, Task]:
    """Return the tasks `mood` and `source`, each with as many texts of every class."""
    snippets = list(read_snippets())
    mood: dict[str, list[Snippet]] = {"negative": [], "positive": []}
    for one in snippets:
        if one.source == "film review" and abs(one.rating) >= CLEAR:
            mood["positive" if one.rating > 0 else "negative"].append(one)
    source: dict[str, list[Snippet]] = {name: [] for name in SOURCES}
    for one in snippets:
        if len(one.text.split()) >= FEWEST_WORDS:
            source[one.source].append(one)
    return {"mood": split("mood", mood), "source": split("source", source)}


def read_snippets() -> Iterator[Snippet]:
    """Yield the rated sentences of Hutto and Gilbert (2014), each text once."""
    seen = set()
    with tarfile.open(fetch("vader-texts")) as archive:
        for source, name in SOURCES.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            for line in io.TextIOWrapper(file, "utf-8"):
                number, rating, text = line.rstrip("\r\n").split("\t")
                text = GIVEAWAYS.sub("", html.unescape(text)).strip()
                if text not in seen:
                    seen.add(text)
                    yield Snippet(source, number.split("_")[0], text, float(rating))


def split(name: str, by_class: dict[str, list[Snippet]]) -> Task:
    """Return a task: one document in ten is for tests, and one for choosing settings."""
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in SIZES}
    for label, snippets in enumerate(by_class.values()):
        ordered = sorted(snippets, key=lambda one: draw(one.text))
        for part, size in SIZES.items():
            fitting = [one.text for one in ordered if part_of(one) == part]
            parts[part] += [(text, label) for text in fitting[: size // len(by_class)]]
    splits = {}
    for part, pairs in parts.items():
        pairs.sort(key=lambda pair: draw(pair[0]))
        splits[part] = Split([text for text, _ in pairs], np.array([y for _, y in pairs]))
    return Task(name, tuple(by_class), splits)


def part_of(snippet: Snippet) -> str:
    """Return the part of a snippet: sentences of one document stay together."""
    tenth = draw(f"{snippet.source} {snippet.document}") % 10
    return {0: "test", 1: "dev"}.get(tenth, "train")


def draw(text: str) -> int:
    """Return a number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def tokenize(texts: Sequence[str]) -> Feeds:
    """Return what the encoder reads, two arrays of `(texts, longest)`."""
    encoded = TOKENIZER.encode_batch(list(texts))
    return {
        "input_ids": np.array([one.ids for one in encoded]),
        "attention_mask": np.array([one.attention_mask for one in encoded]),
    }
