"""The zygote: what it forks is what a new interpreter would be, but for the modules that are there already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tools.zygote.client import ADDRESS, start, zygote

READS = "FREEKV_TEST_READ_AT_IMPORT"
MODULES = {
    "preloaded": f"import os\nREAD = os.environ.get('{READS}')\nos.environ['SET_BY_IMPORT'] = 'yes'\n",
    "describe": """
import json, os, sys, preloaded, setproctitle
setproctitle.setproctitle("retitled")
print(json.dumps({
    "argv": sys.argv,
    "folder": os.getcwd(),
    "path": sys.path[0],
    "variables": [os.environ.get(name) for name in ("ORDERED", "SET_BY_IMPORT", "NOT_ORDERED")],
    "main": __name__,
    "title": open("/proc/self/comm").read(),
    "leads_session": os.getsid(0) == os.getpid(),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],  # without that of the listing
}))
""",
    "spawning": """
import json, multiprocessing, os, sys

def answer(channel):
    print("spawned", file=sys.stderr, flush=True)
    channel.send((os.getppid(), os.environ["SAID"], [name for name in sys.modules if name == "only_in_parent"]))

def main(number):
    spawn = multiprocessing.get_context("spawn")
    sys.modules["only_in_parent"] = sys
    answers = []
    for i in range(number):
        ours, theirs = spawn.Pipe()
        os.environ["SAID"] = str(i)
        process = spawn.Process(target=answer, args=(theirs,))
        process.start()
        answers.append(ours.recv())
        process.join()
        assert process.exitcode == 0
    print(json.dumps([os.getpid(), answers]))

if __name__ == "__main__":
    main(int(sys.argv[1]))
""",
    "sleeping": """
import subprocess, time
subprocess.Popen(["sleep", "600"])
print("asleep", flush=True)
time.sleep(600)
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the modules above."""
    folder = tmp_path_factory.mktemp("modules")
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, READS: "1"}


@pytest.fixture(autouse=True, scope="module")
def light_zygote(environment: dict[str, str]) -> Iterator[None]:
    """A zygote that imports one small module."""
    with zygote(environment, ["preloaded"]):
        yield


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run a process to its end: exit status and output."""

    def run(*arguments: str, children: int = 0, anew: bool = False, **variables: str) -> tuple[int, str]:
        log = tmp_path / "log"
        process = start(arguments, log, environment | variables, children, anew)
        return process.wait(timeout=60), log.read_text()

    return run


@pytest.mark.parametrize("arguments", [["-m", "describe"], ["describe.py"], ["-c", "import describe"]])
def test_a_forked_process_is_as_a_new_one(run, arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    forked, new = (run(*arguments, "x", anew=anew, ORDERED="yes") for anew in (False, True))
    assert forked == new
    assert json.loads(new[1])["variables"] == ["yes", "yes", None]


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "1 / 0", "import os; os.kill(os.getpid(), 15)"])
def test_it_ends_as_a_new_one(run, code):
    (forked, told), (new, expected) = (run("-c", code, anew=anew) for anew in (False, True))
    assert forked == new != 0
    assert told.splitlines()[-1:] == expected.splitlines()[-1:]


def test_modules_are_loaded_before_and_what_one_fork_does_is_not_seen_in_another(run):
    code = "import sys; print('preloaded' in sys.modules, 'describe' in sys.modules, hasattr(sys, 'left_behind'))"
    assert run("-c", f"{code}; import describe; sys.left_behind = 1")[1].startswith("True False False\n")
    assert run("-c", code)[1] == "True False False\n"
    assert run("-c", code, anew=True)[1] == "False False False\n"


def test_spawned_processes_are_children_of_who_spawned_them_with_its_environment_and_none_of_its_state(run):
    status, output = run("-m", "spawning", "2", children=3)  # one is left over
    assert status == 0, output
    *said, last = output.splitlines()
    parent, answers = json.loads(last)
    assert answers == [[parent, "0", []], [parent, "1", []]]
    assert said == ["spawned"] * 2, "a spawned process writes to the log of who spawned it"


def test_who_spawns_more_processes_than_it_said_is_told_so(run):
    status, output = run("-m", "spawning", "2", children=1)
    assert status == 1
    assert "start this one with more children" in output


def test_random_numbers_of_two_forks_differ(run):
    code = "import random; print(random.random())"
    assert run("-c", code)[1] != run("-c", code)[1]


def test_a_variable_that_was_read_at_import_cannot_have_another_value(run):
    with pytest.raises(ValueError, match=rf"read {READS} \('2', here '1'\) when .*; start this process anew"):
        run("-m", "describe", **{READS: "2"})
    assert run("-c", "import preloaded; print(preloaded.READ)", anew=True, **{READS: "2"}) == (0, "2\n")


def start_sleeping(log: Path, environment: dict[str, str]):
    process = start(["-m", "sleeping"], log, environment, children=2)
    while log.read_text() != "asleep\n":
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process


def wait_until_none_is_left_of(session: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        alive = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
        left = [p for p in alive if psutil.pid_exists(p.pid) and os.getsid(p.pid) == session]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_whoever_started_a_process_and_is_gone_leaves_nothing_behind(environment, tmp_path):
    code = f"""
import os
from pathlib import Path
from tests.tools.test_zygote import start_sleeping
print(start_sleeping(Path({str(tmp_path / "log")!r}), dict(os.environ)).pid)
"""
    found = environment | {ADDRESS: os.environ[ADDRESS]}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=found, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_until_none_is_left_of(int(done.stdout))


def test_the_zygotes_end_ends_what_it_has_forked(environment, tmp_path, monkeypatch):
    with zygote(environment, []):
        process = start_sleeping(tmp_path / "log", environment)
    with pytest.raises(RuntimeError, match="the zygote has ended"):
        process.wait()
    wait_until_none_is_left_of(process.pid)
