"""Where a saved model goes, with the data beside it, and what may not be replaced there."""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_adapt.errors import ExternalDataError, SaveError
from onnx_adapt.model.external_data import Reference, by_location, check, find, locate
from onnx_adapt.model.payloads import Source

_ELSEWHERE = "choose another path with -o"


@dataclass(frozen=True, slots=True)
class Destination:
    """A place for a model.

    Attributes:
        path: The model's path as it was named; data files are beside it.
        file: The file to write: the path itself, or what it links to.
    """

    path: Path
    file: Path

    def holds(self, location: str) -> bool:
        """Whether a data file of this location would be the model itself."""
        return os.path.realpath(self.path.parent / location) == str(self.file)


def settle(path: str | os.PathLike[str]) -> Destination:
    """Find out where a path leads to.

    Raises:
        SaveError: If no file can be there.
    """
    target = Path(path).absolute()
    mode = stat.S_IFREG
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is new, if there is a folder for it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise SaveError(f"cannot write {target}: {reason}", hint=_ELSEWHERE) from error
    folder, file = os.path.realpath(target.parent), Path(os.path.realpath(target))
    if not file.parent.is_dir():
        raise SaveError(f"there is no folder {file.parent}", hint="make it first")
    if not stat.S_ISREG(mode):
        raise SaveError(f"{target} is not a regular file", hint="choose another output path")
    return Destination(Path(folder, target.name), file)


def refuse_replacing(
    base: Path,
    place: Destination,
    items: Sequence[Reference],
    lenders: Iterable[Path],
    overwrite: bool,
) -> None:
    """Keep the model that is saved, and its data, from being replaced by the result.

    Args:
        base: The model that is saved.
        place: Where the result goes.
        items: What the result refers to.
        lenders: Other files that data of the model is in.
        overwrite: Whether the model itself may be replaced.

    Raises:
        SaveError: If they would be.
    """
    held = [
        item.location
        for item in by_location(items).values()
        if place.holds(item.location) or _same(locate(base, item), place.file)
    ]
    held += [file.name for file in lenders if _same(file, place.file)]
    if held:
        raise SaveError(
            f"the output would replace {held[0]!r}, which holds weights of {base.name}",
            hint=_ELSEWHERE,
        )
    if _same(base, place.file) and not overwrite:
        raise SaveError(
            f"the output would replace the input {place.path.name}",
            hint=f"{_ELSEWHERE}, or allow it with --force",
        )


def refuse_held(
    outputs: Iterable[str | os.PathLike[str]], held: Iterable[Path], label: str
) -> None:
    """Keep files that a model needs from being replaced by something else.

    Raises:
        SaveError: If an output is one of them, under whatever name.
    """
    held = list(held)
    for path in map(Path, outputs):
        if any(path == file or _same(path, file) for file in held):
            raise SaveError(
                f"the output would replace {path.name!r}, which {label} needs",
                hint=_ELSEWHERE,
            )


def refuse_elsewhere(base: Path, place: Destination) -> None:
    """Keep a model that refers to its base beside it.

    Raises:
        SaveError: If it would be in another folder.
    """
    if os.path.realpath(base.parent) != str(place.path.parent):
        raise SaveError(
            f"a thin model refers to {base.name} and must be beside it",
            hint=f"write it there (-o {base.with_name(place.path.name)}), or leave out --thin",
        )


def data_to_copy(
    base: Path, place: Destination, items: Sequence[Reference], keep: bool
) -> dict[Path, Source]:
    """Data files that must come along, by where they go; none if they are there already.

    Raises:
        ExternalDataError: If data is missing: of the base, or with `keep` of the result.
        SaveError: If another file has the name of a data file.
    """
    folder = place.path.parent
    stays = folder == Path(os.path.realpath(base.parent))
    check(place.path if keep and not stays else base, items)
    if keep or stays:
        return {}
    copies = {}
    for location, item in by_location(items).items():
        source, there = find(base, item), folder / location
        if not os.path.exists(there):
            copies[there] = source
        elif not _equal(source.path, there):
            raise SaveError(
                f"{there} exists and is not the data of {base.name}",
                hint="write to another folder, or rename the data file that is there",
            )
    return copies


def reach_data(base: Path, place: Destination, items: Sequence[Reference]) -> Destination:
    """Let the result reach its data where that is linked out of the folder.

    A model may refer to files in the folder it is in, or in the one that it is a link
    to. In a download cache both are links, so that the result beside them becomes one.

    Raises:
        ExternalDataError: If the data is out of reach.
        SaveError: If another file is where the link would lead to.
    """
    files = by_location(items).values()
    try:
        for item in files:
            locate(place.path, item)
    except ExternalDataError:
        home = Path(os.path.realpath(base)).parent
        if place.path.parent != Path(os.path.realpath(base.parent)):
            raise
        for item in files:
            locate(place.path, item, home)
        file = home / place.path.name
        if os.path.lexists(file):
            raise SaveError(f"{file} exists", hint=_ELSEWHERE) from None
        return replace(place, file=file)
    return place


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _equal(one: Path, other: Path) -> bool:
    try:
        return _same(one, other) or filecmp.cmp(one, other, shallow=False)
    except OSError as error:
        raise SaveError(
            f"cannot compare {one} with {other}: {error.strerror}", hint=_ELSEWHERE
        ) from error
