"""The device that a run is given: what a name hides, and one clear line for a device that is not there.

Needs the `cache` fixture. A GPU is not needed: the runs on one are in tests/gpu.
"""

import os
import sys
from pathlib import Path

import pytest

from oracle._processes import DeviceError, select_device
from tests.processes.judging import judge


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac's GPU cannot be hidden")
@pytest.mark.parametrize(
    ("name", "visible", "order"),
    [
        (None, "2", None),
        ("auto", "2", None),
        ("cuda", "2", None),
        ("cpu", "", None),
        ("cuda:0", "0", "PCI_BUS_ID"),
        ("cuda:11", "11", "PCI_BUS_ID"),
    ],
)
def test_a_name_hides_every_other_device(
    name: str | None, visible: str, order: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    select_device(name)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_DEVICE_ORDER")) == (visible, order)


@pytest.mark.parametrize(
    "name", ["mps", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cuda:0,1", "cuda:²"]
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="choose auto, cpu, cuda or cuda:N"):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, cache: Path, name: str) -> None:
    result = judge(tmp_path / "run", cache, op="check", device=name).result
    assert result["status"] == "unusable"
    assert name in result["reason"] and "\n" not in result["reason"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac's GPU cannot be hidden")
def test_the_cpu_can_be_chosen_and_keeps_its_sandbox(tmp_path: Path, cache: Path) -> None:
    """A GPU that is hidden must not make the search for a sandbox that shows it fail."""
    chosen = judge(tmp_path / "chosen", cache, op="check", device="cpu").result
    default = judge(tmp_path / "default", cache, op="check").result
    assert chosen["status"] == "ok" and chosen["trust"] == default["trust"]


def test_a_memory_limit_is_part_of_what_scores_are_compared_under(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTORESEARCH_MEMORY_GB", raising=False)
    assert "memory_gb" not in judge(tmp_path / "none", cache, op="check").result["fingerprint"]
    monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", "8")
    assert judge(tmp_path / "some", cache, op="check").result["fingerprint"]["memory_gb"] == 8.0
    monkeypatch.setenv("AUTORESEARCH_MEMORY_GB", "all")
    wrong = judge(tmp_path / "wrong", cache, op="check").result
    assert (wrong["status"], wrong["reason"][:32]) == ("unusable", "AUTORESEARCH_MEMORY_GB is 'all':")
