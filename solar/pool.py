"""Several long things to do side by side, with a line that says how far they are."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import NamedTuple

from solar import cli

LIVE, LOGGED = 5, 60  # seconds between progress lines on a terminal, and in a log


class Task(NamedTuple):
    """Something to do in a thread. size: how much it is, in a unit that all share; progress() -> the share of it that
    is done, also by an earlier call."""

    name: str
    size: float
    do: Callable[[], object]
    progress: Callable[[], float] = lambda: 0.0


def side_by_side(label: str, tasks: Sequence[Task], jobs: int, stop: Callable[[], None]) -> None:
    """Do all tasks, the longest first, `jobs` at a time.

    The first failure, or a signal, cancels those that have not begun and calls stop(), which is to make the others end;
    when they have, it is raised.
    """
    tasks = sorted(tasks, key=lambda task: -task.size)
    earlier = {task.name: task.progress() for task in tasks}
    start = shown = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(task.do): task for task in tasks}
        waiting, finished = set(futures), set()
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=LIVE, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    finished.add(futures[future].name)
                now = time.monotonic()
                if now - shown >= (LIVE if sys.stderr.isatty() else LOGGED) or not waiting:
                    show(label, tasks, earlier, finished, now - start)
                    shown = now
        except BaseException:
            for future in waiting:
                future.cancel()
            stop()
            raise


def show(label: str, tasks: Sequence[Task], earlier: dict[str, float], finished: set[str], seconds: float) -> None:
    """The progress line. The time left is by what was done in the `seconds` of this call."""
    whole = sum(task.size for task in tasks)
    done = sum(task.size * (1.0 if task.name in finished else task.progress()) for task in tasks)
    here = done - sum(task.size * earlier[task.name] for task in tasks)
    left = cli.human_seconds(seconds * (whole - done) / here) if here > 0 else "?"
    line = f"{label} {done / whole:4.0%}  {len(finished)} of {len(tasks)}, {left} left"
    live = sys.stderr.isatty() and len(finished) < len(tasks)
    print(f"\r{line:<79}" if sys.stderr.isatty() else line, end="" if live else "\n", file=sys.stderr, flush=True)
