"""What the report's browser tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.driver import install


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Folder of the browser's driver."""
    return install()
