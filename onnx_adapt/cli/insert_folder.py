"""`onnx-adapt insert FOLDER`: a model that is in several files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli.outputs import file_label, print_json, print_table, say
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.slots import slot_dict
from onnx_adapt.errors import SaveError
from onnx_adapt.formats import suffix_of
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import AdaptedFolder, Report

_COLUMNS = ("file", "slots", "proof")
_HERE = (
    *("name", "part", "module_map", "allow_missing", "file_format", "output", "swappable"),
    "batched",
)
"""The options of `insert` that mean something for a folder, beside those of the proof."""
_ALSO = ("model", "adapter", "no_verify", "provider", "force", "as_json")


def insert_into_folder(ctx: click.Context) -> None:
    """Insert a checkpoint into all models of a folder, and write them as a folder.

    Raises:
        UsageError: If an option is given that is for one model, or one is missing.
        SaveError: If the destination cannot be a new folder.
    """
    import onnx_adapt as oa

    given: Mapping[str, Any] = ctx.params
    _refuse_others(ctx)
    folder, out = Path(given["model"]), _destination(given)
    with patience(f"reading {given['adapter']}"):
        made = oa.insert_folder(
            folder,
            given["adapter"],
            name=given["name"],
            part=given["part"],
            module_map=given["module_map"],
            allow_missing=given["allow_missing"],
            baked=not given["swappable"],
            batched=given["batched"],
        )
    proofs: dict[Path, Report] = {}
    with patience() as (_, stage):
        for file in made.files if not given["no_verify"] else ():
            if file.adapted is not None:
                proof = oa.verify(
                    file.base,
                    file.adapted,
                    weights=False,
                    adapter=made.adapter if not given["swappable"] else None,
                    provider=given["provider"],
                    stage=stage,
                )
                proofs[file.path] = proof.raise_for_mismatch()
    label = file_label(made.adapter)
    weights = Path(f"{label}{suffix_of(given['file_format'])}") if given["swappable"] else None
    _write(folder, out, made, weights)
    _show(out, made, proofs, weights, as_json=given["as_json"])


def _refuse_others(ctx: click.Context) -> None:
    from click.core import ParameterSource

    if not ctx.params["adapter"]:
        raise click.UsageError(
            "a folder takes a trained checkpoint: give --adapter; --after is for one model"
        )
    others = [
        param.opts[0]
        for param in ctx.command.params
        if param.name not in (*_HERE, *_ALSO)
        and ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
    ]
    if others:
        raise click.UsageError(f"{', '.join(others)} has no effect with a folder")


def _destination(given: Mapping[str, Any]) -> Path:
    folder = Path(given["model"])
    out = Path(given["output"] or f"{folder.absolute()!s}.adapted")
    inside = folder.resolve() in (out.resolve(), *out.resolve().parents)
    if inside or out.resolve() in folder.resolve().parents:
        raise SaveError(
            f"{out} is {folder} itself, or one is inside the other",
            hint="give another folder with -o",
        )
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise SaveError(f"{out} is a file or a link", hint="give a folder with -o")
    if out.exists() and any(out.iterdir()) and not given["force"]:
        raise SaveError(
            f"the folder {out} is there already, with other files",
            hint="give a new folder, or --force to replace the files in it of the same names",
        )
    return out


def _write(folder: Path, out: Path, made: AdaptedFolder, weights: Path | None) -> None:
    """Write all files of a folder: to a temporary one first, then moved into place."""
    import onnx_adapt as oa
    from onnx_adapt.model.external_data import references

    adapted = {file.path for file in made.files if file.adapted is not None}
    own: set[Path] = set()
    shared: set[Path] = set()
    for file in made.files:
        data = {file.path.parent / item.location for item in references(file.base.proto)}
        (own if file.path in adapted else shared).update(data)
    skipped = {*adapted, *(own - shared)}
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".insert-") as work:
        fresh = Path(work) / "out"
        for path in sorted(folder.rglob("*")):
            short = path.relative_to(folder)
            if path.is_dir():
                (fresh / short).mkdir(parents=True, exist_ok=True)
            elif short not in skipped:
                (fresh / short).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, fresh / short)
        for file in made.files:
            if file.adapted is not None:
                (fresh / file.path).parent.mkdir(parents=True, exist_ok=True)
                oa.save_model(file.adapted, fresh / file.path)
        if weights is not None:
            oa.save_adapter(made.adapter, fresh / weights)
        former = Path(work) / "former"
        if out.exists():
            os.replace(out, former)
        try:
            os.replace(fresh, out)
        except OSError:
            if former.exists():
                os.replace(former, out)
            raise
        _keep_others(former, out)


def _keep_others(former: Path, out: Path) -> None:
    """Move the files of the folder that was replaced into the new one, but for namesakes."""
    for path in sorted(former.rglob("*")):
        there = out / path.relative_to(former)
        if not path.is_dir() and not os.path.lexists(there):
            there.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, there)


def _show(
    out: Path,
    made: AdaptedFolder,
    proofs: Mapping[Path, Report],
    weights: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print what was inserted, proven and written."""
    import onnx_adapt as oa
    from onnx_adapt.edit.insert import all_places

    adapted = {file.path: file.adapted for file in made.files if file.adapted is not None}
    slots = {path: oa.list_slots(model) for path, model in adapted.items()}
    everywhere = {path: all_places(model) for path, model in adapted.items()}
    if as_json:
        print_json(
            {
                "output": str(out),
                "adapter": str(out / weights) if weights else None,
                "files": [
                    {
                        "file": str(file.path),
                        "verified": file.path in proofs,
                        "slots": [
                            slot_dict(slot, everywhere[file.path])
                            for slot in slots.get(file.path, ())
                        ],
                    }
                    for file in made.files
                ],
            }
        )
    else:
        rows = []
        for file in made.files:
            checks = proofs[file.path].checks if file.path in proofs else ()
            proof = next((c.detail for c in checks if c.name == "off"), "not verified")
            if file.adapted is None:
                proof = "copied: no module of the checkpoint is in it"
            rows.append((str(file.path), len(slots.get(file.path, ())), proof))
        print_table(_COLUMNS, rows)
    say(f"wrote {out}: {count(len(slots), 'adapted model')} of {len(made.files)}")
    if weights is not None:
        say(f"wrote {out / weights}, the adapter for all of them")
