"""Keys and values of running answers, and decoding attention over them.

A cohort is a set of prompts prefilled together. Each prompt's keys and values are kept once, padded to the cohort's
longest; each of its answers has its own. One decode step runs the tokens of all cohorts through the layers at once;
attention is per cohort: all answers of a prompt against its keys in one product, each answer against its own, and
the two parts merged by their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from dppo_kernels.products import mixed
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dppo_mcore.model.attention import AttentionPlan

FIRST_SLOTS = 32
"""Slots an answer's cache starts with; it doubles when they are full."""


@dataclass
class RecordingPlan(PackedSeqParams):
    """A packed row's own attention plan that also keeps every layer's keys and values [L, kv heads, D]."""

    plan: AttentionPlan | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer_number: int, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor:
        """Attention of the packed row, [L, heads, D]."""
        self.keys[layer_number], self.values[layer_number] = k_LGD, v_LGD
        return self.plan.attend(layer_number, q_LHD, k_LGD, v_LGD, scale)


@dataclass
class DecodePlan(PackedSeqParams):
    """One decode step: one token of every answer, cohort after cohort, padding rows at the end."""

    caches: tuple[CohortCache, ...] = ()

    def attend(self, layer_number: int, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor:
        """Attention of one token per answer, [L, heads, D]; padding rows get zeros."""
        outputs, at = [], 0
        for cache in self.caches:
            rows = slice(at, at + cache.rows)
            outputs.append(cache.attend(layer_number, q_LHD[rows], k_LGD[rows], v_LGD[rows], scale))
            at += cache.rows
        if at < q_LHD.shape[0]:
            outputs.append(q_LHD.new_zeros(q_LHD.shape[0] - at, *q_LHD.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class CohortCache:
    """Keys and values of a cohort with G prompts and B answers, per layer: [G, kv, P, D] and [B, kv, slots, D].

    An answer carried on from an earlier prefix keeps that prefix right-aligned in the first slots, so that all
    answers write the same slot at every step.
    """

    def __init__(
        self,
        recorded: RecordingPlan,
        prompts: list[tuple[int, int]],
        prefixes: list[tuple[int, int]],
        group_of_row: list[int],
    ) -> None:
        """`prompts` and `prefixes` are spans [start, end) of the prefilled row, per prompt and per answer."""
        lengths = [end - start for start, end in prompts]
        longest = max(end - start for start, end in prefixes)
        self.used = self._longest = longest
        self.rows = len(prefixes)
        some = next(iter(recorded.keys.values()))
        self._prompt_mask = _pad_mask(lengths, left=False, like=some)
        self._own_mask = _pad_mask([end - start for start, end in prefixes], left=True, like=some)
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._group_of_row = group_of_row
        for layer, k_LGD in recorded.keys.items():
            both = (k_LGD, recorded.values[layer])
            self._prompt[layer] = tuple(_gather(x, prompts, max(lengths), left=False) for x in both)  # type: ignore[assignment]
            self._own[layer] = tuple(_gather(x, prefixes, longest, left=True) for x in both)  # type: ignore[assignment]
        self._slots = longest
        self._arrange()

    def advance(self) -> None:
        """The slot written by the last step is taken for good."""
        self.used += 1

    def reserve(self, budget: int) -> None:
        """Make room for one more token; doubles, up to `budget` slots behind the longest prefix."""
        if self.used < self._slots:
            return
        slots = min(max(FIRST_SLOTS, 2 * self._slots), max(self._longest + budget, self.used + 1))
        grown = slots - self._slots
        for layer, pair in self._own.items():
            self._own[layer] = tuple(F.pad(x, (0, 0, 0, grown)) for x in pair)  # type: ignore[assignment]
        self._slots = slots

    def keep(self, rows: list[int]) -> None:
        """Drop all answers but these, and the prompts that have none left."""
        groups = sorted({self._group_of_row[row] for row in rows})
        number = {group: n for n, group in enumerate(groups)}
        all_groups = max(self._group_of_row) + 1
        some = next(iter(self._own.values()))[0]
        rows_t = torch.tensor(rows, device=some.device)
        groups_t = torch.tensor(groups, device=some.device)
        for layer, pair in self._own.items():
            self._own[layer] = tuple(x.index_select(0, rows_t) for x in pair)  # type: ignore[assignment]
            if len(groups) < all_groups:
                prompt = self._prompt[layer]
                self._prompt[layer] = tuple(x.index_select(0, groups_t) for x in prompt)  # type: ignore[assignment]
        if self._own_mask is not None:
            self._own_mask = self._own_mask.index_select(0, rows_t)
        if self._prompt_mask is not None:
            self._prompt_mask = self._prompt_mask.index_select(0, groups_t)
        self._group_of_row = [number[self._group_of_row[row]] for row in rows]
        self.rows = len(rows)
        self._arrange()

    def attend(self, layer: int, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, scale: float) -> Tensor:
        """Write this step's keys and values, then attend: [B, heads, D]."""
        rows, heads, width = q_BHD.shape
        kv = k_BGD.shape[1]
        own_k, own_v = self._own[layer]
        own_k[:, :, self.used], own_v[:, :, self.used] = k_BGD, v_BGD
        seen = self.used + 1
        q_BGRD = q_BHD.view(rows, kv, heads // kv, width)
        own = _part(q_BGRD, own_k[:, :, :seen], own_v[:, :, :seen], self._own_mask, scale)
        prompt = self._against_prompts(layer, q_BGRD, scale)
        return _merge(own, prompt).to(q_BHD.dtype).view(rows, heads, width)

    def _against_prompts(self, layer: int, q_BGRD: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """All answers of a prompt as one block of queries; results back in the answers' order."""
        rows, kv, share, width = q_BGRD.shape
        groups, per_group = self._grid.shape
        gathered = q_BGRD if self._regular else q_BGRD.index_select(0, self._grid.view(-1))
        blocks = gathered.view(groups, per_group, kv, share, width).transpose(1, 2).reshape(groups, kv, -1, width)
        out, top, total = _part(blocks, *self._prompt[layer], self._prompt_mask, scale)

        def back(x: Tensor) -> Tensor:
            by_row = x.view(groups, kv, per_group, share, -1).transpose(1, 2).reshape(groups * per_group, kv, share, -1)
            return by_row if self._regular else by_row.index_select(0, self._place)

        return back(out), back(top), back(total)

    def _arrange(self) -> None:
        """Answers as a [groups, most per group] grid of row numbers (short groups repeat a row)."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(self._group_of_row):
            members.setdefault(group, []).append(row)
        widest = max(map(len, members.values()))
        grid = [members[group] + [0] * (widest - len(members[group])) for group in sorted(members)]
        place = [0] * self.rows
        for group, rows in enumerate(grid):
            for slot, row in enumerate(rows[: len(members[group])]):
                place[row] = group * widest + slot
        device = next(iter(self._own.values()))[0].device
        self._regular = place == list(range(len(grid) * widest))
        self._grid = torch.tensor(grid, device=device)
        self._place = torch.tensor(place, device=device)


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention [.., N, D] of queries [.., N, D], with each query's top score and sum [.., N, 1].

    The cache's type holds what is multiplied; scores and all that follows are fp32, as in the trainer's kernels.
    """
    scores = _scores(q, k).mul_(scale)
    if mask is not None:
        scores[..., : mask.shape[-1]] += mask
    top = scores.amax(-1, keepdim=True)
    # A prefix-less answer among others with prefixes sees at least its own newest key, so `top` is finite.
    weights = scores.sub_(top).exp_()
    return torch.matmul(weights.to(v.dtype), v).float(), top, weights.sum(-1, keepdim=True)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T [.., N, K] in fp32: scores of real models are far larger than what 16 bits can tell apart in a softmax."""
    if mixed(q, k):
        rows, keys = q.flatten(0, -3), k.flatten(0, -3)
        return torch.bmm(rows, keys.transpose(-1, -2), out_dtype=torch.float32).view(*q.shape[:-1], k.shape[-2])
    return torch.matmul(q.float(), k.float().transpose(-1, -2))


def _merge(first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One softmax over both parts' keys."""
    (out_a, top_a, sum_a), (out_b, top_b, sum_b) = first, second
    top = torch.maximum(top_a, top_b)
    scale_a, scale_b = (top_a - top).exp_(), (top_b - top).exp_()
    return (out_a * scale_a + out_b * scale_b) / (sum_a * scale_a + sum_b * scale_b)


def _gather(x_LGD: Tensor, spans: list[tuple[int, int]], longest: int, *, left: bool) -> Tensor:
    """Spans of a packed row as [spans, kv heads, longest, D], padded with zeros left or right."""
    out = x_LGD.new_zeros(len(spans), x_LGD.shape[1], longest, x_LGD.shape[2])
    for n, (start, end) in enumerate(spans):
        at = longest - (end - start) if left else 0
        out[n, :, at : at + end - start] = x_LGD[start:end].transpose(0, 1)
    return out


def _pad_mask(lengths: list[int], *, left: bool, like: Tensor) -> Tensor | None:
    """Additive mask [n, 1, 1, longest] that hides the padding; None where there is none."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    slots = torch.arange(longest, device=like.device)
    sizes = torch.tensor(lengths, device=like.device)[:, None]
    hidden = slots < longest - sizes if left else slots >= sizes
    return torch.zeros(hidden.shape, device=like.device).masked_fill_(hidden, float("-inf"))[:, None, None, :]
