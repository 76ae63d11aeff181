"""Asking the teacher for reference answers to weak samples, verifying them, and going on where a run left off.

Every answer is in the ledger as soon as it has come, so a killed or interrupted collection asks only for what is
missing. A teacher that is down ends the collection with what there is; the rest is asked for again on resume.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dppo_mcore.config import PracticeConfig
from dppo_mcore.practice.ledger import Ledger, TeacherAnswer
from dppo_mcore.practice.teacher_client import (
    ChatClient,
    TeacherDownError,
    TeacherGaveUpError,
    TeacherRefusedError,
)
from dppo_mcore.practice.teacher_media import Frames, media_parts
from dppo_mcore.rewards.extraction import canonical, final_answer
from dppo_mcore.rewards.scoring import Score
from dppo_mcore.types import Sample

Scorer = Callable[[Sequence[tuple[Sample, str]]], Sequence[Score]]
MediaParts = Callable[[Sample], list[dict[str, Any]]]
Outcome = tuple[Sample, int, int, Any]
"""(sample, round, index, what came of it: (text, tokens), None or an exception)."""
WRITE_BATCH = 64
REFUSALS_BEFORE_ANY_ANSWER = 32
"""So many refusals without a single answer, and it's the requests that are wrong, not the samples."""

ASK = (
    "Look closely, reason step by step, and give the final answer alone between <answer> and </answer>. "
    "Put your reasoning between <think> and </think> before it."
)
SHOW_GOLD = (
    "The right answer is: {gold}\nExplain step by step how what is shown leads to it, as if you had not been told: "
    "reasoning between <think> and </think>, then the answer alone between <answer> and </answer>."
)


@dataclass(frozen=True)
class Collection:
    """What a collection came to."""

    asked: int
    """Requests made now."""
    missing: int
    """Samples that still lack answers."""
    reason: str
    """Why it ended, where anything is missing."""


class Teacher(Protocol):
    """Where answers come from: an endpoint or a file."""

    model: str

    def answer(self, sample: Sample, round_: int, index: int) -> tuple[str, int] | None:
        """(text, tokens) of one answer, or None where there is none.

        Raises `TeacherRefusedError` (recorded), `TeacherGaveUpError` (asked for again on resume) or
        `TeacherDownError` (ends the collection).
        """


class FileTeacher:
    """Answers from a JSONL file of {"id", "answer"}; several rows, or a list, give several answers."""

    def __init__(self, path: str) -> None:
        self.model = Path(path).name
        self._answers: dict[str, list[str]] = {}
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                self._answers.setdefault(str(row["id"]), []).extend(map(str, answers))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'teacher_file {path}:{number}: a row is {{"id": ..., "answer": ...}}') from None

    def answer(self, sample: Sample, round_: int, index: int) -> tuple[str, int] | None:
        """The file's answer number `index`; the file knows nothing of a second round."""
        answers = self._answers.get(sample.id, [])
        return (answers[index], 0) if round_ == 0 and index < len(answers) else None


class EndpointTeacher:
    """Answers from an OpenAI-compatible endpoint, which sees the question, the clip and how the answer is scored."""

    def __init__(
        self,
        client: ChatClient,
        media_parts: MediaParts,
        *,
        max_tokens: int,
        temperature: float,
        instructions: Mapping[str, str] | None = None,
    ) -> None:
        """`instructions` by objective follow the question, as they do for the model."""
        self.model = client.model
        self.instructions = instructions or {}
        self._client = client
        self._media_parts = media_parts
        self._max_tokens = max_tokens
        self._temperature = temperature

    def answer(self, sample: Sample, round_: int, index: int) -> tuple[str, int] | None:
        """One request, with the client's retries."""
        try:
            shown = self._media_parts(sample)
        except (OSError, ValueError) as error:
            raise TeacherGaveUpError(f"media of {sample.id} can't be read: {error}") from error
        question = sample.turns[-1].content.replace("<image>", "").replace("<video>", "").strip()
        if instruction := self.instructions.get(sample.objective):
            question = f"{question}\n{instruction}"
        ask = ASK if round_ == 0 else SHOW_GOLD.format(gold=sample.gold)
        content = [*shown, {"type": "text", "text": f"{question}\n\n{ask}"}]
        messages: list[dict[str, Any]] = [
            {"role": turn.role, "content": turn.content} for turn in sample.turns[:-1] if turn.role != "system"
        ]
        messages.append({"role": "user", "content": content})
        return self._client.chat(messages, self._max_tokens, self._temperature, seed=index)


def make_teacher(
    config: PracticeConfig, frames: Frames, key: str = "", instructions: Mapping[str, str] | None = None
) -> Teacher | None:
    """The configured teacher: a file of answers, an endpoint (with its key and instructions by objective), or none."""
    if config.teacher_file:
        return FileTeacher(config.teacher_file)
    if not config.teacher_url:
        return None
    client = ChatClient(
        config.teacher_url,
        config.teacher_model,
        key,
        timeout_s=config.teacher_timeout_s,
        patience_s=config.teacher_patience_s,
        requests_per_minute=config.teacher_requests_per_minute,
    )
    parts = media_parts(config.teacher_media, frames)
    return EndpointTeacher(
        client,
        parts,
        max_tokens=config.teacher_max_tokens,
        temperature=config.teacher_temperature,
        instructions=instructions,
    )


def choose(answers: Iterable[TeacherAnswer]) -> dict[str, TeacherAnswer]:
    """At most one answer per sample: the shortest that the rule reward calls right, from the earliest round."""
    best: dict[str, TeacherAnswer] = {}
    for answer in answers:
        if not answer.success:
            continue
        now = best.get(answer.sample_id)
        rank = (answer.round, len(answer.text), answer.index)
        if now is None or rank < (now.round, len(now.text), now.index):
            best[answer.sample_id] = answer
    return best


def vote(answers: Sequence[TeacherAnswer], share: float) -> list[TeacherAnswer]:
    """Those right answers whose final answer at least `share` of the sample's answers of the same round gave too.

    A lone lucky guess among many different answers is less likely to come with sound reasoning.
    """
    said: dict[tuple[str, int], list[str]] = {}
    for answer in answers:
        if answer.error is None:
            said.setdefault((answer.sample_id, answer.round), []).append(canonical(final_answer(answer.text)))
    return [
        answer
        for answer in answers
        if answer.error is None
        and (group := said[answer.sample_id, answer.round])
        and group.count(canonical(final_answer(answer.text))) >= share * len(group)
    ]


def collect(
    ledger: Ledger,
    phase: str,
    samples: Sequence[Sample],
    teacher: Teacher,
    score: Scorer,
    *,
    answers: int = 4,
    show_gold: bool = False,
    concurrency: int = 16,
    budget: int = 0,
    vote_share: float = 0.0,
    stopped: Callable[[], bool] = lambda: False,
) -> Collection:
    """Ask for `answers` answers per sample, verify each by the rule reward, and mark the kept ones in the ledger.

    With `show_gold`, samples without a right answer get a second round that shows the gold answer. `budget` bounds the
    requests of the whole run (0: no bound). With `vote_share`, a kept answer must agree with that share of its
    sample's. Asking again after an interruption asks only for what is missing; `stopped` is such an interruption: it
    is looked at every second, and requests in flight are then left to themselves. `samples` are bare questions, without
    the model's own prompt template: the teacher has the template's instructions and is told here how to reason.
    """
    wanted = [(sample, 0, index) for sample in samples for index in range(answers)]
    asked, reason = _ask(ledger, phase, wanted, teacher, score, concurrency, budget, stopped)
    if show_gold and not reason:
        solved = {answer.sample_id for answer in ledger.teacher_answers(phase) if answer.success}
        wanted += [(sample, 1, 0) for sample in samples if sample.id not in solved]
        more, reason = _ask(ledger, phase, wanted, teacher, score, concurrency, budget, stopped)
        asked += more
    given = ledger.teacher_answers(phase)
    kept = choose(vote(given, vote_share) if vote_share else given)
    ledger.keep_teacher(phase, [(a.sample_id, a.round, a.index) for a in kept.values()])
    have = {(answer.sample_id, answer.round, answer.index) for answer in given}
    some = {answer.sample_id for answer in given}
    # A teacher's file may hold fewer answers than asked for; only an early end makes a shorter list a gap.
    missing = {
        s.id for s, round_, index in wanted if (s.id, round_, index) not in have and (reason or s.id not in some)
    }
    if missing and not reason:
        reason = f"{teacher.model} has no answer to them"
    return Collection(asked, len(missing), reason if missing else "")


def _ask(
    ledger: Ledger,
    phase: str,
    wanted: Sequence[tuple[Sample, int, int]],
    teacher: Teacher,
    score: Scorer,
    concurrency: int,
    budget: int,
    stopped: Callable[[], bool],
) -> tuple[int, str]:
    """Make the requests that the ledger lacks, `concurrency` at a time; returns their number and why it ended early.

    Worker threads only talk to the teacher; scoring and the ledger stay in this thread.
    """
    have = {(answer.sample_id, answer.round, answer.index) for answer in ledger.teacher_answers(phase)}
    todo = [item for item in wanted if (item[0].id, item[1], item[2]) not in have]
    reason = ""
    if budget:
        left = max(0, budget - len(ledger.teacher_answers()))
        if left < len(todo):
            todo, reason = todo[:left], f"the teacher's budget of {budget} requests is spent"
    jobs: queue.SimpleQueue[tuple[Sample, int, int] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while (job := jobs.get()) is not None:
            if stop.is_set():
                done.put((*job, None))
                continue
            try:
                done.put((*job, teacher.answer(*job)))
            except Exception as error:
                done.put((*job, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(concurrency, len(todo))))]
    for job in todo:
        jobs.put(job)
    for thread in threads:
        jobs.put(None)
        thread.start()
    try:
        asked, down = _receive(ledger, phase, done, len(todo), teacher.model, score, stop, stopped)
    finally:
        stop.set()
    for thread in threads if down != STOPPED else ():
        thread.join()
    return asked, down or reason


def _receive(
    ledger: Ledger,
    phase: str,
    done: queue.SimpleQueue[Outcome],
    count: int,
    model: str,
    score: Scorer,
    stop: threading.Event,
    stopped: Callable[[], bool],
) -> tuple[int, str]:
    """Write outcomes as they come, in small batches; returns how many and, if the teacher went down, why.

    Refusals are facts about samples only where the teacher answers others: until it does they are held back.
    """
    asked, reason = 0, ""
    answers = any(answer.text for answer in ledger.teacher_answers(phase))
    arrived: list[Outcome] = []
    refused: list[Outcome] = []
    number = 0
    while number < count:
        try:
            arrived.append(done.get(timeout=1.0))
        except queue.Empty:
            if stopped():
                return asked, STOPPED
            continue
        number += 1
        if len(arrived) < WRITE_BATCH and not done.empty() and number < count:
            continue
        answers = answers or any(isinstance(outcome, tuple) for *_, outcome in arrived)
        refused += [one for one in arrived if isinstance(one[-1], TeacherRefusedError)]
        told = [one for one in arrived if not isinstance(one[-1], TeacherRefusedError)]
        asked += _write(ledger, phase, [*told, *refused] if answers else told, model, score)
        if answers:
            refused = []
        elif len(refused) >= REFUSALS_BEFORE_ANY_ANSWER:
            stop.set()
        for *_, outcome in arrived:
            if isinstance(outcome, TeacherDownError):
                stop.set()
                reason = str(outcome)
            elif isinstance(outcome, TeacherGaveUpError):
                reason = reason or f"a request was given up: {outcome}"
            elif isinstance(outcome, Exception) and not isinstance(outcome, TeacherRefusedError):
                raise outcome
        arrived = []
        if number < count and stopped():
            return asked, STOPPED
    if refused:
        reason = reason or f"{model} refused all of {len(refused)} requests, the first: {refused[0][-1]}"
    return asked, reason


STOPPED = "the run was asked to stop"


def _write(ledger: Ledger, phase: str, arrived: Sequence[Outcome], model: str, score: Scorer) -> int:
    """Verify what arrived and write it; a refusal is a fact too, silence is not."""
    answered = [(s, r, i, out) for s, r, i, out in arrived if isinstance(out, tuple)]
    rows = [
        TeacherAnswer(sample.id, round_, index, model, text, one.reward, one.success, False, one.error, tokens)
        for (sample, round_, index, (text, tokens)), one in zip(
            answered, score([(sample, text) for sample, _, _, (text, _) in answered]), strict=True
        )
    ]
    rows += [
        TeacherAnswer(sample.id, round_, index, model, "", 0.0, False, False, str(out), 0)
        for sample, round_, index, out in arrived
        if isinstance(out, TeacherRefusedError)
    ]
    ledger.record_teacher(phase, rows)
    return len(rows)
