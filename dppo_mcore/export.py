"""A training checkpoint as a Hugging Face folder that transformers and SGLang load.

    [torchrun ...] python -m dppo_mcore.export --load CKPT --out DIR [--model DIR] [options]

CKPT is a checkpoint, a folder of them (the latest is taken) or a run's folder. Configuration and tokenizer come from
--model, which a run's config.yaml already names; so does the type of the weights. Any parallel layout may export any
checkpoint: give the layout that makes the model fit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dppo_mcore import config_checks
from dppo_mcore.config import Config
from dppo_mcore.config_loading import ConfigError, fail, load, override
from dppo_mcore.runtime import faults
from dppo_mcore.score import take_option


def export(config: Config, out: Path) -> None:
    """Load the checkpoint under the configured layout and write the folder. Collective over all ranks."""
    import torch.distributed as dist

    from dppo_mcore.learn.checkpoint import find, load_weights
    from dppo_mcore.model.config import load_qwen_config
    from dppo_mcore.model.model import build_model
    from dppo_mcore.model.weights import export_hf
    from dppo_mcore.runtime import parallel

    checkpoint = find(Path(config.run.load))
    parallel.start(config.parallel, config.run.seed)
    faults.watch()
    qwen = load_qwen_config(config.run.model)
    chunks = build_model(qwen, config)
    load_weights(chunks, checkpoint)
    export_hf(chunks, qwen, config.run.model, out)
    if dist.get_rank() == 0:
        print(f"{checkpoint} written to {out}")


def parse(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The configuration, completed from the run the checkpoint belongs to, and the output folder."""
    out, rest = take_option(arguments, "--out")
    config = load(rest, "python -m dppo_mcore.export", __doc__ or "")
    if not config.run.load:
        raise ConfigError("load: a checkpoint is needed")
    if not out:
        raise ConfigError("--out: a folder for the result is needed")
    place = Path(config.run.load)
    if (place / "checkpoints").is_dir():
        place = place / "checkpoints"
        config = override(config, load=str(place))
    run_file = next(
        (p / "config.yaml" for p in list(place.absolute().parents)[:3] if (p / "config.yaml").is_file()), None
    )
    if not config.run.model:
        if run_file is None:
            raise ConfigError(f"model: {place} lies in no run's folder; name the starting checkpoint with --model")
        run = load(["--config", str(run_file)], "python -m dppo_mcore.export")
        config = override(config, model=run.run.model)
        if not any(flag.partition("=")[0] == "--dtype" for flag in rest):
            config = override(config, dtype=run.model.dtype)
    return config, Path(out)


def main() -> None:
    """Command line."""
    try:
        config, out = parse(sys.argv[1:])
    except ConfigError as error:
        fail(error)
    config_checks.check_or_exit(config, training=False)

    def guarded() -> None:
        export(config, out)

    faults.run_guarded(guarded)


if __name__ == "__main__":
    main()
