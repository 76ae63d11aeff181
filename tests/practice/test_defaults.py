"""The numbers of the paper and those chosen where it is silent are the configuration's defaults."""

from __future__ import annotations

import pytest

from dppo_mcore.config import Config
from dppo_mcore.practice.curriculum import schedule

DEFAULTS = {
    "run": {"loops": 3, "mode": "dppo", "last_sft": False},
    "practice": {
        "horizons": (32, 64, 64), "sampling": "difficulty", "buffer_rollouts": 4, "success_threshold": 0.5,
        "intractable_share": 0.25, "anchor_share": 0, "stagnation_threshold": 0.7, "stagnation_window": 10,
        "stagnation_min_prompts": 400, "stagnation_aggregate": "mean", "teacher_answers": 4, "teacher_show_gold": False,
        "teacher_vote": 0, "retrieval_neighbours": 4, "mix_weak": 0.5, "mix_retrieved": 0.3, "mix_general": 0.2,
    },
    "rl": {
        "group_size": 8, "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.01, "kl": "k3", "aggregation": "token-mean",
        "advantage_scale": "std", "format_weight": 0.1, "task_weight": 0.9,
    },
    "rollout": {"temperature": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, names in DEFAULTS.items() for n in names])
def test_default(section: str, name: str) -> None:
    assert getattr(getattr(Config(), section), name) == DEFAULTS[section][name]


def test_sft_takes_a_tenth_of_the_plain_learning_rate() -> None:
    assert Config().sft.sft_lr == pytest.approx(Config().sft.base_sft_lr / 10)


def test_the_default_run_is_the_papers_figure() -> None:
    config = Config()
    phases = schedule(config.run.mode, config.run.loops, config.practice.horizons, last_sft=config.run.last_sft)
    shown = [(p.name, p.horizon) for p in phases if p.kind in ("rl", "sft")]
    assert shown == [("1-1 RL", 32), ("1-2 SFT", 32), ("2-1 RL", 64), ("2-2 SFT", 64), ("3-1 RL", 64)]
