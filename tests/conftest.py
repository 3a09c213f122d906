"""A small prepared corpus in the shape of the tiny profile, made once for all tests that judge.

The Hypothesis profiles are those of the laws, for every test.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tests.laws.law  # noqa: F401 - the profiles, before any test module is imported
from tests.processes.judging import ROOT, write_corpus

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no child that a test starts would hear Ctrl-C

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
