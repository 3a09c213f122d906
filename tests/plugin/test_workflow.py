"""The CI workflow: this project's and the one to copy run the same commands, and each is one that the docs explain."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = (ROOT / ".github/workflows/autoresearch.yml").read_text()
DOCS = (ROOT / "docs/ci.md").read_text()
(COPY,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
README = (ROOT / "README.md").read_text()


def commands(workflow: str) -> dict[str, str]:
    """Return the one-line commands of a workflow by their steps' names."""
    steps = re.findall(r"- name: (\w+)\n(?: +working-directory: \w+\n)? +run: (?!\|)(.*)", workflow)
    assert len(steps) == 5, steps
    return dict(steps)


def test_the_copy_runs_what_this_project_runs() -> None:
    assert list(commands(OWN)) == ["Guard", "Laws", "Data", "Lock", "Determinism"]
    assert commands(OWN) == commands(COPY)


@pytest.mark.parametrize("name", commands(OWN))
def test_each_command_is_explained_to_users(name: str) -> None:
    command = commands(OWN)[name]
    options = re.findall(r"--autoresearch-[\w-]+(?:=check)?", command) or ["oracle.prepare"]
    assert all(f"{option}" in README for option in options), options


@pytest.mark.parametrize("workflow", [OWN, COPY], ids=["own", "copy"])
def test_nothing_of_a_pull_request_reaches_a_shell_or_has_rights(workflow: str) -> None:
    runs = re.findall(r"run: (\|\n(?: {10,}.*\n)+|.*)", workflow)
    assert runs and not [run for run in runs if "${{" in run]
    assert "permissions:\n  contents: read\n" in workflow
    assert "pull_request_target" not in workflow
    assert workflow.count("fetch-depth: 0") == 1
    for name in ("Guard", "Laws"):
        assert commands(workflow)[name].startswith("pytest -c /dev/null --rootdir . ")


@pytest.mark.parametrize("workflow", [OWN, COPY], ids=["own", "copy"])
def test_where_the_guard_runs_determinism_there_is_data(workflow: str) -> None:
    before, guard, _ = workflow.partition("- name: Guard\n")
    assert guard and re.search(
        rf"if: env.ALLOW != ''\n.*run: {re.escape(commands(workflow)['Data'])}\n", before, re.DOTALL
    )
