"""Rule rewards: `score(sample, text)`, the registry of objectives, and (in `pool`) workers with a time limit."""

from dppo_mcore.rewards.registry import known_objectives, load_objectives, objective
from dppo_mcore.rewards.scoring import Rubric, Score, score

__all__ = ["Rubric", "Score", "known_objectives", "load_objectives", "objective", "score"]
