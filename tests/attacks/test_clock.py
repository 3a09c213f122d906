"""THREATS class 5, the clock: the judge's clock decides, what is not saved by then does not count, and nothing of a run
works on after it.

Needs the `cache` fixture; the attacks marked `sealed` need a sandbox. Budgets are half a second, the grace is two.
"""

from collections.abc import Callable

import pytest

from tests.attacks.lab import Attack, attack
from tests.processes.judging import Judged


def within_the_budget(run: Judged) -> None:
    """Check that the judge's counts are those of the budget and the grace, and belong together."""
    metrics = run.result["metrics"]
    assert 0.5 <= metrics["training_seconds"] <= 2.5
    assert 0 < metrics["num_steps"] * 8 * 256 <= metrics["total_tokens_M"] * 1e6


def at_rest_while_scored(run: Judged) -> None:
    """Check that what the trainer's processes go on writing was last written before the first row was scored."""
    scored_at = float(run.log.partition("SCORED AT ")[2].split()[0])
    assert 0 < (run.scratch / "trainer/beat").stat().st_mtime < scored_at


PATCH = """
    for name in ('time', 'monotonic', 'perf_counter', 'process_time', 'time_ns', 'monotonic_ns', 'perf_counter_ns'):
        setattr(time, name, lambda: 0)
    import oracle.clock
    oracle.clock.Budget.expired = property(lambda self: False)
    oracle.clock.Budget.elapsed_s = property(lambda self: 0.0)
    time.sleep = lambda seconds: None
"""
# Works on with data that it has, as long as it is let, and then hands over what it has learnt.
WORK_ON = """
    held = [(x, y) for (x, y, epoch), _ in zip(run.batches(8), range(4))]
    def work_on(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for x, y in held:
                F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward(); optimizer.step(); optimizer.zero_grad()
"""
WRITER = """
    import itertools, time
    for count in itertools.count():
        open('beat', 'w').write(str(count)); time.sleep(0.005)
"""

ATTACKS = {
    "a clock that stands still": attack(top=PATCH, check=within_the_budget),
    "honest: trains on through the grace": attack(
        before=WORK_ON, after="work_on(0.2)", rate=200.0, check=within_the_budget
    ),
    "trains on after the grace": attack(
        "overrun",
        r"had not returned 2\.\d s after the budget of 0.5 s",
        before=WORK_ON,
        after="work_on(600)",
        rate=200.0,
    ),
    "trains on while its weights are saved": attack(
        "overrun",
        r"saving the weights took more than 2 s",
        before=WORK_ON,
        after="""
            honest = model.state_dict
            model.state_dict = lambda **keywords: (work_on(600), honest(**keywords))[1]
        """,
        rate=200.0,
    ),
    "says that it returned and trains on": attack(
        "error",
        "an unexpected message .*(log|next)",
        step="if step == 0: say(op='returned')",
        rate=200.0,
    ),
    "trains on while the judge packs a huge batch": attack(
        "overrun",
        "had not returned",
        before=WORK_ON
        + """
    threading.Thread(target=work_on, args=(600,), daemon=True).start()
    next(run.batches(1, 4_000_000), None)
    time.sleep(600)
""",
        rate=200.0,
    ),
    # dummy batches are all that there is then: tokens in a row, which say nothing of the corpus
    "learns before the clock": attack(
        before="""
            for _ in range(30):
                x, y = run.dummy_batch(8)
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                (1000 * loss).backward()
            learnt = model.table.grad.clone(); optimizer.zero_grad()
            for x, y, epoch in run.batches(8): return model
        """,
    ),
    "threads and children that train while it is scored": attack(
        before=f"""
            code = {WRITER!r}
            import textwrap
            for setsid in (False, True):
                subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], start_new_session=setsid)
            if os.fork() == 0:
                if os.fork() == 0: os.setsid(); exec(textwrap.dedent(code))
                os._exit(0)
        """,
        forward="""
            if SCORING: print('SCORED AT', time.time(), flush=True)
            return self.table[tokens]
        """,
        check=at_rest_while_scored,
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_judges_clock_decides(holds: Callable[[Attack], None], name: str) -> None:
    holds(ATTACKS[name])
