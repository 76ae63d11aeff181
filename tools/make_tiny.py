"""Make a small random Qwen2.5-VL checkpoint, complete with tokenizer, chat template and processor files.

    python tools/make_tiny.py --out DIR [--preset tiny|small] [--tied] [--legacy-config]

The architecture is the real one, only the sizes are small: `tiny` has 8 layers, 8 heads and 4 KV heads, so that
every parallel layout divides. The directory loads with transformers and with SGLang, without any download.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 4, "vocab_size": 1024, "mrope_section": [2, 3, 3]},
        "vision": {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "window_size": 56,
                   "fullatt_block_indexes": [1, 3]},
    },
    "small": {
        "text": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 4, "vocab_size": 4096, "mrope_section": [8, 12, 12]},
        "vision": {"depth": 8, "hidden_size": 160, "intermediate_size": 320, "num_heads": 4, "window_size": 112,
                   "fullatt_block_indexes": [3, 7]},
    },
}  # fmt: skip

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
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

CORPUS = """\
The gripper moves to the red block and lifts it above the table before it turns to the left.
How many blocks are on the table? Answer with one number. There are 3 blocks and 2 boxes.
First pick up the cup, then open the drawer, then put the cup into the drawer, and close it.
<think>The robot reaches for the handle, so it is about to open the door.</think><answer>B</answer>
Point at the place where the bottle can be grasped: (0.42, 0.57). Was the task completed? yes or no.
The distance between the chair and the door is about 1.5 metres; the sofa stands 240 cm away.
What happens next? A. The arm pushes the green cube. B. The arm stops. C. The arm picks up the sponge.
You are a helpful assistant. Describe the video in detail, step by step, and explain why it fails.
Zahlen, Wörter und Sätze; des mots et des phrases; 数字 和 文字; 機械 学習; числа и слова.
"""


def make(
    out: str | os.PathLike[str],
    preset: str = "tiny",
    tied: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    legacy_config: bool = False,
    vocab_size: int | None = None,
) -> Path:
    """Write the checkpoint to `out` and return its path; `legacy_config` writes an older config.json, `vocab_size`
    replaces the preset's."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vocab_size = vocab_size or PRESETS[preset]["text"]["vocab_size"]
    config = model_config(preset, tied, vocab_size, write_tokenizer(out, vocab_size))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    randomise(model, seed + 1)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    write_processor_files(out, video_file=not legacy_config)
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [config.eos_token_id, config.pad_token_id], "pad_token_id": config.pad_token_id})
    )
    if legacy_config:
        write_legacy_config(out)
    return out


def model_config(preset: str, tied: bool, vocab_size: int, ids: dict[str, int]) -> Any:
    """Transformers' configuration of a preset."""
    from transformers import Qwen2_5_VLConfig

    text = PRESETS[preset]["text"] | {"vocab_size": vocab_size}
    vision = dict(PRESETS[preset]["vision"])
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    common = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
              "pad_token_id": ids["<|endoftext|>"]}  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={**text, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_parameters": rope,
                     "tie_word_embeddings": tied, **common},
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
                       "temporal_patch_size": 2, "in_channels": 3, "tokens_per_second": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
        **common,
    )  # fmt: skip


def randomise(model: Any, seed: int) -> None:
    """Give norms and biases values that a wrong mapping would not survive, and weights a scale that makes
    log-probs differ from uniform."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_q" in name
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.05 * noise)


def write_tokenizer(out: Path, vocab_size: int) -> dict[str, int]:
    """Train a byte-level BPE on a few sentences, add Qwen's special tokens; returns their ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 64, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines() * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Qwen2TokenizerFast", "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False))
    (out / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=False), ensure_ascii=False))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    (out / "merges.txt").write_text("\n".join(m if isinstance(m, str) else " ".join(m) for m in merges) + "\n")
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_processor_files(out: Path, video_file: bool) -> None:
    """Image and video processor settings with the values of the released checkpoints."""
    image = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    (out / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    if video_file:
        video = image | {"video_processor_type": "Qwen2VLVideoProcessor", "max_pixels": 602112, "min_pixels": 100352}
        del video["image_processor_type"]
        (out / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))


def write_legacy_config(out: Path) -> None:
    """Rewrite config.json the way the released checkpoints have it: text fields flat, `rope_scaling`."""
    config = json.loads((out / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    flat |= {"rope_theta": rope["rope_theta"], "max_window_layers": text["num_hidden_layers"],
             "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}  # fmt: skip
    vision = config["vision_config"]
    vision["in_chans"] = vision.pop("in_channels", 3)
    legacy = {**flat, **config, "torch_dtype": config.pop("dtype", "float32"), "transformers_version": "4.41.2"}
    legacy.pop("dtype", None)
    (out / "config.json").write_text(json.dumps(legacy, indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--tied", action="store_true", help="share embedding and head, as the 3B model does")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--legacy-config", action="store_true", help="config.json as older releases wrote it")
    arguments = parser.parse_args()
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        parser.error(f"--out: {arguments.out} is a file, a folder is needed")
    print(make(**vars(arguments)))


if __name__ == "__main__":
    main()
