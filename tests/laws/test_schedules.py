"""Proves the schedules of learning rate, momentum and weight decay: ranges, ends, breaks, refusals. Needs torch."""

from typing import Any

import pytest
from hypothesis import strategies as st

from oracle import optim

from .law import law

units = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)
ratios = st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]) | st.floats(1e-3, 1)
phases = st.tuples(ratios, ratios).filter(lambda pair: sum(pair) <= 1)
honest = optim.lr_multiplier


def value(schedule: Any, *arguments: float) -> float:
    """Call a schedule whose arguments are legal: whatever it raises is its fault."""
    try:
        return float(schedule(*arguments))
    except (ValueError, ZeroDivisionError) as error:
        raise AssertionError(f"{arguments}: {error}") from error


def unguarded(progress: float, up: float, down: float, final: float) -> float:
    """The formula without a thought for ratios of 0."""
    left = min((1 - progress) / down, 1.0)
    return min(progress / up, 1.0) * (left + (1 - left) * final)


def early(progress: float, up: float, down: float, final: float) -> float:
    """Warm-down counted from the start of the run."""
    if progress < up:
        return progress / up
    left = (1 - progress) / (1 - down) if progress > down else 1.0
    return left + (1 - left) * final


def no_floor(progress: float, up: float, down: float, final: float) -> float:
    return honest(progress, up, down, 0.0)


@law(
    honest,
    mutants={
        "division by zero": unguarded,
        "final fraction forgotten": no_floor,
        "final fraction added": lambda p, up, down, final: honest(p, up, down, 0) + final,
        "falls from the start": lambda p, up, down, final: honest(p, 0.0, 1.0, final),
    },
    phases=phases,
    final=units,
)
def test_the_ends(schedule: Any, phases: tuple[float, float], final: float) -> None:
    up, down = phases
    assert value(schedule, 0.0, up, down, final) == (0.0 if up > 0 else 1.0)
    assert value(schedule, 1.0, up, down, final) == (final if down > 0 else 1.0)
    assert abs(value(schedule, (up + 1 - down) / 2, up, down, final) - 1) <= 1e-12


@law(
    honest,
    mutants={
        "division by zero": unguarded,
        "warm-down from the wrong end": early,
        "clamp forgotten": lambda p, up, down, final: (1 - p) / max(down, 1e-3) + final,
        "warm-up overshoots": lambda p, up, down, final: honest(p, up, down, final) if p >= up else 2 * p / up,
    },
    phases=phases,
    final=units,
    points=st.tuples(units, units).map(sorted),
)
def test_rises_stays_falls(schedule: Any, phases: tuple[float, float], final: float, points: list[float]) -> None:
    up, down = phases
    first, second = points
    a, b = (value(schedule, p, up, down, final) for p in points)
    assert 0 <= a <= 1 and 0 <= b <= 1
    if second <= up:
        assert a <= b
    if up <= first and second <= 1 - down:
        assert abs(a - 1) <= 1e-12 and abs(b - 1) <= 1e-12
    if 1 - down <= first:
        assert a >= b - 1e-12


@law(
    honest,
    mutants={
        "warm-down from the wrong end": early,
        "steps down": lambda p, up, down, final: honest(p, up, 0.0, final) if p < 1 - down else final,
        "warm-up ends short": lambda p, up, down, final: honest(p, up, down, final) * (0.9 if p < up else 1),
    },
    phases=phases,
    final=units,
    step=st.sampled_from([1e-3, 1e-6, 1e-9]),
    at=st.sampled_from(["up", "down", "inside"]),
    progress=units,
)
def test_is_continuous(
    schedule: Any, phases: tuple[float, float], final: float, step: float, at: str, progress: float
) -> None:
    up, down = phases
    centre = {"up": up, "down": 1 - down, "inside": progress}[at]
    before, after = max(centre - step, 0.0), min(centre + step, 1.0)
    slope = max(1 / ratio for ratio in (*phases, 1.0) if ratio > 0)
    jump = value(schedule, after, up, down, final) - value(schedule, before, up, down, final)
    assert abs(jump) <= slope * (after - before) + 1e-12


def outside_counts_on(progress: float, up: float, down: float, final: float) -> float:
    return honest(progress, up, down, final) - max(progress - 1, 0.0)


@law(honest, mutants={"falls on past the end": outside_counts_on}, phases=phases, final=units, by=st.floats(1e-3, 9))
def test_progress_past_an_end_is_the_end(schedule: Any, phases: tuple[float, float], final: float, by: float) -> None:
    assert value(schedule, -by, *phases, final) == value(schedule, 0.0, *phases, final)
    assert value(schedule, 1 + by, *phases, final) == value(schedule, 1.0, *phases, final)


def lenient(progress: float, up: float, down: float, final: float) -> float:
    up, down, final = (min(max(ratio, 0.0), 1.0) for ratio in (up, down, final))
    return honest(progress, up, min(down, 1 - up), final)


@law(
    honest,
    mutants={"squeezes overlapping ramps": lenient, "checks nothing": lambda p, up, down, final: 1.0},
    wrong=st.sampled_from(
        [
            ((0.6, 0.5, 0.0), "warmup_ratio 0.6 + warmdown_ratio 0.5 is more than 1"),
            ((-0.1, 0.5, 0.0), "warmup_ratio is -0.1, use a number from 0 to 1"),
            ((0.0, 1.5, 0.0), "warmdown_ratio is 1.5"),
            ((0.0, 0.5, 2.0), "final_lr_frac is 2.0"),
            ((0.0, float("nan"), 0.0), "warmdown_ratio is nan"),
        ]
    ),
    progress=units,
)
def test_impossible_schedules_are_refused(schedule: Any, wrong: tuple[Any, str], progress: float) -> None:
    arguments, message = wrong
    try:
        schedule(progress, *arguments)
    except ValueError as error:
        assert message in str(error)
    else:
        raise AssertionError(f"accepted {arguments}")


def rises_on(step: int, start: float, end: float, steps: int) -> float:
    return start + (end - start) * step / steps if steps else end


@law(
    optim.muon_momentum,
    mutants={
        "rises on": rises_on,
        "the other way": lambda step, start, end, steps: optim.muon_momentum(step, end, start, steps),
        "division by zero": lambda step, start, end, steps: start + (end - start) * min(step / steps, 1.0),
        "at once": lambda step, start, end, steps: end,
    },
    start=units,
    end=units,
    steps=st.integers(0, 400),
    step=st.integers(0, 1000),
)
def test_momentum_ramps_then_stays(momentum: Any, start: float, end: float, steps: int, step: int) -> None:
    if steps > 0:
        assert value(momentum, 0, start, end, steps) == start
    assert value(momentum, steps + step, start, end, steps) == end
    if step < steps:
        assert abs(value(momentum, step, start, end, steps) - (start + (end - start) * step / steps)) <= 1e-12


def test_momentum_of_the_starting_point() -> None:
    assert [optim.muon_momentum(step) for step in (0, 300, 10_000)] == [0.85, 0.95, 0.95]
    assert optim.muon_momentum(150) == pytest.approx(0.9, abs=1e-12)


@law(
    optim.weight_decay,
    mutants={"constant": lambda p, base: base, "rises": lambda p, base: base * p},
    progress=units,
    base=st.floats(0.01, 2),
)
def test_weight_decay_falls_to_nothing(decay: Any, progress: float, base: float) -> None:
    assert decay(0.0, base) == base and decay(1.0, base) == 0
    assert abs(decay(progress, base) - (base - base * progress)) <= 1e-12
