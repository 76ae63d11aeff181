"""The engine protocol: what every generator of answers promises, and the plain records it exchanges.

Every rank of a replica (its tensor- and pipeline-parallel ranks) holds an engine object and calls its methods at the
same points; the replica's leader talks to the server, if there is one, and all ranks see identical results.

Token contract. The ids sent are the ids trained on. A token that ends an answer (eos, a stop id, the last token of a
stop string) stays in `token_ids` with its log-prob; `text` holds neither special tokens nor the stop string.
`logprobs` belong to the distribution really sampled from: after temperature, after banned ids are removed, and,
where top-p or top-k truncate, after renormalisation over what is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dppo_mcore.runtime.errors import UserError
from dppo_mcore.types import Prompt, Rollout

if TYPE_CHECKING:
    from dppo_mcore.config import Config
    from dppo_mcore.model.config import QwenConfig

SleepTag = Literal["weights", "kv_cache"]
SLEEP_TAGS: tuple[SleepTag, ...] = ("weights", "kv_cache")


class EngineError(UserError):
    """An engine failed beyond its retries, or refused what it was asked; the message says what to do."""


class SyncError(RuntimeError):
    """A weight sync that can't go on, on all ranks of the replica; the message names the tensor or rank."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; one for all requests of a `generate`."""

    temperature: float = 1.0
    """0 is greedy; the log-probs are then those at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    max_tokens: int = 1024
    """Response budget, a prefix carried over included."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end an answer, the checkpoint's eos ids among them."""
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled: media markers and placeholders."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """An answer's tokens so far, sampled earlier (maybe under older weights) and now carried on."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`n` answers to one prompt, numbered from `first_index`."""

    sample_id: str
    prompt: Prompt
    n: int
    first_index: int = 0
    seed: int = 0
    prefixes: Mapping[int, Prefix] = field(default_factory=dict)
    """By answer index: tokens to carry on from."""
    new_tokens: int | None = None
    """An answer that isn't at its end after so many new tokens comes back with finish_reason `abort`."""

    @property
    def indices(self) -> range:
        """Answer indices asked for."""
        return range(self.first_index, self.first_index + self.n)

    def room(self, index: int, sampling: Sampling) -> int:
        """New tokens that answer `index` may get in this call."""
        left = sampling.max_tokens - (len(self.prefixes[index].token_ids) if index in self.prefixes else 0)
        return left if self.new_tokens is None else min(left, self.new_tokens)

    def token_seed(self, index: int) -> int:
        """Seed in [0, 2**31) of answer `index`, a function of (seed, sample_id, index) alone."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.sample_id}\0{index}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") & 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at an engine for the progress line."""

    running: int
    waiting: int
    finished: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One tensor of a bucket: Hugging Face name as the engine takes it, dtype name (`bfloat16`), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class WeightReceiver(Protocol):
    """The engine's side of a weight sync. Called on the replica's leader only, between `begin` and `end`."""

    transports: frozenset[str]
    """Which of ipc, distributed, disk this engine takes."""

    @property
    def wants_vision(self) -> bool:
        """Whether the engine uses its own vision tower, so that the tower's weights must be sent."""
        ...

    def begin(self, version: int) -> None:
        """Open an update."""
        ...

    def load_shared(self, metas: Sequence[TensorMeta], handle: Mapping[str, Any]) -> None:
        """Copy tensors out of a flat shared buffer (`handle` names it); returns when the buffer may be reused."""
        ...

    def join_group(self, address: str, port: int, backend: str) -> Any:
        """Form the process group of trainer leader (rank 0) and engine ranks; returns the leader's group."""
        ...

    def leave_group(self) -> None:
        """Dissolve the engine's side of it."""
        ...

    def load_broadcast(self, metas: Sequence[TensorMeta], send: Callable[[], None]) -> None:
        """Receive one flat broadcast; `send` performs the leader's half once the engine listens."""
        ...

    def load_disk(self, path: str, version: int) -> None:
        """Load a Hugging Face directory."""
        ...

    def end(self, version: int) -> None:
        """Close the update; answers from now on carry `version`."""
        ...

    def fingerprints(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
        """`rollout.fingerprint` of each named tensor as the engine holds it, summed over its ranks.

        None where the engine can't tell; the log-prob check after the sync is then all there is.
        """
        ...


class Engine(Protocol):
    """A generator of answers."""

    name: str
    weight_version: int
    """Version of the weights it answers with; -1 before the first update."""
    receiver: WeightReceiver | None
    """None where the engine reads the trainer's own weights; a receiver exists on every rank, is used on the leader."""

    def start(self) -> None:
        """Bring the engine up and run its start-up checks."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Rollout]:
        """Yield every answer asked for exactly once, as they finish, in the same order on all ranks."""
        ...

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs [len(answer)] of given answers after their prompts, at temperature 1 over the whole vocabulary."""
        ...

    def pause(self) -> None:
        """Hold running requests where they are; they go on after `resume`, under whatever weights are loaded then."""
        ...

    def resume(self) -> None:
        """Let held requests go on."""
        ...

    def abort(self) -> None:
        """End every unfinished request: a running `generate` yields what each has, finish_reason `abort`."""
        ...

    def sleep(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Give memory back to the trainer."""
        ...

    def wake(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Take it again; weights come back undefined until the next update."""
        ...

    def update_weights(self, version: int, load: Callable[[], None] | None = None) -> None:
        """Answer as `version` from now on; `load` hands over the buckets through `receiver` (`sync.push` does)."""
        ...

    def stats(self) -> EngineStats:
        """Requests running, waiting and finished, and the recent speed."""
        ...

    def health(self) -> bool:
        """Whether it can answer."""
        ...

    def stop(self) -> None:
        """End the engine and free all it holds; harmless twice."""
        ...


class TextDecoder(Protocol):
    """What engines need of a tokenizer (a Hugging Face tokenizer is one)."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...


def sampling_from(config: Config, qwen: QwenConfig) -> Sampling:
    """Training's sampling: the options of `RolloutConfig`, the checkpoint's eos ids, media ids banned."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        stop=rollout.stop,
        stop_token_ids=eos_ids(config.run.model),
        banned_token_ids=banned_ids(qwen),
    )


def eos_ids(model_dir: str) -> tuple[int, ...]:
    """Ids that end an answer, from the checkpoint's generation_config.json, or else its config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if path.is_file():
            raw = json.loads(path.read_text())
            found = raw.get("eos_token_id", raw.get("text_config", {}).get("eos_token_id"))
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
    raise EngineError(f"{model_dir}: neither generation_config.json nor config.json names eos_token_id")


def banned_ids(qwen: QwenConfig) -> tuple[int, ...]:
    """Ids an answer must never hold: a sampled placeholder would ask for media that are not there."""
    return (qwen.image_token_id, qwen.video_token_id, qwen.vision_start_token_id, qwen.vision_end_token_id)


def make_engine(config: Config, qwen: QwenConfig, chunks: Sequence[Any], tokenizer: TextDecoder) -> Engine:
    """The engine named by `rollout_engine`, not yet started. `chunks` are this rank's model chunks, unwrapped.

    Collective over all ranks: server engines make a gloo group per replica.
    """
    name = config.rollout.rollout_engine
    if name == "inprocess":
        from dppo_mcore.rollout.inprocess import InProcessEngine

        return InProcessEngine(config, qwen, chunks, tokenizer)
    if name == "sglang":
        from dppo_mcore.rollout.sglang import SglangEngine

        return SglangEngine(config, qwen, chunks, tokenizer)
    if name == "vllm":
        from dppo_mcore.rollout.vllm import VllmEngine

        return VllmEngine(config, qwen, chunks, tokenizer)
    raise EngineError(f"rollout_engine: {name!r} is none of inprocess, sglang, vllm")
