"""pytest and Python as attack surface (THREATS 6 and 7): what the checkout, the working directory, the home, the
configuration and the environment bring does not make a broken law look green, nor a law go missing unseen.

Each row is the real `pytest --autoresearch-laws` in a small project, twice: the attack on a broken oracle, or on its
laws, ends with its true reason; the honest twin, the same means without the harm, ends with "all laws hold". What can
reach a judge is also shown against one. Needs the package to be installed; the user site's tests make a venv.
"""

import importlib.metadata
import json
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pytest_autoresearch import laws
from pytest_autoresearch.lockfile import FILE
from pytest_autoresearch.settings import immutable_patterns
from tests.attacks.projects import (
    BROKEN,
    CHEAT,
    LAW,
    LAW_FILE,
    LAWS,
    ORACLE,
    PATTERNS,
    PYTEST,
    RAN,
    Plant,
    Project,
    ended,
)
from tests.plugin.lab import RUNNER, WAIT_S, Lab

if not [e for e in importlib.metadata.entry_points(group="pytest11") if e.name == "autoresearch"]:
    pytest.skip("the package is not installed here, so `pytest` has no --autoresearch-laws", allow_module_level=True)

FAILED = r"failed: tests/laws/test_double\.py::test_one: assert 3 == 2"
# Is the module that it shadows, and says where it ran
SHADOW = f"""
import os
with open(os.path.join(os.path.dirname(os.__file__), os.path.basename(__file__))) as real:
    exec(real.read())
{RAN}
"""
EXIT = "import os\nos._exit(0)\n"
HOOKS = """
import pytest

def pytest_collection_modifyitems(items):
    del items[:]

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.outcome = "passed"
    return report

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    session.exitstatus = 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An attack, how it ends, and its honest twin."""

    attack: Plant
    ends: str  # regular expression of what is printed
    code: int = 1
    twin: Plant


def unmoved(
    *, files: Mapping[str, str] | None = None, locked: bool = False, args: Sequence[str] = (), **env: str
) -> Row:
    """What has no effect at all: the broken law fails, and the twin, the same on an oracle that is right, passes."""
    plant = Plant(files=files or {}, locked=locked, env=env, args=args)
    return Row(attack=replace(plant, broken=True), ends=FAILED, twin=plant)


def edit(old: str, new: str, harmless: tuple[str, str], ends: str, *, broken: bool = True, hooks: str = "") -> Row:
    """An edit of the laws, locked: it looks like any other change to whoever compares digests alone."""
    assert old in LAW and harmless[0] in LAW
    files = {LAW_FILE: LAW.replace(old, new), "oracle/hooks.py": hooks}
    attack = Plant(files=files, locked=True, broken=broken)
    return Row(attack=attack, ends=ends, twin=Plant(files={LAW_FILE: LAW.replace(*harmless)}, locked=True))


def told(attack: Plant, ends: str, twin: Plant, code: int = 1) -> Row:
    return Row(attack=attack, ends=ends, code=code, twin=twin)


def config(text: str) -> dict[str, str]:
    return {"pyproject.toml": "[tool.pytest.ini_options]\n" + text + "\n"}


PLUGIN = config('addopts = "-p evil"\npythonpath = "."')
ENTRY_POINT = {
    "evil-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1\n",
    "evil-1.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n",
}
ONE, BODY, IMPORT = "def test_one", "    assert double(1) == 2\n", "import pytest\n"
FLAKY = """\
@pytest.mark.flaky(reruns=5)
def test_one():
    from pathlib import Path
    first = Path(__file__).with_name("ran")
    ran = first.exists()
    first.touch()
    assert ran and double(1) == 2
"""
EDITS = {
    "skip": edit(
        ONE,
        f"@pytest.mark.skip(reason='slow')\n{ONE}",
        (ONE, f"@pytest.mark.slow\n{ONE}"),
        "skipped: .*::test_one: slow",
    ),
    "skipif": edit(
        ONE,
        f"@pytest.mark.skipif(True, reason='no GPU')\n{ONE}",
        (ONE, f"@pytest.mark.skipif(False, reason='no GPU')\n{ONE}"),
        r"skipped: tests/laws/test_double\.py::test_one: no GPU",
    ),
    "skip in the body": edit(
        BODY,
        f"    pytest.skip('later')\n{BODY}",
        (BODY, f"    pytest.importorskip('json')\n{BODY}"),
        "skipped: .*: later",
    ),
    "skip in a subtest": edit(
        f"{ONE}():\n{BODY}",
        f"{ONE}(subtests):\n    with subtests.test():\n        pytest.skip('later')\n",
        (f"{ONE}():\n{BODY}", f"{ONE}(subtests):\n    with subtests.test():\n    {BODY}"),
        "skipped: .*::test_one: later",
    ),
    "xfail": edit(
        ONE,
        f"@pytest.mark.xfail(reason='known')\n{ONE}",
        (ONE, f"@pytest.mark.xfail(False, reason='known')\n{ONE}"),
        r"xfailed: tests/laws/test_double\.py::test_one: known",
    ),
    "xfail that passes": edit(
        ONE,
        f"@pytest.mark.xfail(reason='known')\n{ONE}",
        (ONE, f"# no xfail\n{ONE}"),
        r"xpassed: tests/laws/test_double\.py::test_one: known",
        broken=False,
    ),
    "importorskip": edit(
        IMPORT,
        f"{IMPORT}pytest.importorskip('no_such_module')\n",
        (IMPORT, f"{IMPORT}pytest.importorskip('math')\n"),
        r"not collected: tests/laws/test_double\.py: .*no_such_module",
    ),
    "skip at import": edit(
        IMPORT,
        f"{IMPORT}pytest.skip('not here', allow_module_level=True)\n",
        (IMPORT, f"{IMPORT}if not __name__: pytest.skip('not here', allow_module_level=True)\n"),
        r"not collected: tests/laws/test_double\.py: .*not here",
    ),
    "error at import": edit(
        IMPORT,
        f"{IMPORT}import no_such_module\n",
        (IMPORT, f"{IMPORT}import math\n"),
        r"not collected: tests/laws/test_double\.py: ModuleNotFoundError: .*no_such_module",
    ),
    "renamed away": edit(
        ONE,
        "def check_one",
        (ONE, f"def check_two():\n    pass\n\n\n{ONE}"),
        r"not collected: tests/laws/test_double\.py::test_one\n",
    ),
    "__test__ = False": edit(
        IMPORT,
        f"{IMPORT}__test__ = False\n",
        (IMPORT, f"{IMPORT}__test__ = True\n"),
        r"not collected: tests/laws/test_double\.py::test_each\nnot collected: .*::test_one\n",
    ),
    "no cases": edit("[0, 3]", "[]", ("[0, 3]", "[3, 0]"), r"skipped: .*::test_each\[.*empty parameter set"),
    "fewer cases": edit("[0, 3]", "[0]", ("[0, 3]", "[0, 4]"), "1 cases and not 2: .*::test_each"),
    "another law": edit(
        ONE,
        f"def test_two():\n    pass\n\n\n{ONE}",
        (ONE, f"def two():\n    pass\n\n\n{ONE}"),
        r"not in oracle\.lock: tests/laws/test_double\.py::test_two",
    ),
    "pytest.exit": edit(
        BODY,
        f"    pytest.exit('done', returncode=0)\n{BODY}",
        (BODY, f"    if double(1) != 2:\n        pytest.exit('done', returncode=0)\n{BODY}"),
        "not run: 1 of 1 cases of .*::test_one",
    ),
    "os._exit in a law": edit(
        BODY,
        f"    import os\n    os._exit(0)\n{BODY}",
        (BODY, f"    import os\n{BODY}"),
        r"ended \(exit code 0\) without a result, in tests/laws/test_double\.py::test_one",
    ),
    "os._exit at import": edit(
        IMPORT, f"{EXIT}{IMPORT}", (IMPORT, f"import os\n{IMPORT}"), r"ended \(exit code 0\) without a result"
    ),
    "os._exit after the laws": edit(
        IMPORT,
        f"import atexit\nimport os\natexit.register(os._exit, 3)\n{IMPORT}",
        (IMPORT, f"import atexit\natexit.register(print)\n{IMPORT}"),
        r"ended with exit code 3 \(pytest said 0\)\nthe laws do not hold",
        broken=False,
    ),
    "a mark for -m": edit(
        IMPORT, f"{IMPORT}pytestmark = pytest.mark.slow\n", (IMPORT, f"{IMPORT}pytestmark = pytest.mark.slow\n"), FAILED
    ),
    "a mark for reruns": edit(
        f"{ONE}():\n{BODY}", FLAKY, (ONE, f"@pytest.mark.flaky(reruns=5)\n{ONE}"), "failed: .*::test_one", broken=False
    ),
    "hooks that the law asks for": edit(
        IMPORT,
        f"{IMPORT}pytest_plugins = ['oracle.hooks']\n",
        (IMPORT, f"{IMPORT}pytest_plugins = ['pytester']\n"),
        r"oracle/hooks\.py has the pytest hook pytest_collection_modifyitems, ",
        hooks=HOOKS,
    ),
}
FILES = {
    "a law edited": told(
        Plant(files={LAW_FILE: LAW.replace("== 2", "!= 2")}, broken=True),
        rf"changed: {LAW_FILE}\noracle\.lock does not hold and no law was run",
        Plant(files={LAW_FILE: LAW.replace("\n", "\r\n")}),
    ),
    "a law deleted": told(Plant(gone=[LAW_FILE], broken=True), f"missing: {LAW_FILE}", Plant(gone=["train.py"])),
    "a law added": told(
        Plant(files={"tests/laws/test_more.py": "def test_more():\n    pass\n"}),
        r"added: tests/laws/test_more\.py",
        Plant(files={"tests/test_more.py": "def test_more():\n    assert False\n"}),
    ),
    "the oracle edited": told(
        Plant(files={"oracle/double.py": BROKEN}),
        r"changed: oracle/double\.py",
        Plant(files={"train.py": "DEPTH = 5\n"}),
    ),
    "no lock": told(
        Plant(gone=[FILE], broken=True),
        r"ERROR: there is no oracle\.lock in .*--autoresearch-lock=update",
        Plant(),
        code=4,
    ),
    "conftest.py at the top": told(
        Plant(files={"conftest.py": HOOKS}, broken=True), r"added: conftest\.py", Plant(files={"helpers.py": HOOKS})
    ),
    "conftest.py at the top, locked": unmoved(files={"conftest.py": HOOKS}, locked=True),
    "conftest.py that exits, locked": unmoved(files={"conftest.py": EXIT}, locked=True),
    "conftest.py above the laws": unmoved(files={"tests/conftest.py": HOOKS}, locked=True),
    "conftest.py above the laws that exits": unmoved(files={"tests/conftest.py": EXIT}, locked=True),
    "conftest.py beside the laws": told(
        Plant(files={"tests/laws/conftest.py": HOOKS}, broken=True),
        r"added: tests/laws/conftest\.py",
        Plant(files={"tests/plugin/conftest.py": HOOKS}),
    ),
    "conftest.py beside the laws, locked": told(
        Plant(files={"tests/laws/conftest.py": HOOKS}, locked=True, broken=True),
        r"tests/laws/conftest\.py has the pytest hook pytest_collection_modifyitems, pytest_runtest_makereport, ",
        Plant(
            files={
                "tests/laws/conftest.py": "import pytest\n\n\n@pytest.fixture\ndef one():\n    return 1\n",
                LAW_FILE: LAW.replace("test_one()", "test_one(one)"),
            },
            locked=True,
        ),
    ),
    "conftest.py beside the laws that exits, locked": told(
        Plant(files={"tests/laws/conftest.py": EXIT}, locked=True, broken=True),
        r"ended \(exit code 0\) without a result",
        Plant(files={"tests/laws/conftest.py": "import os\n"}, locked=True),
    ),
    "addopts": told(
        Plant(files=config('addopts = "-k nothing"'), broken=True),
        r"changed: pyproject\.toml",
        Plant(files={"package/pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-k nothing'\n"}),
    ),
    "addopts that select, locked": unmoved(
        files=config(f'addopts = "-k nothing -m slow --deselect {LAW_FILE} --ignore tests/laws --maxfail=1"'),
        locked=True,
    ),
    "addopts that run nothing, locked": unmoved(files=config('addopts = "--co --setup-plan"'), locked=True),
    "addopts that print the version, locked": unmoved(files=config('addopts = "--version"'), locked=True),
    "addopts that print the help, locked": unmoved(files=config('addopts = "--help"'), locked=True),
    "addopts without Python tests, locked": unmoved(files=config('addopts = "-p no:python"'), locked=True),
    "addopts with processes and reruns, locked": unmoved(files=config('addopts = "-n2 --reruns=5"'), locked=True),
    "addopts without the plugin, locked": told(
        Plant(files=config('addopts = "-p no:autoresearch"'), locked=True, broken=True),
        "unrecognized arguments: --autoresearch-laws",
        Plant(files=config('addopts = "-p no:cacheprovider"'), locked=True),
        code=4,
    ),
    "addopts that load a plugin, locked": told(
        Plant(files=PLUGIN | {"evil.py": CHEAT}, locked=True, broken=True),
        r"ERROR: module evil of this process is .*/evil\.py, which is no installed package",
        Plant(files=config('addopts = "-p pytester"\npythonpath = "."') | {"evil.py": CHEAT}, locked=True),
        code=4,
    ),
    "addopts that load a plugin that exits, locked; no configuration is read": unmoved(
        files=PLUGIN | {"evil.py": EXIT}, locked=True, args=["-c", os.devnull, "--rootdir={root}"]
    ),
    "an entry point in the checkout": told(
        Plant(files=ENTRY_POINT | {"evil.py": CHEAT}, env={"PYTHONPATH": "{root}"}, broken=True),
        r"ERROR: module evil of this process is .*/evil\.py, which is no installed package",
        Plant(files=ENTRY_POINT | {"evil.py": CHEAT}),
        code=4,
    ),
    "other names for tests, locked": unmoved(
        files=config(
            'python_files = "x.py"\npython_functions = "x"\ntestpaths = "x"\nnorecursedirs = "*"\npythonpath = "shadow"'
        )
        | {"shadow/oracle/double.py": ORACLE, "shadow/oracle/__init__.py": ""},
        locked=True,
    ),
    "pytest.ini beside pyproject.toml": told(
        Plant(files={"pytest.ini": "[pytest]\naddopts = -k nothing\n"}, broken=True),
        r"added: pytest\.ini",
        Plant(files={"tests/pytest.ini": "[pytest]\naddopts = -k nothing\n"}),
    ),
    "sitecustomize.py in the working directory": unmoved(files={"sitecustomize.py": CHEAT, "usercustomize.py": CHEAT}),
    "modules in the working directory": unmoved(files={"random.py": SHADOW, "json.py": CHEAT, "pytest.py": CHEAT}),
}

ENVIRONMENT = {
    "-k": unmoved(args=["-k", "nothing", "--deselect", LAW_FILE]),
    "--reruns": told(
        Plant(files=EDITS["a mark for reruns"].attack.files, locked=True, args=["--reruns=5"]),
        "failed: .*::test_one",
        Plant(args=["--reruns=5"]),
    ),
    "-n 2": unmoved(args=["-n2"]),
    "PYTEST_ADDOPTS": unmoved(PYTEST_ADDOPTS=f"-k nothing --co --deselect {LAW_FILE} -p no:python"),
    "PYTEST_ADDOPTS for another project": told(
        Plant(files={"green/pytest.ini": "[pytest]\n"}, env={"PYTEST_ADDOPTS": "--rootdir={root}/green"}, broken=True),
        "ERROR: PYTEST_ADDOPTS is .* only the command line itself may choose the project",
        Plant(env={"PYTEST_ADDOPTS": "--color=yes"}, args=["--rootdir={root}"]),
        code=4,
    ),
    "PYTEST_ADDOPTS for another configuration": told(
        Plant(files={"green/pytest.ini": "[pytest]\n"}, env={"PYTEST_ADDOPTS": "-c green/pytest.ini"}, broken=True),
        "ERROR: PYTEST_ADDOPTS is .* only the command line itself may choose the project",
        Plant(env={"PYTEST_ADDOPTS": "-q"}, args=["-cpyproject.toml"]),
        code=4,
    ),
    "PYTEST_PLUGINS": told(
        Plant(
            files={"shadow/evil.py": CHEAT}, env={"PYTEST_PLUGINS": "evil", "PYTHONPATH": "{root}/shadow"}, broken=True
        ),
        r"ERROR: module evil of this process is .*/shadow/evil\.py, which is no installed package",
        Plant(env={"PYTEST_PLUGINS": "pytester", "PYTHONPATH": "{root}/shadow"}),
        code=4,
    ),
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": told(
        Plant(env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, broken=True),
        "unrecognized arguments: --autoresearch-laws",
        Plant(env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, args=["-p", "autoresearch"]),
        code=4,
    ),
    "PYTHONPATH with another oracle": unmoved(
        files={"shadow/oracle/__init__.py": "", "shadow/oracle/double.py": ORACLE, "shadow/laws/test_double.py": ""},
        PYTHONPATH="{root}/shadow",
    ),
    "PYTHONPATH with a module of the standard library": told(
        Plant(files={"shadow/random.py": SHADOW}, env={"PYTHONPATH": "{root}/shadow"}, broken=True),
        r"ERROR: module random of this process is .*/shadow/random\.py",
        Plant(files={"shadow/unused.py": CHEAT}, env={"PYTHONPATH": "{root}/shadow"}),
        code=4,
    ),
    "PYTHONPATH with sitecustomize": told(
        Plant(files={"shadow/sitecustomize.py": CHEAT}, env={"PYTHONPATH": "{root}/shadow"}, broken=True),
        r"ERROR: module sitecustomize of this process is .*/shadow/sitecustomize\.py",
        Plant(files={"shadow/customize.py": CHEAT}, env={"PYTHONPATH": "{root}/shadow"}),
        code=4,
    ),
    "PYTHONPYCACHEPREFIX": told(
        Plant(env={"PYTHONPYCACHEPREFIX": "{home}/pyc"}, broken=True),
        "ERROR: PYTHONPYCACHEPREFIX is '.*/pyc': bytecode from there",
        Plant(env={"PYTHONDONTWRITEBYTECODE": "1"}),
        code=4,
    ),
    "PYTHONSTARTUP": unmoved(files={"startup.py": CHEAT}, PYTHONSTARTUP="{root}/startup.py"),
    "PYTHONOPTIMIZE": unmoved(PYTHONOPTIMIZE="2"),
    "PYTHONWARNINGS, PYTHONHASHSEED": unmoved(PYTHONWARNINGS="ignore", PYTHONHASHSEED="0"),
    "TMPDIR in the checkout": unmoved(
        files={"tmp/conftest.py": EXIT, "tmp/pytest.ini": "[pytest]\naddopts = --co\n", "tmp/__init__.py": ""},
        TMPDIR="{root}/tmp",
    ),
}
TABLE = {**EDITS, **FILES, **ENVIRONMENT}


def test_the_project_without_a_plant(tmp_path: Path) -> None:
    project = Project.build(tmp_path, Plant())
    (tmp_path / "project/here").mkdir()
    night = ended(project.start(Plant(args=["--junitxml=here/laws.xml"])))
    assert night.code == 0, night.out
    assert re.search(r"running 2 laws in 3 cases, .*\nall laws hold: 3 cases in \d+ s; oracle.lock has", night.out)
    names = [case.get("name") for case in ET.parse(project.root / "here/laws.xml").getroot().iter("testcase")]
    assert names == ["test_each[0]", "test_each[3]", "test_one"]


@pytest.mark.parametrize("name", TABLE)
def test_attack(tmp_path: Path, name: str) -> None:
    row = TABLE[name]
    attacked, honest = (Project.build(tmp_path / kind, getattr(row, kind)) for kind in ("attack", "twin"))
    processes = attacked.start(row.attack), honest.start(row.twin)
    attack, twin = map(ended, processes)
    assert attack.code == row.code, attack.out
    assert re.search(row.ends, attack.out), attack.out
    assert "all laws hold" not in attack.out
    assert "pytest_autoresearch._laws" not in attacked.cheated
    assert twin.code == 0, twin.out
    assert "all laws hold: 3 cases" in twin.out


def test_our_own_laws_need_nothing_but_what_is_locked() -> None:
    root = Path(__file__).parents[2]
    found = {law.partition("::")[0] for law in laws.collect(root, PATTERNS)}
    assert found == {path.relative_to(root).as_posix() for path in root.glob("tests/laws/test_*.py")}


def bytecode(text: str, source: Path, name: str, *, checked: bool = False) -> None:
    """Compile `text` to bytecode that stands in for `source`'s: by its time and size, or never compared with it."""
    other = source.with_name("other")
    other.write_text(text)
    stamp = source.stat().st_mtime_ns
    os.utime(other, ns=(stamp, stamp))
    mode = py_compile.PycInvalidationMode.TIMESTAMP if checked else py_compile.PycInvalidationMode.UNCHECKED_HASH
    target = source.parent / "__pycache__" / name.format(tag=sys.implementation.cache_tag)
    py_compile.compile(str(other), cfile=str(target), doraise=True, invalidation_mode=mode)
    other.unlink()


@pytest.mark.parametrize("checked", [True, False], ids=["stale", "unchecked"])
def test_bytecode_beside_the_sources(tmp_path: Path, checked: bool) -> None:
    """Python itself believes it; the laws do not."""
    project = Project.build(tmp_path, Plant(broken=True))
    source = project.root / "oracle/double.py"
    bytecode(ORACLE, source, "double.{tag}.pyc", checked=checked)
    command = [sys.executable, "-c", "from oracle.double import double; print(double(1))"]
    believed = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=True)
    assert believed.stdout == "2\n"
    green = "def test_one():\n    pass\n"
    bytecode(green, project.root / LAW_FILE, f"test_double.{{tag}}-pytest-{pytest.__version__}.pyc", checked=checked)
    night = ended(project.start(Plant()))
    assert night.code == 1 and re.search(FAILED, night.out), night.out


def test_a_law_taken_off_the_lock_is_not_run_unseen(tmp_path: Path) -> None:
    project = Project.build(tmp_path, Plant())
    project.lock({f"{LAW_FILE}::test_each": 2})
    night = ended(project.start(Plant()))
    assert night.code == 1 and f"not in oracle.lock: {LAW_FILE}::test_one" in night.out, night.out
    project.lock({})
    night = ended(project.start(Plant()))
    assert night.code == 4 and "lists no law" in night.error, night.out


def test_without_the_configuration_the_lock_says_what_is_immutable(tmp_path: Path) -> None:
    project = Project.build(tmp_path, Plant(files={"table.txt": "1\n", "program.md": "not locked\n"}))
    project.write(config('autoresearch_immutable = ["oracle", "tests/laws", "table.txt"]'))
    project.lock(patterns=immutable_patterns(["oracle", "tests/laws", "table.txt"]))
    unread = Plant(args=["-c", os.devnull, "--rootdir={root}"])
    nights = [ended(process) for process in (project.start(Plant()), project.start(unread))]
    assert [night.code for night in nights] == [0, 0], nights
    project.write({"table.txt": "2\n", "tests/laws/test_more.py": ""})
    night = ended(project.start(unread))
    assert night.code == 1 and night.out.startswith("changed: table.txt\nadded: tests/laws/test_more.py\n"), night.out


def test_nothing_reaches_the_process_of_the_laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing refuses to start here: this process was not reached, but its environment now has what reaches others."""
    project = Project.build(tmp_path, Plant())
    project.write({"shadow/sitecustomize.py": CHEAT, "shadow/random.py": SHADOW})
    monkeypatch.setenv("PYTHONPATH", str(project.root / "shadow"))
    assert laws.collect(project.root, PATTERNS) == LAWS
    assert project.cheated == ""
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert project.cheated, "the cheat is none"


LOOKS = """
import os
import sys


def test_one():
    print("sees", *sorted(os.environ))
    assert os.listdir(os.environ["HOME"]) == [] and not os.path.exists("train.py")
    assert sys.flags.hash_randomization and not sys.flags.optimize and __debug__
    assert not "as far as here"
"""


def test_the_laws_see_little_of_the_environment(tmp_path: Path) -> None:
    """A new home, hashes of their own, and no variable that anything installed would listen to."""
    project = Project.build(tmp_path, Plant(files={LAW_FILE: LOOKS}, locked=True))
    (project.home / "file").touch()
    dropped = ["LD_LIBRARY_PATH", "COVERAGE_PROCESS_START", "PYTHONHASHSEED", "HYPOTHESIS_STORAGE_DIRECTORY", "TORCH_X"]
    night = ended(project.start(Plant(env={**dict.fromkeys(dropped, "0"), "LC_ALL": "C.UTF-8"})))
    assert re.search(r"failed: .*::test_one: .*as far as here", night.out), night.out
    seen = re.search(r"^sees (.*)$", night.out, re.MULTILINE)
    assert seen is not None, night.out
    ours = {"HOME", "TMPDIR", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE"}
    pytests = {"PYTEST_CURRENT_TEST", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_VERSION", "AUTORESEARCH_TREE"}
    assert set(seen[1].split()) <= laws.KEPT | ours | pytests | {"LC_ALL", "LC_CTYPE"}


VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Python that has a user site, as outside of virtual environments, and this one's packages."""
    place = tmp_path_factory.mktemp("python") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(place)], check=True)
    packages = sysconfig.get_path("purelib")
    (place / f"lib/{VERSION}/site-packages/here.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return str(place / "bin/python")


def user_site(home: Path, name: str, cheat: str) -> None:
    """Leave a cheat in the user site."""
    folder = home / f".local/lib/{VERSION}/site-packages"
    folder.mkdir(parents=True)
    (folder / name).write_text(f"import sys; exec({cheat!r})\n" if name.endswith(".pth") else cheat)


@pytest.mark.parametrize("name", ["usercustomize.py", "evil.pth"])
def test_the_user_site(tmp_path: Path, python: str, name: str) -> None:
    """What Python runs of it at every start stops the laws with its name, and does not reach their process."""
    attacked, honest = (Project.build(tmp_path / kind, Plant(broken=kind == "attack")) for kind in ("attack", "twin"))
    user_site(attacked.home, name, attacked.fill(RAN))
    user_site(honest.home, "module.py", honest.fill(RAN))
    command = [python, "-P", "-m", "pytest"]
    attack, twin = map(ended, [project.start(Plant(), command) for project in (attacked, honest)])
    assert twin.code == 0 and "all laws hold" in twin.out, twin.out
    assert attack.code == 4 and f"{name} runs whenever Python starts" in attack.error, attack.out
    assert attacked.cheated, "the cheat is none"
    script = "import sys, pathlib; from pytest_autoresearch import laws; laws.collect(pathlib.Path(), sys.argv[1:])"
    subprocess.run(
        [python, "-c", script, "oracle", "tests/laws"],
        cwd=attacked.root,
        env={"HOME": str(attacked.home), "PATH": os.environ["PATH"]},
        check=True,
    )
    assert "laws.collect" in attacked.cheated and "pytest_autoresearch._laws" not in attacked.cheated


# Says what it is made of before it judges
JUDGE = f"""
import json as _json, os as _os, sys as _sys
import decimal
import oracle.double
_here = _os.getcwd()
_seen = {{
    "flags": list(_sys.flags),
    "oracle": oracle.double.double(1),
    "environment": sorted(name for name in _os.environ if name.startswith(("PYTHON", "PYTEST", "COV", "GIT"))),
    "path": [entry.replace(_here, ".") for entry in _sys.path],
    "foreign": sorted(
        name
        for name, module in list(_sys.modules.items())
        if (getattr(module, "__file__", None) or _here).startswith(_os.environ["LAB_ROOT"])
    ),
}}
with open(_os.environ["LAB_SEEN"], "w") as _file:
    _json.dump(_seen, _file)
{RUNNER}
"""
SHADOWS = {
    **{f"{folder}/{name}.py": SHADOW for folder in ("shadow", ".") for name in ("random", "decimal")},
    **{f"{folder}/{name}customize.py": RAN for folder in ("shadow", ".") for name in ("site", "user")},
    "shadow/oracle/__init__.py": "",
    "shadow/oracle/double.py": ORACLE,
}
ENVIRON = (
    "import os\nos.environ.update(PYTHONPATH='{root}/shadow', PYTHONOPTIMIZE='1', GIT_DIR='/x', PYTEST_ADDOPTS='-x')\n"
)
JUDGED = {
    "the working directory, bytecode": Plant(files=SHADOWS),
    "PYTHONPATH": Plant(files=SHADOWS, env={"PYTHONPATH": "{root}/shadow"}),
    "PYTHONOPTIMIZE, PYTHONHASHSEED": Plant(env={"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "0"}),
    "PYTHONSTARTUP, PYTHONWARNINGS": Plant(
        files=SHADOWS, env={"PYTHONSTARTUP": "{root}/sitecustomize.py", "PYTHONWARNINGS": "ignore"}
    ),
    "PYTHONPYCACHEPREFIX": Plant(env={"PYTHONPYCACHEPREFIX": "{root}/pyc"}),
    "PYTEST_ADDOPTS, PYTEST_PLUGINS": Plant(env={"PYTEST_ADDOPTS": "-q -ra", "PYTEST_PLUGINS": "pytester"}),
    "COVERAGE_PROCESS_START": Plant(env={"COVERAGE_PROCESS_START": "{root}/rc", "COV_CORE_SOURCE": "x"}),
    "a conftest.py that sets the environment": Plant(files={**SHADOWS, "conftest.py": ENVIRON}),
}


def judging(top: Path, plant: Plant) -> Lab:
    """Return a project whose judge is JUDGE, with bytecode of another oracle beside its sources."""
    lab = Lab.build(top)
    lab.write("oracle/__init__.py", "")
    bytecode(ORACLE, lab.write("oracle/double.py", BROKEN), "double.{tag}.pyc")
    lab.write("oracle/judge.py", JUDGE)
    lab.write("pytest.ini", "[pytest]\nautoresearch_immutable = oracle\n")
    for name, text in plant.files.items():
        lab.write(name, text.replace("{root}", str(lab.root)))
    return lab


def judged(lab: Lab, plant: Plant, command: Sequence[str] = (PYTEST,)) -> dict[str, object]:
    """Return what the judge of one run of train.py is made of; the run gives the score that it must."""
    seen = Path(lab.env["HOME"]) / "seen.json"
    words, env = lab.command("train.py")
    env |= {name: value.replace("{root}", str(lab.root)) for name, value in plant.env.items()}
    done = subprocess.run(
        [*command, *words[words.index("-p") :]],
        cwd=lab.root,
        env={**env, "LAB_SEEN": str(seen), "LAB_ROOT": str(lab.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0 and "val_bpb: 1.08" in done.stdout, done.stdout
    cheated = lab.root / "cheated"
    assert not cheated.exists() or "oracle.judge" not in cheated.read_text()
    return dict(json.loads(seen.read_text()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return what a judge is made of where nothing is planted: the twin of every row."""
    seen = judged(judging(tmp_path_factory.mktemp("judge") / "project", Plant()), Plant())
    assert seen["foreign"] == [] and seen["oracle"] == 3
    return seen


@pytest.mark.parametrize("name", JUDGED)
def test_nothing_reaches_the_judge(tmp_path: Path, undisturbed: dict[str, object], name: str) -> None:
    assert judged(judging(tmp_path / "project", JUDGED[name]), JUDGED[name]) == undisturbed


@pytest.mark.parametrize("name", ["usercustomize.py", "evil.pth"])
def test_the_user_site_does_not_reach_the_judge(tmp_path: Path, python: str, name: str) -> None:
    lab = judging(tmp_path / "project", Plant())
    user_site(Path(lab.env["HOME"]), name, RAN.replace("{root}", str(lab.root)))
    assert judged(lab, Plant(), [python, "-P", "-m", "pytest"])["foreign"] == []
    assert (lab.root / "cheated").exists(), "the cheat is none"
