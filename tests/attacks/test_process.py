"""THREATS class 2, the process: whatever a candidate does to its own interpreter, to the channel or to the shared
memory, the judge's score is the model's, and a broken protocol is a crash that says how it was broken.

Needs the `cache` fixture; the attacks marked `sealed` need a sandbox.
"""

import json
from collections.abc import Callable

import psutil
import pytest

from tests.attacks.lab import Attack, attack, source
from tests.processes.judging import Judged


def no_stray(marker: str) -> Callable[[Judged], None]:
    """Check that no process of the machine carries the marker in its command line."""

    def check(run: Judged) -> None:
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if any(marker in s for s in p.info["cmdline"] or ())]
        assert not left

    return check


PATCHES = {
    "patched modules": attack(
        top="""
            import builtins, math, numpy, oracle.evaluate, oracle.report, oracle.clock
            dumps, zero = json.dumps, lambda *a, **k: 0.0
            def patch():
                math.log = math.fsum = builtins.sum = builtins.round = numpy.where = numpy.sum = zero
                F.cross_entropy = F.log_softmax = F.nll_loss = torch.logsumexp = torch.log_softmax = zero
                oracle.evaluate.token_nats = oracle.evaluate.Tally = oracle.evaluate.Score = zero
                oracle.report.figures = oracle.clock.Budget = lambda *a, **k: {"val_bpb": 0.1}
                json.dumps = lambda o, **k: dumps({**o, "val_bpb": 0.1} if o.get("op") == "done" else o, **k)
                sys.modules["oracle.scoring"] = sys.modules["oracle.judge"] = sys.modules["oracle.audit"] = None
        """,
        forward="patch() if SCORING else None; return self.table[tokens]",
        after="patch()",
    ),
    "poisoned state of torch": attack(
        top="""
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(1)
            torch.autograd.set_detect_anomaly(False)
            torch.use_deterministic_algorithms(False)
            torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
            if SCORING: torch.set_grad_enabled(True); torch.set_flush_denormal(True)
        """,
        init="self.table.data = self.table.data.float()",
    ),
    "looks for targets on the stack and among all objects": attack(
        top="""
            import numpy
            def targets():
                seen = [v for f in iter_frames() for v in f.f_locals.values()] + gc.get_objects()
                for thing in seen:
                    if type(thing) is numpy.ndarray and thing.ndim >= 2 and thing.shape[-1] == 257: return thing
            def iter_frames():
                frame = sys._getframe()
                while frame: yield frame; frame = frame.f_back
        """,
        forward="""
            logits = self.table[tokens]
            if SCORING and (rows := targets()) is not None: print("FOUND targets", flush=True)
            return logits
        """,
        never="FOUND targets",
    ),
    "threads, children, limits, an alarm and 50 MB of output": attack(
        top="""
            import resource
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
            signal.alarm(1)
            for daemon in (True, False): threading.Thread(target=time.sleep, args=(600,), daemon=daemon).start()
            for index in range(3 if SCORING else 50):
                subprocess.Popen(["sleep", "600.7531"], start_new_session=index % 2 == 0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            os.nice(5)
            if not SCORING: os.write(2, b"x" * 50_000_000)
        """,
        check=no_stray("600.7531"),
    ),
    "exits at import": attack("error", "exit code 0 before it returned", top="os._exit(0)"),
    "exits politely": attack("error", "exit code 0 before it returned", step="sys.exit(0)"),
    "is killed": attack("error", "signal 9 before it returned", step="os.kill(os.getpid(), 9)"),
    "is killed while it scores": attack(
        "score",
        "ended with signal 9 before every row was scored",
        forward="os.kill(os.getpid(), 9) if SCORING else None; return self.table[tokens]",
    ),
    "exits while it scores": attack(
        "score",
        "ended with exit code 0 before every row was scored",
        forward="os._exit(0) if SCORING else None; return self.table[tokens]",
    ),
    "subclass of tensor": attack(
        "contract",
        "forward returned Sly, not a plain torch.Tensor",
        top="""
            class Sly(torch.Tensor):
                @classmethod
                def __torch_function__(cls, f, types, args=(), kwargs=None): return torch.zeros(())
        """,
        forward="return self.table[tokens].as_subclass(Sly)",
    ),
    "subclass of tensor only while it scores": attack(
        "score",
        "forward returned Sly, not a plain torch.Tensor",
        top="class Sly(torch.Tensor): pass",
        forward="return self.table[tokens].as_subclass(Sly) if SCORING else self.table[tokens]",
    ),
}


@pytest.mark.parametrize("name", PATCHES)
def test_its_own_interpreter_is_all_that_it_owns(holds: Callable[[Attack], None], name: str) -> None:
    holds(PATCHES[name])


# What the trainer sends is a claim. `top` runs before the clock, `step` after it.
MESSAGES = {
    "done before training": attack("error", "an unexpected message .*done", top="say(op='done', peak_device_mb=0.0)"),
    "returned before training": attack(
        "contract", r"train\(run\) returned without having asked for a batch", top="say(op='returned')"
    ),
    "returned twice": attack(
        "error",
        "an unexpected message .*returned",
        step="say(op='returned'); say(op='returned'); time.sleep(60)",
    ),
    "more batches after it returned": attack("error", "an unexpected message .*next", step="say(op='returned')"),
    "done without weights": attack(
        "score",
        "weights.safetensors is missing",
        step="say(op='returned'); say(op='done', peak_device_mb=0.0); time.sleep(60)",
        may_crash="audit",
    ),
    "next before batches": attack("error", "next before batches", top="say(op='next')"),
    "batches of a negative size": attack("error", "a batch of -1 x 256", top="say(op='batches', rows=-1, seq_len=256)"),
    "batches of True": attack("error", "a batch of True x 256", top="say(op='batches', rows=True, seq_len=256)"),
    "a loss that is text": attack("error", "an unexpected message .*0.1", step="say(op='log', step=1, loss='0.1')"),
    "not an object": attack("error", "not an object", top="os.write(ORDER['channel'], b'[1]\\n')"),
    "not JSON": attack("error", "not JSON", top="os.write(ORDER['channel'], b'\\xff\\x00 val_bpb: 0.1\\n')"),
    "nested beyond recursion": attack(
        "error", "not JSON", top="os.write(ORDER['channel'], b'[' * 60_000 + b']' * 4 + b'\\n')"
    ),
    "a line without end": attack(
        "error",
        "more than 65536 bytes",
        top="socket.socket(fileno=os.dup(ORDER['channel'])).sendall(b'x' * 10**6)",
    ),
    "closes the channel and lives on": attack(
        "error",
        "its channel closed",
        top="socket.socket(fileno=ORDER['channel']).shutdown(socket.SHUT_RDWR); time.sleep(60)",
    ),
    "asks and never listens": attack(
        "error",
        "broke its channel",
        top="say(op='batches', rows=1, seq_len=1)\nwhile True: say(op='next')",
    ),
    "a crash of a kind that is not its own": attack(
        "error",
        r"^line one line two x+$",
        top="say(op='crash', kind='audit', reason='line one\\nline two ' + 'x' * 9000, detail=''); time.sleep(60)",
    ),
    "says that the machine failed": attack(
        "error", "^no memory$", top="say(op='crash', kind='killed', reason='no memory', detail=''); time.sleep(60)"
    ),
    "a flood of losses, and the shared memory cut off": attack(
        before="""
            for _ in range(5_000): say(op="log", step=0, loss=float("nan"))
            try: os.ftruncate(ORDER["ring"], 0)
            except OSError: print("REFUSED")
        """,
        says="REFUSED",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_forged_message_is_a_claim(holds: Callable[[Attack], None], name: str) -> None:
    holds(MESSAGES[name])


def test_rewriting_shared_memory_while_the_judge_reads_gives_nothing(judged: Callable[..., Judged]) -> None:
    """Logits jump between two values while the judge looks: one that looked twice would count next to no loss."""
    thread = """
        if SCORING:
            def flip():
                print("FLIPPING", flush=True)
                while True:
                    for value in (40.0, -40.0): logits[0][:] = value
            import oracle._cuda
            map_it, logits = oracle._cuda.shared_array, []
            def found(*given):
                logits.append(map_it(*given))
                threading.Thread(target=flip, daemon=True).start()
                return logits[0]
            oracle._cuda.shared_array = found
    """
    run = judged(source(top=thread))
    assert "FLIPPING" in run.log
    result = json.dumps(run.result)
    if run.result["status"] == "ok":
        assert run.result["metrics"]["val_bpb"] > 2.0, result
    else:
        assert run.result["kind"] == "audit", result
