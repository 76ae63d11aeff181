"""From an engine's raw answer to a `Rollout`, under the token contract. No engine, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dppo_mcore.rollout.base import EngineError, GenerationRequest, Prefix, Sampling, TextDecoder
from dppo_mcore.types import Rollout


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What a server returned for one request, the prefix it was given not included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length", "abort"]
    versions: tuple[tuple[int, int, int], ...]
    """(weight version, first token, one past the last), over these tokens."""
    matched: str = ""
    """The stop string that ended it."""


def check_prompt(request: GenerationRequest, limit: int, media_ids: Sequence[int]) -> None:
    """Refuse a prompt that's too long, is empty, or asks for media it doesn't carry."""
    prompt, name = request.prompt, request.sample_id
    if not prompt.token_ids:
        raise EngineError(f"sample {name}: its prompt is empty")
    if len(prompt.token_ids) > limit:
        raise EngineError(
            f"sample {name}: its prompt has {len(prompt.token_ids)} tokens, max_prompt_tokens is {limit}; "
            "a prompt is never cut: lower max_frames or max_pixels, or raise the limit"
        )
    if not prompt.media and any(token in media_ids for token in prompt.token_ids):
        raise EngineError(f"sample {name}: its prompt holds media tokens but no media")
    for index, prefix in request.prefixes.items():
        if len(prefix.token_ids) != len(prefix.logprobs):
            raise EngineError(f"sample {name}, answer {index}: its prefix has {len(prefix.logprobs)} log-probs")


def assemble(
    request: GenerationRequest, index: int, raw: RawAnswer, sampling: Sampling, decoder: TextDecoder
) -> Rollout:
    """The whole answer, a carried-on prefix in front; anything that breaks the token contract is an error."""
    where = f"sample {request.sample_id}, answer {index}"
    if len(raw.token_ids) != len(raw.logprobs):
        raise EngineError(f"{where}: {len(raw.token_ids)} tokens but {len(raw.logprobs)} log-probs")
    prefix = request.prefixes.get(index, Prefix((), (), ()))
    token_ids = prefix.token_ids + raw.token_ids
    logprobs = prefix.logprobs + raw.logprobs
    shift = len(prefix.token_ids)
    versions = merge_versions(
        prefix.weight_versions + tuple((version, start + shift, end + shift) for version, start, end in raw.versions)
    )
    banned = set(sampling.banned_token_ids).intersection(token_ids)
    if banned:
        raise EngineError(f"{where}: holds media token {min(banned)}, which the engine was told never to sample")
    if any(math.isnan(value) or value > 1e-4 for value in logprobs):
        raise EngineError(f"{where}: a log-prob is not a number or above 0; the engine's weights may be damaged")
    if versions and (versions[0][1] != 0 or versions[-1][2] != len(token_ids)):
        raise EngineError(f"{where}: weight versions {versions} don't cover its {len(token_ids)} tokens")
    finish = raw.finish
    if finish == "length" and request.new_tokens is not None and len(token_ids) < sampling.max_tokens:
        finish = "abort" if len(raw.token_ids) >= request.new_tokens else finish
    if prefix.token_ids and (end := _stop_string_end(token_ids, shift, sampling.stop, decoder)) is not None:
        token_ids, logprobs, finish = token_ids[:end], logprobs[:end], "stop"
        versions = tuple((version, start, min(stop, end)) for version, start, stop in versions if start < end)
    token_ids, logprobs, versions, finish = _cut(token_ids, logprobs, versions, finish, sampling)
    text = decoder.decode(list(token_ids), skip_special_tokens=True)
    if finish == "stop":
        text = cut_at_stop(text, sampling.stop)
    return Rollout(request.sample_id, index, token_ids, logprobs, text, finish, versions)


def _cut(
    token_ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    versions: tuple[tuple[int, int, int], ...],
    finish: Literal["stop", "length", "abort"],
    sampling: Sampling,
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[tuple[int, int, int], ...], Literal["stop", "length", "abort"]]:
    """End at the first stop id and at the budget, whatever the engine ran on to."""
    end = len(token_ids)
    stop_at = next((i for i, token in enumerate(token_ids) if token in sampling.stop_token_ids), None)
    if stop_at is not None and stop_at < sampling.max_tokens:
        end, finish = stop_at + 1, "stop"
    elif end > sampling.max_tokens:
        end, finish = sampling.max_tokens, "length"
    kept = tuple((version, start, min(stop, end)) for version, start, stop in versions if start < end)
    return token_ids[:end], logprobs[:end], kept, finish


def _stop_string_end(token_ids: tuple[int, ...], shift: int, stops: Sequence[str], decoder: TextDecoder) -> int | None:
    """Tokens up to the first that completes a stop string; one across the end of a prefix escapes an engine."""

    def holds(end: int) -> bool:
        text = decoder.decode(list(token_ids[:end]), skip_special_tokens=True)
        return any(stop in text for stop in stops)

    if not stops or not holds(len(token_ids)):
        return None
    return next(end for end in range(shift + 1, len(token_ids) + 1) if holds(end))


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Text up to the first stop string."""
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(found)] if found else text


def merge_versions(pieces: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Empty pieces dropped, neighbours of the same version joined."""
    merged: list[tuple[int, int, int]] = []
    for version, start, end in pieces:
        if end <= start:
            continue
        if merged and merged[-1][0] == version and merged[-1][2] == start:
            merged[-1] = (version, merged[-1][1], end)
        else:
            merged.append((version, start, end))
    return tuple(merged)


def as_prefix(rollout: Rollout) -> Prefix:
    """An aborted answer as the prefix to carry on from."""
    return Prefix(rollout.token_ids, rollout.logprobs, rollout.weight_versions)
