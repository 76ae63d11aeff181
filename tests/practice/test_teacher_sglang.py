"""The teacher at the OpenAI-compatible endpoint of a real SGLang server, with frames of a clip as images."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.practice.teacher import EndpointTeacher, collect
from dppo_mcore.practice.teacher_client import ChatClient
from dppo_mcore.practice.teacher_media import media_parts
from dppo_mcore.rewards import score
from dppo_mcore.types import Media, Sample, Turn
from tests.support.sglang_server import HttpServer

PHASE = "1-2 weakness"


@pytest.mark.sglang
def test_real_endpoint(sglang_server: HttpServer, tmp_path: Path) -> None:
    clip_THWC = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
    shown = (Media("video", "/clips/0.mp4"),)
    samples = [Sample(f"s{i}", "counting", (Turn("user", "<video>How many?"),), shown, gold=3) for i in range(2)]
    client = ChatClient(sglang_server.url, "default", timeout_s=120, patience_s=60)
    parts = media_parts("frames", lambda _: [clip_THWC], most_frames=2)
    teacher = EndpointTeacher(client, parts, max_tokens=12, temperature=1.0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples(samples, "rl")
        ledger.plan([PhasePlan(PHASE, 1, "weakness")])
        began = time.monotonic()
        result = collect(ledger, PHASE, samples, teacher, lambda tasks: [score(*t) for t in tasks], answers=2)
        answers = ledger.teacher_answers(PHASE)
    assert (result.asked, result.missing, result.reason) == (4, 0, ""), (result, time.monotonic() - began)
    assert all(answer.error is None and answer.text.strip() and answer.tokens > 0 for answer in answers)
