"""train.py with a fault: `python -m tests.faulty_train FAULT [train.py's flags]`. FAULT is KIND:RANK:STEP.

nan: the loss of that rank is NaN at that step. kill: the rank dies there, as by kill -9, but only once: it leaves a
file `survived` in --out, and spares a run that finds it there. none: nothing happens.
"""

import os
import signal
import sys
from pathlib import Path

import train
from solar import cli


def main() -> None:
    kind, rank, step = sys.argv.pop(1).split(":")
    inner = train.training_step
    taken = 0

    def step_with_a_fault(model, optimizer, objective, *rest):
        nonlocal taken
        taken += 1
        here = taken == int(step) and int(os.environ.get("RANK", 0)) == int(rank)
        if here and kind == "kill":
            marker = Path(sys.argv[sys.argv.index("--out") + 1]) / "survived"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if here and kind == "nan":
            sound = objective

            def objective(model, batch):
                loss, count, further = sound(model, batch)
                return loss * float("nan"), count, further

        return inner(model, optimizer, objective, *rest)

    train.training_step = step_with_a_fault
    train.main()


if __name__ == "__main__":
    cli.run(main)
