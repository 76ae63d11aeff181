"""What measuring hands on to the teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dppo_mcore.config import PracticeConfig
from dppo_mcore.metaloop.measuring import teacher_of
from dppo_mcore.practice.prompts import PromptTemplate
from dppo_mcore.practice.teacher import EndpointTeacher


def test_the_teacher_has_the_instructions_of_the_run() -> None:
    template = PromptTemplate(instructions={"counting": "in words"})
    practice = PracticeConfig(teacher_url="http://127.0.0.1:9", teacher_model="big")
    run: Any = SimpleNamespace(config=SimpleNamespace(practice=practice), template=template)
    teacher = teacher_of(run, None)
    assert isinstance(teacher, EndpointTeacher) and teacher.instructions == {"counting": "in words"}
