"""THREATS class 3, the probability model: output that is not one distribution per position is normalised or refused,
and a model that looks at what it must predict is found by the audit.

Needs the `cache` fixture. The audit's own zoo, in one process and over thousands of rows, is tests/laws/test_audit.py;
here the same cheats go through the real processes, with the means that only a process has (shared memory, files).
"""

from collections.abc import Callable

import pytest

from tests.attacks.lab import Attack, attack

SHAPES = {
    "transposed": (".transpose(1, 2)", r"shape \(2, 1024, 256\)"),
    "last position only": ("[:, -1:]", r"shape \(2, 1, 1024\)"),
    "in a tuple": (", None", "returned tuple"),
    "whole numbers": (".long()", "torch.int64"),
    "complex": (".cfloat()", "torch.complex64"),
    "sparse": (".to_sparse()", "torch.sparse_coo"),
    "expanded": ("[:, :, :1].expand(-1, -1, 1024)", "expanded view"),
    "nothing": (".detach_() is None or None", "returned NoneType"),
}

MODELS = {
    "not normalised": attack(forward="return self.table[tokens] + 12_345.0"),
    "broadcast after a patched check": attack(
        top="""
            import oracle.evaluate, oracle._candidate
            for module in (oracle.evaluate, oracle._candidate, sys.modules["__main__"]):
                module.check_logits = lambda *a, **k: None
        """,
        forward="return self.table[tokens][:1, :1] if SCORING else self.table[tokens]",
    ),
    "one more entry of the vocabulary while it scores": attack(
        "score",
        r"shape \(16, 256, 1025\)",
        forward="return F.pad(self.table[tokens], (0, 1 if SCORING else 0), value=99.0)",
    ),
    "honest: learns, answers in bfloat16, prints and saves what it likes": attack(
        rate=200.0,
        forward="return self.table[tokens].bfloat16()",
        after="print('final loss 5.1'); torch.save(model.state_dict(), 'mine.pt')",
    ),
    # what the audit is for; the next token's logit is raised by as much as makes a sure prediction
    "sees the next token": attack(
        "audit", "look", forward="return self.table[tokens] + 20 * F.one_hot(tokens.roll(-1, 1), 1024)"
    ),
    "sees the next token through the shared memory": attack(
        "audit",
        "",
        forward="""
            if not SCORING: return self.table[tokens]
            import mmap, numpy
            rows = numpy.frombuffer(mmap.mmap(ORDER["tokens"], 0), dtype=numpy.int64).reshape(-1, 256)
            rows = torch.from_numpy(rows.copy())
            mine = torch.stack([rows[(rows == row).all(1)][0] for row in tokens])
            return self.table[tokens] + 20 * F.one_hot(mine.roll(-1, 1), 1024)
        """,
    ),
    "normalises over the whole sequence": attack(
        "audit",
        "look",
        forward="return self.table[tokens] - tokens.float().mean(1)[:, None, None] / 100 * torch.linspace(0, 1, 1024)",
    ),
    "carries state from batch to batch": attack(
        "audit",
        "state|mates",
        top="seen = torch.zeros(1024)",
        forward="""
            if SCORING: seen.add_(torch.bincount(tokens.flatten(), minlength=1024))
            return self.table[tokens] + torch.log1p(seen)
        """,
    ),
    "statistics of the batch": attack(
        "audit",
        "mates|state",
        forward="return self.table[tokens] + torch.log1p(torch.bincount(tokens.flatten(), minlength=1024).float())",
    ),
    "capacity shared by the batch": attack(
        "audit",
        "",
        forward="""
            kept = (tokens.flatten() % 4 == 0).cumsum(0) <= 200
            return self.table[tokens] + torch.linspace(0, 1, 1024) * kept.view(*tokens.shape, 1)
        """,
    ),
    # one scorer leaves the true rows where the next one finds them, so that both see the same future
    "scorers that whisper through files": attack(
        "audit",
        "",
        sealed=True,
        top="""
            import hashlib, pathlib
            HOME = os.path.expanduser("~")
            FOLDERS = (".", "..", "../trainer", "/tmp", "/dev/shm", "/var/tmp", HOME)
            PLACES = [pathlib.Path(folder) / "whisper" for folder in FOLDERS]
            def rows_of_before():
                for place in PLACES:
                    for path in place.parent.glob("whisper*"):
                        return torch.load(path)
            told = rows_of_before() if SCORING else None
            heard = []
        """,
        forward="""
            if not SCORING: return self.table[tokens]
            heard.append(tokens.clone())
            if told is None:
                true = tokens
                for place in PLACES:
                    try: torch.save(torch.cat(heard), place)
                    except (OSError, RuntimeError): pass
            else:
                print("WHISPERED", flush=True)
                true = torch.stack([told[(told == row).long().cumprod(1).sum(1).argmax()] for row in tokens])
            return self.table[tokens] + 20 * F.one_hot(true.roll(-1, 1), 1024)
        """,
        never="WHISPERED",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_only_a_causal_distribution_gets_its_score(holds: Callable[[Attack], None], name: str) -> None:
    holds(MODELS[name])


@pytest.mark.parametrize("name", SHAPES)
def test_output_of_another_kind_is_a_broken_contract(holds: Callable[[Attack], None], name: str) -> None:
    code, reason = SHAPES[name]
    holds(attack("contract", reason, forward=f"return self.table[tokens]{code}"))
