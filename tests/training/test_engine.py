"""How the steps of a training are run."""

import os
import subprocess
import sys

COUNT = """
import os
import sys

from onnx_adapt.ort import threads

os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
print(threads())
"""


def counted(cores: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(cores)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_process_that_may_use_one_core_of_several_gets_one_thread() -> None:
    several = (os.cpu_count() or 1) > 1
    assert counted(1) == (1 if several else 0)


def test_a_process_that_may_use_all_cores_leaves_the_number_to_onnx_runtime() -> None:
    cores = os.cpu_count() or 1
    free = len(os.sched_getaffinity(0))
    assert counted(cores) == (0 if free == cores else free)
