"""Write the tabletop's own Qwen2.5-VL: random parameters, about a million by default, and a word-level tokenizer.

    python -m examples.tabletop.make_base --out DIR [--seed 0] [--size small|large]

The architecture and the files are those of the released checkpoints; only sizes and vocabulary are small.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.tabletop.questions import VOCABULARY

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Size:
    """Widths and depths of the language model and of the vision tower, and the spread of random weights."""

    hidden: int
    layers: int
    heads: int
    vision_hidden: int
    vision_layers: int
    std: float


SIZES = {"small": Size(128, 4, 4, 64, 2, 0.06), "large": Size(512, 8, 8, 256, 4, 0.03)}
MAKE_TINY = Path(__file__).resolve().parents[2] / "tools" / "make_tiny.py"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def _make_tiny() -> Any:
    """The tool that writes tiny checkpoints; its processor files and special tokens are used here."""
    spec = importlib.util.spec_from_file_location("make_tiny", MAKE_TINY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tokenizer(out: Path, special_tokens: tuple[str, ...]) -> dict[str, int]:
    """A word-level fast tokenizer; whitespace separates and is not kept. Returns token -> id."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *ROLES, *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+\.\d+|\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(special_tokens[3:]),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return tokenizer.get_vocab(with_added_tokens=True)


def model_config(ids: dict[str, int], size: Size) -> Any:
    """A language model of some size over its vision tower, both with MLPs of three times their width."""
    from transformers import Qwen2_5_VLConfig

    vocabulary = -(-(max(ids.values()) + 1) // 16) * 16
    angles = size.hidden // size.heads // 2
    sections = [angles // 4, (angles - angles // 4) // 2, (angles - angles // 4) // 2]
    common = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
              "pad_token_id": ids["<|endoftext|>"]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        text_config={"vocab_size": vocabulary, "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden,
                     "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
                     "num_key_value_heads": size.heads, "max_position_embeddings": 4096,
                     "rms_norm_eps": 1e-6, "rope_parameters": rope, "tie_word_embeddings": False, **common},
        vision_config={"depth": size.vision_layers, "hidden_size": size.vision_hidden,
                       "intermediate_size": 3 * size.vision_hidden, "num_heads": size.vision_hidden // 32,
                       "out_hidden_size": size.hidden, "patch_size": 14, "spatial_merge_size": 2,
                       "temporal_patch_size": 2, "in_channels": 3, "tokens_per_second": 1, "window_size": 112,
                       "fullatt_block_indexes": list(range(size.vision_layers))},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        **common,
    )  # fmt: skip


def make_base(out: Path, seed: int = 0, size: str = "small") -> Path:
    """Write the checkpoint to `out`: weights normal, norms 1, biases 0."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    make_tiny = _make_tiny()
    out.mkdir(parents=True, exist_ok=True)
    config = model_config(write_tokenizer(out, make_tiny.SPECIAL_TOKENS), SIZES[size])
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(SIZES[size].std * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(out)
    make_tiny.write_processor_files(out, video_file=True)
    ends = [config.eos_token_id, config.pad_token_id]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": ends[1]}))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    arguments = parser.parse_args()
    print(make_base(arguments.out, arguments.seed, arguments.size))


if __name__ == "__main__":
    main()
