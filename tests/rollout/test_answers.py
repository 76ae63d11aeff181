"""The token contract, from raw answers to rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dppo_mcore.rollout.answers import RawAnswer, as_prefix, assemble, check_prompt, merge_versions
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Prefix, Sampling
from dppo_mcore.types import Prompt, Sample
from tests.rollout.cases import Spelling

EOS, PAD = 592, 601
SAMPLING = Sampling(max_tokens=6, stop_token_ids=(EOS,), banned_token_ids=(PAD,))


def request(**changes: Any) -> GenerationRequest:
    """One answer to a short prompt."""
    return GenerationRequest("s", Prompt(Sample("s", "exact", ()), (1, 2)), 1, **changes)


def raw(ids: tuple[int, ...], finish: str = "stop", version: int = 4, **changes: Any) -> RawAnswer:
    """An answer of one version, log-prob -1 a token."""
    fields: dict[str, Any] = {
        "token_ids": ids,
        "logprobs": (-1.0,) * len(ids),
        "finish": finish,
        "versions": ((version, 0, len(ids)),) if ids else (),
    }
    return RawAnswer(**(fields | changes))


def test_eos_stays_in_the_ids_and_out_of_the_text() -> None:
    """What is trained on is what was sampled."""
    rollout = assemble(request(), 0, raw((0, 1, EOS)), SAMPLING, Spelling())
    assert (rollout.token_ids, rollout.text, rollout.finish_reason) == ((0, 1, EOS), "ab", "stop")


def test_tokens_after_a_first_eos_are_dropped() -> None:
    """Repeated eos and what follows never reach training."""
    rollout = assemble(request(), 0, raw((0, EOS, EOS, 3), "length"), SAMPLING, Spelling())
    assert (rollout.token_ids, rollout.finish_reason) == ((0, EOS), "stop")
    assert rollout.weight_versions == ((4, 0, 2),)
    assert len(rollout.logprobs) == 2


def test_an_answer_beyond_the_budget_is_cut_and_marked() -> None:
    """Longer than max_tokens ends as `length`."""
    rollout = assemble(request(), 0, raw(tuple(range(9)), "stop"), SAMPLING, Spelling())
    assert (len(rollout.token_ids), rollout.finish_reason) == (6, "length")


def test_an_empty_answer_is_one() -> None:
    """Nothing sampled, nothing wrong."""
    rollout = assemble(request(), 0, raw((), "abort"), SAMPLING, Spelling())
    assert (rollout.token_ids, rollout.text, rollout.finish_reason) == ((), "", "abort")


def test_stop_strings_end_the_text() -> None:
    """The string's tokens stay, its text doesn't."""
    sampling = Sampling(max_tokens=6, stop=("cd",))
    rollout = assemble(request(), 0, raw((0, 2, 3)), sampling, Spelling())
    assert (rollout.token_ids, rollout.text) == ((0, 2, 3), "a")


def test_a_prefix_comes_first_with_its_versions() -> None:
    """Carried on: ids and log-probs joined, version pieces shifted."""
    prefix = Prefix((7, 8), (-0.5, -0.25), ((3, 0, 2),))
    rollout = assemble(request(prefixes={0: prefix}), 0, raw((0, EOS)), SAMPLING, Spelling())
    assert rollout.token_ids == (7, 8, 0, EOS)
    assert rollout.logprobs == (-0.5, -0.25, -1.0, -1.0)
    assert rollout.weight_versions == ((3, 0, 2), (4, 2, 4))
    assert as_prefix(rollout).weight_versions == rollout.weight_versions


def test_an_answer_at_its_steps_budget_is_unfinished() -> None:
    """Not one that ended or spent its whole budget with the same token."""
    step = request(new_tokens=2)
    assert assemble(step, 0, raw((7, 8), finish="length"), SAMPLING, Spelling()).finish_reason == "abort"
    assert assemble(step, 0, raw((7, EOS)), SAMPLING, Spelling()).finish_reason == "stop"
    last = request(new_tokens=2, prefixes={0: Prefix((7,) * 4, (-0.5,) * 4, ((3, 0, 4),))})
    whole = assemble(last, 0, raw((7, 8), finish="length"), replace(SAMPLING, max_tokens=6), Spelling())
    assert whole.finish_reason == "length" and len(whole.token_ids) == 6


def test_a_stop_string_across_the_end_of_a_prefix_ends_the_answer() -> None:
    """An engine that was given the prefix as prompt doesn't see it."""
    carried = request(prefixes={0: Prefix((0, 1), (-0.5, -0.25), ((3, 0, 2),))})
    rollout = assemble(carried, 0, raw((2, 3, 4)), replace(SAMPLING, stop=("bc",)), Spelling())
    assert rollout.token_ids == (0, 1, 2) and len(rollout.logprobs) == 3
    assert (rollout.text, rollout.finish_reason) == ("a", "stop")
    assert rollout.weight_versions[-1][2] == 3


def test_versions_join_and_cover() -> None:
    """Neighbours of one version become one piece; a gap is an error."""
    assert merge_versions(((1, 0, 2), (1, 2, 5), (2, 5, 5), (2, 5, 6))) == ((1, 0, 5), (2, 5, 6))
    with pytest.raises(EngineError, match="don't cover its 3 tokens"):
        assemble(request(), 0, raw((0, 1, 2), versions=((4, 0, 2),)), SAMPLING, Spelling())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raw((0, PAD)), "holds media token 601"),
        (raw((0, 1), logprobs=(-1.0,)), "2 tokens but 1 log-probs"),
        (raw((0, 1), logprobs=(-1.0, float("nan"))), "not a number or above 0"),
        (raw((0, 1), logprobs=(-1.0, 0.5)), "not a number or above 0"),
    ],
)
def test_what_breaks_the_contract_is_refused(answer: RawAnswer, message: str) -> None:
    """Each with the sample's name."""
    with pytest.raises(EngineError, match=f"sample s, answer 0: .*{message}"):
        assemble(request(), 0, answer, SAMPLING, Spelling())


@pytest.mark.parametrize(
    ("ids", "message"),
    [((), "is empty"), (tuple(range(20)), "has 20 tokens, max_prompt_tokens is 10"), ((1, PAD), "but no media")],
)
def test_prompts_are_checked_before_they_are_sent(ids: tuple[int, ...], message: str) -> None:
    """Never cut, never blind."""
    bad = GenerationRequest("s", Prompt(Sample("s", "exact", ()), ids), 1)
    with pytest.raises(EngineError, match=f"sample s: .*{message}"):
        check_prompt(bad, 10, (PAD,))


def test_seeds_depend_on_sample_and_index_only() -> None:
    """And differ between answers."""
    seeds = {(s, i): GenerationRequest(s, request().prompt, 4, seed=1).token_seed(i) for s in "ab" for i in range(4)}
    assert len(set(seeds.values())) == 8
    assert GenerationRequest("a", request().prompt, 1, 3, seed=1).token_seed(3) == seeds["a", 3]
    assert all(0 <= seed < 2**31 for seed in seeds.values())
