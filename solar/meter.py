"""How fast a run is, and what it says of each step: the line that is printed and the entry in metrics.jsonl.

MFU, model FLOPs utilisation (arXiv:2204.02311, appendix B): the operations that the model needs for the tokens,
recomputation not counted, over what these devices could do in the time. The latter is measured at the start, by a large
product of random matrices, and not taken from a data sheet.
"""

import resource
import sys
import time
from typing import Protocol

import torch

from solar import cli

PROBED = 0.3  # seconds
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class StepOutcome(Protocol):
    """What a meter is told of a step. count: of what the loss is a mean over; sums: further means to report."""

    loss: float
    count: int
    grad_norm: float
    sums: dict[str, float]


class Meter:
    """Times the steps of a run that goes from step `first` to step `steps`, each of so many tokens, padding included.

    flops: operations for one of them (`ModelConfig.training_flops`). unit: what a step's count counts, "tokens" or
    "pairs". devices: how many like `device` work side by side.
    """

    def __init__(
        self,
        tokens: int,
        flops: int,
        unit: str,
        first: int,
        steps: int,
        device: torch.device,
        devices: int,
        compute: torch.dtype,
    ):
        self.tokens, self.unit, self.flops = tokens, unit, tokens * flops
        self.device, self.steps, self.first = device, steps, first
        self.peak = devices * matrix_rate(device, compute)
        self.start = self.before = time.monotonic()

    def entry(self, step: int, lr: float, outcome: StepOutcome) -> dict:
        """The entry of a step that ends now."""
        now = time.monotonic()
        seconds = now - self.before
        self.peak = max(self.peak, self.flops / seconds)  # other work may have held up what it was measured by
        left = (now - self.start) / (step - self.first) * (self.steps - step)
        on_gpu = self.device.type == "cuda"
        return {
            "step": step,
            "loss": outcome.loss,
            **outcome.sums,
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            self.unit: outcome.count,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak,
            "memory_bytes": torch.cuda.max_memory_allocated()
            if on_gpu
            else RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "seconds_left": left,
        }

    def lap(self) -> None:
        """The next step's time begins here: it does not pay for evaluating and saving."""
        self.before = time.monotonic()

    def line(self, entry: dict) -> str:
        """An entry, to be read."""
        width = len(str(self.steps))
        preferences = "".join(f"{name} {entry[name]:.2f}  " for name in ("accuracy", "margin") if name in entry)
        return (
            f"step {entry['step']:{width}}/{self.steps}  loss {entry['loss']:.4f}  {preferences}lr {entry['lr']:.2e}  "
            f"norm {entry['grad_norm']:.2f}  {entry['tokens_per_second']:,.0f} tokens/s  mfu {entry['mfu']:.0%}  "
            f"{cli.human_bytes(entry['memory_bytes'])}  {cli.human_seconds(entry['seconds_left'])} left"
        )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on one device: the best within PROBED seconds, after a first one.

    (Where a dtype is emulated, as bf16 on most CPUs, a single product can take longer than that.)
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    while len(seconds) < 2 or sum(seconds) < PROBED:
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
