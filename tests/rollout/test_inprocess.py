"""The embedded engine against transformers, against the trainer's log-probs, and against itself in other batches."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from dppo_mcore.config import ParallelConfig
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.rollout.answers import as_prefix
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling
from dppo_mcore.rollout.inprocess import InProcessEngine
from dppo_mcore.rollout.media import positions
from dppo_mcore.types import Prompt
from tests.rollout import inprocess_cases as cases
from tests.rollout import protocol


@pytest.fixture(scope="module")
def qwen(tiny_dir: str) -> QwenConfig:
    return load_qwen_config(tiny_dir)


@pytest.fixture(scope="module")
def engine(tiny_dir: str) -> Any:
    from dppo_mcore.runtime import parallel

    parallel.start(ParallelConfig(), seed=0)
    yield cases.engine(tiny_dir)
    parallel.stop()


@pytest.fixture(scope="module")
def oracle(tiny_dir: str) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir, dtype=torch.float32).eval()


def oracle_logits(oracle: Any, qwen: QwenConfig, prompt: Prompt, answer: tuple[int, ...]) -> torch.Tensor:
    """transformers' logits [len(answer), V] that predict the answer's tokens, under our positions."""
    where = positions(prompt, qwen)
    tail = torch.arange(len(answer)) + int(where.max()) + 1
    ids = torch.tensor([[*prompt.token_ids, *answer]])
    media: dict[str, Any] = {}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item for item in prompt.media if item.plan.kind == kind]
        if items:
            media[key] = torch.cat([item.patches for item in items])
            media[f"{kind}_grid_thw"] = torch.tensor([item.plan.grid for item in items])
    with torch.no_grad():
        logits = oracle(
            input_ids=ids,
            position_ids=torch.cat([where, tail.expand(3, -1)], 1).unsqueeze(1),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **media,
        ).logits[0]
    return logits[len(prompt.token_ids) - 1 : -1]


def test_the_protocol(engine: InProcessEngine) -> None:
    """As for every engine."""
    protocol.check_protocol(engine, 592)


def test_greedy_equals_transformers_generate(engine: InProcessEngine, oracle: Any, qwen: QwenConfig) -> None:
    prompts = [cases.text_prompt(n, 5 + 9 * n) for n in range(4)]
    sampling = cases.default_sampling(qwen, temperature=0.0, max_tokens=20)
    found = cases.by_key(engine.generate(cases.requests(prompts, n=1), sampling))
    for prompt in prompts:
        expected = oracle.generate(
            torch.tensor([prompt.token_ids]),
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=list(sampling.banned_token_ids),
            eos_token_id=None,
        )[0, len(prompt.token_ids) :]
        assert list(found[prompt.sample.id, 0].token_ids) == expected.tolist()
        assert found[prompt.sample.id, 0].finish_reason == "length"


def test_greedy_over_media_equals_transformers(engine: InProcessEngine, oracle: Any, qwen: QwenConfig) -> None:
    """Every token is the largest logit after the tokens before it, which is what greedy generation gives."""
    sampling = cases.default_sampling(qwen, temperature=0.0)
    prompts = cases.mixed_prompts(qwen)
    found = cases.by_key(engine.generate(cases.requests(prompts, n=2), sampling))
    for prompt in prompts:
        for index in range(2):
            rollout = found[prompt.sample.id, index]
            logits = oracle_logits(oracle, qwen, prompt, rollout.token_ids)
            logits[:, list(sampling.banned_token_ids)] = float("-inf")
            assert logits.argmax(1).tolist() == list(rollout.token_ids)
            expected = logits.log_softmax(1).amax(1)
            assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(engine: InProcessEngine, qwen: QwenConfig, temperature: float) -> None:
    """Against `linear_logprob` over the model's own forward; banned ids are taken out of the distribution by hand."""
    from dppo_kernels import linear_logprob

    from dppo_mcore.model.attention import plan_attention
    from dppo_mcore.rollout.prefill import pack_prompts

    sampling = cases.default_sampling(qwen, temperature=temperature)
    prompts = cases.mixed_prompts(qwen)
    found = cases.by_key(engine.generate(cases.requests(prompts), sampling))
    chunk, worst = engine._chunks[0], 0.0
    for prompt in prompts:
        answers = [found[prompt.sample.id, index].token_ids for index in range(3)]
        packed = pack_prompts([prompt], [answers], qwen, 1, every_token=True)
        batch = packed.batch
        with torch.no_grad():
            plan = plan_attention(batch.segments_L, batch.branches_L)
            hidden = chunk.forward_with(batch, plan)

            def logprob(targets: torch.Tensor, hidden: torch.Tensor = hidden) -> torch.Tensor:
                return linear_logprob(
                    hidden, chunk.head_weight(), targets, temperature=temperature, vocab_size=qwen.vocab_size
                )[0]

            values = logprob(batch.targets_R)
            banned = sum(logprob(torch.full_like(batch.targets_R, token)).exp() for token in sampling.banned_token_ids)
        expected = values - torch.log1p(-banned)
        got = torch.tensor([value for index in range(3) for value in found[prompt.sample.id, index].logprobs])
        worst = max(worst, (got - expected).abs().max().item())
    assert worst < 1e-5


def test_scores_equal_transformers(engine: InProcessEngine, oracle: Any, qwen: QwenConfig) -> None:
    for number, prompt in enumerate(cases.mixed_prompts(qwen)):
        answer = cases.text_prompt(50 + number, 9).token_ids
        expected = oracle_logits(oracle, qwen, prompt, answer).log_softmax(1)
        expected = expected[torch.arange(len(answer)), torch.tensor(answer)]
        (got,) = engine.score([prompt], [answer])
        assert (torch.tensor(got) - expected).abs().max() < 1e-5


def test_answers_depend_on_seed_sample_and_index_only(engine: InProcessEngine, qwen: QwenConfig, tiny_dir: str) -> None:
    sampling = cases.default_sampling(qwen)
    prompts = cases.mixed_prompts(qwen)
    whole = cases.by_key(engine.generate(cases.requests(prompts), sampling))
    assert len({rollout.token_ids for rollout in whole.values()}) == len(whole)
    alone = cases.by_key(engine.generate(cases.requests(prompts[3:4]), sampling))
    later = cases.by_key(
        engine.generate([GenerationRequest(prompts[3].sample.id, prompts[3], 1, first_index=2, seed=5)], sampling)
    )
    narrow = cases.engine(tiny_dir, rollout_max_in_flight=4)
    waves = cases.by_key(narrow.generate(cases.requests(prompts[::-1]), sampling))
    for part in (alone, later, waves):
        for key, rollout in part.items():
            assert rollout.token_ids == whole[key].token_ids
            assert rollout.logprobs == pytest.approx(whole[key].logprobs, abs=1e-5)
    assert waves.keys() == whole.keys()
    other = cases.by_key(engine.generate(cases.requests(prompts, seed=6), sampling))
    assert all(other[key].token_ids != whole[key].token_ids for key in whole)


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8, "top_k": 40}, {"temperature": 0.0}])
def test_same_answers_in_every_layout(tiny_dir: str, pool2: Any, pool4: Any, changes: dict[str, Any]) -> None:
    sampling = cases.default_sampling(load_qwen_config(tiny_dir), **changes)

    def run(pool: Any, **parallel: Any) -> list[dict[str, Any]]:
        return pool.run(cases.layout_rollouts, tiny_dir, ParallelConfig(**parallel), sampling)

    data_parallel = run(pool2)
    expected = cases.by_key(data_parallel[0]["rollouts"])
    shifted = cases.by_key(data_parallel[1]["rollouts"])
    assert len(expected) == 15 and len(shifted) == 12 and not expected.keys() & shifted.keys()
    layouts = [
        run(pool2, tensor_model_parallel_size=2),
        run(pool2, pipeline_model_parallel_size=2),
        run(pool2, tensor_model_parallel_size=2, sequence_parallel=True),
        run(pool2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ]
    if not changes:
        layouts.append(run(pool4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True))
    for ranks in layouts:
        assert all(rank["rollouts"] == ranks[0]["rollouts"] for rank in ranks), "ranks of a replica disagree"
        assert all(rank["scores"] == ranks[0]["scores"] for rank in ranks)
        found = cases.by_key(ranks[0]["rollouts"])
        assert found.keys() == expected.keys()
        for key, rollout in found.items():
            assert rollout.token_ids == expected[key].token_ids
            assert rollout.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)


def test_a_carried_on_answer_ends_like_an_unbroken_one(engine: InProcessEngine, qwen: QwenConfig) -> None:
    sampling = cases.default_sampling(qwen)
    prompts = cases.mixed_prompts(qwen)
    whole = cases.by_key(engine.generate(cases.requests(prompts), sampling))
    resumed = []
    for number, request in enumerate(cases.requests(prompts)):
        prefixes = {}
        for index in range(3):
            rollout, cut = whole[request.sample_id, index], (number + 4 * index) % 12
            prefixes[index] = as_prefix(
                replace(
                    rollout,
                    token_ids=rollout.token_ids[:cut],
                    logprobs=rollout.logprobs[:cut],
                    weight_versions=((0, 0, cut),) if cut else (),
                )
            )
        resumed.append(replace(request, prefixes=prefixes))
    found = cases.by_key(engine.generate(resumed, sampling))
    for request in resumed:
        for index in range(3):
            key = (request.sample_id, index)
            cut = len(request.prefixes[index].token_ids)
            assert found[key].token_ids == whole[key].token_ids
            assert found[key].logprobs == pytest.approx(whole[key].logprobs, abs=1e-5)
            assert found[key].weight_versions == (((0, 0, cut), (1, cut, 12)) if cut else ((1, 0, 12),))


def test_stop_ids_end_an_answer_and_stay_in_it(engine: InProcessEngine, qwen: QwenConfig) -> None:
    prompts = [cases.text_prompt(n, 20) for n in range(6)]
    free = cases.by_key(engine.generate(cases.requests(prompts, n=6), cases.default_sampling(qwen)))
    stops = {rollout.token_ids[n % 9] for n, rollout in enumerate(free.values())}
    sampling = cases.default_sampling(qwen, stop_token_ids=tuple(stops))
    found = cases.by_key(engine.generate(cases.requests(prompts, n=6), sampling))
    assert found.keys() == free.keys()
    reasons = set()
    for key, rollout in found.items():
        ids = free[key].token_ids
        end = next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))
        assert rollout.token_ids == ids[:end]
        assert rollout.finish_reason == ("stop" if rollout.token_ids[-1] in stops else "length")
        assert rollout.logprobs == pytest.approx(free[key].logprobs[:end], abs=1e-5)
        reasons.add((rollout.finish_reason, len(rollout.token_ids) == 1))
    assert ("stop", True) in reasons and ("stop", False) in reasons


def test_stop_strings_end_an_answer_and_leave_its_text(engine: InProcessEngine, qwen: QwenConfig) -> None:
    prompt = cases.text_prompt(3, 20)
    plain = cases.default_sampling(qwen, max_tokens=24)
    (free,) = engine.generate(cases.requests([prompt], n=1), plain)
    stop = free.text[6:9]
    (found,) = engine.generate(cases.requests([prompt], n=1), replace(plain, stop=("never there", stop)))
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < len(free.token_ids)
    assert stop not in found.text and free.text.startswith(found.text)


def test_no_budget_and_spent_prefixes_give_answers_at_once(engine: InProcessEngine, qwen: QwenConfig) -> None:
    prompt = cases.text_prompt(1, 10)
    empty = list(engine.generate(cases.requests([prompt]), cases.default_sampling(qwen, max_tokens=0)))
    assert [(r.token_ids, r.text, r.finish_reason) for r in empty] == [((), "", "length")] * 3
    (request,) = cases.requests([prompt])
    one = cases.by_key(engine.generate([request], cases.default_sampling(qwen, max_tokens=1)))
    spent = replace(request, prefixes={1: as_prefix(one[prompt.sample.id, 1])})
    again = cases.by_key(engine.generate([spent], cases.default_sampling(qwen, max_tokens=1)))
    assert again == one


def test_media_are_encoded_once_per_group(engine: InProcessEngine, qwen: QwenConfig) -> None:
    chunk, calls = engine._chunks[0], []
    original = chunk.encode_media

    def counting(patches: torch.Tensor, grids: Any) -> torch.Tensor:
        calls.append(tuple(grids))
        return original(patches, grids)

    chunk.encode_media = counting
    try:
        prompts = cases.mixed_prompts(qwen)
        list(engine.generate(cases.requests(prompts, n=5), cases.default_sampling(qwen)))
    finally:
        del chunk.encode_media
    grids = tuple(item.plan.grid for prompt in prompts for item in prompt.media)
    assert calls == [grids]


def test_a_frozen_tower_encodes_each_medium_once_for_good(tiny_dir: str, qwen: QwenConfig, engine: Any) -> None:
    frozen = cases.engine(tiny_dir, model={"freeze_vision": True, "freeze_merger": True})
    chunk, calls = frozen._chunks[0], []
    original = chunk.encode_media
    chunk.encode_media = lambda patches, grids: calls.append(tuple(grids)) or original(patches, grids)
    prompts, sampling = cases.mixed_prompts(qwen), cases.default_sampling(qwen)
    expected = cases.by_key(engine.generate(cases.requests(prompts), sampling))
    for encoded in (3, 3):
        found = cases.by_key(frozen.generate(cases.requests(prompts), sampling))
        assert len(calls) == encoded
        assert {key: rollout.token_ids for key, rollout in found.items()} == {
            key: rollout.token_ids for key, rollout in expected.items()
        }
    (item,) = prompts[1].media
    other = replace(prompts[1], media=(replace(item, patches=item.patches + 1),))
    list(frozen.generate(cases.requests([other]), sampling))
    assert len(calls) == 4


def test_bf16_is_off_by_its_rounding_only(tiny_dir: str, qwen: QwenConfig, engine: Any) -> None:
    """Decoding differs from a full forward no more than bf16 differs from fp32."""
    low = cases.engine(tiny_dir, model={"dtype": "bf16"})
    prompts = cases.mixed_prompts(qwen)
    found = cases.by_key(low.generate(cases.requests(prompts, n=2), Sampling(max_tokens=12)))
    pairs = [(prompt, found[prompt.sample.id, n]) for prompt in prompts for n in range(2)]
    given = ([prompt for prompt, _ in pairs], [rollout.token_ids for _, rollout in pairs])
    decoded = torch.tensor([rollout.logprobs for _, rollout in pairs])
    low_scores, high_scores = torch.tensor(low.score(*given)), torch.tensor(engine.score(*given))
    rounding = (low_scores - high_scores).abs().mean()
    assert (decoded - low_scores).abs().mean() < 1.5 * rounding < 0.1


def test_an_image_changes_the_answer(engine: InProcessEngine, qwen: QwenConfig) -> None:
    prompt = cases.media_prompt(3, qwen, ("video", (3, 4, 4), 0.7))
    (item,) = prompt.media
    blind = replace(prompt, media=(replace(item, patches=torch.zeros_like(item.patches)),))
    answer = cases.text_prompt(9, 8).token_ids
    seen, unseen = engine.score([prompt, blind], [answer, answer])
    assert max(abs(a - b) for a, b in zip(seen, unseen, strict=True)) > 1e-3


def test_abort_ends_what_is_unfinished(tiny_dir: str, engine: InProcessEngine, qwen: QwenConfig) -> None:
    sampling = cases.default_sampling(qwen)
    prompts = [cases.text_prompt(n, 12) for n in range(4)]
    whole = cases.by_key(engine.generate(cases.requests(prompts), sampling))
    narrow = cases.engine(tiny_dir, rollout_max_in_flight=6)
    stream = narrow.generate(cases.requests(prompts), sampling)
    first = next(stream)
    narrow.abort()
    found = cases.by_key([first, *stream])
    assert found.keys() == whole.keys()
    assert sum(rollout.finish_reason == "abort" for rollout in found.values()) == 6
    carried = [
        replace(
            request,
            prefixes={
                index: as_prefix(found[request.sample_id, index])
                for index in range(3)
                if found[request.sample_id, index].finish_reason == "abort"
            },
        )
        for request in cases.requests(prompts)
    ]
    assert {k: r.token_ids for k, r in cases.by_key(narrow.generate(carried, sampling)).items()} == {
        k: r.token_ids for k, r in whole.items()
    }


def test_pause_holds_and_new_weights_show_in_the_versions(tiny_dir: str, qwen: QwenConfig, engine: Any) -> None:
    sampling = cases.default_sampling(qwen, stop_token_ids=())
    held = cases.engine(tiny_dir, rollout_max_in_flight=3)
    stream = held.generate(cases.requests([cases.text_prompt(n, 8) for n in range(2)]), sampling)
    first = next(stream)
    held.pause()
    held.update_weights(2)
    timer = threading.Timer(0.3, held.resume)
    began = time.monotonic()
    timer.start()
    rest = list(stream)
    assert len(rest) == 5 and time.monotonic() - began >= 0.25
    assert first.weight_versions == ((1, 0, 12),)
    assert {r.weight_versions for r in rest if r.sample_id != first.sample_id} == {((2, 0, 12),)}
    impatient = cases.engine(tiny_dir, rollout_timeout_s=0.05)
    impatient.pause()
    with pytest.raises(EngineError, match="call resume"):
        next(impatient.generate(cases.requests([cases.text_prompt(0, 8)]), sampling))


def test_media_ids_are_never_sampled(engine: InProcessEngine, qwen: QwenConfig) -> None:
    prompts = [cases.text_prompt(n, 10) for n in range(8)]
    found = list(engine.generate(cases.requests(prompts, n=16), Sampling(max_tokens=24, temperature=5.0)))
    tokens = {token for rollout in found for token in rollout.token_ids}
    assert not tokens & {qwen.image_token_id, qwen.video_token_id}
    assert max(tokens) < qwen.vocab_size


def test_refusals_name_the_sample(engine: InProcessEngine, qwen: QwenConfig, tiny_dir: str) -> None:
    sampling = cases.default_sampling(qwen)
    prompt = cases.media_prompt(7, qwen, ("image", (1, 4, 4), None))
    undecoded = replace(prompt, media=(replace(prompt.media[0], patches=None),))
    with pytest.raises(EngineError, match="media-7.*not decoded"):
        engine.generate(cases.requests([undecoded]), sampling)
    with pytest.raises(EngineError, match="text-1.*max_prompt_tokens"):
        cases.engine(tiny_dir, max_prompt_tokens=4).generate(cases.requests([cases.text_prompt(1, 5)]), sampling)


def test_the_trainer_keeps_its_mode_and_gradients(engine: InProcessEngine, qwen: QwenConfig) -> None:
    chunk = engine._chunks[0]
    chunk.train()
    stream = engine.generate(cases.requests([cases.text_prompt(0, 8)]), cases.default_sampling(qwen))
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert chunk.training and all(module.training for module in chunk.modules())
    assert engine.stats().tokens_per_s > 0
