"""Every option, typed and documented once. Flags and YAML keys are made from these fields (`config_loading`).

Field names are unique over all sections, so a flag needs no prefix: `--tensor-model-parallel-size 2`.
Where the paper is silent, the default is ours and the field says so with [ours].
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """What to run, on which model and pool."""

    run: str = "runs/default"
    """Run folder; it owns configuration, ledger, checkpoints, logs and report. Also `--run-folder`: torchrun on
    Python 3.11 takes `--run` for its own `--run-path`."""
    model: str = ""
    """Hugging Face directory of the starting checkpoint."""
    load: str = ""
    """Checkpoint folder to start from instead of `model`'s weights (the run's own checkpoints win on resume)."""
    save: str = ""
    """Checkpoint folder; empty is RUN/checkpoints."""
    seed: int = 1234
    """Seed of everything random."""
    mode: Literal["dppo", "rl-only", "sft-only", "single-loop"] = "dppo"
    """The whole metaloop, or an ablation of it."""
    loops: int = 3
    """Loops of RL then SFT."""
    last_sft: bool = False
    """End the last loop with an SFT phase too (the paper's ends on RL)."""
    note: str = ""
    """What a reader of the run's log and report should know about it."""

    def seed_of(self, label: str) -> int:
        """A seed in [0, 2**31) for one named use, the same in every process."""
        return zlib.crc32(f"{self.seed}/{label}".encode()) & 0x7FFFFFFF


@dataclass(frozen=True)
class ParallelConfig:
    """Layout over ranks, under Megatron's names."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage (interleaved schedule)."""
    context_parallel_size: int = 1
    """Context parallelism; only 1 for now."""
    sequence_parallel: bool = False
    """Shard activations outside the attention over tensor-parallel ranks."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers on the first stage, to balance the vision tower."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers on the last stage, to balance the head."""
    distributed_timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the run."""


@dataclass(frozen=True)
class ModelConfig:
    """How the model is computed and which parts learn."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Parameters and activations; optimizer state is fp32 either way."""
    attention_backend: Literal["auto", "flex", "flash", "sdpa"] = "auto"
    """Packed attention of the language model."""
    freeze_vision: bool = True
    """Keep the vision tower as it is."""
    freeze_merger: bool = False
    """Keep the merger as it is."""
    freeze_language: bool = False
    """Keep the language model as it is."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recompute in the language model."""
    recompute_num_layers: int = 1
    """Layers per recomputed unit with `full`."""


@dataclass(frozen=True)
class DataConfig:
    """The pool, its media and how batches are packed."""

    data: str = ""
    """Manifest (JSONL or JSON) of the RL pool."""
    general_data: str = ""
    """Manifest of general data, replayed in SFT against forgetting."""
    base_data: str = ""
    """Manifest for the optional first SFT (`base_sft_steps`) that makes a base from scratch."""
    eval_data: str = ""
    """Held-out manifest evaluated after every phase."""
    eval_general_data: str = ""
    """Held-out general manifest, to report forgetting."""
    media_root: str = ""
    """Root of relative media paths; empty is each manifest's folder. Media outside it are refused."""
    fps: float = 2.0
    """Frames per second taken from a clip."""
    max_frames: int = 128
    """Frame budget of a clip; a longer clip is sampled more thinly."""
    min_pixels: int = 3136
    """Fewest pixels of a frame, and of an image too, after resize."""
    max_pixels: int = 602112
    """Most pixels of a frame, and of an image too, after resize."""
    max_clip_pixels: int = 90316800
    """Most pixels of a clip, all its frames together."""
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    """Decode backend tried first; a clip it refuses goes to the next, once."""
    data_workers: int = 2
    """Worker processes that decode ahead; 0 decodes in place."""
    decode_ahead: int = 8
    """Prompts decoded ahead of the training loop (bounds memory)."""
    media_cache_mib: int = 512
    """Decoded patches kept in memory per rank, as bytes of pixels; 0 keeps none."""
    horizon_keep: Literal["end", "start", "middle"] = "end"
    """Which part of a clip longer than the horizon is used. [ours]"""
    max_tokens_per_micro_batch: int = 16384
    """Token budget of a packed row; a shared-prompt group is never split beyond its responses."""
    max_conversation_tokens: int | None = None
    """Longest conversation that SFT learns; a longer one is cut at its end, and a medium the cut meets is left out."""
    micro_batch_size: int | None = None
    """Groups (RL) or conversations (SFT) per micro-batch; None packs to the token budget."""
    share_prompts: bool = True
    """Compute the prompt of a GRPO group once for all its answers."""


@dataclass(frozen=True)
class RolloutConfig:
    """Engine and sampling."""

    rollout_engine: Literal["inprocess", "sglang", "vllm"] = "inprocess"
    """Who generates."""
    rollout_placement: Literal["colocated", "disjoint"] = "colocated"
    """Engine on the trainer's GPUs, or on GPUs of its own."""
    rollout_tensor_parallel_size: int = 1
    """Tensor parallelism of one engine replica."""
    rollout_url: str = ""
    """Use this running engine instead of starting one."""
    rollout_python: str = ""
    """Python of the environment SGLang lives in; empty is this one."""
    engine_vision: Literal["embeddings", "own"] = "embeddings"
    """The engine gets the trainer's media embeddings, or encodes media itself (checked before the first rollout)."""
    weight_transport: Literal["ipc", "distributed", "disk"] = "ipc"
    """How weights reach the engine."""
    sync_bucket_mib: int = 512
    """Size of a weight bucket."""
    rollout_partial: bool = False
    """Carry unfinished answers on under new weights instead of waiting for the longest."""
    rollout_step_tokens: int = 0
    """With rollout_partial: new tokens an answer gets in one step; 0 is a quarter of max_response_tokens."""
    rollout_max_in_flight: int = 256
    """Most requests in flight per engine."""
    rollout_timeout_s: float = 600.0
    """A request without an answer after this is sent again."""
    rollout_retries: int = 3
    """Restarts of a failed engine before the run ends."""
    engine_memory_fraction: float = 0.75
    """Share of GPU memory the engine may take."""
    engine_options: tuple[str, ...] = ()
    """Further options of SGLang itself, NAME=VALUE each; a server given by URL has its own."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are those of the tempered distribution."""
    top_p: float = 1.0
    """Nucleus; below 1 the log-probs of `inprocess` and `vllm` are renormalised over what is kept, `sglang`'s not."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    max_prompt_tokens: int = 12288
    """A longer prompt is refused, never cut."""
    max_response_tokens: int = 1024
    """Response budget."""


@dataclass(frozen=True)
class RlConfig:
    """GRPO and its published variants."""

    group_size: int = 8
    """Answers per prompt."""
    prompts_per_step: int = 32
    """Prompts per RL step, over all data-parallel ranks."""
    rl_lr: float = 1e-6
    """Learning rate of RL phases."""
    updates_per_batch: int = 1
    """Optimizer steps per rollout batch."""
    clip_low: float = 0.2
    """Lower clip of the ratio."""
    clip_high: float = 0.28
    """Upper clip of the ratio (clip-higher)."""
    dual_clip: float | None = None
    """Bound on the ratio's loss for negative advantages."""
    kl_coef: float = 0.01
    """KL to the reference, reset at the start of each loop; 0 needs no reference. [ours]"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator."""
    tis_cap: float | None = None
    """Cap of the truncated importance weight for rollout/trainer mismatch; None is off."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs the ratio starts from. Neither `engine` nor tis_cap goes with top_p or top_k, but on `sglang`."""
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio per token (GRPO) or per sequence (GSPO)."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How token losses become one loss; `constant` is Dr.GRPO's."""
    advantage_scale: Literal["std", "none", "batch"] = "std"
    """What a group's centred rewards are divided by."""
    drop_zero_variance: bool = True
    """Leave groups out whose rewards are all equal."""
    overlong_penalty_tokens: int = 0
    """Soft penalty over the last so many tokens of the budget (0 is off)."""
    format_weight: float = 0.1
    """Weight of the format reward. [ours]"""
    task_weight: float = 0.9
    """Weight of the task reward. [ours]"""


@dataclass(frozen=True)
class SftConfig:
    """Weakness refinement."""

    sft_lr: float = 1e-6
    """Learning rate of SFT phases (a tenth of plain SFT's). [ours]"""
    sft_epochs: int = 1
    """Passes over the corpus."""
    sft_max_steps: int | None = None
    """Bound on an SFT phase's steps."""
    global_batch_size: int = 64
    """Conversations per SFT step, over all data-parallel ranks."""
    base_sft_steps: int = 0
    """SFT steps on `base_data` before the first loop, to make a base from scratch."""
    base_sft_lr: float = 1e-5
    """Learning rate of that first SFT."""
    base_sft_window: int = 0
    """Rows of `base_data` in a row that are shuffled among each other: 0 is all, 1 keeps their order."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of both phases."""

    optimizer: Literal["adam", "muon"] = "adam"
    """AdamW, or Muon for matrices with AdamW for the rest."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """AdamW's first moment."""
    adam_beta2: float = 0.98
    """AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    clip_grad: float = 1.0
    """Gradient norm is clipped to this; 0 is off."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay within a phase, counted in optimizer steps."""
    lr_warmup_steps: int = 0
    """Linear warm-up at the start of each phase."""
    lr_min_ratio: float = 0.1
    """Where the decay ends, as a share of the peak."""
    max_bad_steps: int = 5
    """Non-finite gradients in a row before the run ends, naming the batch."""
    overlap_grad_reduce: bool = True
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    offload: bool = False
    """Move gradients and optimizer state to pinned memory while the engine generates; it sleeps otherwise."""


@dataclass(frozen=True)
class PracticeConfig:
    """The method: difficulty, stagnation, weakness, curriculum."""

    horizons: tuple[float, ...] = (32.0, 64.0, 64.0)
    """Longest clip in seconds per loop; the last value holds for later loops."""
    sampling: Literal["difficulty", "random"] = "difficulty"
    """Which samples RL sees."""
    buffer_samples: int = 0
    """Samples rolled out to fill a loop's buffer; 0 is the whole pool."""
    buffer_rollouts: int = 4
    """Rollouts per sample for its success rate. [ours]"""
    success_threshold: float = 0.5
    """Task reward from which an answer counts as success. [ours]"""
    intractable_share: float = 0.25
    """Most of the buffer that samples with success rate 0 may take, per task. [ours]"""
    anchor_share: float = 0.0
    """Share of mastered samples kept in the buffer. [ours]"""
    stagnation_threshold: float = 0.7
    """Score from which an RL phase ends."""
    stagnation_window: int = 10
    """RL steps the score looks back. [ours]"""
    stagnation_min_prompts: int = 400
    """Prompts per task the window must hold; it is lengthened until it does. [ours]"""
    stagnation_aggregate: Literal["mean", "all", "freeze"] = "mean"
    """Phase ends on the mean score, when every task stagnates at once, or when each did (drawn no more from then on).
    [ours]"""
    rl_min_steps: int = 20
    """An RL phase is not ended earlier by its score."""
    rl_max_steps: int = 500
    """An RL phase ends here whatever its score."""
    teacher_url: str = ""
    """OpenAI-compatible endpoint of the teacher (its key in DPPO_TEACHER_API_KEY)."""
    teacher_model: str = ""
    """Model name sent to the teacher's endpoint."""
    teacher_file: str = ""
    """Answers from a JSONL file {"id", "answer"} instead of an endpoint."""
    teacher_answers: int = 4
    """Answers asked per weak sample. [ours]"""
    teacher_concurrency: int = 16
    """Requests in flight at the teacher."""
    teacher_budget: int = 0
    """Most teacher requests per run; 0 is no bound."""
    teacher_requests_per_minute: float = 0.0
    """Most requests a minute to the teacher; 0 is no bound (Retry-After is kept to either way)."""
    teacher_timeout_s: float = 300.0
    """Longest wait for one answer of the teacher."""
    teacher_patience_s: float = 3600.0
    """Time without any answer after which the phase goes on with what there is. [ours]"""
    teacher_max_tokens: int = 2048
    """Longest answer asked of the teacher."""
    teacher_temperature: float = 0.7
    """The teacher's sampling temperature."""
    teacher_vote: float = 0.0
    """Share of a sample's answers that must agree with an answer for it to be kept; 0 is no vote. [ours]"""
    teacher_media: Literal["frames", "video"] = "frames"
    """Send frames as images, or the clip."""
    teacher_show_gold: bool = False
    """Second pass for unsolved samples with the gold answer shown, asking for the reasoning."""
    retrieval_neighbours: int = 4
    """Related samples retrieved per weak sample. [ours]"""
    retrieval_model: str = ""
    """Local text-embedding model; empty is TF-IDF."""
    mix_weak: float = 0.5
    """Share of weak samples in the SFT mix, by tokens. [ours]"""
    mix_retrieved: float = 0.3
    """Share of retrieved samples. [ours]"""
    mix_own: float = 0.0
    """Share of the model's own verified answers to what RL practised, against losing what it revealed. [ours]"""
    mix_general: float = 0.2
    """Share of general data. [ours]"""
    prompt_template: str = ""
    """YAML file with system prompt and per-objective instructions; empty is the built-in one."""
    objectives: str = ""
    """Python file with further @objective scorers."""
    reward_workers: int = 2
    """Reward worker processes; 0 scores in place."""
    reward_timeout_s: float = 10.0
    """Time limit of one score; beyond it the reward is 0."""


@dataclass(frozen=True)
class OutputConfig:
    """Logs, checkpoints, evaluation."""

    log_interval: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str = ""
    """Weights & Biases project; empty is off."""
    save_interval: int = 50
    """Steps between checkpoints; phases always end with one."""
    keep_checkpoints: int = 2
    """Last checkpoints kept, besides the best."""
    async_save: bool = True
    """Write checkpoints in the background where Megatron can."""
    eval_interval: int = 0
    """RL steps between evaluations inside a phase; 0 evaluates after phases only."""
    eval_samples: int = 0
    """Held-out samples per evaluation, the first so many rows of each manifest, so shuffle it; 0 is all."""
    best_metric: str = "eval/success"
    """Metric that names the best checkpoint."""
    dump_rollouts: str = ""
    """Write every rollout batch to this folder."""
    replay_rollouts: str = ""
    """Train on the batches dumped there, without an engine."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    practice: PracticeConfig = field(default_factory=PracticeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
