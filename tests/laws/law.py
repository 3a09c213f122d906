"""`law`: a property that must hold for its subject and must be violated by each of its mutants.

And the Hypothesis profiles, here and in no conftest.py, so that they are locked with the laws: `gate` is what
`make test` runs, `hunt` is for nights (HYPOTHESIS_PROFILE=hunt).
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

settings.register_profile("gate", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("hunt", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


def law(
    subject: Any, *, mutants: dict[str, Any], **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn `body(subject, **drawn)` into a test: green for `subject`, red for every planted bug in `mutants`.

    A law without a mutant is an error: a law that cannot fail proves nothing. A body without strategies is run once.
    """
    if not mutants:
        raise ValueError("a law needs at least one mutant that turns it red")

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def check(of: Any, *, shrink: bool) -> None:
            def run(**drawn: Any) -> None:
                body(of, **drawn)

            if not strategies:
                return run()
            run.__name__ = run.__qualname__ = body.__name__
            quick = settings(phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
            (given(**strategies)(run) if shrink else quick(given(**strategies)(run)))()

        def test(planted: str | None) -> None:
            if planted is None:
                check(subject, shrink=True)
            else:
                with pytest.raises((AssertionError, pytest.fail.Exception)):
                    check(mutants[planted], shrink=False)

        test.__name__ = test.__qualname__ = body.__name__
        test.__doc__ = body.__doc__
        test.__module__ = body.__module__
        ids = ["holds", *(f"red: {name}" for name in mutants)]
        return pytest.mark.parametrize("planted", [None, *mutants], ids=ids)(test)

    return decorate
