"""The SFT corpus of a loop: weak, retrieved, own and general data, mixed by shares of learnt tokens.

Every item knows why it's there. The weak items set the size; the other sources are taken up to their share of it, and
a source that has less gives what it has (the shares reached are part of the result).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dppo_mcore.practice.ledger import Ledger, SftItem, TeacherAnswer
from dppo_mcore.practice.prompts import PromptTemplate
from dppo_mcore.practice.retrieval import Related
from dppo_mcore.practice.weakness import spread
from dppo_mcore.types import Sample

SOURCES = ("weak", "retrieved", "own", "general")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A conversation that may enter the corpus."""

    sample_id: str
    source: str
    answer: str
    tokens: int
    """Learnt tokens."""
    why: str


@dataclass(frozen=True)
class Corpus:
    """The mix and how it came out."""

    items: list[SftItem]
    tokens: dict[str, int]
    """Learnt tokens by source."""
    available: dict[str, int]
    """Tokens each source could have given."""

    def shares(self) -> dict[str, float]:
        """Share of tokens by source."""
        total = sum(self.tokens.values())
        return {source: count / total if total else 0.0 for source, count in self.tokens.items()}

    def summary(self) -> str:
        """One line for log and ledger."""
        parts = [f"{source} {share:.0%}" for source, share in self.shares().items() if self.available[source]]
        return f"{len(self.items)} items, {sum(self.tokens.values())} tokens: {', '.join(parts)}"


def weak_candidates(
    kept: Iterable[TeacherAnswer], template: PromptTemplate, count_tokens: Callable[[str], int]
) -> list[Candidate]:
    """The teacher's kept answers in the structure the model is asked for; those that can't take it are left out."""
    found = []
    for answer in kept:
        text = template.conform(answer.text)
        if text is not None:
            shown = ", the right answer shown to it" if answer.round else ""
            why = f"success rate 0; answer {answer.index} of {answer.model}{shown}, verified by the rule reward"
            found.append(Candidate(answer.sample_id, "weak", text, count_tokens(text), why))
    return found


def retrieved_candidates(
    related: Iterable[Related], ledger: Ledger, template: PromptTemplate, count_tokens: Callable[[str], int]
) -> list[Candidate]:
    """Related samples with the best answer known: the manifest's where it reasons, else the model's own verified one,
    else the teacher's, else the bare gold answer, unless the template asks for reasoning. Own answers keep the model's
    way of reasoning alive.
    """
    taught = {answer.sample_id: answer for answer in ledger.teacher_answers() if answer.kept}
    found = []
    for one in related:
        sample = one.sample
        text, origin = template.conform(sample.answer or ""), "the manifest"
        own = None if text else ledger.verified(sample.id)
        if own is not None:
            text, origin = own[0], f"own rollout of {own[1]}, step {own[2]}"
        if not text and sample.id in taught:
            text, origin = template.conform(taught[sample.id].text), f"answer of {taught[sample.id].model}"
        if not text:
            text, origin = template.bare(sample), "the gold answer without reasoning"
        if text:
            why = f"{one.why()}; {origin}"
            found.append(Candidate(sample.id, "retrieved", text, count_tokens(text), why))
    return found


def own_candidates(
    practised: Mapping[str, str], ledger: Ledger, count_tokens: Callable[[str], int], *, seed: int
) -> list[Candidate]:
    """The model's own newest verified answers to what it practised (objectives by id), every objective in turn.

    A corpus of weaknesses pulls the policy away from what RL has just taught; these answers hold it there.
    """
    found = []
    for name in spread(practised, 0, seed):
        own = ledger.verified(name)
        if own is not None:
            text, phase, step = own
            why = f"keeps what RL revealed: own verified rollout of {phase}, step {step}"
            found.append(Candidate(name, "own", text, count_tokens(text), why))
    return found


def general_candidates(
    samples: Iterable[Sample], template: PromptTemplate, count_tokens: Callable[[str], int], *, seed: int
) -> list[Candidate]:
    """General data with answers, every objective and source in turn, so that each output format is replayed.

    Answers stay as the data set wrote them: they're there to keep what the model already does. Those that aren't in the
    template's structure are learnt without its system prompt (`PromptTemplate.apply_to_general`).
    """
    strata: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        if sample.answer is not None or sample.gold is not None:
            strata.setdefault((sample.objective, sample.source), []).append(sample)
    for members in strata.values():
        members.sort(key=lambda s: _order(seed, s.id))
    found = []
    for turn in range(max(map(len, strata.values()), default=0)):
        for objective, source in sorted(strata):
            members = strata[objective, source]
            if turn < len(members):
                text = template.replayed(members[turn])
                if not text:
                    continue
                why = f"general replay: {objective}{' of ' + source if source else ''}"
                found.append(Candidate(members[turn].id, "general", text, count_tokens(text), why))
    return found


def mix(
    candidates: Sequence[Candidate],
    *,
    weak: float = 0.5,
    retrieved: float = 0.3,
    own: float = 0.0,
    general: float = 0.2,
    seed: int = 0,
) -> Corpus:
    """Take candidates of each source, in order, up to its share of tokens, and shuffle them by the seed.

    The whole is as large as all weak items at their share; without weak items as the retrieved ones at theirs, and
    without either there is nothing to repair: the corpus is empty.
    """
    shares = dict(zip(SOURCES, (weak, retrieved, own, general), strict=True))
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"mix_weak, mix_retrieved, mix_own, mix_general must be >= 0 and not all 0, got {shares}")
    available = {source: sum(c.tokens for c in candidates if c.source == source) for source in SOURCES}
    size = next((available[s] / shares[s] for s in ("weak", "retrieved") if shares[s] > 0 and available[s]), 0.0)
    taken: list[Candidate] = []
    tokens = dict.fromkeys(SOURCES, 0)
    for candidate in candidates:
        budget = size * shares[candidate.source]
        # The item that would overshoot is taken if that ends nearer to the share.
        if tokens[candidate.source] + candidate.tokens / 2 <= budget + 1e-9:
            taken.append(candidate)
            tokens[candidate.source] += candidate.tokens
    taken.sort(key=lambda c: _order(seed, f"{c.source}/{c.sample_id}"))
    items = [SftItem(n, c.sample_id, c.source, c.answer, c.tokens, c.why) for n, c in enumerate(taken)]
    return Corpus(items, tokens, available)


def _order(seed: int, name: str) -> bytes:
    return sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()
