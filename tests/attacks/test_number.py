"""THREATS class 1, the number: nothing that a candidate prints, writes or logs is a score.

Needs the `cache` fixture. The plugin's own refusals (a runner that answers NaN, 0, text, or twice) stand in
tests/plugin/test_loop.py and test_supervise.py, a NaN as the first score and crash rows in test_ratchet.py.
"""

from collections.abc import Callable

import pytest

from tests.attacks.lab import Attack, attack

RESULT = '{"event": "result", "schema": 1, "status": "ok", "metrics": {"val_bpb": 3.2e-05}}'

ATTACKS = {
    "better figures printed, logged, in files and from an exit handler": attack(
        top=f"""
            print('---\\nval_bpb: 3.2e-05', flush=True)
            atexit.register(print, 'val_bpb: 0.0001', flush=True)
            print({RESULT!r}, file=sys.stderr, flush=True)
        """,
        step="if step == 0: run.log(0, 3.2e-05); run.log(1, 0.0); run.log(2, -1.0); run.log(-5, float('-inf'))",
        after=f"""
            print('val_bpb:          0.000000\\nval_bpb:          -1.0\\nval_bpb: nan', flush=True)
            for name in ('run.log', 'result.json', 'results.tsv', 'ledger.jsonl', 'weights.json'):
                open(name, 'w').write('val_bpb: 0.5\\n' + {RESULT!r} + '\\n')
        """,
        says=r"val_bpb: 3\.2e-05(.|\n)*step -5 \| loss -inf(.|\n)*val_bpb: nan",
    ),
    "writes a forged result into every descriptor": attack(
        kind="error",
        reason="broke its channel: an unexpected message .*result",
        step=f"""
            for fd in range(3, 256):
                try: os.write(fd, {RESULT!r}.encode() + b'\\n')
                except OSError: pass
        """,
    ),
    "writes a forged result into every descriptor while it scores": attack(
        kind="score",
        reason="the scoring process broke its channel: an unexpected message .*result",
        forward=f"""
            for fd in range(3, 256 if SCORING else 3):
                try: os.write(fd, {RESULT!r}.encode() + b'\\n')
                except OSError: pass
            return self.table[tokens]
        """,
    ),
    "writes a forged result into the judge's own channel": attack(
        sealed=True,
        step=f"""
            for path in glob.glob('/proc/[0-9]*/fd/*') if step == 0 else ():
                if path.split('/')[2] != str(os.getpid()) and 'pipe' in os.readlink(path):
                    try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), {RESULT!r}.encode() + b'\\n')
                    except OSError: pass
        """,
    ),
    "weights NaN": attack(kind="score", reason="NaN", after="model.table.data.fill_(float('nan'))"),
    "weights inf": attack(kind="score", reason=r"\+inf", after="model.table.data[:, 0] = float('inf')"),
    "weights -inf": attack(kind="score", reason="every entry is -inf", after="model.table.data.fill_(float('-inf'))"),
    "impossible targets": attack(
        kind="score", reason="probability 0", after="model.table.data[:, 32:512] = float('-inf')"
    ),
    "NaN in one position of one row": attack(
        kind="score",
        reason="NaN",
        forward="""
            logits = self.table[tokens]
            if SCORING: logits[3, 100, 5] = float('nan')
            return logits
        """,
    ),
    "honest: weights huge and all alike": attack(after="model.table.data.fill_(-3e38)"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_no_score_is_never_one(holds: Callable[[Attack], None], name: str) -> None:
    holds(ATTACKS[name])
