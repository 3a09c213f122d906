"""`op: determinism`: an honest model is scored the same whatever must not matter, and a model that draws random numbers
while it is scored is found out.

Needs the `cache` fixture; each test judges one artifact a dozen times.
"""

from pathlib import Path

from tests.processes.judging import FEW_ROWS, judge
from tests.processes.test_judge import HONEST


def test_an_honest_model_scores_the_same_in_every_way(tmp_path: Path, cache: Path) -> None:
    result = judge(tmp_path, cache, HONEST, code=FEW_ROWS, op="determinism").result
    assert result["status"] == "ok", result
    table = {row["condition"]: row for row in result["table"]}
    assert all(row["holds"] for row in table.values()), table
    assert {"a fresh process", "another fresh process", "rows in another order", "batches of 1", "one thread"} <= set(
        table
    )
    exact = [row for row in table.values() if row["guarantee"] == "bit-equal"]
    assert len(exact) >= 9 and len({row["value"] for row in exact}) == 1
    assert 0 < float.fromhex(exact[0]["value"]) < 10


def test_a_model_that_draws_while_it_is_scored_breaks_a_guarantee(tmp_path: Path, cache: Path) -> None:
    noisy = HONEST.replace(
        "return self.table[tokens]", "return self.table[tokens] + 0.01 * torch.randn(self.table.shape[1])"
    )
    short = f"from oracle import determinism\ndeterminism.POISON.clear()\n{FEW_ROWS}"
    table = judge(tmp_path, cache, noisy, code=short, op="determinism").result["table"]
    broken = {row["condition"] for row in table if not row["holds"]}
    assert "the same process again" in broken
    assert "another fresh process" not in broken  # the seed is the judge's: that much is deterministic
