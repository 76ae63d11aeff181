"""Log-probs of given conversations, images and videos included, under any parallel layout.

    torchrun --nproc-per-node N -m dppo_mcore.score --model DIR --data FILE --out OUT.jsonl [options]

Writes a row per sample, in the manifest's order:
`{"id", "token_ids", "logprobs", "loss_mask", "media": [{"path", "indices", "size", "grid", "seconds_per_grid"}]}`.
logprobs[i] belongs to token_ids[i] (null for the first), at temperature 1. The model is computed in fp32 unless
--dtype says otherwise. --load takes the weights from a training checkpoint. Options are those of the trainer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo_mcore import config_checks
from dppo_mcore.config import Config
from dppo_mcore.config_loading import ConfigError, fail, load
from dppo_mcore.runtime import faults
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.runtime.files import replacing

if TYPE_CHECKING:
    from dppo_mcore.data.qwen import Processor
    from dppo_mcore.model.config import QwenConfig
    from dppo_mcore.types import PackedBatch, Prompt, Sample

SAMPLES_PER_ROUND = 32
"""Samples each data-parallel rank scores between two writes."""


def score(config: Config, out: Path) -> int:
    """Score every sample of `--data` and write the rows; returns their number. Collective over all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from dppo_mcore.data.manifest import read_manifest
    from dppo_mcore.data.qwen import Processor
    from dppo_mcore.runtime import device, parallel

    parallel.start(config.parallel, config.run.seed)
    faults.watch()
    manifest = read_manifest(config.data.data, config.data.media_root)
    if manifest.refused:
        raise UserError(str(manifest.refused[0]))
    scorer = Scorer.build(config)
    processor = Processor(config.run.model, config.data, device.device())
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    is_leader = dist.get_rank() == min(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
    step = SAMPLES_PER_ROUND * replicas

    def rounds() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(manifest), step):
            numbers = range(start + replica, min(start + step, len(manifest)), replicas)
            planned = [plan(processor, manifest[number]) for number in numbers]
            rows = dict(zip(numbers, scorer.rows(planned, processor.load), strict=True))
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows if is_leader else {})
            merged = {number: row for part in gathered for number, row in part.items()}
            yield [merged[number] for number in sorted(merged)]

    if dist.get_rank() != 0:
        return sum(len(rows) for rows in rounds())
    written = 0
    with replacing(out) as file:
        for rows in rounds():
            written += len(rows)
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{written} rows in {out}")
    return written


def plan(processor: Processor, sample: Sample) -> Prompt:
    """The sample's whole conversation, media not decoded; a question without an answer has nothing to learn."""
    if sample.answer is not None:
        return processor.plan_conversation(sample)
    prompt = processor.plan(sample)
    return replace(prompt, loss_mask=(False,) * len(prompt.token_ids))


class Scorer:
    """Model chunks and how they turn conversations into rows. All model-parallel ranks call together."""

    def __init__(self, config: Config, qwen: QwenConfig, chunks: Sequence[Any]) -> None:
        from dppo_mcore.rollout.stages import Stages

        self._config, self._qwen = config, qwen
        self._stages = Stages(chunks, qwen.hidden_size)
        for chunk in chunks:
            chunk.eval()

    @classmethod
    def build(cls, config: Config) -> Scorer:
        """With the weights of `--model`, or of the checkpoint `--load`."""
        from dppo_mcore.learn.checkpoint import load_start
        from dppo_mcore.model.config import load_qwen_config
        from dppo_mcore.model.model import build_model

        qwen = load_qwen_config(config.run.model)
        chunks = build_model(qwen, config)
        load_start(chunks, config.run, qwen)
        return cls(config, qwen, chunks)

    def rows(self, prompts: Sequence[Prompt], decode: Callable[[Prompt], Prompt]) -> list[dict[str, Any]]:
        """A row of the output per conversation, in order; decoded by as many as fill a packed row."""
        values: list[list[float]] = []
        for together in self._portions(prompts):
            values += self.logprobs([decode(prompt) for prompt in together])
        return [
            {
                "id": prompt.sample.id,
                "token_ids": list(prompt.token_ids),
                "logprobs": [None, *values],
                "loss_mask": list(prompt.loss_mask or ()),
                "media": [
                    {
                        "path": item.plan.path,
                        "indices": list(item.plan.indices),
                        "size": list(item.plan.size),
                        "grid": list(item.plan.grid),
                        "seconds_per_grid": item.plan.seconds_per_grid,
                    }
                    for item in prompt.media
                ],
            }
            for prompt, values in zip(prompts, values, strict=True)
        ]

    def _portions(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        portion: list[Prompt] = []
        tokens = 0
        for prompt in prompts:
            if portion and tokens + len(prompt.token_ids) > self._config.data.max_tokens_per_micro_batch:
                yield portion
                portion, tokens = [], 0
            portion.append(prompt)
            tokens += len(prompt.token_ids)
        if portion:
            yield portion

    def logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Per conversation, the log-probs of its second to last token."""
        from dppo_mcore.data.packing import pack_conversations

        # Ids need not be unique within a packed row's references, positions in the list are.
        numbered = [
            replace(
                prompt,
                sample=replace(prompt.sample, id=str(number)),
                loss_mask=(False, *(True for _ in prompt.token_ids[1:])),
            )
            for number, prompt in enumerate(prompts)
        ]
        batches = pack_conversations(
            numbered, self._qwen, self._config.data.max_tokens_per_micro_batch, self._stages.length_multiple
        )
        found: dict[int, list[float]] = {}
        for batch in batches:
            values = self._batch(batch)
            bounds = batch.cu_rows.tolist()
            for sequence, start, end in zip(batch.sequences, bounds, bounds[1:], strict=False):
                found[int(sequence.sample_id)] = values[start:end]
        return [found[number] for number in range(len(prompts))]

    def _batch(self, batch: PackedBatch) -> list[float]:
        """Log-probs of a packed row's targets, on every stage."""
        import torch
        from dppo_kernels import linear_logprob
        from megatron.core import parallel_state

        from dppo_mcore.model.attention import plan_attention

        plan = plan_attention(batch.segments_L, batch.branches_L, self._config.model.attention_backend)
        with torch.no_grad():
            hidden_RH = self._stages.forward(batch, plan)
            values_R = None
            if hidden_RH is not None:
                weight_VH = self._stages.chunks[-1].head_weight()
                group = parallel_state.get_tensor_model_parallel_group()
                values_R, _ = linear_logprob(
                    hidden_RH,
                    weight_VH,
                    batch.targets_R.to(hidden_RH.device),
                    group=group if group.size() > 1 else None,
                    vocab_start=group.rank() * weight_VH.shape[0],
                    vocab_size=self._qwen.vocab_size,
                )
        return self._stages.from_last(values_R, batch.targets_R.shape, torch.float32).tolist()


def take_option(arguments: Sequence[str], name: str) -> tuple[str, list[str]]:
    """The value of a flag that is no option of the trainer, and the other arguments."""
    value, rest = "", []
    iterator = iter(arguments)
    for argument in iterator:
        flag, _, given = argument.partition("=")
        if flag == name:
            value = given or next(iterator, "")
        else:
            rest.append(argument)
    return value, rest


def parse(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The configuration and the output file."""
    out, rest = take_option(arguments, "--out")
    config = load(["--dtype", "fp32", *rest], "python -m dppo_mcore.score", __doc__ or "")
    if not out:
        raise ConfigError("--out: a file for the rows is needed")
    if not config.data.data:
        raise ConfigError("data: a manifest is needed")
    return config, Path(out)


def main() -> None:
    """Command line."""
    try:
        config, out = parse(sys.argv[1:])
    except ConfigError as error:
        fail(error)
    config_checks.check_or_exit(config, training=False)

    def guarded() -> None:
        score(config, out)

    faults.run_guarded(guarded)


if __name__ == "__main__":
    main()
