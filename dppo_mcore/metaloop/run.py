"""A run: everything that lives from start to end, opened from a configuration and closed in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dppo_mcore.config import Config
from dppo_mcore.config_loading import to_yaml
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.frames import too_long
from dppo_mcore.data.manifest import Manifest
from dppo_mcore.data.quarantine import Quarantine
from dppo_mcore.data.qwen import Processor
from dppo_mcore.learn import state as learn_state
from dppo_mcore.learn.checkpoint import Saver, load_start
from dppo_mcore.learn.offload import Offloader
from dppo_mcore.learn.state import Learner
from dppo_mcore.metaloop.exchange import Exchange
from dppo_mcore.metaloop.pools import GENERAL, POOLS, check_ids, check_objectives, open_pools, remarks, samples_of
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.model import QwenVL, build_model
from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.practice.prompts import PromptTemplate, load_template
from dppo_mcore.rewards.pool import RewardPool
from dppo_mcore.rewards.scoring import Rubric
from dppo_mcore.rollout.base import Engine, Sampling, make_engine, sampling_from
from dppo_mcore.runtime import device, faults, parallel
from dppo_mcore.runtime.files import replacing
from dppo_mcore.runtime.log import Metrics, get_logger
from dppo_mcore.types import Prompt, Sample


@dataclass(frozen=True)
class BareModel:
    """Model chunks without optimizer and gradients, for evaluation."""

    qwen: QwenConfig
    models: list[QwenVL]

    @classmethod
    def build(cls, config: Config) -> BareModel:
        """With the weights of `--model`, or of the checkpoint `--load`."""
        qwen = load_qwen_config(config.run.model)
        models = build_model(qwen, config)
        load_start(models, config.run, qwen)
        return cls(qwen, models)


@dataclass
class Run:
    """One rank's view of the run."""

    config: Config
    folder: Path | None
    exchange: Exchange
    model: Learner | BareModel
    engine: Engine
    sampling: Sampling
    source: PromptSource
    template: PromptTemplate
    pools: Mapping[str, Manifest]
    saver: Saver
    metrics: Metrics
    log: logging.Logger
    rewards: RewardPool | None
    """On replica leaders."""
    _ledger: Ledger | None = field(repr=False, default=None)
    offloader: Offloader | None = field(repr=False, default=None)
    """Kept for its pinned buffers."""
    probe: tuple[Prompt, tuple[int, ...]] | None = field(repr=False, default=None)
    """A prompt and its newest answer, for the log-prob check after a weight sync."""
    step: int = 0
    """Optimizer steps and evaluations are counted over the whole run on this axis."""

    @property
    def learner(self) -> Learner:
        """The training side; an evaluation has none."""
        assert isinstance(self.model, Learner)
        return self.model

    @property
    def processor(self) -> Processor:
        """Chat template, tokenizer and frame plans."""
        return self.source.processor

    @property
    def ledger(self) -> Ledger:
        """The ledger; only rank 0 has it."""
        assert self._ledger is not None, "only rank 0 may use the ledger"
        return self._ledger

    def sample(self, pool: str, sample_id: str) -> Sample:
        """A sample with the instruction of its objective and the system prompt, general ones where it fits them."""
        apply = self.template.apply_to_general if pool in GENERAL else self.template.apply
        return apply(self.pools[pool].get(sample_id))

    def say(self, line: str) -> None:
        """One line on rank 0's screen and in every log file."""
        self.log.info(line)


def open_run(config: Config) -> Run:
    """Start groups, logs, model, engine and ledger of a training run. Collective over all ranks."""
    parallel.start(config.parallel, config.run.seed)
    faults.watch()
    exchange = Exchange.join()
    folder = Path(config.run.run)
    ledger = None
    if exchange.rank == 0:
        with replacing(folder / "config.yaml") as file:
            file.write(to_yaml(config))
        ledger = Ledger(folder / "ledger.sqlite")
    exchange.barrier()
    pools = open_pools(
        {pool: getattr(config.data, option) for pool, option in POOLS.items()}, config.data.media_root, exchange
    )
    if ledger is not None:
        check_objectives(pools, config.practice.objectives)
        check_ids(pools)
        for name, manifest in pools.items():
            ledger.add_samples(manifest, name)
    run = assemble(config, exchange, pools, learn_state.build(config), folder)
    run._ledger = ledger
    return run


def open_evaluation(config: Config, data: str) -> Run:
    """The same around a bare model and one held-out manifest, without a run folder or ledger."""
    parallel.start(config.parallel, config.run.seed)
    faults.watch()
    exchange = Exchange.join()
    pools = open_pools({"eval": data}, config.data.media_root, exchange)
    if exchange.rank == 0:
        check_objectives(pools, config.practice.objectives)
    return assemble(config, exchange, pools, BareModel.build(config), None)


def assemble(
    config: Config, exchange: Exchange, pools: dict[str, Manifest], model: Learner | BareModel, folder: Path | None
) -> Run:
    """Engine, clips and rewards around a model."""
    template = load_template(config.practice.prompt_template)
    quarantine = Quarantine(folder / f"quarantine-{exchange.rank}.jsonl" if folder else None)
    quarantine.keep_for(lambda name: samples_of(pools, name))
    source = PromptSource(config.run.model, config.data, device.device(), quarantine)
    engine = make_engine(_engine_config(config), model.qwen, model.models, source.processor.chat)
    engine.start()
    log = get_logger()
    if exchange.rank == 0:
        long = too_long(
            config.data, config.practice.horizons, source.processor.geometry, config.rollout.max_prompt_tokens
        )
        for line in filter(None, (*remarks(pools, config.output.eval_samples), long)):
            log.warning(line)
    output = config.output
    return Run(
        config=config,
        folder=folder,
        exchange=exchange,
        model=model,
        engine=engine,
        sampling=sampling_from(config, model.qwen),
        source=source,
        template=template,
        pools=pools,
        saver=Saver(_save_folder(config), output.keep_checkpoints, output.async_save),
        metrics=Metrics(folder if exchange.rank == 0 else None, output.tensorboard, output.wandb),
        log=log,
        rewards=_open_rewards(config, template) if exchange.is_leader else None,
    )


def _engine_config(config: Config) -> Config:
    """A replay asks no engine anything: the embedded one, which is no process, stands where one is expected."""
    if not config.output.replay_rollouts:
        return config
    return replace(config, rollout=replace(config.rollout, rollout_engine="inprocess"))


def close_run(run: Run) -> None:
    """End engine, workers and files."""
    run.saver.finish()
    run.engine.stop()
    run.source.close()
    if run.rewards is not None:
        run.rewards.close()
    run.metrics.close()
    if run._ledger is not None:
        run._ledger.close()
    parallel.stop()


def _save_folder(config: Config) -> Path:
    return Path(config.run.save) if config.run.save else Path(config.run.run) / "checkpoints"


def _open_rewards(config: Config, template: PromptTemplate) -> RewardPool:
    rubric = Rubric(
        format_weight=config.rl.format_weight,
        task_weight=config.rl.task_weight,
        success_threshold=config.practice.success_threshold,
        structure=template.structure,
    )
    practice = config.practice
    return RewardPool(
        practice.reward_workers, timeout_s=practice.reward_timeout_s, rubric=rubric, objectives=practice.objectives
    )
