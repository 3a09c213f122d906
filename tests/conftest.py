"""Hypothesis profiles: `gate` is what `make test` runs, `hunt` is for nights (HYPOTHESIS_PROFILE=hunt).

And a small prepared corpus in the shape of the tiny profile, made once for all tests that judge.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.processes.judging import ROOT, write_corpus

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no child that a test starts would hear Ctrl-C


settings.register_profile("gate", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("hunt", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder that `python -m oracle.prepare --corpus FOLDER` filled."""
    home = tmp_path_factory.mktemp("cache")
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    command = [sys.executable, "-m", "oracle.prepare", "--profile", "tiny", "--corpus", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AUTORESEARCH_CACHE": str(home)}
    subprocess.run(command, env=env, check=True, capture_output=True)
    return home
