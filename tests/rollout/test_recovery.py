"""A server that is killed, stopped, slow or refusing costs time, never an answer; a dead trainer leaves no server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.config import ParallelConfig
from dppo_mcore.learn import state
from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling, make_engine
from dppo_mcore.rollout.sidecar_client import EngineDied
from dppo_mcore.runtime import parallel
from dppo_mcore.sync.push import attach
from dppo_mcore.types import ScoredRollout
from tests.rollout import cases, protocol
from tests.support.sglang_server import SHIMS

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def engine(tiny_dir: str, sglang_python: str, tmp_path_factory: Any) -> Iterator[Any]:
    """An engine over the tiny checkpoint, on a world of one rank, its weights pushed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SHIMS))
        parallel.start(ParallelConfig(), seed=0)
        config = cases.config(tiny_dir, str(tmp_path_factory.mktemp("run")), sglang_python)
        learner = state.build(config)
        made = make_engine(config, learner.qwen, learner.models, cases.Spelling())
        made.start()
        sync = attach(learner.models, made, learner.qwen, config)
        assert sync is not None
        sync.push(1)
        yield made
        made.stop()
        parallel.stop()


def processes(engine: Any) -> list[int]:
    """The sidecar and the engine's own processes."""
    ping = engine.client.sidecar.call("ping", timeout_s=30.0)
    return [ping["pid"], *ping["children"]]


def requests(engine: Any, count: int, n: int) -> list[GenerationRequest]:
    """Groups over mixed prompts."""
    prompts = cases.mixed(engine.qwen)
    return [GenerationRequest(f"{i}-{prompts[i % 32].sample.id}", prompts[i % 32], n, seed=i) for i in range(count)]


def counted(engine: Any, asked: list[GenerationRequest]) -> Counter[tuple[str, int]]:
    """How often each answer came."""
    return Counter((rollout.sample_id, rollout.index) for rollout in engine.generate(asked, SAMPLING))


def test_the_protocol(engine: Any) -> None:
    """As for every engine."""
    protocol.check_protocol(engine, 592)


def test_a_killed_worker_costs_no_answer(engine: Any) -> None:
    """SIGKILL to a scheduler in mid-batch: restarted with the same weights, every answer once."""
    asked = requests(engine, 24, 4)
    victim = processes(engine)[1]
    seen: Counter[tuple[str, int]] = Counter()
    versions = set()
    for rollout in engine.generate(asked, SAMPLING):
        seen[rollout.sample_id, rollout.index] += 1
        versions |= {piece[0] for piece in rollout.weight_versions}
        if sum(seen.values()) == 3:
            os.kill(victim, signal.SIGKILL)
    assert set(seen.values()) == {1}
    assert len(seen) == 96
    assert versions == {1}
    assert engine.restarts >= 1
    assert not os.path.exists(f"/proc/{victim}") or victim not in processes(engine)


def test_an_engine_lost_inside_a_sync_gets_the_weights_all_the_same(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to the sidecar while it loads a bucket: started anew, synced from the first bucket, verified."""
    sync, before = engine.weight_sync, engine.restarts
    load, victims = engine.receiver.load_shared, processes(engine)[:1]

    def kill_then_load(*arguments: Any) -> None:
        if victims:
            os.kill(victims.pop(), signal.SIGKILL)
        load(*arguments)

    monkeypatch.setattr(engine.receiver, "load_shared", kill_then_load)
    report = sync.push(1)
    assert not victims and engine.restarts == before + 1
    assert report.tensors == len(sync.plan().shapes) and engine.weight_version == 1
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4


def test_a_request_the_engine_refuses_is_one_clear_error(engine: Any) -> None:
    """It names the sample; the engine stays well."""
    too_long = replace(SAMPLING, max_tokens=-5)
    with pytest.raises(EngineError, match="sample 0-mixed-0"):
        list(engine.generate(requests(engine, 1, 1), too_long))
    assert engine.health()
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4


def test_stopping_early_leaves_nothing_running(engine: Any) -> None:
    """A caller that walks away: requests end, the next batch is whole."""
    walk = engine.generate(requests(engine, 16, 4), replace(SAMPLING, max_tokens=200))
    next(walk)
    walk.close()
    assert sum(counted(engine, requests(engine, 4, 2)).values()) == 8


def test_sleep_and_wake(engine: Any) -> None:
    """By tags, twice over, right after answers; asleep it refuses; slept weights are undefined until the next push."""
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4
    engine.sleep(("kv_cache",))
    with pytest.raises(EngineError, match="asleep .kv_cache"):
        list(engine.generate(requests(engine, 2, 2), SAMPLING))
    engine.sleep()
    assert engine.weight_version == -1
    engine.weight_sync.push(1)
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4
    engine.wake()


def test_sleep_waits_for_what_is_ending(engine: Any) -> None:
    """An aborted or late answer may still be under way when the batch is done."""
    late = engine.client.submit("late", requests(engine, 1, 1)[0], 0, replace(SAMPLING, max_tokens=40), None)
    engine.sleep()
    assert late.done() and late.result().token_ids
    engine.weight_sync.push(1)
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4


@pytest.mark.parametrize("asleep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_engine_lost_in_the_trainers_turn_is_started_anew(engine: Any, asleep: bool) -> None:
    """SIGKILL while it sleeps, or before it was put to sleep: the next push brings it back."""
    before = engine.restarts
    if asleep:
        engine.sleep()
    os.kill(processes(engine)[0], signal.SIGKILL)
    if not asleep:
        engine.sleep()
    assert engine.weight_version == -1
    engine.weight_sync.push(1)
    assert engine.restarts == before + 1 and engine.weight_version == 1
    assert sum(counted(engine, requests(engine, 2, 2)).values()) == 4


def test_a_failure_of_one_rank_alone_restarts_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours know nothing of it: to wait for them would hang the job, so it goes up at once."""

    def out_of_memory() -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.weight_sync, "probe", out_of_memory)
    monkeypatch.setattr(engine, "revive", lambda error: pytest.fail(f"asked the other ranks about {error!r}"))
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.weight_sync.push(1)


def test_over_sampling_keeps_the_first(engine: Any) -> None:
    """Ask for more, abort once enough are there: all come back, the rest marked."""
    finished = aborted = 0
    for rollout in engine.generate(requests(engine, 8, 6), replace(SAMPLING, max_tokens=300)):
        if rollout.finish_reason == "abort":
            aborted += 1
        else:
            finished += 1
        if finished == 8:
            engine.abort()
    assert finished + aborted == 48


def test_the_server_ends_with_its_trainer(tiny_dir: str, sglang_python: str, tmp_path: Path) -> None:
    """SIGKILL to the trainer: sidecar and workers are gone within 10 seconds."""
    script = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from pathlib import Path
from dppo_mcore.rollout.sglang_options import engine_options, environment
from dppo_mcore.rollout.sidecar_client import SidecarClient
from tests.rollout import cases, protocol
config = cases.config({tiny_dir!r}, {str(tmp_path)!r})
variables = environment("cpu", 1) | {{"PYTHONPATH": {str(SHIMS)!r}}}
client = SidecarClient({sglang_python!r}, engine_options(config, "cpu", 1), Path({str(tmp_path / "log")!r}), variables)
ping = client.call("ping")
print(ping["pid"], *ping["children"], flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout is not None
    pids = [int(word) for word in trainer.stdout.readline().split()]
    assert len(pids) >= 3
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(running(pid) for pid in pids):
        time.sleep(0.1)
    assert not [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_own_vision_is_refused_with_its_reason(
    tiny_dir: str, sglang_environment: str, tmp_path: Path, single_rank: None
) -> None:
    """SGLang 0.5.23's tower differs on clips; the check before the first rollout says so."""
    config = cases.config(tiny_dir, str(tmp_path), sglang_environment, engine_vision="own")
    learner = state.build(config)
    own = make_engine(config, learner.qwen, learner.models, cases.Spelling())
    own.start()
    try:
        clip = cases.videos(learner.qwen)[9]
        with pytest.raises(EngineError, match=r"engine_vision: own is refused.*frames attend to each other"):
            list(own.generate([GenerationRequest("clip", clip, 1)], SAMPLING))
    finally:
        own.stop()


def use(engine: Any) -> tuple[int, int, int]:
    """Descriptors, resident KiB of the trainer and of the sidecar with its workers, and entries of /dev/shm."""
    pids = [os.getpid(), *processes(engine)]
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    resident = sum(
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    return descriptors, resident, len(os.listdir("/dev/shm"))


@pytest.mark.slow
def test_nothing_grows_over_2000_rollouts(engine: Any) -> None:
    """From 500 to 2000 no growth beyond 5%."""
    for _ in range(5):
        assert sum(counted(engine, requests(engine, 25, 4)).values()) == 100
    early = use(engine)
    for _ in range(15):
        assert sum(counted(engine, requests(engine, 25, 4)).values()) == 100
    late = use(engine)
    print(f"descriptors, resident KiB, /dev/shm entries: {early} after 500 rollouts, {late} after 2000")
    assert all(after <= before * 1.05 + 2 for before, after in zip(early, late, strict=True)), (early, late)


CHUNK = 40
"""Answers of one `generate` in the runs below; trouble comes while some of them are still owed."""


class Trouble:
    """Ten bad things at chosen moments of a run of 400 answers, each in the middle of a batch."""

    def __init__(self, engine: Any, seed: int) -> None:
        self.engine, self.dice = engine, random.Random(seed)
        kinds = ["kill server", "kill worker", "kill worker", "stop", "stop", "stop", "refuse", "refuse", "refuse"]
        self.kinds = [*kinds, "hang" if seed % 2 else "stop"]
        self.dice.shuffle(self.kinds)
        moments = [moment for moment in range(1, 8 * CHUNK) if moment % CHUNK < 25]
        self.moments = sorted(self.dice.sample(moments, len(self.kinds)))
        self.done: Counter[str] = Counter()

    def look(self, arrived: int) -> None:
        """Do what is due; put off while the engine is down from the last time."""
        if not self.moments or arrived < self.moments[0]:
            return
        try:
            server, *workers = processes(self.engine)
            workers = [pid for pid in workers if name(pid).startswith("sglang::")]
            victim = server if self.kinds[0] == "kill server" else self.dice.choice(workers)
            if self.kinds[0] == "refuse":
                self.engine.client.sidecar.call("abort", timeout_s=10.0, rid=None)
            elif self.kinds[0].startswith("kill"):
                os.kill(victim, signal.SIGKILL)
            else:
                os.kill(victim, signal.SIGSTOP)
        except (EngineDied, OSError, IndexError):
            return
        if self.kinds[0] == "stop":
            threading.Timer(self.dice.uniform(0.1, 2.0), go_on, [victim]).start()
        self.done[self.kinds.pop(0)] += 1
        self.moments.pop(0)


def name(pid: int) -> str:
    """A process's own name: the scheduler's and the detokenizer's, not Python's helper processes'."""
    return Path(f"/proc/{pid}/comm").read_text()


def go_on(pid: int) -> None:
    """SIGCONT, if the process still exists."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(10))
def test_runs_of_400_rollouts_survive_kills_and_stops(engine: Any, seed: int, tmp_path: Path) -> None:
    """3 kills and 7 stops, refusals or hangs a run, ten runs: the ledger ends with exactly n answers a prompt."""
    engine.config = replace(
        engine.config, rollout=replace(engine.config.rollout, rollout_timeout_s=20.0, rollout_retries=8)
    )
    trouble = Trouble(engine, seed)
    asked = requests(engine, 100, 4)
    before, arrived = engine.restarts, 0
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([replace(r.prompt.sample, id=r.sample_id) for r in asked], "rl")
        ledger.plan([PhasePlan("RL", 1, "rl", None)])
        for step in range(100 * 4 // CHUNK):
            rollouts = []
            for rollout in engine.generate(asked[step * 10 : step * 10 + 10], SAMPLING):
                rollouts.append(rollout)
                arrived += 1
                trouble.look(arrived)
            ledger.record_rollouts("RL", step, [ScoredRollout(r, 0.0, {}, False) for r in rollouts])
        kept = Counter((row.scored.rollout.sample_id, row.scored.rollout.index) for row in ledger.all_rollouts("RL"))
        assert arrived == 400
        assert kept == Counter((r.sample_id, index) for r in asked for index in range(4))
        assert all(group.trials == 4 for group in ledger.groups("RL"))
    print(f"{dict(trouble.done)}, {engine.restarts - before} restarts")
    assert trouble.done["kill server"] + trouble.done["kill worker"] == 3
    assert trouble.done.total() == 10
