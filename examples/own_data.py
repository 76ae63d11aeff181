"""Clips and manifests that stand for your own in docs/tutorial.md: coloured blocks on grey, two kinds of questions.

python -m examples.own_data --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
EDGE, SECONDS, CELL = 56, 4, 28
SUMS = 40
PROMPTS = 'system: ""\nstructure: answer\ninstructions: {colour: "", counting: "", exact: ""}\n'


def write_clip(path: Path, colour: str, count: int, rng: np.random.Generator) -> None:
    """`count` blocks of one colour that flicker over a noisy table, 4 s at 2 frames a second."""
    cells = rng.permutation(4)[:count]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = EDGE
        stream.pix_fmt = "yuv420p"
        for _ in range(2 * SECONDS):
            frame_HW3 = rng.normal(110, 6, (EDGE, EDGE, 3))
            for cell in cells:
                top, left = CELL * (cell // 2) + 4, CELL * (cell % 2) + 4
                frame_HW3[top : top + 20, left : left + 20] = COLOURS[colour] + rng.normal(0, 8, 3)
            picture = av.VideoFrame.from_ndarray(np.clip(frame_HW3, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def rows(out: Path, split: str, clips: int, rng: np.random.Generator) -> list[tuple[dict[str, Any], str]]:
    """Two questions about each new clip, and their right answers."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(clips):
        colour, count = list(COLOURS)[rng.integers(4)], int(rng.integers(1, 5))
        path = f"clips/{split}-{number:04d}.mp4"
        write_clip(out / path, colour, count, rng)
        for objective, question, gold in (("colour", "which colour ?", colour), ("counting", "how many ?", count)):
            row = {
                "id": f"{split}-{number:04d}-{objective}",
                "objective": objective,
                "dimension": {"colour": "Perception", "counting": "Quantity"}[objective],
                "media": [{"type": "video", "path": path}],
                "messages": [{"role": "user", "content": f"<video>{question}"}],
                "gold": gold,
                "source": "own",
            }
            found.append((row, f"<answer>{gold}</answer>"))
    return found


def sums(split: str, numbers: Iterable[int]) -> list[tuple[dict[str, Any], str]]:
    """General data: sums, in text alone; every number has its own, up to SUMS."""
    return [({"id": f"{split}-{k}", "objective": "exact", "source": "general", "gold": str(k % 5 + k // 5),
              "messages": [{"role": "user", "content": f"{k % 5} plus {k // 5} ?"}]},
             f"<answer>{k % 5 + k // 5}</answer>") for k in numbers]  # fmt: skip


def answered(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The row as a conversation to learn from."""
    return {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} rows")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--clips", type=int, default=96, help="clips in the pool")
    arguments = parser.parse_args()
    out, rng = arguments.out, np.random.default_rng(0)
    base = rows(out, "base", 2 * arguments.clips, rng)
    pool = rows(out, "pool", arguments.clips, rng)
    held_out = rows(out, "held", arguments.clips // 2, rng)
    numbers = np.random.default_rng(1).permutation(SUMS).tolist()
    general = sums("general", numbers[: SUMS // 2])
    wrong = [(row, answer if rng.random() < 0.6 else base[rng.integers(len(base)) // 2 * 2 + k % 2][1])
             for k, (row, answer) in enumerate(base)]  # fmt: skip
    write(out / "base.jsonl", [answered(row, answer) for row, answer in wrong + general])
    write(out / "pool.jsonl", [row for row, _ in pool])
    write(out / "teacher.jsonl", [{"id": row["id"], "answer": answer} for row, answer in pool])
    write(out / "held_out.jsonl", [row for row, _ in held_out])
    write(out / "general.jsonl", [answered(row, answer) for row, answer in general])
    write(out / "general_held_out.jsonl", [row for row, _ in sums("general-held-out", numbers[SUMS // 2 :])])
    (out / "prompts.yaml").write_text(PROMPTS)


if __name__ == "__main__":
    main()
