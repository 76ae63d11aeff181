"""The embedded engine: answers sampled from the trainer's own model chunks, batched and KV-cached.

A prompt is prefilled once for its whole group, media included. Every decode step runs one token of all running
answers through the layers together; answers that finish leave the batch, and waiting prompts come in as a new cohort
once enough places are free. Works under any tensor and pipeline layout: the last stage samples (each rank its share
of the vocabulary) and all stages hear the tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dppo_mcore.config import Config
from dppo_mcore.model.attention import plan_attention
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.weights import unwrap
from dppo_mcore.rollout.answers import assemble, check_prompt
from dppo_mcore.rollout.base import (
    SLEEP_TAGS,
    EngineError,
    EngineStats,
    GenerationRequest,
    Sampling,
    SleepTag,
    TextDecoder,
)
from dppo_mcore.rollout.cohort import Answer, Cohort
from dppo_mcore.rollout.kv_cache import CohortCache, DecodePlan, RecordingPlan
from dppo_mcore.rollout.media import Encoder
from dppo_mcore.rollout.prefill import check_decoded, pack_prompts
from dppo_mcore.rollout.sampler import Sampler, VocabShard
from dppo_mcore.rollout.stages import Stages
from dppo_mcore.types import PackedBatch, Prompt, Rollout

EMBEDDING_CACHE_BYTES = 1 << 30
"""Media embeddings kept on the host between calls, where the whole tower is frozen."""
FREE_SHARE = 4
"""Waiting prompts come in once one place in so many is free."""


class InProcessEngine:
    """See `rollout.base.Engine`. Shares the trainer's weights, so a weight update only counts the version up."""

    name = "inprocess"
    receiver = None

    def __init__(self, config: Config, qwen: QwenConfig, chunks: Sequence[Any], tokenizer: TextDecoder) -> None:
        self.weight_version = -1
        self._qwen, self._options, self._tokenizer = qwen, config.rollout, tokenizer
        self._prefill_tokens = config.data.max_tokens_per_micro_batch
        self._backend = config.model.attention_backend
        self._chunks = [unwrap(chunk) for chunk in chunks]
        # A tower that learns gives other embeddings after every step: nothing of it is kept.
        frozen = config.model.freeze_vision and config.model.freeze_merger
        self._encoder = Encoder(self._chunks, qwen, EMBEDDING_CACHE_BYTES) if frozen else None
        self._media_ids = (qwen.image_token_id, qwen.video_token_id)
        self._running = threading.Event()
        self._running.set()
        self._aborts = 0
        self._stats = EngineStats(0, 0, 0, 0.0)

    def start(self) -> None:
        """Nothing to bring up."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Rollout]:
        """Yield every answer once, in the order they finish; identical on all ranks of the replica."""
        for request in requests:
            check_prompt(request, self._options.max_prompt_tokens, self._media_ids)
            check_decoded(request.prompt)
        # A placeholder without its features can't be run through the model, whatever the caller bans.
        banned = tuple(dict.fromkeys((*sampling.banned_token_ids, *self._media_ids)))
        return self._generate(requests, replace(sampling, banned_token_ids=banned))

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs [len(answer)] of given answers after their prompts, at temperature 1 over the whole vocabulary."""
        from dppo_kernels import linear_logprob

        stages, found = self._stages(), []
        with self._evaluating(), torch.no_grad():
            for prompt, answer in zip(prompts, answers, strict=True):
                check_decoded(prompt)
                packed = pack_prompts([prompt], [[answer]], self._qwen, stages.length_multiple, every_token=True)
                hidden = stages.forward(packed.batch, self._plan(packed.batch))
                values = None
                if hidden is not None:
                    shard = self._vocab()
                    values, _ = linear_logprob(
                        hidden,
                        shard.weight_VH,
                        packed.batch.targets_R.to(hidden.device),
                        group=shard.group,
                        vocab_start=shard.start,
                        vocab_size=shard.total,
                    )
                found.append(stages.from_last(values, (len(answer),), torch.float32).tolist())
        return found

    def pause(self) -> None:
        """Hold running answers where they are; whoever draws from `generate` waits."""
        self._running.clear()

    def resume(self) -> None:
        """Let them go on."""
        self._running.set()

    def abort(self) -> None:
        """End every unfinished answer of the running `generate`."""
        self._aborts += 1
        self._running.set()

    def sleep(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Nothing to give back: the weights are the trainer's and caches end with `generate`."""

    def wake(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Nothing to take."""

    def update_weights(self, version: int, load: Callable[[], None] | None = None) -> None:
        """Tokens sampled from now on carry `version`; the weights are already the trainer's."""
        self.weight_version = version

    def stats(self) -> EngineStats:
        """A look for the progress line."""
        return self._stats

    def health(self) -> bool:
        """Always able to answer."""
        return True

    def stop(self) -> None:
        """End what runs; holds nothing afterwards."""
        self.abort()

    def _generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Rollout]:
        aborts, began, drawn, finished = self._aborts, time.monotonic(), 0, 0
        waiting = deque(requests)
        cohorts: list[Cohort] = []
        stages = self._stages()
        sampler = Sampler(self._vocab(), sampling) if stages.is_last else None
        with self._evaluating():
            while waiting or cohorts:
                if not self._running.wait(self._options.rollout_timeout_s):
                    raise EngineError(f"paused for {self._options.rollout_timeout_s:.0f} s; call resume")
                if self._aborts != aborts:
                    done = [answer for cohort in cohorts for answer in cohort.answers if answer.finish is None]
                    done += [Answer(request, index) for request in waiting for index in request.indices]
                    cohorts, waiting = [], deque()
                    for answer in done:
                        answer.finish = "abort"
                else:
                    done = self._admit(waiting, cohorts, sampling, stages, sampler)
                    if cohorts:
                        drawn += sum(len(cohort.answers) for cohort in cohorts)
                        done += self._decode(cohorts, sampling, stages, sampler)
                finished += len(done)
                running = sum(answer.finish is None for cohort in cohorts for answer in cohort.answers)
                speed = drawn / max(1e-9, time.monotonic() - began)
                self._stats = EngineStats(running, sum(r.n for r in waiting), finished, speed)
                for answer in done:
                    yield assemble(answer.request, answer.index, answer.raw(), sampling, self._tokenizer)

    def _admit(
        self,
        waiting: deque[GenerationRequest],
        cohorts: list[Cohort],
        sampling: Sampling,
        stages: Stages,
        sampler: Sampler | None,
    ) -> list[Answer]:
        """Prefill waiting prompts where places are free; returns answers that are finished at once."""
        places = max(1, self._options.rollout_max_in_flight)
        running = sum(len(cohort.answers) for cohort in cohorts)
        if not waiting or (cohorts and places - running < max(waiting[0].n, places // FREE_SHARE)):
            return []
        groups: list[list[Answer]] = []
        done: list[Answer] = []
        tokens = 0
        while waiting and (not groups or running + waiting[0].n <= places):
            answers = [Answer(waiting[0], index) for index in waiting[0].indices]
            size = len(waiting[0].prompt.token_ids) + sum(len(answer.prefix.token_ids) for answer in answers)
            if groups and tokens + size > self._prefill_tokens:
                break
            waiting.popleft()
            spent = [answer for answer in answers if len(answer.prefix.token_ids) >= sampling.max_tokens]
            for answer in spent:
                answer.finish = "length"
            done += spent
            group = [answer for answer in answers if answer.finish is None]
            if group:
                groups.append(group)
                running += len(group)
                tokens += size
        if groups:
            cohort = self._prefill(groups, stages, sampler)
            done += self._take(cohort, sampling)
            if cohort.without_finished():
                cohorts.append(cohort)
        return done

    @torch.no_grad()
    def _prefill(self, groups: list[list[Answer]], stages: Stages, sampler: Sampler | None) -> Cohort:
        """Run the prompts (and prefixes) once, keep keys and values, draw each answer's first token."""
        answers = [answer for group in groups for answer in group]
        prompts = [group[0].request.prompt for group in groups]
        packed = pack_prompts(
            prompts,
            [[answer.prefix.token_ids for answer in group] for group in groups],
            self._qwen,
            stages.length_multiple,
        )
        recorded = RecordingPlan(qkv_format="sbhd", plan=self._plan(packed.batch))
        hidden = stages.forward(packed.batch, recorded, self._embeddings(prompts))
        seeds = torch.tensor([answer.request.token_seed(answer.index) for answer in answers], device=stages.device)
        steps = torch.tensor([len(answer.prefix.token_ids) for answer in answers], device=stages.device)
        cohort = Cohort(
            answers,
            CohortCache(recorded, packed.prompts, packed.answers, packed.prompt_of_answer),
            tokens_B=torch.zeros_like(seeds),
            seeds_B=seeds,
            steps_B=steps,
            positions_B=torch.tensor(packed.next_positions, device=stages.device) - 1,
        )
        self._draw([cohort], hidden, stages, sampler)
        return cohort

    @torch.no_grad()
    def _decode(
        self, cohorts: list[Cohort], sampling: Sampling, stages: Stages, sampler: Sampler | None
    ) -> list[Answer]:
        """One more token for every running answer; returns those that finished with it."""
        for cohort in cohorts:
            cohort.cache.reserve(sampling.max_tokens)
        tokens_L = torch.cat([cohort.tokens_B for cohort in cohorts])
        positions_L = torch.cat([cohort.positions_B for cohort in cohorts])
        rows = tokens_L.numel()
        padding = -rows % stages.length_multiple
        if padding:
            tokens_L = torch.cat([tokens_L, tokens_L.new_zeros(padding)])
            positions_L = torch.cat([positions_L, positions_L.new_zeros(padding)])
        numbers_L = torch.zeros(rows + padding, dtype=torch.int32)
        loss_rows_R = torch.arange(rows)
        batch = PackedBatch(
            token_ids_L=tokens_L,
            position_ids_3L=positions_L.expand(3, -1),
            segments_L=numbers_L,
            branches_L=numbers_L,
            loss_rows_R=loss_rows_R,
            targets_R=loss_rows_R,
            cu_rows=numbers_L[:1],
            sequences=(),
        )
        plan = DecodePlan(qkv_format="sbhd", caches=tuple(cohort.cache for cohort in cohorts))
        hidden = stages.forward(batch, plan)
        for cohort in cohorts:
            cohort.cache.advance()
        self._draw(cohorts, hidden, stages, sampler)
        done = [answer for cohort in cohorts for answer in self._take(cohort, sampling)]
        cohorts[:] = [cohort for cohort in cohorts if cohort.without_finished()]
        return done

    def _draw(self, cohorts: list[Cohort], hidden: Tensor | None, stages: Stages, sampler: Sampler | None) -> None:
        """Sample on the last stage, tell all stages, and record tokens, log-probs and versions."""
        rows = sum(len(cohort.answers) for cohort in cohorts)
        drawn = None
        if sampler is not None and hidden is not None:
            seeds_B = torch.cat([cohort.seeds_B for cohort in cohorts])
            steps_B = torch.cat([cohort.steps_B for cohort in cohorts])
            tokens_B, logprobs_B = sampler.draw(hidden, seeds_B, steps_B)
            drawn = torch.stack([tokens_B.double(), logprobs_B.double()])
        drawn = stages.from_last(drawn, (2, rows), torch.float64)
        tokens_B = drawn[0].long()
        tokens, logprobs = tokens_B.tolist(), drawn[1].tolist()
        at = 0
        for cohort in cohorts:
            size = len(cohort.answers)
            cohort.tokens_B = tokens_B[at : at + size]
            cohort.steps_B = cohort.steps_B + 1
            cohort.positions_B = cohort.positions_B + 1
            for answer, token, logprob in zip(
                cohort.answers, tokens[at : at + size], logprobs[at : at + size], strict=True
            ):
                if answer.finish is None:
                    if not answer.versions or answer.versions[-1][0] != self.weight_version:
                        answer.versions.append((self.weight_version, len(answer.tokens)))
                    answer.tokens.append(token)
                    answer.logprobs.append(logprob)
            at += size

    def _take(self, cohort: Cohort, sampling: Sampling) -> list[Answer]:
        """Mark answers that end with their newest token."""
        done = []
        for answer in cohort.answers:
            if answer.finish is not None:
                continue
            if answer.tokens[-1] in sampling.stop_token_ids or (sampling.stop and self._hits_stop(answer, sampling)):
                answer.finish = "stop"
            elif len(answer.tokens) >= answer.request.room(answer.index, sampling):
                answer.finish = "length"
            else:
                continue
            done.append(answer)
        return done

    def _hits_stop(self, answer: Answer, sampling: Sampling) -> bool:
        """Whether a stop string shows at the end; a string of n bytes spans at most n tokens."""
        longest = max(len(stop.encode()) for stop in sampling.stop)
        tail = [*answer.prefix.token_ids[-longest - 4 :], *answer.tokens[-longest - 4 :]][-longest - 4 :]
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in sampling.stop)

    def _embeddings(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Kept media embeddings [M, H] of these prompts; None where the model has to encode them itself."""
        if self._encoder is None:
            return None
        found = [self._encoder.embeddings(prompt) for prompt in prompts if prompt.media]
        kept = [embeddings for embeddings in found if embeddings is not None]
        return torch.cat(kept) if kept else None

    def _plan(self, batch: PackedBatch) -> Any:
        return plan_attention(batch.segments_L, batch.branches_L, self._backend)

    def _stages(self) -> Stages:
        return Stages(self._chunks, self._qwen.hidden_size)

    def _vocab(self) -> VocabShard:
        """This rank's share of the head; call on the last stage."""
        weight = self._chunks[-1].head_weight().detach()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard(
            weight, group.rank() * weight.shape[0], self._qwen.vocab_size, group if group.size() > 1 else None
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, so that nothing is recomputed or dropped; the former mode comes back."""
        modes = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, mode in zip(self._chunks, modes, strict=True):
                chunk.train(mode)
