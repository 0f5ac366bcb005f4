"""AdamW (arXiv:1711.05101): which parameters decay, how the learning rate moves, and moments or weights in 16 bits.

Memory a parameter, with its gradient: 16 bytes with all of it in fp32; 12 with both moments in bf16; 8 with weights
and gradients in bf16 as well. Weights and moments in bf16 are computed in fp32 and rounded stochastically: an update
smaller than half a bf16 step (a relative 2^-9) would otherwise be lost every time instead of most times, and a second
moment that forgets 5% a step would be stuck where it is. (A gradient in bf16 is rounded to nearest, with each
micro-batch that is added to it: its error grows with the root of their number, 0.3% at 8 and 0.8% at 64.)
"""

import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from solar.jsonfile import brief, read_json

SCHEDULES = ("cosine", "constant", "wsd")


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str, floor: float, decay: float) -> float:
    """The learning rate of step 0 .. steps-1.

    It rises linearly over `warmup` steps to `peak`. Then `constant` stays; `cosine` falls along half a cosine to
    floor * peak at the end (arXiv:1608.03983); `wsd`, warm-up, stable, decay (arXiv:2404.06395), stays until the last
    `decay` share of the steps and falls linearly from there: a run can be continued from its stable part.
    """
    rising = (step + 1) / warmup if step < warmup else 1.0
    if schedule == "cosine" and step >= warmup:
        share = (step - warmup + 1) / max(steps - warmup, 1)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
    if schedule == "wsd":
        falling = max(round(decay * steps), 1)
        share = max(step + 1 - (steps - falling), 0) / falling
        return peak * min(rising, 1 - (1 - floor) * share)
    return peak * rising


def choose_trainable(names: Iterable[str], choice: str, model_dir: Path) -> set[str]:
    """Which of a model's parameters learn: "all", "new", or those in whose names a regular expression finds something.

    "new" takes the layers that up-scaling added and nothing else, neither embeddings nor norms of the base: LLaMA Pro's
    recipe (arXiv:2401.02415, section 3.3). Raises ValueError if nothing is left to train.
    """
    names = list(names)
    if choice == "new":
        record = model_dir / "upscale.json"
        if not record.is_file():
            raise ValueError(f"--train new: {record} would say which layers are new, but is not there")
        content = read_json(record)
        layers = content.get("new_layers") if isinstance(content, dict) else None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"{record}: new_layers must be a list of layer numbers, found {brief(layers)}")
        new = {str(layer) for layer in layers}
        chosen = lambda name: name.startswith("model.layers.") and name.split(".")[2] in new
    else:
        try:
            pattern = re.compile("" if choice == "all" else choice)
        except re.error as error:
            raise ValueError(f"--train {choice}: not all, not new, and no regular expression: {error}") from None
        chosen = lambda name: pattern.search(name) is not None
    trained = {name for name in names if chosen(name)}
    if not trained:
        raise ValueError(f"--train {choice}: no parameter is left to train; names look like {names[-1]}")
    return trained


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters as two groups: matrices, which decay, and norms' weights and biases, which do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    weight_decay: float,
    betas: tuple[float, float],
    state_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """torch's fused AdamW where everything is fp32, `AdamW16` where weights or moments are bf16. The learning rate of
    each step is set by the caller. `seed`, of the rounding, must differ from shard to shard and be equal on copies."""
    groups = parameter_groups(model, weight_decay)
    stored = {parameter.dtype for group in groups for parameter in group["params"]} | {state_dtype}
    if stored == {torch.float32}:
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    return AdamW16(groups, betas=betas, state_dtype=state_dtype, seed=seed)


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments, and perhaps whose weights, are stored in bf16; computed in fp32, rounded stochastically.

    The state has torch's names: `step`, `exp_avg`, `exp_avg_sq`. The noise is a function of (seed, step, parameter), so
    a resumed run rounds as the uninterrupted one. Working memory: a few fp32 copies of the largest parameter.
    """

    def __init__(self, params, betas: tuple[float, float], state_dtype: torch.dtype, seed: int, eps: float = 1e-8):
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.state_dtype, self.seed = state_dtype, seed

    @torch.no_grad()
    def step(self, closure=None):
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
                state["step"] += 1
                self._update(parameter, state, group, index)

    def _update(self, parameter: Tensor, state: dict, group: dict, index: int) -> None:
        """Equations 7-12 of algorithm 2 in arXiv:1711.05101, on this rank's part of the parameter."""
        step, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        weight, gradient, exp_avg, exp_avg_sq = map(
            local, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
        noise = torch.Generator(weight.device)  # which on a CPU looks at 32 bits of its seed: hence a hash of them all
        noise.manual_seed(zlib.crc32(f"{self.seed} {step} {index}".encode()))
        gradient = gradient.float()
        mean = exp_avg.float().lerp_(gradient, 1 - beta1)
        square = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        store(exp_avg, mean, noise)
        store(exp_avg_sq, square, noise)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        updated = weight.float() * (1 - lr * group["weight_decay"])
        store(weight, updated.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step)), noise)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def store(target: Tensor, values: Tensor, noise: torch.Generator) -> None:
    """Write fp32 values into `target`; into bf16 up or down at random, so that the expectation is the value.

    bf16 is the upper half of an fp32: adding a random lower half carries into the upper one with just the probability
    that rounding up should have. Values must be finite.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    lower = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    target.copy_(lower.add_(values.view(torch.int32)).bitwise_and_(-65536).view(torch.float32))


def square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements of this rank's parts, one fp64 number."""
    norms = torch._foreach_norm([local(tensor) for tensor in tensors], 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def scale_(tensors: Iterable[Tensor], factor: float) -> None:
    """Multiply this rank's parts by a number, in place."""
    torch._foreach_mul_([local(tensor) for tensor in tensors], factor)
