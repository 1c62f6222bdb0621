"""The result of a verification."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from onnx_adapt.errors import MismatchError
from onnx_adapt.tables import html_table, text_table
from onnx_adapt.words import count

CALIBRATE = (
    "`onnx-adapt insert BASE --adapter DIR --calibrate INPUTS.npz` widens the ranges for the "
    "adapter"
)
"""The hint for an adapter whose values do not fit the ranges of a quantised model."""


@dataclass(frozen=True, slots=True)
class Check:
    """One of the checks of a verification.

    Attributes:
        name: `interface`, `graph`, `fused`, `off`, `ranges`, `rows`, `on`, `effect`,
            `saturation`, `checker` or `gradients`.
        passed: Whether it holds.
        detail: What was measured, or what is wrong.
        warnings: What does not hold for these inputs but need not be an error.
    """

    name: str
    passed: bool
    detail: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotResult:
    """What was measured at one slot, at one of its places.

    Attributes:
        name: The slot; for a further place of a slot `name@2`, `name@3`, ...
        error: The difference from the float64 oracle, relative to the largest value, of the
            element that is nearest to its bound or furthest past it; None if the slot was
            not reached.
        tolerance: The bound of rounding errors of that element, relative to the same.
        bottlenecks: The bottlenecks that were tried.
        effect: The largest change of a model output when this slot alone is on, at all its
            places, relative to the output's largest value, with the smallest inputs that show
            one; of a large model with many outputs only the nearest ones may be looked at.
            0 for a place that was not reached; None if effects were not measured.
        ratio: The error divided by its bound; more than 1 is more than rounding explains.
        shares: For a further place, the slot that it is a place of; else ''.
    """

    name: str
    error: float | None
    tolerance: float | None
    bottlenecks: tuple[int, ...]
    effect: float | None
    ratio: float | None = None
    shares: str = ""


@dataclass(frozen=True, slots=True)
class Saturation:
    """The values that an adapter drives out of the range of one QuantizeLinear.

    Attributes:
        node: The QuantizeLinear.
        slots: The slots and trained weights that it is behind, with no other slot between.
        off: The share of its values outside its range with the slots off.
        on: The same with the adapter on.
        least: Its least value with the adapter on.
        most: Its largest value with the adapter on.
        low: The least value that its range holds.
        high: The largest value that its range holds.
    """

    node: str
    slots: tuple[str, ...]
    off: float
    on: float
    least: float
    most: float
    low: float
    high: float


CHECK_COLUMNS = ("check", "result", "measured")
SLOT_COLUMNS = ("slot", "error", "tolerance", "ratio", "bottlenecks", "effect")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`.

    Attributes:
        base: Label of the base model.
        adapted: Label of the adapted model.
        checks: The checks, in order.
        slots: One result per place of each slot, where `on` and `effect` ran.
        shapes: Shapes of the inputs used, one dict per set.
        runtime: Version of ONNX Runtime, or '' if it was not used.
        strict: Whether warnings count as failures.
        saturation: The quantizers with more values outside their range when the adapter is
            on than when it is off.
        providers: The execution providers that the models ran on; empty if none ran.
    """

    base: str
    adapted: str
    checks: tuple[Check, ...]
    slots: tuple[SlotResult, ...]
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    runtime: str
    strict: bool
    saturation: tuple[Saturation, ...] = ()
    providers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check holds, and with `strict` without a warning."""
        held = all(check.passed for check in self.checks)
        return held and not (self.strict and self.warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all checks."""
        return tuple(text for check in self.checks for text in check.warnings)

    def raise_for_mismatch(self) -> Report:
        """Return the report, or raise if it did not pass.

        Raises:
            MismatchError: If a check failed.
        """
        if self.passed:
            return self
        failed = [check for check in self.checks if not check.passed]
        reasons = [f"{check.name}: {check.detail}" for check in failed]
        hint = "`onnx-adapt verify --json` has every number"
        if [check.name for check in failed] == ["saturation"]:
            hint = CALIBRATE
        if [check.name for check in failed] == ["rows"]:
            hint = "insert without --batched: rows are then run by adapter"
        raise MismatchError(
            f"{self.adapted} does not match {self.base}: "
            + "; ".join(reasons or list(self.warnings)),
            hint=hint,
        )

    def __repr__(self) -> str:
        """Whether it passed, and what was checked."""
        failed = [check.name for check in self.checks if not check.passed]
        verdict = "passed" if self.passed else f"FAILED ({', '.join(failed) or 'strict'})"
        checks, slots = count(len(self.checks), "check"), count(len(self.slots), "slot")
        return f"<Report {verdict}: {self.adapted} against {self.base}, {checks}, {slots}>"

    def __str__(self) -> str:
        """The tables that `onnx-adapt verify` prints, and the warnings."""
        tables = [text_table(CHECK_COLUMNS, self.check_rows())]
        tables += [text_table(SLOT_COLUMNS, self.slot_rows())] if self.slots else []
        return "\n\n".join([*tables, *(f"warning: {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        slots = html_table("", SLOT_COLUMNS, self.slot_rows()) if self.slots else ""
        return html_table(repr(self), CHECK_COLUMNS, self.check_rows()) + slots

    def check_rows(self) -> list[tuple[str, str, str]]:
        """The checks, by `CHECK_COLUMNS`."""
        marks = {True: "ok", False: "FAILED"}
        return [(check.name, marks[check.passed], check.detail) for check in self.checks]

    def slot_rows(self) -> list[tuple[str, ...]]:
        """What was measured at the slots, by `SLOT_COLUMNS`."""
        return [
            (
                slot.name,
                "not reached" if slot.error is None else f"{slot.error:.1e}",
                "" if slot.tolerance is None else f"{slot.tolerance:.1e}",
                "" if slot.ratio is None else f"{slot.ratio:.2f}",
                " ".join(map(str, slot.bottlenecks)),
                f"{slot.effect:.1e}" if slot.effect else "none",
            )
            for slot in self.slots
        ]

    def as_dict(self) -> dict[str, object]:
        """The report for `--json`."""
        return {
            "passed": self.passed,
            "base": self.base,
            "adapted": self.adapted,
            "runtime": self.runtime,
            "providers": list(self.providers),
            "strict": self.strict,
            "checks": [asdict(check) for check in self.checks],
            "slots": [
                {key: _plain(value) for key, value in asdict(slot).items()}
                for slot in self.slots
            ],
            "saturation": [asdict(item) for item in self.saturation],
            "shapes": [{k: list(v) for k, v in item.items()} for item in self.shapes],
        }


def _plain(value: object) -> object:
    """A number that JSON has no form for, as text."""
    odd = isinstance(value, float) and not math.isfinite(value)
    return str(value) if odd else value
