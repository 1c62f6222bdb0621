"""Look into a wheel and an sdist: what has to be there is, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

LARGEST = 1_000_000
NEEDED = ("License-Expression", "Requires-Python", "Summary", "Description-Content-Type")


def look_at_wheel(wheel: Path, repo: Path) -> list[str]:
    """What is wrong with a wheel: it has the files of the package that git has, no others."""
    listed = subprocess.run(
        ["git", "ls-files", "onnx_adapt"], cwd=repo, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        record = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(record).decode())
    wrong = [f"wheel: {name}" for name in sorted(names ^ set(listed.stdout.split()))]
    wrong += [f"no {field} in the metadata" for field in NEEDED if not metadata[field]]
    if "onnx_adapt/py.typed" not in names:
        wrong.append("no py.typed: type checkers would ignore the package")
    if "Typing :: Typed" not in metadata.get_all("Classifier", []):
        wrong.append("no classifier Typing :: Typed")
    return wrong


def look_at_sdist(sdist: Path) -> list[str]:
    """What is wrong with an sdist: it can be built, and is the source only."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "SECURITY.md",
        "PKG-INFO",
    }
    wrong = [f"sdist without {name}" for name in sorted(wanted - names)]
    tops = {name.partition("/")[0] for name in names}
    extra = tops - wanted - {"onnx_adapt", "docs", ".gitignore", ""}
    return wrong + [f"sdist with {name}" for name in sorted(extra)]


def main(wheel: Path, sdist: Path, repo: Path) -> None:
    """Say what is wrong, if anything is."""
    wrong = look_at_wheel(wheel, repo) + look_at_sdist(sdist)
    large = [file for file in (wheel, sdist) if file.stat().st_size > LARGEST]
    wrong += [f"{file.name} has {file.stat().st_size} bytes" for file in large]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
