"""Proves that a kill -9 at any moment of a night costs nothing: started again, it ends as if it had never been killed.

Ledger, branch, refs, results.tsv, worktree and the user's files are compared to the last byte with those of a night
that nobody killed. Needs git; forks.py says how a night takes a fraction of a second and what a step is.
HYPOTHESIS_PROFILE=hunt kills at 1,000 random points, some of them while the damage of an earlier kill is mended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.forks import LOOP, Ended, Idea, Nights, build, copy, differences, outcomes, train, view

NOISY = train(1.0, noise=0.01)  # the baselines: sigma is about 0.005
IDEAS = [
    Idea(description="better", text=train(0.9, noise=0.0)),
    Idea(description="worse", text=train(1.2)),
    Idea(description="breaks", text=train(0.5, mode="bang")),
    Idea(description="close", text=train(0.89, noise=0.0)),
    Idea(description="busy at first", text=train(1.9, mode="busy at first")),
    *(Idea(description=f"worse still {n}", text=train(2.0 + n)) for n in range(6, 21)),
]
TRY = ("--autoresearch-try", "by hand", "--autoresearch-tag=lab")
ENDS = ((1,), (0, 4))  # exit codes of a loop out of ideas; of a try: kept, or kept already and there is nothing to try


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a night: the experiments before it and those at its end, and what its runs come to."""

    first: int
    last: int
    outcomes: tuple[str, ...]
    after: str = "run"  # what comes before is done alike in another part,
    runs: range = range(9)  # and so is what does not come after so many runs
    edit: str = ""  # of the user's own train.py, to be tried


PARTS = {
    "begin": Part(first=-1, last=0, outcomes=("baseline",) * 3, after="", runs=range(2)),
    "keep": Part(first=0, last=1, outcomes=("keep",), after="proposal"),
    "discard": Part(first=1, last=2, outcomes=("discard",), after="proposal"),
    "crash": Part(first=2, last=3, outcomes=("crash",)),
    "confirm and keep": Part(first=3, last=4, outcomes=("confirm", "keep")),
    "retry": Part(first=4, last=5, outcomes=("retry", "discard"), runs=range(2)),
    "champion again": Part(first=19, last=20, outcomes=("discard", "champion"), runs=range(2, 3)),
    "try and keep": Part(first=20, last=20, outcomes=("keep",), after="", edit=train(0.5)),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part as it was when no kill interrupted it."""

    part: Part
    nights: Nights
    top: Path
    before: Path  # a copy of the repository at its beginning
    whole: dict[str, Any]  # view of its end

    def run(self, **how: Any) -> Ended:
        """Start the night, or start it again, up to this part's end."""
        args = TRY if self.part.edit else LOOP
        return self.nights.run(self.top, *args, ideas=IDEAS[: self.part.last], **how)

    def finish(self, plant: str = "") -> None:
        """Start the night again, and check that it ends as it did."""
        ended = self.run(plant=plant)
        assert ended.code in ENDS[bool(self.part.edit)], ended.out
        assert not (differ := differences(view(self.top), self.whole)), "\n".join(differ)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    """Record the night without a kill."""
    home = tmp_path_factory.mktemp("kill")
    top = build(home / "project", NOISY)
    done, made = -1, {}
    with Nights(home / "home") as nights:
        for name, part in PARTS.items():
            if done < part.first:
                assert nights.run(top, *LOOP, ideas=IDEAS[: part.first]).code == 1
            if part.edit:
                (top / "train.py").write_text(part.edit)
            before, so_far = home / f"before {name}", len(outcomes(top))
            copy(top, before)
            ended = Stage(part=part, nights=nights, top=top, before=before, whole={}).run()
            assert tuple(outcomes(top)[so_far:]) == part.outcomes, ended.out
            made[name] = Stage(part=part, nights=nights, top=top, before=before, whole=view(top))
            done = part.last
        yield made


def kill_everywhere(stage: Stage, images: Path, plant: str = "") -> None:
    """Finish the part from what a kill leaves before each of its steps, and after its last."""
    copy(stage.before, stage.top)
    ended = stage.run(images=images, after=stage.part.after, plant=plant)
    steps = sorted(int(image.name) for image in images.iterdir())
    steps = [step for step in steps if ended.steps[:step].count("run") in stage.part.runs]
    assert len(steps) > 5, ended.out
    for step in steps[::-2] if plant else steps:
        copy(images / str(step), stage.top)
        try:
            stage.finish(plant)
        except AssertionError as exc:
            raise AssertionError(f"killed before step {step}, {ended.steps[step]}: {exc}") from exc


@pytest.mark.parametrize("name", PARTS)
def test_a_kill_at_every_step(stages: dict[str, Stage], tmp_path: Path, name: str) -> None:
    kill_everywhere(stages[name], tmp_path)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        ("git before ledger", "keep"),
        ("git never catches up", "keep"),
        ("torn record believed", "crash"),
        ("run folders stay", "crash"),
        ("second run forgotten", "confirm and keep"),
    ],
)
def test_a_kill_shows_a_planted_bug(stages: dict[str, Stage], tmp_path: Path, plant: str, name: str) -> None:
    with pytest.raises(AssertionError, match="killed before step"):
        kill_everywhere(stages[name], tmp_path, plant)


@settings(max_examples=1_000 if settings.get_current_profile_name() == "hunt" else 6)
@given(data=st.data())
def test_kills_at_random(stages: dict[str, Stage], data: st.DataObject) -> None:
    """Here the process does end by SIGKILL, and what it leaves is what the images of the test above show."""
    stage = stages[data.draw(st.sampled_from(sorted(PARTS)), label="part")]
    copy(stage.before, stage.top)
    for _ in range(data.draw(st.integers(1, 3), label="kills")):
        ended = stage.run(kill=data.draw(st.integers(0, 120), label="step"))
        assert ended.killed or ended.code in ENDS[bool(stage.part.edit)], ended.out
    stage.finish()
