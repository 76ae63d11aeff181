"""The manifests of a run, opened and checked against each other before a model is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from dppo_mcore.data.check import media_print
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.manifest import Manifest, read_manifest
from dppo_mcore.metaloop.exchange import Exchange
from dppo_mcore.practice.ledger import differences
from dppo_mcore.rewards.registry import load_objectives, without_scorer
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.types import Sample

POOLS = {"rl": "data", "general": "general_data", "base": "base_data", "eval": "eval_data",
         "eval-general": "eval_general_data"}  # fmt: skip
"""Pool names and the options that name their manifests."""
HELD_OUT = ("eval", "eval-general")
GENERAL = ("general", "eval-general")
NAMED = 5
"""Objectives or sources that a warning names."""


def open_pools(files: Mapping[str, str], media_root: str, exchange: Exchange) -> dict[str, Manifest]:
    """Every manifest that is named; rank 0 indexes first so that the others find the index."""
    files = {pool: file for pool, file in files.items() if file}
    names = names_of(files)
    pools: dict[str, Manifest] = {}
    for first in (True, False):
        if first == (exchange.rank == 0):
            try:
                pools = {pool: read_manifest(file, media_root, names[pool]) for pool, file in files.items()}
            except DataError as error:
                raise UserError(str(error)) from error
        exchange.barrier()
    for pool, manifest in pools.items():
        if not len(manifest):
            refused = (
                f"{len(manifest.refused)} refused, the first: {manifest.refused[0]}" if manifest.refused else "empty"
            )
            raise UserError(f"pool {pool}: {manifest.path} has no usable row ({refused})")
    return pools


def samples_of(pools: Mapping[str, Manifest], sample_id: str) -> Iterator[Sample]:
    """What the pools hold under an id."""
    for manifest in pools.values():
        with suppress(KeyError):
            yield manifest.get(sample_id)


def names_of(files: Mapping[str, str]) -> dict[str, str]:
    """What the ids of rows without one begin with, by pool: the file's stem.

    Of several files with one stem the first keeps it; the others have their pool's name before it.
    """
    names: dict[Path, str] = {}
    for pool, file in files.items():
        path = Path(os.path.abspath(file))
        if path not in names:
            taken = any(other.stem == path.stem for other in names)
            names[path] = f"{pool}/{path.stem}" if taken else path.stem
    return {pool: names[Path(os.path.abspath(file))] for pool, file in files.items()}


def check_ids(pools: Mapping[str, Manifest]) -> None:
    """Two pools may hold the same sample, but not two samples under one id."""
    for (pool, manifest), (other_pool, other) in combinations(pools.items(), 2):
        if (manifest.path, manifest.root) == (other.path, other.root):
            continue
        for one, another in manifest.shared(other):
            found = differences(one, another) or (["media"] if _other_contents(one, another) else [])
            if found:
                raise UserError(
                    f"id {one.id!r} stands for two samples ({' and '.join(found)} differ): in pool {pool} "
                    f"({manifest.path}) and in pool {other_pool} ({other.path}); ids hold for all manifests of a run, "
                    "so give one of the two another id"
                )


def check_objectives(pools: Mapping[str, Manifest], file: str) -> None:
    """Whatever is asked and scored must have a scorer, `file` being the user's; what is only learnt needs none."""
    load_objectives(file)
    for pool in ("rl", *HELD_OUT):
        if pool in pools and (complaint := without_scorer(pools[pool].counts("objective"))):
            raise UserError(f"pool {pool} ({pools[pool].path}): {complaint}; --objectives FILE adds yours")


def remarks(pools: Mapping[str, Manifest], eval_samples: int) -> list[str]:
    """What a run that goes on all the same should say about its manifests."""
    found = []
    for pool, manifest in pools.items():
        if manifest.refused:
            found.append(f"pool {pool}: {len(manifest.refused)} row(s) refused, the first: {manifest.refused[0]}")
        if pool in HELD_OUT and eval_samples and (missing := _cut_off(manifest, eval_samples)):
            found.append(
                f"pool {pool}: the first {eval_samples} of {len(manifest)} rows (eval_samples) have none of {missing}; "
                "shuffle the manifest, or take more of it"
            )
    return found


def _cut_off(manifest: Manifest, first: int) -> str:
    """The objectives and sources that have no row among the first so many, in words."""
    parts = []
    for label in ("objective", "source"):
        seen, rows = manifest.counts(label, first), manifest.counts(label)
        missing = [f"{name!r} ({rows[name]} rows)" for name in rows if not seen[name]]
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            parts.append(f"{label} {', '.join(missing[:NAMED])}{more}")
    return " and none of ".join(parts)


def _other_contents(one: Sample, another: Sample) -> bool:
    """Whether media of the same names lie in two folders and aren't the same."""
    prints: dict[str, bytes] = {}
    return any(
        mine.path != theirs.path
        and os.path.isfile(mine.path)
        and os.path.isfile(theirs.path)
        and media_print(mine, prints) != media_print(theirs, prints)
        for mine, theirs in zip(one.media, another.media, strict=True)
    )
