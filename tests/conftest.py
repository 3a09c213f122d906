"""Hypothesis profiles: `gate` is what `make test` runs, `hunt` is for nights (HYPOTHESIS_PROFILE=hunt)."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("gate", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("hunt", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

pytest_plugins = ["pytester"]
