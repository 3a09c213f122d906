"""What every attack test gets: a judge for a source, and the trust level that this machine can give."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks.lab import Attack, hold
from tests.processes.judging import FEW_ROWS, Judged, judge


@pytest.fixture(scope="session")
def trust(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trust level of a run here: sealed with a working sandbox, else split."""
    checked = judge(tmp_path_factory.mktemp("check") / "run", cache, op="check").result
    assert checked["status"] == "ok", checked
    return str(checked.get("trust", "split"))


@pytest.fixture
def judged(tmp_path: Path, cache: Path) -> Callable[..., Judged]:
    return lambda source="", **request: judge(tmp_path / "run", cache, source, code=FEW_ROWS, **request)


@pytest.fixture
def holds(judged: Callable[..., Judged], cache: Path, trust: str) -> Callable[[Attack], None]:
    return lambda planted: hold(planted, judged, cache, trust)
