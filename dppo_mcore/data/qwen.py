"""A sample to a `Prompt`: planned frames, expanded token ids, decoded patches."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dppo_mcore.config import DataConfig
from dppo_mcore.data.cache import BoundedCache
from dppo_mcore.data.chat import MEDIA_TOKENS, PADS, Chat
from dppo_mcore.data.decode import Decoder, make_decoder
from dppo_mcore.data.errors import DataError, LengthError
from dppo_mcore.data.frames import plan_key, plan_media
from dppo_mcore.data.patches import load_geometry, normalise, patchify
from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.types import FramePlan, Media, Prompt, PromptMedia, Sample

PLANS_KEPT = 65536


class Processor:
    """Everything between a sample and a prompt, for one checkpoint. Cheap to make, not thread-safe."""

    def __init__(self, model_dir: str | Path, data: DataConfig, device: torch.device | None = None) -> None:
        """`device` is where clips may be decoded; patches always come out on the CPU."""
        self.data = data
        self.qwen = load_qwen_config(model_dir)
        self.geometry = load_geometry(model_dir)
        self.chat = Chat(model_dir)
        self.decoder: Decoder = make_decoder(data.decoder, device or torch.device("cpu"))
        self.cache: BoundedCache[Tensor] = BoundedCache(data.media_cache_mib << 20, Tensor.numel)
        self.plans: OrderedDict[tuple[Media, float | None], FramePlan] = OrderedDict()
        self.eos_ids = _eos_ids(Path(model_dir), self.chat)
        self.banned_ids = tuple(self.chat.special[token] for token in MEDIA_TOKENS if token in self.chat.special)
        """Tokens an answer may never contain."""

    def prompt(self, sample: Sample, horizon: float | None = None) -> Prompt:
        """The question with decoded patches; its ids end with the opened assistant turn."""
        return self.load(self.plan(sample, horizon))

    def conversation(self, sample: Sample, answer: str | None = None, horizon: float | None = None) -> Prompt:
        """Question and answer (the sample's own where none is given) with decoded patches and the loss mask."""
        return self.load(self.plan_conversation(sample, answer, horizon))

    def plan(self, sample: Sample, horizon: float | None = None) -> Prompt:
        """As `prompt`, nothing decoded."""
        ids, _ = self.chat.render(sample)
        return self._expand(sample, ids, None, horizon)

    def plan_conversation(self, sample: Sample, answer: str | None = None, horizon: float | None = None) -> Prompt:
        """As `conversation`, nothing decoded."""
        answer = sample.answer if answer is None else answer
        if answer is None:
            raise DataError(f"sample {sample.id}: has no answer to learn")
        ids, learnt = self.chat.render(sample, answer)
        prompt = self._expand(sample, ids, learnt, horizon)
        limit = self.data.max_conversation_tokens
        return prompt if limit is None else truncate(prompt, limit, self)

    def load(self, prompt: Prompt) -> Prompt:
        """The same prompt with its patches, float32 [t*h*w, values]."""
        return replace(
            prompt,
            media=tuple(
                PromptMedia(media.plan, normalise(self.pixels(media.plan), self.geometry)) for media in prompt.media
            ),
        )

    def pixels(self, plan: FramePlan) -> Tensor:
        """Patches of a plan before normalisation, uint8 [t*h*w, values]; from the cache where they are there."""
        key = plan_key(plan)
        patches_PV = self.cache.get(key)
        if patches_PV is None:
            patches_PV = patchify(self.decoder(plan), self.geometry)
            self.cache.put(key, patches_PV)
        return patches_PV

    def plan_of(self, media: Media, horizon: float | None) -> FramePlan:
        """The medium's plan, remembered."""
        key = (media, horizon)
        plan = self.plans.get(key)
        if plan is None:
            plan = plan_media(media, self.data, horizon, self.geometry)
            self.remember(media, horizon, plan)
        return plan

    def remember(self, media: Media, horizon: float | None, plan: FramePlan) -> None:
        """Take over a plan made elsewhere."""
        self.plans[(media, horizon)] = plan
        if len(self.plans) > PLANS_KEPT:
            self.plans.popitem(last=False)

    def holds(self, sample: Sample, horizon: float | None) -> bool:
        """Whether the sample's prompt can be made without touching a file."""
        plans = (self.plans.get((media, horizon)) for media in sample.media)
        return all(plan is not None and plan_key(plan) in self.cache for plan in plans)

    def _expand(self, sample: Sample, ids: list[int], learnt: list[bool] | None, horizon: float | None) -> Prompt:
        """Each pad token becomes as many as its medium has merged patches."""
        pads = {self.chat.special[token] for token in PADS.values()}
        plans = [self.plan_of(media, horizon) for media in sample.media]
        places = [index for index, token in enumerate(ids) if token in pads]
        if len(places) != len(plans):
            raise DataError(f"sample {sample.id}: the chat template shows {len(places)} of its {len(plans)} media")
        whole: list[int] = []
        mask: list[bool] = []
        done = 0
        for place, plan in zip(places, plans, strict=True):
            if ids[place] != self.chat.special[PADS[plan.kind]]:
                raise DataError(
                    f"sample {sample.id}: the chat template puts another kind of medium where {plan.path} goes"
                )
            t, h, w = plan.grid
            copies = t * h * w // self.geometry.merge**2
            whole += ids[done:place] + [ids[place]] * copies
            if learnt is not None:
                mask += learnt[done:place] + [False] * copies
            done = place + 1
        whole += ids[done:]
        if learnt is not None:
            mask += learnt[done:]
        return Prompt(
            sample=sample,
            token_ids=tuple(whole),
            media=tuple(PromptMedia(plan) for plan in plans),
            loss_mask=None if learnt is None else tuple(mask),
        )


def truncate(prompt: Prompt, max_tokens: int, processor: Processor) -> Prompt:
    """A conversation cut at its end to `max_tokens`; a medium the cut would go through is left out whole."""
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    start, end = processor.qwen.vision_start_token_id, processor.qwen.vision_end_token_id
    ids = prompt.token_ids[:max_tokens]
    opened = max((index for index, token in enumerate(ids) if token == start), default=-1)
    closed = max((index for index, token in enumerate(ids) if token == end), default=-1)
    keep = opened if opened > closed else max_tokens
    kept = sum(token == start for token in ids[:keep])
    mask = None if prompt.loss_mask is None else prompt.loss_mask[:keep]
    if mask is not None and not any(mask):
        raise LengthError(
            f"sample {prompt.sample.id}: {max_tokens} tokens leave nothing to learn of {len(prompt.token_ids)}"
        )
    return replace(prompt, token_ids=ids[:keep], media=prompt.media[:kept], loss_mask=mask)


def _eos_ids(folder: Path, chat: Chat) -> tuple[int, ...]:
    """Tokens that end an answer, from generation_config.json and the end of a turn."""
    path = folder / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = [listed] if isinstance(listed, int) else list(listed or ())
    return tuple(dict.fromkeys([chat.special["<|im_end|>"], *ids]))
