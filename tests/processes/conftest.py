"""A small prepared corpus in the shape of the tiny profile, made once for all process tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.judging import ROOT, write_corpus


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
