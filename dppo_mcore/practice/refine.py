"""From a weakness phase's ledger to the corpus of its SFT phase: kept answers, retrieval, replay, mix; made once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from dppo_mcore.config import PracticeConfig
from dppo_mcore.practice.corpus import (
    SOURCES,
    Corpus,
    general_candidates,
    mix,
    own_candidates,
    retrieved_candidates,
    weak_candidates,
)
from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.practice.prompts import PromptTemplate
from dppo_mcore.practice.retrieval import retrieve
from dppo_mcore.practice.weakness import weak
from dppo_mcore.types import Sample


def refine(
    ledger: Ledger,
    *,
    weakness: str,
    sft: str,
    pool: Mapping[str, Sample],
    practised: Collection[str],
    general: Iterable[Sample],
    template: PromptTemplate,
    count_tokens: Callable[[str], int],
    config: PracticeConfig,
    seed: int,
) -> Corpus:
    """Make and record the corpus of phase `sft` from the mining and the teacher's answers of phase `weakness`.

    `pool`: the RL pool by id; `practised`: ids RL drew from in this loop, which retrieval leaves out. Made already, it
    is read back, so a resumed SFT phase learns the same items in the same order.
    """
    recorded = ledger.corpus(sft)
    if recorded:
        tokens = dict.fromkeys(SOURCES, 0)
        for item in recorded:
            tokens[item.source] += item.tokens
        return Corpus(recorded, tokens, tokens)
    weak_samples = [pool[name] for name in weak(ledger, weakness)]
    kept = [answer for answer in ledger.teacher_answers(weakness) if answer.kept]
    others = (sample for name, sample in pool.items() if name not in practised)
    related = retrieve(weak_samples, others, neighbours=config.retrieval_neighbours, model=config.retrieval_model)
    usable = weak_candidates(kept, template, count_tokens)
    rehearsed = {name: pool[name].objective for name in practised if name in pool} if config.mix_own else {}
    candidates = [
        *usable,
        *retrieved_candidates(related, ledger, template, count_tokens),
        *own_candidates(rehearsed, ledger, count_tokens, seed=seed),
        *general_candidates(general, template, count_tokens, seed=seed),
    ]
    corpus = mix(
        candidates,
        weak=config.mix_weak,
        retrieved=config.mix_retrieved,
        own=config.mix_own,
        general=config.mix_general,
        seed=seed,
    )
    numbers = {
        "weak_samples": len(weak_samples),
        "taught": len(kept),
        "without_reasoning": len(kept) - len(usable),
        "retrieved": len(related),
        "tokens": corpus.tokens,
        "available": corpus.available,
        "shares": corpus.shares(),
    }
    summary = corpus.summary()
    if len(usable) < len(kept):
        summary += f"; {len(kept) - len(usable)} teacher answers without any reasoning left out"
    with ledger.transaction():
        ledger.record_corpus(sft, corpus.items)
        ledger.decide(sft, 0, "corpus", numbers, summary)
    return corpus
