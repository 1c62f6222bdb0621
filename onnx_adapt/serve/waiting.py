"""To wait for something no longer than so many seconds, at little cost."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def within(seconds: float, action: Coroutine[Any, Any, _T]) -> _T:
    """What an action gives, if it takes no longer than this; otherwise it is cancelled.

    `asyncio.wait_for` makes a task of the action before Python 3.12, and `asyncio.timeout`,
    which comes with Python 3.11, costs three times this.

    Raises:
        asyncio.TimeoutError: If it takes longer.
    """
    task = asyncio.current_task()
    assert task is not None
    late = False

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        return await action
    except asyncio.CancelledError:
        if not late:
            raise
        if sys.version_info >= (3, 11) and task.uncancel():  # others cancelled it as well
            raise
        raise asyncio.TimeoutError from None
    finally:
        timer.cancel()
