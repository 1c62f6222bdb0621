"""Run by test_crash_safety in a process of its own: saves that stop at every stage.

Usage: save_at_risk.py FOLDER kill|interrupt. In FOLDER a function of this file makes what is
saved, and a child of this process saves it, once for each call to the system on the way: the
child is killed, or gets Ctrl-C, right before that call. Prints what is there afterwards as one
JSON document.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from disk_models import dense, external, raw, write

import onnx_adapt as oa
from onnx_adapt import model_file
from onnx_adapt.files import whole_files


def replaced(folder: Path) -> Callable[[], object]:
    """A model in place of an older one."""
    write(folder / "old" / "a.onnx", b"an older result")
    model = oa.open_model(write(folder / "old" / "m.onnx", dense(raw("V", 1))))
    adapted = oa.insert(model, after="dense")
    return lambda: oa.save_model(adapted, folder / "now" / "a.onnx")


def in_place(folder: Path) -> Callable[[], object]:
    """A model in place of the file it was opened from."""
    write(folder / "old" / "a.onnx", dense(raw("V", 1)))
    shutil.copytree(folder / "old", folder / "now")
    model = oa.open_model(folder / "now" / "a.onnx")
    adapted = oa.insert(model, after="dense")
    return lambda: oa.save_model(adapted, folder / "now" / "a.onnx", overwrite=True)


def with_data(folder: Path) -> Callable[[], object]:
    """A model with data that is copied into a new folder beside it."""
    model = oa.open_model(external(folder / "base" / "a.onnx", "deep/w.bin"))
    (folder / "old").mkdir()
    adapted = oa.insert(model, after="dense")
    return lambda: oa.save_model(adapted, folder / "now" / "a.onnx")


def moved_out(folder: Path) -> Callable[[], object]:
    """A model whose data moves out, in place of another one of which that is true."""
    model_file.PROTOBUF_LIMIT = 20_000
    one = oa.open_model(write(folder / "one.onnx", dense(raw("V", 1))))
    other = oa.open_model(write(folder / "two.onnx", dense(raw("V", 2), raw("U", 3))))
    (folder / "old").mkdir()
    assert oa.save_model(one, folder / "old" / "a.onnx").moved_out
    return lambda: oa.save_model(other, folder / "now" / "a.onnx")


def adapter(folder: Path) -> Callable[[], object]:
    """An adapter in place of an older one."""
    write(folder / "old" / "a.npz", b"an older adapter")
    parts = {"down": np.ones((64, 4), np.float32), "up": np.ones((4, 64), np.float32)}
    return lambda: oa.save_adapter(oa.Adapter("a", {"s": parts}), folder / "now" / "a.npz")


def owner(called: Any) -> object:
    """The module of a C function, or the object of a method."""
    return getattr(called, "__self__", None)


def stop_at(count: int, how: str, save: Callable[[], object]) -> None:
    """Save, and stop right before a call; the whole save if there are not so many."""
    left = count

    def watch(frame: FrameType, event: str, called: Any) -> None:
        nonlocal left
        if event != "c_call" or not isinstance(owner(called), type(os) | FileIO):
            return
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename != whole_files.__file__:
            caller = caller.f_back
        if caller is None or getattr(owner(called), "__name__", "posix") != "posix":
            return
        left -= 1
        if left == 0 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        save()
    except KeyboardInterrupt:
        os._exit(3)
    finally:
        sys.setprofile(None)
    os._exit(0)


def there(folder: Path) -> dict[str, str]:
    """What is in a folder: the checksum of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(folder: Path, how: str, make: Callable[[Path], Callable[[], object]]) -> Any:
    """What is there after each way to stop."""
    save = make(folder)
    found, count, code = [], 0, -1
    while code:
        count += 1
        shutil.rmtree(folder / "now", ignore_errors=True)
        shutil.copytree(folder / "old", folder / "now")  # with the times of the files
        child = os.fork()
        if not child:
            stop_at(count, how, save)
        code = os.waitpid(child, 0)[1]
        found.append(there(folder / "now"))
    return {"old": there(folder / "old"), "found": found, "new": found[-1]}


if __name__ == "__main__":
    place, how, name = sys.argv[1:]
    print(json.dumps(results(Path(place), how, globals()[name])))
