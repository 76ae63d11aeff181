"""What a leader needs of its line to a server, whichever server and line it is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import GenerationRequest, Sampling
from dppo_mcore.types import Prompt


class EngineClient(Protocol):
    """The leader's line to a running server."""

    def submit(
        self, rid: str, request: GenerationRequest, index: int, sampling: Sampling, media: Any
    ) -> Future[RawAnswer]:
        """Ask for one answer; `media` is what `share` returned for its prompt."""
        ...

    def score(self, prompt: Prompt, answer: Sequence[int], media: Any) -> list[float]:
        """Log-probs of a given answer."""
        ...

    def share(self, prompt: Prompt, embeddings_MH: Tensor | None, positions_3L: Tensor) -> Any:
        """Make a prompt's media reachable for the engine; has a `close`."""
        ...

    def abort(self, rid: str | None = None) -> None:
        """End one request, or all."""
        ...

    def pause(self) -> None:
        """Hold running requests."""
        ...

    def resume(self) -> None:
        """Let them go on."""
        ...

    def sleep(self, tags: Sequence[str]) -> None:
        """Release memory."""
        ...

    def wake(self, tags: Sequence[str]) -> None:
        """Take it again."""
        ...

    def alive(self) -> bool:
        """Whether the server answers."""
        ...

    def close(self) -> None:
        """End it, or leave it where it isn't ours."""
        ...
