"""The gate: what means the same as before is no experiment, and what means something else is one.

Each table pairs a file with another one; the honest pairs look alike but differ in what they do.
"""

from pathlib import Path

import pytest

from pytest_autoresearch.gate import signature

TRAIN = (Path(__file__).parents[2] / "train.py").read_text()


def same(one: str, other: str) -> bool:
    return signature({"train.py": one.encode()}) == signature({"train.py": other.encode()})


SAME = {
    "a comment": ("x = 1\n", "# why\nx = 1  # units\n"),
    "formatting": ("f(a, b=[1, 2])\n", "f(\n    a,\n    b = [1,\n 2],\n)\n"),
    "line ends": ("x = 1\ny = 2\n", "x = 1\r\ny = 2\r\n"),
    "docstrings": ("def f():\n    return 1\n", '"""A file."""\ndef f():\n    """Do it."""\n    return 1\n'),
    "another notation": ("x = 0.001\ny = 'a'\n", 'x = 1e-3\ny = "a"\n'),
    "a doubtful literal": ("x = '\\d'\n", "x = '\\d'  # digits\n"),
    "a constant": ("SEED = 1337\nuse(SEED)\n", "SEED = 42\nuse(SEED)\n"),
    "a constant by profile": ("DATA_SEED = {'a': 1}[P]\nuse(DATA_SEED)\n", "DATA_SEED = {'a': 2}[P]\nuse(DATA_SEED)\n"),
    "an annotated constant": ("class C:\n    seed: int = 1\n", "class C:\n    seed: int = 2\n"),
    "an attribute": ("self.random_state = 1\n", "self.random_state = -2\n"),
    "an entry": ("CONFIG = {'lr': 1, 'seed': 2}\n", "CONFIG = {'lr': 1, 'seed': 3}\n"),
    "an entry set": ("config['seed'] = 2\n", "config['seed'] = 3\n"),
    "an argument": ("split(x, random_state=0)\n", "split(x, random_state=run.seed + 1)\n"),
    "a default": ("def f(a, seed=1, *, b, init_seed=2): pass\n", "def f(a, seed=3, *, b, init_seed=4): pass\n"),
    "the harness's seed overridden": ("torch.manual_seed(run.seed)\n", "torch.manual_seed(1337)\n"),
    "the harness's seed moved": ("torch.manual_seed(run.seed)\n", "torch.manual_seed(run.seed ^ hash('lucky'))\n"),
    "seeding once more": ("train()\n", "torch.cuda.manual_seed_all(7)\nnp.random.seed(8)\nrandom.seed()\ntrain()\n"),
    "a generator": ("g = torch.Generator().manual_seed(1)\n", "g = torch.Generator().manual_seed(2)\n"),
    "a source of numbers": ("r = np.random.default_rng(1)\n", "r = np.random.default_rng(seed=[2, 3])\n"),
    "a constant that only seeds": (
        "N = 1\ntorch.manual_seed(run.seed + N)\n",
        "N = 2\ntorch.manual_seed(run.seed + N)\n",
    ),
    "by way of another": ("A = 1\nB = A * 3\nr = Random(B)\n", "A = 9\nB = 3 - A\nr = Random(B)\n"),
}


@pytest.mark.parametrize("what", SAME)
def test_what_means_the_same_is_no_experiment(what: str) -> None:
    assert same(*SAME[what])


DIFFERENT = {
    "a value": ("LR = 1\nuse(LR)\n", "LR = 2\nuse(LR)\n"),
    "a string that is used": ("x = 'a'\n", "x = 'b'\n"),
    "how many seeds": ("NUM_SEEDS = 4\nuse(NUM_SEEDS)\n", "NUM_SEEDS = 5\nuse(NUM_SEEDS)\n"),
    "tokens of a seed": ("SEED_TOKENS = 64\nuse(SEED_TOKENS)\n", "SEED_TOKENS = 32\nuse(SEED_TOKENS)\n"),
    "a learned seed": ("self.seed = zeros(3)\n", "self.seed = zeros(4)\n"),
    "a number that seeds and more": (
        "DEPTH = 1\ntorch.manual_seed(DEPTH)\nbuild(DEPTH)\n",
        "DEPTH = 2\ntorch.manual_seed(DEPTH)\nbuild(DEPTH)\n",
    ),
    "a number that is read by its name": (
        "DEPTH = 1\ntorch.manual_seed(DEPTH)\nbuild(globals()['DEPTH'])\n",
        "DEPTH = 2\ntorch.manual_seed(DEPTH)\nbuild(globals()['DEPTH'])\n",
    ),
    "a seeding call that became another": ("torch.manual_seed(1)\n", "torch.set_num_threads(1)\n"),
    "beside a seed": ("f(3, seed=1)\n", "f(4, seed=1)\n"),
    "no Python, and no Python": ("x = = 1\n", "x = = 2\n"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_means_something_else_is_an_experiment(what: str) -> None:
    assert not same(*DIFFERENT[what])


def test_a_number_that_another_file_reads_is_no_seed() -> None:
    def of(base: int, other: str) -> str:
        train = f"BASE = {base}\ntorch.manual_seed(BASE)\n".encode()
        return signature({"train.py": train, "model.py": other.encode()})

    assert of(1, "x = 1\n") == of(2, "x = 1\n")
    assert of(1, "from train import BASE\nx = BASE\n") != of(2, "from train import BASE\nx = BASE\n")
    assert of(1, "import train\nx = train.BASE\n") != of(2, "import train\nx = train.BASE\n")


def test_names_and_other_files_count_as_they_are() -> None:
    assert signature({"a.py": b"x = 1\n"}) != signature({"b.py": b"x = 1\n"})
    assert signature({"a.yaml": b"x: 1\n"}) != signature({"a.yaml": b"x: 1  # why\n"})
    assert signature({"a.py": b"", "b.py": b"x"}) != signature({"a.py": b"x", "b.py": b""})


@pytest.mark.parametrize("depth", [100, 3_000, 100_000])
def test_a_file_that_is_too_deep_to_read_counts_as_it_is(depth: int) -> None:
    deep = f"x = {'-' * depth}1\n"
    long = f"x = 1{' + 1' * depth}\n"
    for text in (deep, long):
        assert same(text, text) and not same(text, f"{text}y = 2\n")


def test_the_trainer_at_hand() -> None:
    seeding = "torch.manual_seed(run.seed)\n"
    assert seeding in TRAIN
    assert same(TRAIN, TRAIN.replace(seeding, "torch.manual_seed(run.seed + 1)\n    # lucky\n"))
    assert not same(TRAIN, TRAIN.replace("MATRIX_LR = 0.04", "MATRIX_LR = 0.03"))
