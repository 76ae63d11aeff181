"""What happens on the table: blocks, a box, a gripper and its moves, as continuous functions of time.

Positions are in cells of a 4 x 4 table (x to the right, y down); a block's centre lies near the middle of a cell.
The last move of every clip is cut when 60% of it is done, so that there is something to predict.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

CELLS = 4
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 210, 40),
    "blue": (40, 60, 240),
    "yellow": (240, 230, 30),
    "purple": (220, 40, 220),
    "cyan": (30, 225, 225),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BOX = "box"
APPROACH = 0.25
"""Share of a move in which the gripper travels to the block."""
CUT = 0.6
"""Share of the last move that the clip shows."""
HOLD = 2.0
"""Seconds at the end in which nothing moves, so that a thin sampling of frames sees the end."""

Level = Literal["trivial", "normal", "hard", "impossible"]
Split = Literal["base", "pool", "eval"]
Cell = tuple[int, int]


@dataclass(frozen=True)
class Difficulty:
    """What a level changes: how much is on the table and how well it can be seen."""

    blocks: tuple[int, int]
    moves: int
    jitter: float
    """Largest offset of a block from its cell's middle, in cells."""
    noise: float
    """Standard deviation of the background, in grey levels."""
    light: float
    """Brightness factor; at 0.02 nothing is left to see."""


LEVELS: dict[Level, Difficulty] = {
    "trivial": Difficulty((2, 2), 2, 0.0, 0.0, 1.0),
    "normal": Difficulty((2, 5), 3, 0.14, 4.0, 1.0),
    "hard": Difficulty((4, 6), 3, 0.18, 14.0, 0.6),
    "impossible": Difficulty((2, 5), 3, 0.14, 4.0, 0.02),
}


@dataclass(frozen=True)
class Move:
    """One block carried from cell to cell between two times in seconds."""

    block: int
    source: Cell
    target: Cell
    word: str
    """Direction, or `box`."""
    start: float
    end: float


@dataclass(frozen=True)
class Scene:
    """A whole clip. `offsets_N2` shifts each block's centre from its cell's middle."""

    seconds: float
    level: Level
    colours: tuple[str, ...]
    cells: tuple[Cell, ...]
    offsets_N2: np.ndarray
    box: Cell
    moves: tuple[Move, ...]
    gripper_start: tuple[float, float]
    texture_seed: int

    def signature(self) -> str:
        """The configuration without its nuisances (jitter, texture, timing): what splits are made by."""
        parts = (self.box, sorted(zip(self.colours, self.cells, strict=True)),
                 [(self.colours[m.block], m.target) for m in self.moves])  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def carried(self, move: Move, time: float) -> float:
        """Share of the way that the move's block has gone at `time`."""
        done = (time - move.start) / (move.end - move.start)
        shown = CUT if move is self.moves[-1] else 1.0
        return float(np.clip((done - APPROACH) / (1 - APPROACH), 0.0, 1.0)) * shown

    def centre(self, cell: Cell, block: int) -> np.ndarray:
        """Where a block rests in a cell; in the box it is nearly centred."""
        offset = self.offsets_N2[block] * (0.4 if cell == self.box else 1.0)
        return np.array(cell, float) + 0.5 + offset

    def blocks_at(self, time: float) -> np.ndarray:
        """Centres [N, 2] of all blocks."""
        centres_N2 = np.array([self.centre(cell, k) for k, cell in enumerate(self.cells)])
        for move in self.moves:
            if time <= move.start:
                break
            start, end = self.centre(move.source, move.block), self.centre(move.target, move.block)
            centres_N2[move.block] = start + (end - start) * self.carried(move, time)
        return centres_N2

    def gripper_at(self, time: float) -> np.ndarray:
        """Centre [2] of the gripper: on its way to the next block, or on the block it carries."""
        position = np.array(self.gripper_start)
        for move in self.moves:
            if time <= move.start:
                break
            block = self.centre(move.source, move.block)
            done = (time - move.start) / (move.end - move.start)
            if done < APPROACH:
                return position + (block - position) * (done / APPROACH)
            target = self.centre(move.target, move.block)
            position = block + (target - block) * self.carried(move, time)
        return position

    @property
    def movers(self) -> tuple[str, ...]:
        """Colours in the order they are moved."""
        return tuple(self.colours[move.block] for move in self.moves)

    @property
    def boxed(self) -> str | None:
        """Colour of the block that ends in the box."""
        return next((self.colours[move.block] for move in self.moves if move.word == BOX), None)


def _moves(rng: np.random.Generator, cells: list[Cell], box: Cell, count: int, seconds: float) -> list[Move] | None:
    """`count` moves of different blocks along free straight lines, or into the box; None where a block is stuck."""
    movers = rng.permutation(len(cells))[:count]
    into_box = int(rng.integers(count - 1)) if rng.random() < 0.7 else -1
    bounds = np.concatenate([[0.0], np.cumsum(rng.dirichlet(np.full(count, 8.0)))]) * (seconds - HOLD)
    occupied, moves = set(cells) | {box}, []
    for k, block in enumerate(int(m) for m in movers):
        source = cells[block]
        if k == into_box:
            word, target = BOX, box
        else:
            ways = {}
            for word, (dx, dy) in DIRECTIONS.items():
                reach = []
                for r in range(1, CELLS):
                    cell = (source[0] + dx * r, source[1] + dy * r)
                    if cell in occupied or not all(0 <= c < CELLS for c in cell):
                        break
                    if r >= 2 or k < count - 1:
                        reach.append(cell)
                if reach:
                    ways[word] = reach
            if not ways:
                return None
            word = str(rng.choice(sorted(ways)))
            target = ways[word][int(rng.integers(len(ways[word])))]
        moves.append(Move(block, source, target, word, float(bounds[k]), float(bounds[k + 1])))
        occupied = (occupied - {source}) | {target}
    return moves


def make_scene(rng: np.random.Generator, seconds: float, level: Level = "normal") -> Scene:
    """Draw a scene of a level."""
    difficulty = LEVELS[level]
    count = int(rng.integers(difficulty.blocks[0], difficulty.blocks[1] + 1))
    box: Cell = [(0, 0), (CELLS - 1, 0), (0, CELLS - 1), (CELLS - 1, CELLS - 1)][int(rng.integers(4))]
    table = [(x, y) for x in range(CELLS) for y in range(CELLS) if (x, y) != box]
    while True:
        cells = [table[k] for k in rng.permutation(len(table))[:count]]
        moves = _moves(rng, cells, box, int(rng.integers(2, min(difficulty.moves, count) + 1)), seconds)
        if moves is not None:
            break
    colours = tuple(list(COLOURS)[k] for k in rng.permutation(len(COLOURS))[:count])
    offsets_N2 = rng.uniform(-difficulty.jitter, difficulty.jitter, (count, 2))
    gripper_start = (float(rng.uniform(0.4, CELLS - 0.4)), float(rng.uniform(0.4, CELLS - 0.4)))
    texture_seed = int(rng.integers(2**31))
    return Scene(seconds, level, colours, tuple(cells), offsets_N2, box, tuple(moves), gripper_start, texture_seed)


SPLIT_SHARES: dict[Split, range] = {"base": range(0, 48), "pool": range(48, 88), "eval": range(88, 100)}


def split_of(scene: Scene) -> Split:
    """The split a configuration belongs to, whatever seed drew it: no configuration is in two splits."""
    bucket = int(scene.signature()[:8], 16) % 100
    return next(split for split, buckets in SPLIT_SHARES.items() if bucket in buckets)


def scenes(split: Split, count: int, seed: int, seconds: tuple[float, ...], shares: dict[Level, float]) -> list[Scene]:
    """`count` different scenes of a split; lengths take turns, levels are drawn with their shares."""
    rng = np.random.default_rng([seed, list(SPLIT_SHARES).index(split)])
    levels, weights = list(shares), np.array(list(shares.values()))
    found: list[Scene] = []
    seen: set[str] = set()
    while len(found) < count:
        level: Level = levels[int(rng.choice(len(levels), p=weights / weights.sum()))]
        scene = make_scene(rng, seconds[len(found) % len(seconds)], level)
        if split_of(scene) == split and scene.signature() not in seen:
            seen.add(scene.signature())
            found.append(scene)
    return found
