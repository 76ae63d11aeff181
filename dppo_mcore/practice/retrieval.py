"""Samples related to a weakness: same dimension and task first, then the nearest question.

Nearness is the cosine of TF-IDF vectors (numpy, an inverted index), or of a local embedding model's vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dppo_mcore.types import Sample

_TOKEN = re.compile(r"[^\W_]+")
_MARKER = re.compile(r"<(?:image|video)>")


EVERY = slice(None)


class TextIndex(Protocol):
    """Similarity of a query to the indexed texts of `span`, [N] in [-1, 1]."""

    def similarity(self, text: str, span: slice = ...) -> np.ndarray: ...


def question_of(sample: Sample) -> str:
    """The user's words of a sample."""
    return _MARKER.sub(" ", "\n".join(turn.content for turn in sample.turns if turn.role == "user"))


class TfIdf:
    """TF-IDF vectors of texts behind an inverted index: a query costs as much as its words' postings."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._terms: dict[str, int] = {}
        documents: list[int] = []
        terms: list[int] = []
        counts: list[int] = []
        for number, text in enumerate(texts):
            seen: dict[int, int] = {}
            for word in _TOKEN.findall(text.lower()):
                term = self._terms.setdefault(word, len(self._terms))
                seen[term] = seen.get(term, 0) + 1
            documents += [number] * len(seen)
            terms += seen.keys()
            counts += seen.values()
        self.size = len(texts)
        document_P, term_P = np.array(documents, dtype=np.int32), np.array(terms, dtype=np.int32)
        frequency_V = np.bincount(term_P, minlength=len(self._terms))
        self._idf_V = np.log((1 + self.size) / (1 + frequency_V)) + 1
        weight_P = (1 + np.log(np.array(counts, dtype=np.float64))) * self._idf_V[term_P]
        norm_N = np.sqrt(np.bincount(document_P, weight_P**2, minlength=self.size))
        order_P = np.argsort(term_P, kind="stable")
        self._document_P = document_P[order_P]
        self._weight_P = (weight_P / norm_N[document_P])[order_P]
        self._start_V = np.concatenate([[0], np.cumsum(frequency_V)])

    def similarity(self, text: str, span: slice = EVERY) -> np.ndarray:
        """Cosine with the texts of `span`; the cost follows their number, not that of all."""
        first, last, _ = span.indices(self.size)
        counts: dict[int, int] = {}
        norm, scores_N = 0.0, np.zeros(last - first)
        for word in _TOKEN.findall(text.lower()):
            if word in self._terms:
                counts[self._terms[word]] = counts.get(self._terms[word], 0) + 1
        for term, count in counts.items():
            weight = (1 + np.log(count)) * self._idf_V[term]
            norm += weight**2
            start, end = self._start_V[term], self._start_V[term + 1]
            documents_D = self._document_P[start:end]
            low, high = np.searchsorted(documents_D, (first, last))
            scores_N[documents_D[low:high] - first] += weight * self._weight_P[start + low : start + high]
        return scores_N / np.sqrt(norm) if norm else scores_N


class Embeddings:
    """Vectors of a local embedding model (a Hugging Face directory), mean over tokens, normalised."""

    def __init__(self, texts: Sequence[str], model: str) -> None:
        from transformers import pipeline

        self._extract = pipeline("feature-extraction", model=model, tokenizer=model, device=-1)
        vectors = [self._vector(text) for text in texts]
        self._vectors_NH = np.stack(vectors) if vectors else np.zeros((0, 1))

    def _vector(self, text: str) -> np.ndarray:
        options = {"truncation": True, "max_length": 512}
        hidden_LH = np.asarray(self._extract(text.strip() or "-", tokenize_kwargs=options)[0])
        mean_H = hidden_LH.mean(axis=0)
        return mean_H / max(float(np.linalg.norm(mean_H)), 1e-12)

    def similarity(self, text: str, span: slice = EVERY) -> np.ndarray:
        """Cosine with the texts of `span`."""
        return self._vectors_NH[span] @ self._vector(text)


@dataclass(frozen=True, slots=True)
class Related:
    """A retrieved sample, and what it was retrieved for."""

    sample: Sample
    weak_id: str
    similarity: float
    same_dimension: bool
    same_task: bool

    def why(self) -> str:
        """One line for the ledger."""
        shared = [name for name, same in (("dimension", self.same_dimension), ("task", self.same_task)) if same]
        same = " and ".join(shared) or "wording"
        return f"related to weak {self.weak_id}: same {same}, similarity {self.similarity:.2f}"


def retrieve(weak: Sequence[Sample], pool: Iterable[Sample], *, neighbours: int = 4, model: str = "") -> list[Related]:
    """Up to `neighbours` samples of `pool` per weak sample, each at most once over all.

    `pool` should hold neither the weak samples (those are skipped) nor those RL already practised. Rank: dimension and
    task the same, then task, then dimension, then neither; within a rank the nearest first, ties in the pool's order.
    """
    weak_ids = {sample.id for sample in weak}
    candidates = [sample for sample in pool if sample.id not in weak_ids]
    if not weak or not candidates or neighbours <= 0:
        return []
    # Samples of one task and dimension lie together: most queries then look at one span of the pool only.
    candidates.sort(key=_kind)
    spans = _spans([_kind(sample) for sample in candidates])
    texts = [question_of(sample) for sample in candidates]
    index: TextIndex = Embeddings(texts, model) if model else TfIdf(texts)
    task_N = np.array([sample.objective for sample in candidates])
    dimension_N = np.array([sample.dimension for sample in candidates])
    free_N = np.ones(len(candidates), dtype=bool)
    found: list[Related] = []
    for sample in weak:
        span = spans.get(_kind(sample), slice(0, 0))
        if not sample.dimension or free_N[span].sum() < neighbours:
            span = slice(0, len(candidates))
        top = min(neighbours, int(free_N[span].sum()))
        if top == 0:
            break
        same_task_N = task_N[span] == sample.objective
        same_dimension_N = (dimension_N[span] == sample.dimension) & bool(sample.dimension)
        similarity_N = index.similarity(question_of(sample), span)
        # Cosines are at most 1, so ranks 4 apart never mix.
        rank_N = np.where(free_N[span], similarity_N + 8.0 * same_task_N + 4.0 * same_dimension_N, -np.inf)
        for place in _best(rank_N, top):
            free_N[span.start + place] = False
            found.append(
                Related(
                    candidates[span.start + place], sample.id, float(similarity_N[place]),
                    bool(same_dimension_N[place]), bool(same_task_N[place]),
                )
            )  # fmt: skip
    return found


def _kind(sample: Sample) -> tuple[str, str]:
    return sample.objective, sample.dimension


def _spans(kinds: Sequence[tuple[str, str]]) -> dict[tuple[str, str], slice]:
    """Where each kind's run lies in a sorted list."""
    spans: dict[tuple[str, str], slice] = {}
    for place, kind in enumerate(kinds):
        spans[kind] = slice(spans[kind].start if kind in spans else place, place + 1)
    return spans


def _best(score_N: np.ndarray, count: int) -> list[int]:
    """Places of the `count` largest, largest first, ties by place."""
    edge = np.partition(score_N, -count)[-count]
    places = np.flatnonzero(score_N >= edge)
    return places[np.lexsort((places, -score_N[places]))][:count].tolist()
