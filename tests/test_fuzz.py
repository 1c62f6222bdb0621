"""A short run of every fuzzing harness: the corpus, and seeded damage to it.

The long run is `python tests/fuzz/run.py READER`.
"""

import random
import time
import tracemalloc

import pytest
from fuzz import mutation, readers

MB = 1 << 20
SECONDS = 0.7


def _survives(name: str, data: bytes) -> None:
    """Read, or an AdaptError: in proportionate memory and time."""
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.process_time()
    readers.read(name, data)
    assert tracemalloc.get_traced_memory()[1] - before < 8 * MB + 64 * len(data)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", readers.READERS)
def test_only_an_adapt_error_comes_out_of_a_reader(name: str) -> None:
    seeds = readers.corpus(name)
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for data in seeds:
            _survives(name, data)
        count, started = 0, time.process_time()
        while count < 100 or time.process_time() - started < SECONDS:
            _survives(name, mutation.damaged(rng, rng.choice(seeds), seeds)[:4096])
            count += 1
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(readers.READERS))
def test_the_corpus_holds_files_that_are_read(name: str) -> None:
    """What is refused at once leads a fuzzer nowhere: when a format grows, so do they."""
    refused = [
        path.name
        for path in sorted((readers.CORPUS / name).iterdir())
        if not readers.read(name, path.read_bytes())
    ]
    assert refused == {"npz": ["member-text"]}.get(name, [])
