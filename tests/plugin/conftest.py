"""The `lab` fixture; needs git."""

from pathlib import Path

import pytest

from tests.plugin.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Return a project in a fresh repository."""
    return Lab.build(tmp_path / "project")
