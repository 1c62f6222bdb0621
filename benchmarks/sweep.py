"""Put one slot at every eligible site of six trained models, and verify each.

Every site of every model gets an insertion of its own: ONNX Runtime runs it with real
inputs (`onnx_adapt.verify`), then the slot is removed and the base must be back. Then each
model takes all its layers at once, and all its sites. Exit status 1 means a failure.

    python benchmarks/sweep.py --jobs 2
    python benchmarks/sweep.py --layers --models plcmos smart-turn
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from real_feeds import MAKERS, feeds

import onnx_adapt as oa
from onnx_adapt.cli.show import print_table, say

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from fetch_models import fetch


@dataclass(frozen=True, slots=True)
class Trial:
    """Slots to insert into a model at once.

    Attributes:
        model: Name of the model.
        places: Addresses of sites.
        title: What these places are.
    """

    model: str
    places: tuple[str, ...]
    title: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        wrong: What failed; empty if nothing did.
        still: Slots that move no output for these inputs, and why.
        error: Largest distance of a slot's output from the formula, or NaN.
        ratio: The largest error in parts of its bound.
        seconds: Time taken.
    """

    trial: Trial
    wrong: tuple[str, ...]
    still: tuple[str, ...]
    error: float
    ratio: float
    seconds: float


@functools.cache
def _open(name: str) -> oa.Model:
    return oa.open_model(fetch(name))


def attempt(trial: Trial) -> Outcome:
    """Insert, verify and remove. Whatever is raised is an outcome too: the sweep goes on."""
    started = time.perf_counter()
    wrong: list[str] = []
    still: list[str] = []
    error = ratio = math.nan
    try:
        base = _open(trial.model)
        adapted = oa.insert(base, after=trial.places)
        report = oa.verify(base, adapted, inputs=feeds(trial.model))
        wrong, still = _failures(report), _motionless(report)
        error = max((s.error for s in report.slots if s.error is not None), default=math.nan)
        ratio = max((s.ratio for s in report.slots if s.ratio is not None), default=math.nan)
        if oa.remove(adapted).proto != base.proto:
            wrong.append("remove: the base does not come back")
    except Exception as failure:
        wrong.append(f"{type(failure).__name__}: {failure}")
    seconds = time.perf_counter() - started
    return Outcome(trial, tuple(wrong), tuple(still), error, ratio, seconds)


def _failures(report: oa.Report) -> list[str]:
    """The checks that failed, but for slots that these inputs do not reach."""
    unreached = all(slot.error is None for slot in report.slots)
    excused = {"effect", "on"} if unreached and report.slots else set()
    failed = [check for check in report.checks if not check.passed]
    return [f"{c.name}: {c.detail}" for c in failed if c.name not in excused]


def _motionless(report: oa.Report) -> list[str]:
    return [
        f"{slot.name} ({'not reached' if slot.error is None else 'reached'})"
        for slot in report.slots
        if not slot.effect
    ]


def run(trials: Sequence[Trial], jobs: int) -> list[Outcome]:
    """Make all attempts, in processes of their own, and tell how far they are."""
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for outcome in pool.map(attempt, trials):
            outcomes.append(outcome)
            if len(outcomes) % 50 == 0:
                say(f"{len(outcomes)} of {len(trials)} done")
    return outcomes


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a model.

    Attributes:
        sites: The sites looked at, refused ones too.
        single: A trial for each eligible site.
        joint: Trials of several slots at once.
    """

    sites: list[oa.Site]
    single: list[Trial]
    joint: list[Trial]


def plan(name: str, *, only_layers: bool) -> Plan:
    """List the trials of a model."""
    sites = oa.find_sites(_open(name), all_tensors=not only_layers)
    usable = [site for site in sites if site.refused is None]
    groups = {"all layers": [site.address for site in usable if site.layer]}
    if not only_layers:
        groups["all sites"] = [site.address for site in usable]
    return Plan(
        sites,
        [Trial(name, (site.address,), site.address) for site in usable],
        [Trial(name, tuple(places), title) for title, places in groups.items()],
    )


def _row(name: str, sites: Sequence[oa.Site], outcomes: Sequence[Outcome]) -> list[object]:
    failed = sum(bool(o.wrong) for o in outcomes)
    still = sum(bool(o.still) and not o.wrong for o in outcomes)
    errors = [o for o in outcomes if not math.isnan(o.error)]
    worst = max(errors, key=lambda o: o.ratio, default=None)
    return [
        name,
        len(sites),
        sum(site.refused is not None for site in sites),
        len(outcomes),
        len(outcomes) - failed - still,
        still,
        failed,
        f"{worst.error:.1e}" if worst else "",
        f"{worst.ratio:.2f}" if worst else "",
        round(sum(o.seconds for o in outcomes), 1),
    ]


_COLUMNS = (
    *("model", "sites", "refused", "tried", "passed", "moved nothing", "failed"),
    *("worst error", "of its bound", "seconds"),
)


def show(plans: dict[str, Plan], single: Sequence[Outcome], joint: Sequence[Outcome]) -> None:
    """Print the tables, then every refusal counted and every other exception named."""
    rows = [
        _row(name, plan.sites, [o for o in single if o.trial.model == name])
        for name, plan in plans.items()
    ]
    rows.append(_row("all", [site for p in plans.values() for site in p.sites], single))
    print_table(_COLUMNS, rows)
    print("\nseveral slots at once")
    print_table(
        (
            "model",
            "at",
            "slots",
            "result",
            "moved nothing",
            "worst error",
            "of its bound",
            "seconds",
        ),
        [
            (
                *(o.trial.model, o.trial.title, len(o.trial.places)),
                *("FAILED" if o.wrong else "passed", len(o.still)),
                *(f"{o.error:.1e}", f"{o.ratio:.2f}", round(o.seconds, 1)),
            )
            for o in joint
        ],
    )
    reasons = Counter(
        (name, site.refused.split(";")[0])
        for name, plan in plans.items()
        for site in plan.sites
        if site.refused
    )
    _list("refused", (f"{n} x {model}: {reason}" for (model, reason), n in reasons.items()))
    _list("moved nothing", (f"{_where(o)}: {', '.join(o.still)}" for o in single if o.still))
    _list(
        "failed", (f"{_where(o)}: {'; '.join(o.wrong)}" for o in (*single, *joint) if o.wrong)
    )


def _where(outcome: Outcome) -> str:
    return f"{outcome.trial.model} {outcome.trial.title}"


def _list(title: str, lines: Iterable[str]) -> None:
    print(f"\n{title}", *(list(lines) or ["none"]), sep="\n  ")


def main() -> int:
    """Run the sweep and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--layers", action="store_true", help="only the outputs of layers")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    options = parser.parse_args()
    plans = {name: plan(name, only_layers=options.layers) for name in options.models}
    single = [trial for item in plans.values() for trial in item.single]
    joint = [trial for item in plans.values() for trial in item.joint]
    outcomes = run([*single, *joint], options.jobs)
    show(plans, outcomes[: len(single)], outcomes[len(single) :])
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
