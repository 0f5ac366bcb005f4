"""What training minimises, as sums over tokens or pairs. Tensors in, tensors out: nothing here sees a model.

A loss is a sum and a count, and whoever steps divides by the count of the whole step, over all micro-batches and ranks.
The mean of their means is another number as soon as they count differently, and masks make them differ.

Shapes: B batch, T positions, V vocabulary, P pairs of answers in a row, N pairs.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

IGNORED = -100  # a label that is not learned


def learned(labels: Tensor) -> Tensor:
    """(B, T) labels -> (B, T) bool: those that are learned. Nothing stands before a sequence's first token."""
    mask = labels != IGNORED
    mask[:, 0] = False
    return mask


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T) fp32 log-probability of each label given the tokens before it; 0 where not learned.

    Labels are aligned with the inputs: the logits at t-1 are asked for label t. This is the specification of what
    `model(input_ids, labels=labels)` computes in chunks.
    """
    mask = learned(labels)[:, 1:]
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, labels[:, 1:].where(mask, 0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.where(mask, 0.0), (1, 0))


def lm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, V), (B, T) -> the sum of -log p(label) over the learned labels, and how many those are."""
    return -token_logps(logits, labels).sum(), learned(labels).sum()


# ------------------------------------------------------------------------------------------------ preferences

KINDS = ("sigmoid", "hinge", "ipo")


def check_preference(beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
    """Raise ValueError, in one line, for settings that `preference_loss` cannot have."""
    if kind not in KINDS:
        raise ValueError(f"unknown preference loss {kind!r}; known are {', '.join(KINDS)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta {beta}: a number above 0 is needed")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label smoothing {label_smoothing}: the share of pairs that stand the wrong way round is wanted, at least "
            "0 and below 0.5"
        )
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"label smoothing {label_smoothing} is for the loss sigmoid, not for {kind}; leave it out")
    if not 0 <= sft_weight < math.inf:
        raise ValueError(f"weight of the SFT term {sft_weight}: a number that is at least 0 is needed")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) summed log-probabilities of answers -> (losses, chosen rewards, rejected rewards), (N,) each.

    A reward is r(y) = beta (log pi(y) - log pi_ref(y)), in nats. With x = r(chosen) - r(rejected) the losses are:

    sigmoid   -log sigmoid(x)                  (arXiv:2305.18290, eq. 7)
              with label_smoothing e           -(1 - e) log sigmoid(x) - e log sigmoid(-x): cDPO, for labels of which a
                                               share e is wrong
    hinge     max(0, 1 - x)                    (SLiC, arXiv:2305.10425; on rewards as in arXiv:2309.06657)
    ipo       (x / beta - 1 / (2 beta))^2      (arXiv:2310.12036, eq. 17; beta is its tau)

    ipo takes the log-ratios as they are, summed, which is what equation 17 says; TRL divides each by the length of its
    answer. The rewards carry no gradient. Raises ValueError as `check_preference` does.
    """
    check_preference(beta, kind, label_smoothing)
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    log_ratio = chosen - rejected
    x = beta * log_ratio
    if kind == "hinge":
        losses = (1 - x).relu()
    elif kind == "ipo":
        losses = (log_ratio - 1 / (2 * beta)) ** 2
    else:  # logsigmoid: log(sigmoid(x)) is -inf from x = -104 on, and log-ratios of thousands occur
        losses = -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def document_sums(values: Tensor, document_ids: Tensor, count: int) -> Tensor:
    """(B, T) values, (B, T) ids -> (B, count) fp64: the sum of the values of documents 0..count-1 of each row.

    What belongs to other documents, such as padding, is left out. In fp64, since the differences of two such sums are
    what preferences are learned from. (`scatter_add` would do it in one pass, but adds in no fixed order on a GPU.)
    """
    documents = torch.arange(count, device=values.device)[:, None]
    return values[:, None].double().where(document_ids[:, None] == documents, 0.0).sum(-1)


def pair_logps(logps: Tensor, document_ids: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities of labels -> (B, pairs) of whole answers, chosen and rejected, in fp64.

    Documents 2j and 2j + 1 of a row are the chosen and the rejected text of its pair j.
    """
    sums = document_sums(logps, document_ids, 2 * pairs)
    return sums[:, 0::2], sums[:, 1::2]


def preference_loss(
    logps: Tensor,
    batch: dict[str, Tensor],
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(B, T) log-probabilities of a batch's labels -> the sum of the losses of its pairs, how many those are, and sums
    to report, which divided by the number of pairs are:

    reward_chosen, reward_rejected, margin   rewards as in `dpo_loss`, and the first less the second
    accuracy          share of pairs whose chosen answer has the higher reward; a tie counts as wrong
    logp_chosen, logp_rejected               log-probabilities of whole answers under the policy
    gamma_ref         log pi_ref(chosen) - log pi_ref(rejected): a reference that has seen these pairs already has a
                      large one, and has little left to teach (arXiv:2403.19270)

    batch: labels, document_ids (B, T); pairs (B, P) bool, which of a row's P pairs are there; reference_chosen and
    reference_rejected (B, P), the reference's log-probabilities. Documents 2j and 2j + 1 of a row are pair j.
    sft_weight: adds that much of the mean of -log pi over the tokens of the chosen answer, a mean so that its size does
    not depend on their number, as arXiv:2404.19733 does.
    """
    check_preference(beta, kind, label_smoothing, sft_weight)
    there, document_ids = batch["pairs"], batch["document_ids"]
    take = lambda values: values[there]  # (B, P) -> (N,): what a row lacks of pairs has neither loss nor gradient
    chosen, rejected = map(take, pair_logps(logps, document_ids, there.shape[1]))
    reference = take(batch["reference_chosen"]).double(), take(batch["reference_rejected"]).double()
    losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, *reference, beta, kind, label_smoothing)
    if sft_weight:
        lengths, _ = pair_logps(learned(batch["labels"]), document_ids, there.shape[1])
        losses = losses - sft_weight * chosen / take(lengths).clamp(min=1)
    sums = {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": reward_chosen - reward_rejected,
        "accuracy": reward_chosen > reward_rejected,
        "logp_chosen": chosen.detach(),
        "logp_rejected": rejected.detach(),
        "gamma_ref": reference[0] - reference[1],
    }
    return losses.sum(), there.sum(), {name: values.sum() for name, values in sums.items()}
