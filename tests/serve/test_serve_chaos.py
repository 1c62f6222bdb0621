"""Everything happens to a server under load: it loses no request, and gives no wrong answer.

`tools/chaos.py` does the same for longer, and on Ray.
"""

import signal
import time
from pathlib import Path
from random import Random

from chaos_clients import Ledger
from chaos_files import make_world
from chaos_victim import Victim, asked, happen, left_behind, settle


def test_whatever_happens_each_request_is_answered_right_in_the_end(tmp_path: Path) -> None:
    world, ledger, rng = make_world(tmp_path, 4), Ledger(), Random(1)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    options = ["--max-adapters", "3", "--batch-axis", "0"]
    victim = Victim(world, ledger, options, temporary)
    victim.start()
    with asked(victim, 6, pause_s=0.01):
        for kind in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 0.7
            while time.monotonic() < end:
                happen(world, rng)
                time.sleep(0.02)
            victim.end(kind)
            victim.start()
        settle(victim)
    victim.end(signal.SIGTERM)
    print(f"{ledger.right} right; sent again: {dict(ledger.again)}")
    assert ledger.wrong[:3] == []
    assert ledger.right > 500
    assert left_behind(victim) == []
