"""Where a saved model goes, with its data, and which files it must not replace there.

An example of links: a download cache has `snapshots/1/model.onnx`, a link to `blobs/abc`,
and `snapshots/1/model.onnx.data`, a link to `blobs/def`. A model may refer to files in its
own folder, or in the folder that it is linked to. The adapted `snapshots/1/fr.onnx` refers to
`model.onnx.data` too; as a plain file it could not reach `blobs/def`. So `reach_data` makes
the destination `blobs/fr.onnx`, and `snapshots/1/fr.onnx` becomes a link to it.
"""

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

_CHOOSE_ANOTHER = "choose another path with -o"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a model is written.

    Attributes:
        path: The path that was asked for; data files are beside it.
        file: The file to write: the path itself, or what it links to.
    """

    path: Path
    file: Path

    def holds(self, location: str) -> bool:
        """Whether a data file of this location would be the model itself."""
        return os.path.realpath(self.path.parent / location) == str(self.file)


def resolve_destination(path: str | os.PathLike[str]) -> Destination:
    """Follow the links of an output path to the file that will be written.

    Raises:
        SaveError: If no file can be written there.
    """
    target = Path(path).absolute()
    mode = stat.S_IFREG
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is new, if there is a folder for it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise SaveError(f"cannot write {target}: {reason}", hint=_CHOOSE_ANOTHER) from error
    folder, file = os.path.realpath(target.parent), Path(os.path.realpath(target))
    if not file.parent.is_dir():
        raise SaveError(f"there is no folder {file.parent}", hint="make it first")
    if not stat.S_ISREG(mode):
        raise SaveError(f"{target} is not a regular file", hint="choose another output path")
    return Destination(Path(folder, target.name), file)


def refuse_replacing_model(
    base: Path,
    place: Destination,
    items: Sequence[Reference],
    data: Iterable[Path],
    overwrite: bool,
) -> None:
    """Refuse a save that would replace the model that it reads, or data of that model.

    Args:
        base: The file that the model was opened from.
        place: Where the result goes.
        items: The external data that the result refers to.
        data: Other files that hold data of the model.
        overwrite: Whether the model itself may be replaced.

    Raises:
        SaveError: If one of them would be replaced.
    """
    needed = [
        item.location
        for item in by_location(items).values()
        if place.holds(item.location) or _same(locate(base, item), place.file)
    ]
    needed += [file.name for file in data if _same(file, place.file)]
    if needed:
        raise SaveError(
            f"the output would replace {needed[0]!r}, which holds weights of {base.name}",
            hint=_CHOOSE_ANOTHER,
        )
    if _same(base, place.file) and not overwrite:
        raise SaveError(
            f"the output would replace the input {place.path.name}",
            hint=f"{_CHOOSE_ANOTHER}, or allow it with --force",
        )


def refuse_replacing_files(
    outputs: Iterable[str | os.PathLike[str]], needed: Iterable[Path], label: str
) -> None:
    """Refuse outputs that would replace files that a model needs.

    Raises:
        SaveError: If an output is one of them, under whatever name.
    """
    needed = list(needed)
    for path in map(Path, outputs):
        if any(path == file or _same(path, file) for file in needed):
            raise SaveError(
                f"the output would replace {path.name!r}, which {label} needs",
                hint=_CHOOSE_ANOTHER,
            )


def refuse_other_folder(base: Path, place: Destination) -> None:
    """Refuse to save a thin model in another folder than its base's.

    Raises:
        SaveError: If the folders are different.
    """
    if os.path.realpath(base.parent) != str(place.path.parent):
        raise SaveError(
            f"a thin model refers to {base.name} and must be beside it",
            hint=f"write it there (-o {base.with_name(place.path.name)}), or leave out --thin",
        )


def data_to_copy(
    base: Path, place: Destination, items: Sequence[Reference], keep: bool
) -> dict[Path, Source]:
    """Find the external data files to copy along with a model, by their new paths.

    Nothing is copied if the folder stays the same, or if the same file is there already.

    Args:
        base: The file that the model was opened from.
        place: Where the result goes.
        items: The external data that the result refers to.
        keep: Copy nothing; the data must be in the new folder.

    Raises:
        ExternalDataError: If data is missing beside the base, or with `keep` beside the
            result.
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
    """Make the result a link where its data is linked out of the folder.

    The module's docstring has an example.

    Raises:
        ExternalDataError: If the result cannot refer to the data from there.
        SaveError: If a file exists where the link would lead.
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
            raise SaveError(f"{file} exists", hint=_CHOOSE_ANOTHER) from None
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
            f"cannot compare {one} with {other}: {error.strerror}", hint=_CHOOSE_ANOTHER
        ) from error
