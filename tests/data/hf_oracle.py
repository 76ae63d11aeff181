"""Hugging Face's own processors, run in SGLang's environment (it has torchvision; ours must not).

PYTHONPATH=tests/sglang_shims .venv-sglang/bin/python tests/data/hf_oracle.py MODEL CASES.pt ANSWERS.pt
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoProcessor


def answer(processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """`image` and `video` cases give patches and grid, `chat` cases give token ids too."""
    size = {"shortest_edge": case.get("min_pixels", 3136), "longest_edge": case.get("max_pixels", 602112)}
    if case["kind"] == "image":
        result = processor.image_processor(images=[case["frames"][0]], size=size, return_tensors="pt")
        return {"patches": result["pixel_values"], "grid": result["image_grid_thw"].tolist()}
    if case["kind"] == "video":
        result = processor.video_processor(
            videos=[case["frames"]], size=size, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
        )
        return {"patches": result["pixel_values_videos"], "grid": result["video_grid_thw"].tolist()}
    text = processor.apply_chat_template(
        case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
    )
    settings: dict[str, Any] = {}
    if case["images"]:
        settings["images_kwargs"] = {"size": size}
    if case["videos"]:
        metadata = [{"fps": rate, "total_num_frames": len(clip), "frames_indices": list(range(len(clip)))}
                    for clip, rate in zip(case["videos"], case["rates"], strict=True)]  # fmt: skip
        settings["videos_kwargs"] = {"size": size, "do_sample_frames": False, "video_metadata": metadata,
                                     "cap_pixels_per_frame": False}  # fmt: skip
    result = processor(
        text=[text], images=case["images"] or None, videos=case["videos"] or None, return_tensors="pt", **settings
    )
    found = {"ids": result["input_ids"][0].tolist(), "text": text}
    for name in ("pixel_values", "pixel_values_videos", "second_per_grid_ts"):
        if name in result:
            found[name] = result[name]
    return found


def main() -> None:
    """Answer every case of a file."""
    model, cases, answers = sys.argv[1:]
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(model)
    torch.save([answer(processor, case) for case in torch.load(cases, weights_only=False)], answers)


if __name__ == "__main__":
    main()
