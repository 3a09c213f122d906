"""Whether scoring is deterministic: one trained artifact, scored again in every way that must not matter.

What is guaranteed is the same float from the same artifact on the same machine: in a fresh process, again in the same
one, with the rows in another order, and whatever state the candidate's code left the process in. Another batch size or
number of threads takes other kernels or splits reductions otherwise, so there only a tolerance can hold.

A profile with many rows is scored on its first ones, and the first line of the table says so: 14 passes over all of
climbmix would take minutes, and what differs between two passes differs in any thousand rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .prepared import Prepared
from .scoring import Scoring

TOLERANCE = {"cpu": 1e-5, "mps": 1e-4, "cuda": 2e-4}  # bits per byte, across batch sizes and thread counts
ROWS = 1_024  # that are scored at most
# What a candidate might leave behind at import; the scorer must not care
POISON = {
    "default dtype bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "reduced matmul precision": "torch.set_float32_matmul_precision('medium')",
    "gradients on": "torch.set_grad_enabled(True)",
    "autocast left on": "torch.autocast('cuda' if torch.cuda.is_available() else 'cpu', torch.bfloat16).__enter__()",
    "one thread set": "torch.set_num_threads(1)",
}


def table(scoring: Scoring, request: dict[str, Any], prepared: Prepared) -> list[dict[str, Any]]:
    """Score one artifact under every condition; return a row each: condition, value, difference, guarantee, holds."""
    rows = prepared.val_rows()
    of_all = f" (the first {ROWS} of {len(rows)} rows)" if len(rows) > ROWS else ""
    rows = rows[:ROWS]
    tolerance = TOLERANCE[scoring.device.type]
    exact, close = "bit-equal", f"within {tolerance:g}"
    reference = 0.0
    lines: list[dict[str, Any]] = []

    def note(condition: str, value: float, guarantee: str) -> None:
        difference = abs(value - reference)
        holds = value.hex() == reference.hex() if guarantee == exact else difference <= tolerance
        lines.append(
            {
                "condition": condition,
                "value": value.hex(),
                "difference": difference,
                "guarantee": guarantee,
                "holds": holds,
            }
        )

    with scoring.fresh() as first:
        reference = scoring.score(first, rows)
        note(f"a fresh process{of_all}", reference, exact)
        note("the same process again", scoring.score(first, rows), exact)
        order = np.random.default_rng(request["seed"]).permutation(len(rows))
        note("rows in another order", scoring.score(first, rows[order]), exact)
    with scoring.fresh() as second:
        note("another fresh process", scoring.score(second, rows), exact)
    for name, poisoned in _poisoned(Path(request["candidate"]), Path(request["scratch"])):
        with scoring.fresh(candidate=poisoned) as scorer:
            note(name, scoring.score(scorer, rows), exact)
    for batch in (1, 2, 8, 32) if scoring.device.type == "cpu" else (1, 2, 8):  # a GPU may have no room for more
        with scoring.fresh(batch=batch) as scorer:
            note(f"batches of {batch}", scoring.score(scorer, rows), close)
    with scoring.fresh(threads=1) as scorer:
        note("one thread", scoring.score(scorer, rows), close)
    return lines


def _poisoned(candidate: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    source = (candidate / "train.py").read_text()
    for number, (name, statement) in enumerate(POISON.items()):
        folder = scratch / f"poisoned{number}"
        folder.mkdir()
        (folder / "train.py").write_text(f"{source}\n\n{statement}\n")
        yield name, folder
