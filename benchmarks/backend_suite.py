"""Slots in every model of ONNX's own backend tests that has a float output.

For each: insert after up to six tensors, verify in ONNX Runtime with the test's own inputs,
remove, and compare byte for byte. Prints the counts and every reason. Exit status 1 means
that something is wrong.

    python benchmarks/backend_suite.py [--jobs 2] [--sample 10]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/fixtures"))
from backend_models import (
    Case,
    Outcome,
    attempt,
    has_float_output,
    node_cases,
    stored_cases,
)

_SHOWN = 100


def _attempt(case: Case) -> Outcome | None:
    warnings.simplefilter("ignore")
    return attempt(case) if has_float_output(case.proto) else None


def main() -> int:
    """Try the models and print what became of them."""
    options = argparse.ArgumentParser()
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--sample", type=int, default=1, help="try every n-th")
    given = options.parse_args()
    chosen = [*node_cases(), *stored_cases()][:: given.sample]
    with ProcessPoolExecutor(given.jobs) as pool:
        tried = [found for found in pool.map(_attempt, chosen, chunksize=8) if found]
    kinds = Counter(outcome.kind for outcome in tried)
    print(f"{len(chosen)} models, {len(tried)} with a float output tried: {dict(kinds)}")
    print(f"{sum(outcome.slots for outcome in tried)} slots verified and removed")
    for kind in ("refused", "unproven", "infinite", "still"):
        reasons = Counter(o.reason[:_SHOWN] for o in tried if o.kind == kind)
        for reason, count in reasons.most_common():
            print(f"{kind} {count:4}  {reason}")
    for outcome in tried:
        if outcome.kind == "wrong":
            print(f"WRONG {outcome.name}: {outcome.reason}")
    return 1 if kinds["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
