"""Nights whose proposer attacks: one loop runs a table of acts in turn, each beside an honest edit of train.py.

The acts are code that the proposer executes in the loop's work tree, like an agent's shell would; names that it has:
`workdir`, `top` of the work tree, `common` (the repository's git directory), `git(*args)`, `write(name, text)`, `os`,
`shutil`, `Path`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

from tests.plugin.lab import Lab, Night

PROPOSER = r"""
import json, os, re, shutil, subprocess
from pathlib import Path
from pytest_autoresearch.propose import NoProposal

ACTS = json.loads(Path(__file__).with_name("acts.json").read_text())
RATES = iter(0.04 - step * 0.0005 for step in range(1, 1000))
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

def pytest_autoresearch_propose(workdir):
    if not ACTS:
        raise NoProposal("no more acts")
    name, code = ACTS.pop(0)
    path = workdir / "train.py"
    path.write_text(re.sub(r"^RATE = .*", f"RATE = {next(RATES):.4f}", path.read_text(), flags=re.M))
    def git(*args):
        command = ["git", "-c", "user.name=Eve", "-c", "user.email=eve@example.org", "-c", "core.hooksPath=/dev/null"]
        done = subprocess.run([*command, *args], cwd=workdir, env=CLEAN, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    def write(name, text):
        target = workdir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target
    common = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir"))
    top = Path(git("rev-parse", "--show-toplevel"))
    names = dict(workdir=workdir, top=top, common=common, git=git, write=write, os=os, shutil=shutil, Path=Path)
    exec(code, names)
    return name
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What a proposer does beside its honest edit, and how that must end."""

    code: str = ""
    verdict: str = "keep"  # "" where it is no experiment
    reason: str = ""  # regular expression: of the crash, or of why it is no experiment


def act(code: str, verdict: str = "keep", reason: str = "") -> Act:
    return Act(code=dedent(code), verdict=verdict, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """A night after its end."""

    lab: Lab
    night: Night
    records: Mapping[str, dict[str, Any]]  # of the experiments, by the act's name

    def check(self, name: str, planted: Act) -> None:
        """Check the verdict, the reason, and that the score is that of the commit's own train.py and no other."""
        out = self.night.out
        if not planted.verdict:
            assert name not in self.records, out
            assert re.search(f"no experiment: .*{planted.reason}", out), out
            return
        record = self.records[name]
        verdict = record["verdict"]
        assert verdict["outcome"] == planted.verdict, verdict
        assert re.search(planted.reason, verdict["reason"]), verdict
        ref = f"refs/autoresearch/lab/{record['number']:04d}"
        git = self.lab.git
        assert git("rev-parse", ref) == record["commit"]
        assert git("diff", "--name-only", "--relative", record["parent"], ref) == "train.py"
        if planted.verdict == "keep":
            found = re.search(r"^RATE = (.*)", git("--no-replace-objects", "show", f"{ref}:./train.py"), re.MULTILINE)
            assert found is not None
            assert record["result"]["score"] == 1.0 + abs(float(found[1]) - 0.02) + 0.064
            assert git("ls-tree", ref, "./train.py").startswith("100644 blob ")


def plan(lab: Lab, acts: Mapping[str, Act]) -> None:
    """Let a conftest.py propose the acts in turn; it and the plan are no part of the repository."""
    (lab.root / "conftest.py").write_text(PROPOSER)
    (lab.root / "acts.json").write_text(json.dumps([(name, planted.code) for name, planted in acts.items()]))


def run(lab: Lab, acts: Mapping[str, Act], *args: str, env: Mapping[str, str] | None = None) -> Acted:
    """Run a night of these acts."""
    plan(lab, acts)
    experiments = sum(bool(planted.verdict) for planted in acts.values())
    command = ("--autoresearch-loop", "--autoresearch-tag=lab", f"--autoresearch-max={experiments}", *args)
    night = lab.pytest(*command, env=env)
    records = {record["description"]: record for record in lab.runs if record["kind"] in ("experiment", "confirm")}
    return Acted(lab=lab, night=night, records=records)
