"""The long run of one reader, guided by coverage (atheris, from the dev extra).

python tests/fuzz/run.py READER [-runs=1000000] [any other option of libFuzzer]

New inputs are kept in the folder of the run; what crashes is written to `crash-*`. Make it
small (`-minimize_crash=1`), write a test that fails, fix it, and add it to the corpus.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import random
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "fixtures")]

with atheris.instrument_imports(include=["onnx_adapt", "safetensors", "zipfile"]):
    import mutation
    import readers

    import onnx_adapt

    # Also those that are imported where they are used.
    for module in pkgutil.walk_packages(onnx_adapt.__path__, "onnx_adapt."):
        importlib.import_module(module.name)


def main() -> None:
    """Fuzz one reader."""
    logging.getLogger("onnx_adapt").setLevel(logging.ERROR)
    name, *options = sys.argv[1:]
    seeds = readers.corpus(name)

    def one_input(data: bytes) -> None:
        readers.read(name, data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutation.damaged(rng, data, seeds)[:max_size]

    limits = ("-timeout=10", "-rss_limit_mb=1500", "-max_len=4096")
    atheris.Setup(
        [sys.argv[0], *options, *limits, str(readers.CORPUS / name)],
        one_input,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
