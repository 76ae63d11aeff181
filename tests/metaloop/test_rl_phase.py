"""An RL phase's own judgement of its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from dppo_mcore.metaloop.rl_phase import _judge
from dppo_mcore.practice.difficulty import Draw, make_buffer
from dppo_mcore.practice.ledger import Group, PhasePlan
from dppo_mcore.practice.stagnation import Stagnation
from dppo_mcore.types import Sample


def test_a_phase_is_judged_live_as_it_is_when_resumed() -> None:
    """What a group stands for is known when it was drawn: a replay of the ledger's groups finds the same."""
    pool = [Sample(f"s{i:03}", "ab"[i % 2], ()) for i in range(120)]
    rng = np.random.default_rng(0)
    rows = make_buffer(pool, {sample.id: (4, int(rng.integers(0, 5))) for sample in pool})
    options: dict[str, Any] = {"min_prompts": 16, "window": 3}
    draw, stagnation, groups = Draw(pool, rows, seed=0), Stagnation(**options), list[Group]()
    run: Any = SimpleNamespace(ledger=SimpleNamespace(groups=lambda _, before_step: groups))
    for step in range(20):
        names = sorted(draw.draw(16))
        groups += [Group(step, name, "ab"[int(name[1:]) % 2], 8, int(rng.integers(5, 9))) for name in names]
        verdict = _judge(run, PhasePlan("1-1 RL", 1, "rl"), draw, stagnation, step + 1)
    again = Stagnation(**options)
    Draw(pool, rows, seed=0).replay(groups, 16, again, steps=20)
    assert again.verdict() == verdict
    # Much was mastered on the way, which the last steps' own groups say nothing of.
    last = [group.successes / group.trials for group in groups if group.step >= 17]
    assert verdict.tasks["a"].success > np.mean(last) + 0.02
