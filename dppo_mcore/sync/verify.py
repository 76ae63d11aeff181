"""Whether the engine holds what the trainer has: fingerprints tensor by tensor, and log-probs of one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dppo_mcore.model.weight_map import Piece
from dppo_mcore.rollout.base import SyncError
from dppo_mcore.rollout.fingerprint import add, fingerprint


def piece_fingerprint(piece: Piece) -> int:
    """This rank's summand to its tensor's fingerprint."""
    if piece.dim == 1:
        return fingerprint(piece.view, column=piece.start)
    rows = piece.view.reshape(piece.length, -1) if len(piece.tensor.shape) > 1 else piece.view.reshape(piece.length)
    return fingerprint(rows, row=piece.start)


def total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums over ranks, per tensor."""
    sums: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = add(sums.get(name, 0), value)
    return sums


def compare(expected: Mapping[str, int], held: Mapping[str, int], engine: str) -> None:
    """Raise for the first tensor, in the plan's order, that differs or is missing."""
    wrong = [name for name, value in expected.items() if held.get(name) != value]
    if wrong:
        state = "is missing from" if wrong[0] not in held else "differs in"
        raise SyncError(f"weight sync: {wrong[0]} {state} engine {engine} ({len(wrong)} of {len(expected)} tensors)")


def compare_logprobs(trainer: Sequence[float] | Tensor, engine: Sequence[float], tolerance: float) -> float:
    """Largest difference of the trainer's and the engine's log-probs of one answer; an error beyond `tolerance`."""
    ours = [float(value) for value in trainer]
    if len(ours) != len(engine):
        raise SyncError(f"log-prob check: the trainer scored {len(ours)} tokens, the engine {len(engine)}")
    differences = [abs(left - right) for left, right in zip(ours, engine, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if not differences[worst] <= tolerance:
        raise SyncError(
            f"log-prob check after the sync: token {worst} has {ours[worst]:.6f} in the trainer, {engine[worst]:.6f} "
            f"in the engine (tolerance {tolerance:g}); the two don't compute the same model"
        )
    return differences[worst]
