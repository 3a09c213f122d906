"""Where the compile cache of a line of research lies: one folder a start commit and fingerprint, the last few of them.

The runner makes and reads it (`oracle/compiled.py`); here is only said where it is, and which run may fill it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._disk import remove

NAME = ".compiled"  # beside the folders of the tags, and no tag: those begin with a letter or digit
KEPT = 3


def request(home: Path, start: str, fingerprint: Mapping[str, Any], *, fill: bool) -> dict[str, Any]:
    """Return what the runner is told; below `home` make room for a new one if the run may `fill` it."""
    digest = hashlib.sha256(json.dumps([start, dict(fingerprint)], sort_keys=True).encode()).hexdigest()
    path = home / NAME / digest
    if fill and not path.exists():
        old = sorted(path.parent.glob("*"), key=lambda one: one.lstat().st_mtime_ns, reverse=True)
        whole = [one for one in old if not one.suffix]
        for one in old:
            if one not in whole[: KEPT - 1]:
                remove(one)
    return {"path": str(path), "keep": fill}
