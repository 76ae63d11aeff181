"""transformers' Qwen2.5-VL as the oracle, in fp32, one sequence at a time, with our position ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.rope import mrope_positions
from tests.model.cases import Conversation, answer_weights


def load_reference(folder: str) -> Any:
    """The oracle with eager attention."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logprobs(model: Any, item: Conversation, qwen: QwenConfig) -> list[Tensor]:
    """Log-probs of each answer of a conversation."""
    media = list(zip(item.grids, item.seconds, strict=True))
    sizes = [t * h * w for t, h, w in item.grids]
    pieces = item.patches_P.split(sizes) if item.patches_P is not None else []
    inputs: dict[str, Tensor] = {}
    for key, grid_key, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        chosen = [i for i, (_, seconds) in enumerate(media) if (seconds is not None) == wanted]
        if chosen:
            inputs[key] = torch.cat([pieces[i] for i in chosen])
            inputs[grid_key] = torch.tensor([item.grids[i] for i in chosen])
    found = []
    for answer in item.answers:
        ids = [*item.prompt, *answer]
        positions = mrope_positions(ids, item.grids, item.seconds, qwen)
        logits = model(
            input_ids=torch.tensor([ids]), position_ids=positions.unsqueeze(1), use_cache=False, **inputs
        ).logits[0, len(item.prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1))
    return found


def reference_loss(model: Any, items: Sequence[Conversation], qwen: QwenConfig) -> tuple[Tensor, list[Tensor]]:
    """Weighted sum of all answers' log-probs over their number of tokens, and the log-probs."""
    logprobs = [one for item in items for one in reference_logprobs(model, item, qwen)]
    weights = [answer_weights(answer) for item in items for answer in item.answers]
    total = sum((lp * w).sum() for lp, w in zip(logprobs, weights, strict=True))
    return total / sum(len(lp) for lp in logprobs), [lp.detach() for lp in logprobs]


def reference_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients under the checkpoint's own key names."""
    return {hf_name(name): parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def reference_training(
    folder: str, rows: Sequence[Sequence[Conversation]], qwen: QwenConfig, steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses before each of `steps` AdamW steps over all rows, and the weights after them."""
    model = load_reference(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = reference_loss(model, [item for row in rows for item in row], qwen)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def hf_name(name: str) -> str:
    """The checkpoint's key of a parameter of transformers' model."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
