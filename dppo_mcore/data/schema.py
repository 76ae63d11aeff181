"""One manifest row, in any of the accepted schemas, to a validated `Sample`.

Accepted: our own form (`media` list), `messages` or `conversations`, turns as `role`/`content` or `from`/`value`,
media keys `video`, `videos`, `image`, `images` holding a string or a list. `docs/data.md` has an example of each.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dppo_mcore.data.errors import DataError
from dppo_mcore.types import Media, Sample, Turn

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
OWN_KEYS = {"id", "objective", "dimension", "source", "data_source", "gold", "answer", "extras", "media", "messages",
            "conversations", "video", "videos", "image", "images", "start", "end", "system"}  # fmt: skip
MARKER = re.compile(r"<(image|video)>")


def parse_row(row: Any, root: str, default_id: str) -> Sample:
    """A row as a `Sample`; raises `DataError` with the field that is wrong. `root` is absolute."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    parts: list[Media] = []
    turns = _turns(row, parts)
    turns, media = _place_media(turns, _media(row, parts, root))
    answer = row.get("answer")
    if turns and turns[-1].role == "assistant":
        answer = answer if answer is not None else turns[-1].content
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise DataError("messages: the question must end with a user turn")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"answer: must be text, got {type(answer).__name__}")
    extras = row.get("extras") or {}
    if not isinstance(extras, Mapping):
        raise DataError(f"extras: must be an object, got {type(extras).__name__}")
    gold = answer if row.get("gold") is None else row["gold"]
    return Sample(
        id=_text(row, "id") or default_id,
        objective=_text(row, "objective") or guess_objective(gold),
        turns=tuple(turns),
        media=media,
        dimension=_text(row, "dimension"),
        gold=gold,
        answer=answer,
        source=_text(row, "source") or _text(row, "data_source"),
        extras={**{key: value for key, value in row.items() if key not in OWN_KEYS}, **extras},
    )


def guess_objective(gold: Any) -> str:
    """Objective of a row that names none: a choice letter, yes/no and a number have rules of their own."""
    text = str(gold).strip()
    if re.fullmatch(r"\(?[A-Z]\)?\.?", text):
        return "prediction"
    if text.lower() in ("yes", "no"):
        return "success"
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", text):
        return "counting"
    return "exact"


def resolve(path: Any, root: str) -> str:
    """Absolute path of a medium; refuses one that leaves `root`. Symbolic links inside the root are followed."""
    if not isinstance(path, str) or not path:
        raise DataError(f"media path must be non-empty text, got {path!r}")
    plain = path.removeprefix("file://")
    if "://" in plain or "\0" in plain:
        raise DataError(f"media path {path!r} is not the name of a file")
    whole = os.path.normpath(os.path.join(root, plain))
    if whole != root and not whole.startswith(root.rstrip(os.sep) + os.sep):
        raise DataError(f"media path {path!r} lies outside the media root {root}")
    return whole


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{key}: must be text, got {type(value).__name__}")


def _either(row: Mapping[str, Any], key: str, other: str) -> Any:
    """A value under one of two names; null is as good as absent, tables write it into every row that lacks a column."""
    return row.get(other) if row.get(key) is None else row[key]


def _turns(row: Mapping[str, Any], parts: list[Media]) -> list[Turn]:
    raw = _either(row, "messages", "conversations")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise DataError("messages: missing or empty (also accepted as conversations)")
    turns = [Turn("system", row["system"])] if isinstance(row.get("system"), str) else []
    for number, turn in enumerate(raw):
        if not isinstance(turn, Mapping):
            raise DataError(f"messages[{number}]: must be an object")
        named = _either(turn, "role", "from")
        role = ROLES.get(str(named))
        if role is None:
            raise DataError(f"messages[{number}].role: unknown {named!r}")
        content = _either(turn, "content", "value")
        if isinstance(content, list):
            content = _join_parts(content, number, parts)
        if not isinstance(content, str):
            raise DataError(f"messages[{number}].content: must be text or a list of parts")
        turns.append(Turn(role, content))  # type: ignore[arg-type]
    return turns


def _join_parts(content: list[Any], number: int, parts: list[Media]) -> str:
    """A turn given as OpenAI-style parts: its text with markers; media found on the way go to `parts`, unresolved."""
    text = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text.append(str(part.get("text", "")))
        elif kind in ("image", "video"):
            text.append(f"<{kind}>")
            where = f"messages[{number}].content"
            window = _window(
                {"start": _either(part, "start", "video_start"), "end": _either(part, "end", "video_end")}, where
            )
            if any(seconds is not None for seconds in window) and (kind == "image" or part.get(kind) is None):
                raise DataError(f"{where}: start and end are for a part that names a video")
            if part.get(kind) is not None:
                parts.append(Media(kind, part[kind], *window))
        else:
            raise DataError(f"messages[{number}].content: part of unknown type {kind!r}")
    return "".join(text)


def _media(row: Mapping[str, Any], parts: list[Media], root: str) -> list[Media]:
    found = [replace(part, path=resolve(part.path, root)) for part in parts]
    for number, item in enumerate(_as_list(row.get("media"))):
        if not isinstance(item, Mapping) or item.get("type") not in ("image", "video"):
            raise DataError(f"media[{number}]: must be an object with type image or video")
        window = _window(item, f"media[{number}]")
        if item["type"] == "image" and any(seconds is not None for seconds in window):
            raise DataError(f"media[{number}]: an image has no start and end")
        found.append(Media(item["type"], resolve(item.get("path"), root), *window))
    for key, kind in (("video", "video"), ("videos", "video"), ("image", "image"), ("images", "image")):
        for path in _as_list(row.get(key)):
            window = _window(row, key) if kind == "video" else (None, None)
            found.append(Media(kind, resolve(path, root), *window))  # type: ignore[arg-type]
    if mixed := {part.kind for part in parts} & {media.kind for media in found[len(parts) :]}:
        raise DataError(f"messages: parts and fields of the row both name a {min(mixed)}; name all in one way")
    if not (_as_list(row.get("video")) or _as_list(row.get("videos"))) and _window(row, "row") != (None, None):
        raise DataError(
            "start, end: are for video and videos, which the row has not; put them where the medium is named"
        )
    return found


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _window(row: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    return _seconds(row, "start", where), _seconds(row, "end", where)


def _seconds(row: Mapping[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise DataError(f"{where}.{key}: must be seconds >= 0, got {value!r}")
    if key == "end" and value <= (row.get("start") or 0):
        raise DataError(f"{where}.end: {value} is not after start {row.get('start')}")
    return float(value)


def _place_media(turns: list[Turn], media: list[Media]) -> tuple[list[Turn], tuple[Media, ...]]:
    """Put media in the order of their markers; media of a kind without any marker go first in the first user turn."""
    queues = {kind: [item for item in media if item.kind == kind] for kind in ("image", "video")}
    markers = [found for turn in turns for found in MARKER.findall(turn.content)]
    missing = "".join(f"<{kind}>" * len(queues[kind]) for kind in ("video", "image") if kind not in markers)
    if missing:
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise DataError("messages: no user turn to hold the media")
        turns[first] = Turn("user", missing + turns[first].content)
        markers = [found for turn in turns for found in MARKER.findall(turn.content)]
    for kind, queue in queues.items():
        if markers.count(kind) != len(queue):
            raise DataError(f"the text has {markers.count(kind)} <{kind}> but the row names {len(queue)} of them")
    if any(turn.role != "user" and MARKER.search(turn.content) for turn in turns):
        raise DataError("messages: only user turns may hold <image> or <video>")
    return turns, tuple(queues[kind].pop(0) for kind in markers)
