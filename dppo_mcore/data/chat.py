"""Conversations to token ids with the checkpoint's own chat template, and back to text.

The user's words can never act as control tokens: what looks like one in a turn is tokenised as plain text, and media
tokens there are refused.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from dppo_mcore.data.errors import DataError
from dppo_mcore.data.schema import MARKER
from dppo_mcore.types import Sample, Turn

MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
# Unicode noncharacters: never text, so one of them can mark places in the rendered template.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Chat:
    """Tokenizer and template of a Hugging Face directory."""

    def __init__(self, model_dir: str | Path) -> None:
        folder = Path(model_dir)
        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"{folder}: tokenizer.json is missing; save the checkpoint with its fast tokenizer")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items() if token.special}
        self._split = re.compile(
            "(" + "|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True)) + ")"
        )
        self._template = _environment().from_string(_template_text(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens in it stay text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of an answer, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render(self, sample: Sample, answer: str | None = None) -> tuple[list[int], list[bool]]:
        """Token ids and loss mask of a sample; one pad token per medium, not yet expanded.

        Without an answer the ids end with the opened assistant turn; with one, the mask covers the content of every
        assistant turn and the token that closes it.
        """
        turns = sample.turns if answer is None else (*sample.turns, Turn("assistant", answer))
        mark = self._mark(sample, turns)
        messages = [{"role": turn.role, "content": self._content(turn, mark)} for turn in turns]
        text = self._template.render(messages=messages, add_generation_prompt=answer is None)
        return self._tokenise(text, mark)

    def _mark(self, sample: Sample, turns: Sequence[Turn]) -> str:
        whole = "".join(turn.content for turn in turns)
        for token in MEDIA_TOKENS:
            if token in whole:
                raise DataError(f"sample {sample.id}: its text contains {token}; use <image> or <video> where media go")
        mark = next((sign for sign in NONCHARACTERS if sign not in whole), None)
        if mark is None:
            raise DataError(f"sample {sample.id}: its text holds every Unicode noncharacter from U+FDD0 to U+FDEF")
        return mark

    def _content(self, turn: Turn, mark: str) -> str | list[dict[str, str]]:
        def guarded(text: str) -> str:
            return self._split.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        pieces = MARKER.split(turn.content) if turn.role == "user" else [turn.content]
        if len(pieces) == 1:
            return guarded(turn.content)
        parts = []
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append({"type": piece, piece: ""})
            elif piece:
                parts.append({"type": "text", "text": guarded(piece)})
        return parts

    def _tokenise(self, text: str, mark: str) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learnt: list[bool] = []
        header = "assistant\n"
        opened = answering = False
        for piece in self._split.split(text):
            if piece in self.special:
                ids.append(self.special[piece])
                learnt.append(answering)
                answering = False
                opened = piece == "<|im_start|>"
            elif piece:
                encoding = self.tokenizer.encode(piece.replace(mark, ""), add_special_tokens=False)
                answering = opened and piece.startswith(header)
                ids.extend(encoding.ids)
                learnt.extend(answering and end > len(header) for _, end in encoding.offsets)
                opened = False
        return ids, learnt


def _template_text(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = json.loads(path.read_text()).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        if template:
            return template
    raise DataError(f"{folder}: no chat template (chat_template.jinja, chat_template.json or tokenizer_config.json)")


def _environment() -> ImmutableSandboxedEnvironment:
    """Set up as the templates' authors expect it."""

    def refuse(message: str) -> None:
        raise DataError(f"chat template: {message}")

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
