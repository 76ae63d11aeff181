"""The tabletop: answers right by the product's rewards, splits disjoint, files real, the tokenizer whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import av
import numpy as np
import pytest

from dppo_mcore.config_loading import load
from dppo_mcore.data.manifest import read_manifest
from dppo_mcore.rewards.scoring import Rubric, score
from examples.tabletop import experiment
from examples.tabletop.experiment import ARMS, PRESETS, Preset, arm_options, base_options, command
from examples.tabletop.make_base import make_base
from examples.tabletop.make_world import WITHHELD, WorldOptions, make_world
from examples.tabletop.questions import GENERAL_KINDS, KINDS, VOCABULARY, ask
from examples.tabletop.render import PIXELS, render
from examples.tabletop.scene import BOX, CUT, LEVELS, SPLIT_SHARES, make_scene, scenes, split_of

OPTIONS = WorldOptions(clips_base=40, clips_pool=45, clips_eval=20, general=60, general_eval=20, camera_share=0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tabletop")
    make_world(out, OPTIONS, workers=1)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def rows(world: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def test_the_teacher_is_right_about_everything(world: Path) -> None:
    answers = {row["id"]: row["answer"] for row in rows(world, "teacher")}
    pool = read_manifest(world / "pool.jsonl", "")
    assert len(answers) == len(pool) == 135
    for sample in pool:
        result = score(sample, answers[sample.id], Rubric())
        assert result.reward == 1 and result.success, (sample.id, answers[sample.id], result)


def test_another_question_s_answer_is_rarely_right(world: Path) -> None:
    pool = list(read_manifest(world / "pool.jsonl", ""))
    answers = {row["id"]: row["answer"] for row in rows(world, "teacher")}
    plans = [sample for sample in pool if sample.objective == "planning"]
    wrong = [score(a, answers[b.id], Rubric()).success for a in plans for b in plans if a.gold != b.gold]
    assert wrong and np.mean(wrong) < 0.2
    assert not any(score(s, "<think>red</think><answer>unsure</answer>", Rubric()).success for s in pool)


def test_nine_dimensions_six_objectives_and_all_levels(world: Path) -> None:
    pool = rows(world, "pool")
    assert {row["dimension"] for row in pool} == {kind.dimension for kind in KINDS.values()} and len(KINDS) == 9
    assert len({row["objective"] for row in pool}) == 6
    assert {row["extras"]["level"] for row in rows(world, "base")} >= {"trivial", "normal", "hard"}


def test_no_configuration_is_in_two_splits() -> None:
    by_split = {
        split: {scene.signature() for scene in scenes(split, 60, seed, (32.0,), dict.fromkeys(LEVELS, 1.0))}
        for seed, split in enumerate(SPLIT_SHARES)
    }
    assert all(len(found) == 60 for found in by_split.values())
    assert not by_split["base"] & by_split["pool"] and not by_split["base"] & by_split["eval"]
    assert not by_split["pool"] & by_split["eval"]
    scene = make_scene(np.random.default_rng(1), 32.0)
    assert split_of(scene) == split_of(scene)


def test_general_questions_held_out_are_not_replayed(world: Path) -> None:
    texts = [{row["messages"][0]["content"] for row in rows(world, name)} for name in ("general", "eval_general")]
    assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_the_base_is_inconsistent_and_never_plans(world: Path) -> None:
    answers = [turn["content"] for row in rows(world, "base") for turn in row["messages"] if turn["role"] == "assistant"
               and not row["id"].startswith("base-general")]  # fmt: skip
    rejected = np.mean(["unsure" in answer for answer in answers])
    bare = np.mean(["<" not in answer for answer in answers])
    assert 0.35 < rejected < 0.65 and 0.05 < bare < 0.3
    asked = [turn["content"] for row in rows(world, "base") for turn in row["messages"] if turn["role"] == "user"]
    assert not any(text.endswith("list all moves in order ?") for text in asked) and WITHHELD == "plan"


def clip(path: Path) -> tuple[str, int, int]:
    """Codec, frames and frames a second of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (PIXELS, PIXELS)
        codec = "vp9" if "vp9" in stream.codec_context.name else stream.codec_context.name
        return codec, sum(1 for _ in container.decode(stream)), int(stream.average_rate or 0)


def test_a_base_may_be_consistent_first(tmp_path: Path) -> None:
    """What comes first is right and in the wanted style, clips come again with other questions, planning never."""
    options = dataclasses.replace(OPTIONS, base_conversations=100, base_consistent=0.6)
    make_world(tmp_path, options, workers=1)
    found = rows(tmp_path, "base")
    about_clips = [row for row in found if row["media"]]
    assert len(found) == 125 and len(about_clips) == 100
    assert len({row["media"][0]["path"] for row in about_clips}) == 40
    assert len({row["messages"][0]["content"] + row["media"][0]["path"] for row in about_clips}) > 85
    said = ["".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant") for row in about_clips]
    assert sum(row["media"] == [] for row in found[:75]) == 15
    assert all(text.count("<answer>") == 4 and "unsure" not in text for text in said[:60])
    assert np.mean(["unsure" in text or text.count("<answer>") < 4 for text in said[60:]]) > 0.8
    assert not any("list all moves" in turn["content"] for row in found for turn in row["messages"])


def test_files_are_real_clips_of_both_codecs_lengths_and_rates(world: Path) -> None:
    found = [clip(path) for split in ("pool", "eval") for path in sorted((world / "clips" / split).iterdir())]
    assert {codec for codec, _, _ in found} == {"h264", "vp9"}
    assert {(frames / rate, rate) for _, frames, rate in found} == {(32, 2), (64, 2), (32, 25), (64, 25)}
    assert 0.05 < np.mean([rate == 25 for _, _, rate in found]) < 0.4
    assert {clip(path)[2] for path in (world / "clips" / "base").iterdir()} == {2}


def test_clips_made_with_other_options_are_made_again(tmp_path: Path) -> None:
    """Also those of a call that was stopped before it wrote its manifests."""
    few = WorldOptions(clips_base=2, clips_pool=2, clips_eval=2, general=8, general_eval=4)
    make_world(tmp_path, few, workers=1)
    (tmp_path / "world.json").unlink()
    kept = (tmp_path / "clips" / "pool" / "00001.mp4").stat().st_mtime_ns
    make_world(tmp_path, few, workers=1)
    assert (tmp_path / "clips" / "pool" / "00001.mp4").stat().st_mtime_ns == kept
    (tmp_path / "world.json").unlink()
    make_world(tmp_path, dataclasses.replace(few, fps=3), workers=1)
    assert {clip(path)[2] for path in (tmp_path / "clips" / "pool").iterdir()} == {3}


def test_the_picture_shows_what_the_answers_say() -> None:
    rng = np.random.default_rng(5)
    scene = make_scene(rng, 32.0, "trivial")
    last = render(scene, 2)[-1]
    for colour, (x, y) in zip(scene.colours, scene.blocks_at(32.0), strict=True):
        centre = last[int(y * 14) + 3, int(x * 14) + 3].astype(int)
        wanted = {"red": 0, "green": 1, "blue": 2}.get(colour)
        assert wanted is None or centre.argmax() == wanted
    move = scene.moves[-1]
    assert move.word != BOX and scene.carried(move, 32.0) == pytest.approx(CUT)
    assert ask(scene, "next", rng).gold == move.word


def test_every_word_is_in_the_tokenizer_and_answers_survive_it(world: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    pool = read_manifest(world / "pool.jsonl", "")
    for row in rows(world, "teacher"):
        ids = tokenizer.encode(row["answer"], add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and len(ids) <= 15
        assert score(pool.get(row["id"]), tokenizer.decode(ids), Rubric()).reward == 1
    for row in rows(world, "base"):
        for turn in row["messages"]:
            words = tokenizer.encode(turn["content"].removeprefix("<video>"), add_special_tokens=False)
            assert tokenizer.unk_token_id not in words, turn["content"]
    assert set(tokenizer.encode(" ".join(VOCABULARY), add_special_tokens=False)).isdisjoint({tokenizer.unk_token_id})


def test_the_base_loads_as_a_small_qwen(base: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert len(GENERAL_KINDS) == 2


def test_the_large_base_loads_too(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(make_base(tmp_path, size="large"))
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 40e6


@pytest.mark.parametrize("preset", list(PRESETS.values()), ids=[f"preset-{name}" for name in PRESETS])
def test_arms_of_a_preset_have_equal_lengths(preset: Preset, tmp_path: Path) -> None:
    """Every arm's options are real ones; arms with RL and SFT have as many steps of each, those with RL about as many
    rollouts a loop: what is mined is taken for half a buffer, and the smallest corpus for two fifths of one.
    """
    lengths, rollouts = {}, {}
    for arm in ARMS:
        flags = command(tmp_path / arm, 1, arm_options(preset, arm, tmp_path))
        config = load(flags[flags.index("--config") :], "train")
        assert config.practice.stagnation_threshold == 1.0
        lengths[arm] = (config.practice.rl_min_steps, config.practice.rl_max_steps, config.sft.sft_max_steps)
        buffer = config.practice.buffer_samples * config.practice.buffer_rollouts
        measured = (config.practice.sampling == "difficulty") + 0.5 * (config.run.mode == "dppo")
        if config.run.mode != "sft-only":
            practised = config.practice.rl_max_steps * config.rl.prompts_per_step * config.rl.group_size
            rollouts[arm] = practised + measured * buffer
        learnt = config.sft.sft_epochs * 0.4 * config.practice.buffer_samples
        assert learnt >= config.sft.sft_max_steps * config.sft.global_batch_size
    assert len({length for arm, length in lengths.items() if arm not in ("rl-only", "dppo-random")}) == 1
    assert all(shortest == longest for shortest, longest, _ in lengths.values())
    assert lengths["rl-only"][1] > lengths["dppo-random"][1] > lengths["dppo"][1]
    assert lengths["dppo-random"][2] == lengths["dppo"][2]
    assert max(rollouts.values()) < 1.04 * min(rollouts.values()), rollouts
    flags = command(tmp_path / "base", 1, base_options(preset))
    assert load(flags[flags.index("--config") :], "train").sft.base_sft_steps == preset.base_steps


def test_a_summary_of_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "dppo-1").mkdir(parents=True)
    (tmp_path / "runs" / "dppo-1" / "experiment.log").write_text("1-1 RL step 3\n")
    results = tmp_path / "results"
    arguments = ["--summary", "--out", str(tmp_path / "runs"), "--benchmarks", str(results)]
    monkeypatch.setattr("sys.argv", ["experiment.py", *arguments])
    with pytest.raises(SystemExit, match="no finished run") as ended:
        experiment.main()
    assert isinstance(ended.value.code, str) and not results.exists()  # a string is printed, and the exit status is 1


def test_the_same_options_give_the_same_files(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path, OPTIONS, workers=1)
    for name in ("base", "pool", "eval", "general", "teacher"):
        assert (tmp_path / f"{name}.jsonl").read_text() == (world / f"{name}.jsonl").read_text()
    name = "clips/pool/00001.mp4"
    assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
