"""The spine of the data's way: Sample -> Prompt -> Rollout -> ScoredRollout -> PackedBatch.

Light on purpose: nothing here imports torch, so that the method (`practice`, `rewards`) runs without it.
Shape suffixes: L tokens of a packed row, R loss rows, S sequences, P patches, M media tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

MediaKind = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class Media:
    """One image or clip of a sample. `path` is absolute and was checked to lie under its root."""

    kind: MediaKind
    path: str
    start: float | None = None
    """Seconds into the file where the clip starts; None is the beginning."""
    end: float | None = None
    """Seconds into the file where the clip ends; None is the end."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `content` holds `<image>` and `<video>` where the sample's media go, in order."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A question of the pool, as validated from the manifest.

    `turns` ends with the user's question; a manifest's last assistant turn becomes `answer` (SFT) and,
    where no `gold` is given, also the gold answer.
    """

    id: str
    objective: str
    """Which rule reward scores it: affordance, counting, temporal, success, planning, prediction, boxes, exact, ..."""
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()
    dimension: str = ""
    """Capability dimension (one of the taxonomy's nine, or empty)."""
    gold: Any = None
    """JSON value the objective's scorer compares with."""
    answer: str | None = None
    """Reference answer text for SFT; None for a question without one."""
    source: str = ""
    """Data set it came from, for reports and for the general replay."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What a scorer needs besides gold: mask, polygon, image size, options, ..."""


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Which frames of one medium are seen, at what size: planned once, shared by trainer and every engine."""

    path: str
    kind: MediaKind
    indices: tuple[int, ...]
    """Frame numbers in presentation order, ascending, even in number for a video ((0,) for an image)."""
    times: tuple[float, ...]
    """Presentation time in seconds of each index."""
    size: tuple[int, int]
    """Height and width in pixels after rotation and smart resize."""
    grid: tuple[int, int, int]
    """Patches along time, height, width (before the merger)."""
    seconds_per_grid: float | None
    """Real seconds between temporal patches; None for an image."""
    rotation: int = 0
    """Degrees clockwise the decoder must turn the frame before resizing."""


@dataclass(frozen=True, slots=True)
class PromptMedia:
    """One planned medium and, once decoded, its patches [t*h*w, 3*2*14*14] float32."""

    plan: FramePlan
    patches: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample turned into token ids, media placeholders expanded exactly once."""

    sample: Sample
    token_ids: tuple[int, ...]
    media: tuple[PromptMedia, ...] = ()
    loss_mask: tuple[bool, ...] | None = None
    """Per token, for conversations with answers (SFT, scoring): True where the token is learnt. None: a bare prompt."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer. `logprobs` are those of the distribution really sampled from."""

    sample_id: str
    index: int
    """Number of the answer within its group."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: tuple[tuple[int, int, int], ...] = ()
    """(weight version, first token, one past its last token), several for an answer carried on under new weights."""


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with its reward and the reward's named parts (format, task, ...)."""

    rollout: Rollout
    reward: float
    parts: Mapping[str, float]
    success: bool
    error: str | None = None
    """The scorer's exception, if it raised (the reward is then 0)."""


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """Whose rows these are in a packed batch."""

    sample_id: str
    index: int = 0
    source: str = ""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: a single packed row of L tokens.

    Tokens of one segment share a prompt: branch 0 is the prompt (seen by all), branch g > 0 is response g, which
    sees the prompt and itself but not its siblings. Token i attends to j <= i iff same segment and
    (branch[j] == 0 or branch[j] == branch[i]). A conversation without sharing is one segment, all branch 0.
    Padding has segment -1 and attends to padding only.
    Loss rows name the position whose hidden state predicts `targets_R`: the last prompt position appears once per
    response. Rows of one sequence are contiguous.
    """

    token_ids_L: Tensor
    position_ids_3L: Tensor
    segments_L: Tensor
    """int32, -1 is padding."""
    branches_L: Tensor
    """int32, 0 is the shared prompt."""
    loss_rows_R: Tensor
    """int64 indices into L."""
    targets_R: Tensor
    """int64 token ids."""
    cu_rows: Tensor
    """int32 [S+1]: rows of sequence s are cu_rows[s]:cu_rows[s+1]."""
    sequences: tuple[SequenceRef, ...]
    patches_P: Tensor | None = None
    """[P, 3*2*14*14], all media of the row in order; None for a text-only row."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """(t, h, w) per medium, in patches."""
    media_rows_M: Tensor | None = None
    """int64 positions in L that take the merged media embeddings, in order."""
    media_keys: tuple[str, ...] = ()
    """A stable name per medium (path and plan), the key of the embedding cache."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-row floats [R]: advantages, old_logprobs, ref_logprobs, rollout_logprobs, ..."""
