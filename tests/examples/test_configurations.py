"""Every example configuration parses, fits its launch script's ranks, and has a layout that covers all keys."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import plan
import pytest
import yaml

from dppo_mcore.config_loading import load

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = {"qwen7b-1node": "7b", "qwen72b-8nodes": "72b", "qwen72b-32nodes": "72b"}


@pytest.mark.parametrize(("name", "size"), CONFIGURATIONS.items())
def test_layout_takes_every_key_and_fits_the_nodes(name: str, size: str) -> None:
    config = load(["--config", str(ROOT / "examples" / f"{name}.yaml")], "train")
    layout = config.parallel
    found = plan.dry_run(plan.qwen_of(size), layout)
    model_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    assert found["ranks"] == model_ranks
    script = (ROOT / "examples" / "slurm" / f"{name}.sbatch").read_text()
    nodes = re.search(r"--nodes=(\d+)", script)
    assert nodes and int(nodes.group(1)) * 8 % model_ranks == 0
    replicas = int(nodes.group(1)) * 8 // model_ranks
    assert config.rl.prompts_per_step % replicas == 0 and config.sft.global_batch_size % replicas == 0
    tokens = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert tokens <= config.data.max_tokens_per_micro_batch


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.stem)
def test_default_ids_of_its_manifests_differ(file: Path) -> None:
    """They begin with a manifest's stem, and a run's ids are unique over all its manifests."""
    data = load(["--config", str(file)], "train").data
    named = [data.data, data.general_data, data.base_data, data.eval_data, data.eval_general_data]
    stems = [Path(path).stem for path in named if path]
    assert len(stems) >= 4 and len(set(stems)) == len(stems)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_launch_scripts_are_valid_bash(name: str) -> None:
    script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert f"examples/{name}.yaml" in script.read_text()


def test_the_demo_s_configuration_parses() -> None:
    file = ROOT / "examples" / "tiny.yaml"
    assert load(["--config", str(file)], "train").run.loops == yaml.safe_load(file.read_text())["run"]["loops"]
