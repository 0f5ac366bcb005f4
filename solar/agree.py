"""What all ranks do together: it succeeds on all of them, or fails on all with the same words."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from solar import cli


def agree(group: dist.ProcessGroup | None, doing: str, work: Callable[[], Any]) -> list[Any]:
    """What `work` gave on each rank. If it failed on any, the first failure, raised on all: none is left waiting.

    group: a gloo process group, all of whose ranks call this, or None for a single process. doing: what the message
    begins with. Raises OSError, FileNotFoundError or ValueError as `work` did, on whichever rank, and RuntimeError for
    anything else.
    """
    outcome, failure = None, None
    try:
        outcome = work()
    except Exception as error:
        failure = reason = error
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            reason = error.__context__  # torch.save raises it over the one that says that the disk is full
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next((kind for kind in kinds if isinstance(reason, kind)), RuntimeError)
        rank = "" if group is None else f" on rank {dist.get_rank(group)}"
        outcome = kind((f"{doing}{rank}: " if doing else "") + (cli.describe(reason) or type(reason).__name__))
    outcomes = [outcome]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, outcome, group=group)
    for other in outcomes:
        if isinstance(other, Exception):
            raise other from failure
    return outcomes
