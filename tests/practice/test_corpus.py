"""From failed samples to the SFT mix: mining, retrieval, shares, reasons; schedule and prompts beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_mcore.config import PracticeConfig
from dppo_mcore.practice.corpus import Candidate, general_candidates, mix, own_candidates, retrieved_candidates
from dppo_mcore.practice.curriculum import horizon, schedule
from dppo_mcore.practice.ledger import Ledger, PhasePlan, TeacherAnswer
from dppo_mcore.practice.prompts import INSTRUCTIONS, PromptTemplate, load_template
from dppo_mcore.practice.refine import refine
from dppo_mcore.practice.retrieval import Embeddings, TfIdf, retrieve
from dppo_mcore.practice.weakness import candidates, spread, weak, weak_dimensions
from dppo_mcore.rewards.format import format_reward
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn


def sample(
    name: str, objective: str = "counting", dimension: str = "D", question: str = "How many?", **k: Any
) -> Sample:
    return Sample(name, objective, (Turn("user", question),), dimension=dimension, gold=3, **k)


def rolled(name: str, wins: int, of: int = 4) -> list[ScoredRollout]:
    text = "<think>own</think><answer>3</answer>"
    return [
        ScoredRollout(Rollout(name, i, (1,), (0.0,), text, "stop"), 1.0, {"format": 1.0, "task": 1.0}, i < wins)
        for i in range(of)
    ]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    kinds = [("1-1 buffer", "buffer"), ("1-1 RL", "rl"), ("1-2 weakness", "weakness"), ("1-2 SFT", "sft"),
             ("2-2 SFT", "sft")]  # fmt: skip
    ledger.plan([PhasePlan(name, 1, kind) for name, kind in kinds])
    return ledger


def test_mining(ledger: Ledger) -> None:
    samples = [sample(f"s{i}", "counting" if i < 3 else "planning", f"D{i % 2}") for i in range(6)]
    ledger.add_samples(samples, "rl")
    for name, wins in (("s0", 0), ("s1", 0), ("s2", 4), ("s3", 0), ("s4", 2), ("s5", 1)):
        ledger.record_rollouts("1-1 buffer", 0, rolled(name, wins))
    ledger.record_rollouts("1-1 RL", 3, [*rolled("s1", 2), *rolled("s4", 0)])
    # s1 was learnt in RL, s4 lost: what counts is the last group.
    found = candidates(ledger, ["1-1 buffer", "1-1 RL"])
    assert sorted(found) == ["s0", "s3", "s4"]
    few = candidates(ledger, ["1-1 buffer", "1-1 RL"], limit=2)
    assert len(few) == 2 and "s0" in few  # one of counting's, one of planning's
    ledger.record_rollouts("1-2 weakness", 0, [*rolled("s0", 0), *rolled("s3", 1), *rolled("s4", 0)])
    assert weak(ledger, "1-2 weakness") == ["s0", "s4"]
    dimensions = weak_dimensions(samples, found, ["s0", "s4"])
    assert [(d.dimension, d.weak, d.mined) for d in dimensions] == [("D0", 2, 2)]
    assert dimensions[0].share == 1.0


def test_spread_is_even_and_fixed_by_the_seed() -> None:
    names = {f"a{i}": "a" for i in range(50)} | {f"b{i}": "b" for i in range(5)}
    chosen = spread(names, 8, 0)
    assert Counter(name[0] for name in chosen) == {"a": 4, "b": 4}
    assert chosen == spread(names, 8, 0) != spread(names, 8, 1)
    assert spread({}, 0, 0) == []


def test_tf_idf() -> None:
    texts = ["count the red blocks", "count the blue blocks", "where is the gripper", ""]
    index = TfIdf(texts)
    scores_N = index.similarity("red blocks")
    assert scores_N.argmax() == 0 and scores_N[1] > scores_N[2] == scores_N[3] == 0
    assert index.similarity(texts[0])[0] == pytest.approx(1)
    assert not index.similarity("nothing known").any()
    dense = np.array([index.similarity(text) for text in texts[:3]])[:, :3]
    assert np.allclose(dense, dense.T)


def test_retrieval_order() -> None:
    weak_one = sample("w", "counting", "D", "count the red blocks in the box")
    pool = [
        sample("far", "planning", "E", "count the red blocks in the box"),
        sample("dimension", "planning", "D", "zzz"),
        sample("task", "counting", "E", "zzz"),
        sample("both", "counting", "D", "zzz"),
        sample("nearest", "counting", "D", "count the blue blocks in the box"),
        weak_one,
    ]
    found = retrieve([weak_one], pool, neighbours=5)
    assert [r.sample.id for r in found] == ["nearest", "both", "task", "dimension", "far"]
    assert found[0].why().startswith("related to weak w: same dimension and task, similarity 0.")
    assert found[4].why() == "related to weak w: same wording, similarity 1.00"
    assert retrieve([], pool) == [] and retrieve([weak_one], []) == []


def test_each_sample_is_retrieved_once() -> None:
    weak_ones = [sample(f"w{i}") for i in range(3)]
    found = retrieve(weak_ones, [sample(f"p{i}") for i in range(7)], neighbours=3)
    assert len({r.sample.id for r in found}) == len(found) == 7


def test_retrieval_by_a_local_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "count", "red", "blue", "where", "gripper"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    index = Embeddings(["count red", "where gripper", ""], str(tmp_path))
    assert index.similarity("count red").argmax() == 0
    assert index.similarity("where gripper")[1] == pytest.approx(1, abs=1e-5)


def made(source: str, count: int, tokens: int = 10) -> list[Candidate]:
    return [Candidate(f"{source}{i}", source, "text", tokens, "because") for i in range(count)]


def test_mix_by_token_shares() -> None:
    corpus = mix([*made("weak", 50), *made("retrieved", 500, 7), *made("general", 500, 3)])
    assert corpus.tokens["weak"] == 500
    assert corpus.shares()["retrieved"] == pytest.approx(0.3, abs=0.01)
    assert corpus.shares()["general"] == pytest.approx(0.2, abs=0.01)
    assert [item.position for item in corpus.items] == list(range(len(corpus.items)))
    first = Counter(item.source for item in corpus.items[: len(corpus.items) // 2])
    assert all(first[s] > 10 for s in ("weak", "retrieved", "general"))
    assert mix(made("weak", 5), seed=1).items != mix(made("weak", 5), seed=2).items
    assert "weak 50%" in corpus.summary()


def test_mix_when_a_source_is_short_or_empty() -> None:
    short = mix([*made("weak", 50), *made("retrieved", 3), *made("general", 500)])
    assert short.tokens == {"weak": 500, "retrieved": 30, "own": 0, "general": 200}
    only = mix([*made("retrieved", 30), *made("general", 500)])
    assert only.tokens == {"weak": 0, "retrieved": 300, "own": 0, "general": 200}
    assert mix(made("general", 500)).items == []
    assert mix([]).items == []
    with pytest.raises(ValueError, match="mix_weak"):
        mix([], weak=0, retrieved=0, general=0)


def test_own_verified_answers_hold_what_rl_revealed(ledger: Ledger) -> None:
    pool = [sample(f"c{i}", "counting") for i in range(40)] + [sample(f"p{i}", "planning") for i in range(4)]
    ledger.add_samples(pool, "rl")
    for one in pool:
        ledger.record_rollouts("1-1 RL", 0, rolled(one.id, 0 if one.id in ("c0", "p0") else 2))
    found = own_candidates({one.id: one.objective for one in pool}, ledger, len, seed=0)
    assert {c.sample_id for c in found} == {one.id for one in pool} - {"c0", "p0"}
    assert [c.sample_id[0] for c in found].index("p") <= 2 and Counter(c.sample_id[0] for c in found[:7])["p"] == 3
    assert all(c.source == "own" and "own verified rollout of 1-1 RL, step 0" in c.why for c in found)
    corpus = mix([*made("weak", 20), *made("own", 100)], weak=0.4, retrieved=0.0, own=0.6, general=0.0)
    assert corpus.tokens == {"weak": 200, "retrieved": 0, "own": 300, "general": 0}
    assert corpus.summary().endswith("weak 40%, own 60%")


def test_general_replay_covers_every_format() -> None:
    pool = [sample(f"b{i}", "boxes", answer="[0.1, 0.1, 0.2, 0.2]", source="refcoco") for i in range(100)]
    pool += [sample(f"e{i}", "exact", answer="four", source="add") for i in range(5)]
    found = general_candidates(pool, PromptTemplate(), len, seed=0)
    assert Counter(c.sample_id[0] for c in found[:10]) == {"b": 5, "e": 5}
    assert found[0].why == "general replay: boxes of refcoco" and found[0].answer == "[0.1, 0.1, 0.2, 0.2]"


def test_refine_from_end_to_end_and_once(ledger: Ledger) -> None:
    pool = {f"s{i}": sample(f"s{i}", question=f"How many red blocks {i}?") for i in range(30)}
    general = [sample(f"g{i}", "exact", answer="four") for i in range(50)]
    ledger.add_samples(pool.values(), "rl")
    ledger.add_samples(general, "general")
    for i in range(10):
        ledger.record_rollouts("1-2 weakness", 0, rolled(f"s{i}", 0))
        text = "<answer>3</answer>" if i == 8 else "I see three. \\boxed{3}"
        answer = TeacherAnswer(f"s{i}", 0, 0, "big", text, 0.9, True, i != 9, None, 9)
        ledger.record_teacher("1-2 weakness", [answer])
    ledger.record_rollouts("1-1 buffer", 0, rolled("s15", 4))
    arguments = {
        "weakness": "1-2 weakness", "sft": "1-2 SFT", "pool": pool, "practised": {f"s{i}" for i in range(12)},
        "general": general, "template": PromptTemplate(), "count_tokens": lambda text: len(text.split()),
        "config": PracticeConfig(), "seed": 0,
    }  # fmt: skip
    corpus = refine(ledger, **arguments)
    by_source = {s: [i for i in corpus.items if i.source == s] for s in ("weak", "retrieved", "general")}
    assert len(by_source["weak"]) == 8
    assert all(format_reward(i.answer) == 1 and "verified by the rule reward" in i.why for i in by_source["weak"])
    retrieved = {i.sample_id: i for i in by_source["retrieved"]}
    assert retrieved and not set(retrieved) & {f"s{i}" for i in range(12)}
    if "s15" in retrieved:
        assert "own rollout of 1-1 buffer, step 0" in retrieved["s15"].why
    decision = ledger.decisions("corpus")[0]
    assert decision.numbers["weak_samples"] == 10 and decision.numbers["taught"] == 9
    assert decision.numbers["without_reasoning"] == 1 and "1 teacher answers without" in decision.reason
    again = refine(ledger, **{**arguments, "seed": 99})
    assert again.items == corpus.items
    rehearsing = PracticeConfig(mix_retrieved=0.1, mix_own=0.2)
    pool_practised = arguments["practised"] | {"s15"}
    own = refine(ledger, **{**arguments, "sft": "2-2 SFT", "config": rehearsing, "practised": pool_practised})
    assert [item.sample_id for item in own.items if item.source == "own"] == ["s15"]


def test_schedule() -> None:
    names = [p.name for p in schedule("dppo", 3, (32, 64))]
    assert [n for n in names if n.endswith(("RL", "SFT"))] == ["1-1 RL", "1-2 SFT", "2-1 RL", "2-2 SFT", "3-1 RL"]
    assert names[:5] == ["1-1 buffer", "1-1 RL", "1-2 weakness", "1-2 SFT", "2-1 buffer"]
    assert [p.horizon for p in schedule("dppo", 3, (32, 64)) if p.kind == "rl"] == [32, 64, 64]
    assert schedule("dppo", 1, (32,), last_sft=True)[-1].name == "1-2 SFT"
    assert [p.kind for p in schedule("single-loop", 3, (32,))] == ["buffer", "rl", "weakness", "sft"]
    assert {p.kind for p in schedule("rl-only", 2, (32,))} == {"buffer", "rl"}
    assert [p.kind for p in schedule("sft-only", 1, (32,), base_sft=True)] == ["base-sft", "weakness", "sft"]
    shorter, longer = schedule("dppo", 2, (32, 64)), schedule("dppo", 4, (32, 64))
    assert longer[: len(shorter)] == shorter
    assert horizon(9, (32, 64)) == 64
    with pytest.raises(ValueError, match="loops must be"):
        schedule("dppo", 0, (32,))
    with pytest.raises(ValueError, match="horizons"):
        horizon(1, ())


def test_prompt_and_format_reward_agree() -> None:
    template = PromptTemplate()
    shown = template.apply(sample("s"))
    assert [turn.role for turn in shown.turns] == ["system", "user"]
    assert "<think>" in shown.turns[0].content and shown.turns[1].content.endswith(INSTRUCTIONS["counting"])
    own = Sample("s", "general", (Turn("system", "mine"), Turn("user", "q")))
    assert template.apply(own) == own
    assert PromptTemplate(system="").apply(own).turns == own.turns


@pytest.mark.parametrize(
    ("structure", "answer", "gold", "learnt", "asked"),
    [
        ("think-answer", "four", 4, "four", False),
        ("think-answer", None, 4, "4", False),
        ("think-answer", "<answer>four</answer>", 4, "<answer>four</answer>", False),
        ("think-answer", "<think>add</think><answer>4</answer>", 4, "<think>add</think><answer>4</answer>", True),
        ("answer", "four", 4, "four", False),
        ("answer", None, 4, "<answer>4</answer>", True),
        ("plain", "four", 4, "four", True),
        ("plain", None, 4, "4", True),
        ("think-answer", None, None, None, True),
    ],
)
def test_general_data_is_never_learnt_against_the_system_prompt(
    structure: Any, answer: str | None, gold: Any, learnt: str | None, asked: bool
) -> None:
    """Where an answer isn't what the system prompt asks for, the prompt isn't there; the instruction is."""
    template = PromptTemplate(structure=structure)
    row = Sample("g", "exact", (Turn("user", "2 + 2?"),), gold=gold, answer=answer)
    assert [c.answer for c in general_candidates([row], template, len, seed=0)] == ([] if learnt is None else [learnt])
    shown = template.apply_to_general(row)
    assert [turn.role for turn in shown.turns] == (["system", "user"] if asked else ["user"])
    assert shown.turns[-1].content == f"2 + 2?\n{INSTRUCTIONS['exact']}"
    assert learnt is None or asked == bool(format_reward(learnt, structure))
    own = Sample("g", "exact", (Turn("system", "mine"), Turn("user", "q")), answer=answer, gold=gold)
    assert template.apply_to_general(own).turns[0].content == "mine"
    silent = PromptTemplate(system="", structure=structure)
    assert silent.apply_to_general(row) == silent.apply(row)


@pytest.mark.parametrize(("structure", "answers"), [("think-answer", []), ("answer", ["<answer>3</answer>"])])
def test_a_bare_gold_answer_is_not_retrieved_where_reasoning_is_asked_for(
    ledger: Ledger, structure: Any, answers: list[str]
) -> None:
    """It would teach the model to leave the thought out, which the format reward calls wrong."""
    ledger.add_samples([sample("p")], "rl")
    related = retrieve([sample("w")], [sample("p")])
    found = retrieved_candidates(related, ledger, PromptTemplate(structure=structure), len)
    assert [one.answer for one in found] == answers
    assert all(format_reward(one.answer, structure) for one in found)


@pytest.mark.parametrize(
    ("text", "conformed"),
    [
        ("<think>a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"),
        ("I see three. \\boxed{3}", "<think>I see three.</think>\n<answer>3</answer>"),
        ("<think>a</think> so \\boxed{3}", "<think>a</think>\n<answer>3</answer>"),
        ("<thought>a</thought>b", "<think>a</think>\n<answer>b</answer>"),
        ("<answer>3</answer>", None),
        ("3", None),
        ("", None),
    ],
)
def test_conform(text: str, conformed: str | None) -> None:
    assert PromptTemplate().conform(text) == conformed


def test_other_structures_and_files(tmp_path: Path) -> None:
    assert PromptTemplate(structure="answer").conform("so \\boxed{3}") == "<answer>3</answer>"
    assert PromptTemplate(structure="plain").conform(" 3 ") == "3"
    assert PromptTemplate(structure="answer").bare(sample("s")) == "<answer>3</answer>"
    assert PromptTemplate(structure="plain").bare(sample("s")) == "3"
    path = tmp_path / "prompt.yaml"
    path.write_text("system: be brief\nstructure: answer\ninstructions: {counting: '', mine: do it}\n")
    template = load_template(str(path))
    assert (template.system_text, template.structure) == ("be brief", "answer")
    assert template.apply(sample("s")).turns[1].content == "How many?"
    assert template.apply(sample("s", "mine")).turns[1].content == "How many?\ndo it"
    assert load_template() == PromptTemplate()
    path.write_text("sistem: x\n")
    with pytest.raises(ValueError, match=r"unknown \['sistem'\]"):
        load_template(str(path))
    path.write_text("structure: free\n")
    with pytest.raises(ValueError, match="structure 'free' is none of think-answer"):
        load_template(str(path))
