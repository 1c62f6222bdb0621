"""Leave out modules of a checkpoint that have no effect, and those that may be missing.

An adapter for `model.layers.0.q_proj` was trained by PPO, so the file also has
`v_head.summary`, which gives the value of a state and none of the model's outputs. The graph
has no `v_head`: it is left out, with a warning. Where a graph lacks any other module, an
adapter without it would compute something else than PyTorch, so it is refused, unless the user
says that it may be missing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue
from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import glob_matcher, nearest

_log = logging.getLogger(__name__)

_VALUE_HEADS = frozenset(["v_head", "value_head"])
"""What TRL and its kin call the value head of PPO."""


def may_be_missing(modules: Iterable[str], globs: Sequence[str]) -> dict[str, str]:
    """The modules that a graph may lack, each with the reason.

    Args:
        modules: The checkpoint's modules.
        globs: Those that the user allows to be missing.
    """
    found = {}
    for module in modules:
        glob = next((glob for glob in globs if _matches(glob, module)), None)
        if glob is not None:
            found[module] = f"the graph lacks it, and {glob!r} allows that"
        elif not _VALUE_HEADS.isdisjoint(module.split(".")):
            found[module] = "a value head gives none of the outputs that the graph has"
    return found


def _matches(glob: str, module: str) -> bool:
    return glob_matcher(glob, ".")(module) or glob_matcher(f"**.{glob}", ".")(module)


def tell_missing(spare: Mapping[str, str], missing: Collection[str]) -> None:
    """Warn of modules that are left out because the graph lacks them.

    Args:
        spare: The modules that may be missing, each with the reason.
        missing: Those that are.
    """
    for reason in dict.fromkeys(spare[module] for module in missing):
        _tell([module for module in missing if spare[module] == reason], reason)


def _tell(modules: Sequence[str], reason: str) -> None:
    shown = ", ".join(modules[:_SHOWN])
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    _log.warning("left out %s%s: %s", shown, more, reason)


_SHOWN = 20


def refuse_idle(
    globs: Sequence[str], missing: Collection[str], modules: Iterable[str]
) -> None:
    """Refuse a glob of modules that may be missing if none of them is.

    Args:
        globs: The globs.
        missing: The modules that are missing.
        modules: All modules of the checkpoint.

    Raises:
        CheckpointError: With the modules that it matches, or that are most like it.
    """
    known = list(modules)
    for glob in globs:
        if any(_matches(glob, module) for module in missing):
            continue
        there = [module for module in known if _matches(glob, module)]
        near = ", ".join(nearest(glob, known, 3)) or "none"
        raise CheckpointError(
            f"no module that the graph lacks matches {glob!r}, which may be missing",
            hint=f"the graph has {', '.join(there[:3])}; leave this glob out"
            if there
            else f"the nearest modules of the checkpoint: {near}",
        )


def with_effect(
    edits: Sequence[Edit], names: Mapping[str, str], finder: ByName | ByValue
) -> list[Edit]:
    """Leave out edits of modules that PyTorch never calls, with a warning.

    A trained weight of such a module is not left out: PyTorch reads it where it is.

    Args:
        edits: The edits.
        names: The graph's path for each module.
        finder: Finds the modules in the graph.

    Raises:
        CheckpointError: If nothing is left.
    """
    changed = {edit.module for edit in edits if not isinstance(edit, Replacement)}
    idle = {module for module in changed if finder.is_uncalled(names.get(module, ""))}
    kept = [e for e in edits if e.module not in idle or isinstance(e, Replacement)]
    if not idle:
        return list(edits)
    if not kept:
        raise CheckpointError(
            f"the checkpoint changes {', '.join(sorted(idle))} alone: {_UNCALLED}",
            hint="train the adapter for other modules",
        )
    _tell(sorted(idle), _UNCALLED)
    return kept


_UNCALLED = (
    "torch.nn.MultiheadAttention uses its weights without calling it, so that an adapter "
    "there has no effect in PyTorch either"
)
