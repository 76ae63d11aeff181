"""GRPO loss and gradients against TRL's GRPOTrainer as installed, given equal advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from dppo_mcore.config import ParallelConfig
from dppo_mcore.learn.loss import PolicyLoss
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import train_step
from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.model.weights import iter_hf_weights
from dppo_mcore.runtime import parallel
from dppo_mcore.types import PackedBatch
from tests.learn.batches import Answer, Question, pack
from tests.learn.exact import config, step_to_gradient

LONGEST, SEQUENCES, GROUP, BATCHES = 12, 6, 2, 20
AGGREGATION = {"grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dr_grpo": "constant", "dapo": "token-mean"}
VARIANTS = list(product(AGGREGATION, ("token", "sequence"), (0.0, 0.04)))


@dataclass(frozen=True)
class Batch:
    """One random batch in both forms."""

    questions: list[Question]
    padded: dict[str, torch.Tensor]


def random_batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    questions, lengths = [], random.integers(1, LONGEST + 1, SEQUENCES)
    prompts, completions = np.zeros((2, SEQUENCES, LONGEST), np.int64), np.zeros((2, SEQUENCES, LONGEST), np.int64)
    old, reference = np.zeros((2, SEQUENCES, LONGEST), np.float32)
    advantages = random.standard_normal(SEQUENCES).astype(np.float32)
    for first in range(0, SEQUENCES, GROUP):
        prompt = random.integers(20, 590, random.integers(1, LONGEST + 1))
        answers = []
        for s in range(first, first + GROUP):
            n, ids = lengths[s], random.integers(20, 590, lengths[s])
            prompts[0, s, LONGEST - len(prompt) :], prompts[1, s, LONGEST - len(prompt) :] = prompt, 1
            completions[0, s, :n], completions[1, s, :n] = ids, 1
            old[s, :n], reference[s, :n] = (-7 + 0.4 * random.standard_normal((2, n))).astype(np.float32)
            columns = {
                "advantages": [float(advantages[s])] * n,
                "old_logprobs": old[s, :n].tolist(),
                "ref_logprobs": reference[s, :n].tolist(),
            }
            answers.append(Answer(ids.tolist(), columns))
        questions.append(Question(f"q{first}", prompt.tolist(), None, None, answers))
    padded = {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": np.array(lengths.sum()),
    }
    return Batch(questions, {name: torch.from_numpy(value) for name, value in padded.items()})


@pytest.fixture(scope="module")
def trainer(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    options = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=SEQUENCES,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.04,
        use_bias_correction_kl=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir, dtype=torch.float32),
        args=options,
        processing_class=AutoTokenizer.from_pretrained(tiny_dir),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def theirs(trainer: Any, batch: Batch, variant: tuple[str, str, float]) -> torch.Tensor:
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = variant
    return trainer._compute_loss(trainer.model, batch.padded)


def ours(variant: tuple[str, str, float]) -> PolicyLoss:
    loss_type, level, beta = variant
    return PolicyLoss(level=level, kl_coef=beta, aggregation=AGGREGATION[loss_type], constant=float(LONGEST))


def normalizer(loss: PolicyLoss, batch: PackedBatch) -> float:
    return loss.count(batch) + loss.extra_count()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_loss_and_logprob_gradients(
    variant: tuple[str, str, float], trainer: Any, tiny_dir: str, monkeypatch: Any
) -> None:
    """From the log-probs on: what TRL's trainer makes of given ones, and what ours does."""
    from dppo_kernels import policy_loss

    loss, qwen = ours(variant), load_qwen_config(tiny_dir)
    for seed in range(BATCHES):
        batch = random_batch(seed)
        mask = batch.padded["completion_mask"].bool()
        start = batch.padded["old_per_token_logps"] + 0.3 * torch.randn(
            mask.shape, generator=torch.Generator().manual_seed(seed)
        )
        leaf = start.clone().requires_grad_()
        answer = (leaf, torch.zeros_like(leaf), None)
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, answer=answer, **__: answer)
        expected = theirs(trainer, batch, variant)
        expected.backward()
        packed = pack(batch.questions, qwen)
        rows = start[mask].clone().requires_grad_()
        columns = packed.columns
        value, _ = policy_loss(
            rows,
            columns["old_logprobs"],
            columns["advantages"],
            torch.ones_like(packed.targets_R, dtype=torch.bool),
            ref_logprobs=columns["ref_logprobs"] if loss.kl_coef else None,
            kl_coef=loss.kl_coef,
            level=loss.level,
            aggregation=loss.aggregation,
            cu_seqlens=packed.cu_rows,
            normalizer=normalizer(loss, packed),
        )
        value.backward()
        assert float(value) == pytest.approx(float(expected), abs=1e-5)
        assert float((rows.grad - leaf.grad[mask]).abs().max()) <= 1e-5
        assert float(leaf.grad[~mask].abs().sum()) == 0.0


@pytest.fixture(scope="module")
def learner(tiny_dir: str) -> Iterator[Learner]:
    parallel.start(ParallelConfig(), seed=0)
    state = build(config(tiny_dir, ParallelConfig()))
    step_to_gradient(state)
    yield state
    parallel.stop()


def test_weight_gradients(learner: Learner, trainer: Any) -> None:
    """Whole steps on the same checkpoint: every weight's gradient, a variant a batch."""
    saved = [p.detach().clone() for p in learner.models[0].parameters()]
    for seed in range(BATCHES):
        variant, batch = VARIANTS[seed % len(VARIANTS)], random_batch(seed)
        trainer.model.zero_grad()
        expected = theirs(trainer, batch, variant)
        expected.backward()
        half = len(batch.questions) // 2
        micro_batches = [pack(part, learner.qwen) for part in (batch.questions[:half], batch.questions[half:])]
        result = train_step(learner, micro_batches, ours(variant))
        gradients = {name: tensor.clone() for name, tensor in iter_hf_weights(learner.models, learner.qwen)}
        with torch.no_grad():
            for parameter, value in zip(learner.models[0].parameters(), saved, strict=True):
                parameter.copy_(value)
        assert result.loss == pytest.approx(float(expected), abs=1e-5), variant
        compared = 0
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None and (key := checkpoint_name(name)) in gradients:
                error = float((gradients[key] - parameter.grad).abs().max())
                assert error <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), (variant, name, error)
                compared += 1
        assert compared >= 8 * 12 + 3


def checkpoint_name(name: str) -> str:
    """A module's parameter name as the checkpoint has it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
