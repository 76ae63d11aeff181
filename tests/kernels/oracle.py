"""What the kernels should give, said as plainly as can be: fp64, whole logits, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def head_case(
    rows: int,
    width: int,
    vocab: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    masked: float = 0.2,
    spread: float = 2.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [N, H], weight [V, H], targets [N] (some negative); logits have the given standard deviation."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=source)
    weight = torch.randn(vocab, width, generator=source) * (spread / width**0.5)
    targets = torch.randint(0, vocab, (rows,), generator=source)
    targets[torch.rand(rows, generator=source) < masked] = -100
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of given hidden states and weight, in fp64; masked rows do not even see their hidden."""
    keep = (targets >= 0).nonzero()[:, 0]
    logits = hidden[keep].double() @ weight.double().t() / temperature
    logps = torch.log_softmax(logits, -1)
    chosen = logps.gather(1, targets[keep, None].long())[:, 0]
    entropy = -(logps.exp() * logps.clamp(min=-1e300)).sum(1)
    empty = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    return empty.index_add(0, keep, chosen), empty.index_add(0, keep, entropy)


def policy(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None = None,
    rollout: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    tis_cap: float | None = None,
    level: str = "token",
    bounds: list[int] | None = None,
    aggregation: str = "token-mean",
    normalizer: float | None = None,
) -> Tensor:
    """The policy loss as a loop over sequences, differentiable by autograd."""
    bounds = bounds or [0, logprobs.shape[0]]
    total = logprobs.new_zeros((), dtype=torch.float64)
    tokens = sequences = 0
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        keep = torch.arange(first, last, device=mask.device)[mask[first:last] != 0]
        if len(keep) == 0:
            continue
        tokens, sequences = tokens + len(keep), sequences + 1
        new, before, advantage = logprobs[keep].double(), old[keep].double(), advantages[keep].double()
        log_ratio = new - before
        if level == "sequence":
            log_ratio = log_ratio.mean().expand(len(keep))
        ratio = log_ratio.clamp(-20, 20).exp()
        low, high = torch.tensor([1 - clip_low, 1 + clip_high]).double()
        clipped = ratio.clamp(low.item(), high.item())
        loss = torch.where(-advantage * ratio >= -advantage * clipped, -advantage * ratio, -advantage * clipped)
        if dual_clip is not None:
            loss = torch.where((advantage < 0) & (loss > -advantage * dual_clip), -advantage * dual_clip, loss)
        if rollout is not None and tis_cap is not None:
            mismatch = before - rollout[keep].double()
            if level == "sequence":
                mismatch = mismatch.mean().expand(len(keep))
            loss = loss * mismatch.clamp(-20, 20).exp().clamp(max=tis_cap)
        if ref is not None:
            d = (ref[keep].double() - new).clamp(-20, 20)
            loss = loss + kl_coef * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[kl]
        total = total + (loss.mean() if aggregation == "seq-mean-token-mean" else loss.sum())
    if normalizer is None:
        normalizer = max(1, sequences if aggregation.startswith("seq-") else tokens)
    return total / normalizer


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius distance over the expected norm."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
