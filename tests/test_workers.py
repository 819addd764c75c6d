"""The two processes in which the tests run: what pytest says of them, and how they end."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NOTE = """
import os, time
from pathlib import Path
def note(name):
    with open(f"seen-{os.getpid()}", "a") as file:
        file.write(name + "\\n")
    while Path("two").exists() and len(list(Path.cwd().glob("seen-*"))) < 2:     # until the other process is there
        time.sleep(0.01)
"""
FILES = {
    "conftest.py": "from workers import pytest_runtestloop\n",
    "test_good.py": NOTE + """
import pytest, warnings
def test_passes(): note("good")
@pytest.mark.skip(reason="today")
def test_is_skipped(): pass
def test_warns(): warnings.warn("careful")
""",
    "test_other.py": NOTE + """
import pytest
@pytest.mark.parametrize("i", range(3))
def test_number(i): note("other")
@pytest.mark.xfail
def test_known(): assert False
"""}


@pytest.fixture
def project(tmp_path):
    """A folder of two files with tests, of which none fails."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def start(project, *args):
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", project, *args]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run(project, *args):
    """-> (exit status, output, the last line without its time)."""
    process = start(project, *args)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, re.sub(r" in [\d.]+s|=+ ?", "", output.splitlines()[-1]).strip()


def processes(project):
    """How many processes have run tests. With a file `two` in the project a test waits for the second one."""
    return len(list(project.glob("seen-*")))


def alive(project):
    """The processes that work in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == project and process.name != str(os.getpid()):
                found.append(process)
        except OSError:
            pass
    return found


def test_two_processes_share_the_files_and_all_tests_are_counted_once(project):
    (project / "two").touch()
    status, output, last = run(project)
    assert status == 0 and last == "5 passed, 1 skipped, 1 xfailed, 1 warning", output
    assert processes(project) == 2 and "UserWarning: careful" in output and output.count("collected") == 1


@pytest.mark.parametrize("arguments, last, count", [
    (["test_good.py"], "2 passed, 1 skipped, 1 warning", 1), (["-s"], "5 passed, 1 skipped, 1 xfailed, 1 warning", 1),
    (["-k", "number"], "3 passed, 4 deselected", 1), (["-k", "passes or number"], "4 passed, 3 deselected", 2),
    (["--collect-only"], "7 tests collected", 0), (["-v", "-p", "no:cacheprovider", "-p", "no:capture"],
                                                   "5 passed, 1 skipped, 1 xfailed, 1 warning", 2)])
def test_a_choice_of_tests_or_a_way_to_run_them_is_as_without_workers(project, arguments, last, count):
    if count == 2:
        (project / "two").touch()
    status, output, said = run(project, *arguments)
    assert (status, said, processes(project)) == (0, last, count), output
    assert count != 1 or re.search(r"^test_\w+\.py [.s]", output, re.MULTILINE)   # pytest itself names files


def test_a_failure_is_printed_in_full_with_what_the_test_printed(project):
    (project / "test_bad.py").write_text("def test_bad():\n    print('on the way')\n    assert [1, 2] == [1, 3]\n")
    status, output, last = run(project)
    assert status == 1 and last == "1 failed, 5 passed, 1 skipped, 1 xfailed, 1 warning"
    assert "assert [1, 2] == [1, 3]" in output and "on the way" in output and "FAILED test_bad.py::test_bad" in output
    status, output, last = run(project, "--last-failed")
    assert status == 1 and last.startswith("1 failed")


def test_a_file_that_cannot_be_imported_stops_all(project):
    (project / "test_bad.py").write_text("import nothing_of_this_name\n")
    status, output, last = run(project)
    assert status == 2 and "1 error" in last and processes(project) == 0


@pytest.mark.parametrize("end, status", [("os._exit(0)", "0"), ("os.kill(os.getpid(), 9)", "-9")])
def test_a_process_that_ends_is_named_with_its_test_and_stops_all(project, end, status):
    """Even where it ends with status 0: no test is forgotten."""
    (project / "test_bad.py").write_text(f"import os\ndef test_before(): pass\ndef test_ends(): {end}\n")
    code, output, last = run(project)
    assert code == 2 and f"Interrupted: a worker ended with status {status} in test_bad.py::test_ends" in output, output
    assert "passed" in last and not alive(project)


def test_a_fixture_of_the_session_that_cannot_be_torn_down_is_no_success(project):
    (project / "test_bad.py").write_text("""
import pytest
@pytest.fixture(scope="session")
def thing():
    yield
    raise KeyError("while torn down")
def test_thing(thing): pass
""")
    status, output, _ = run(project)
    assert status not in (0, 5) and "while torn down" in output, output


def test_fixtures_live_as_long_as_their_scope_says(project):
    (project / "conftest.py").write_text(FILES["conftest.py"] + NOTE + """
import pytest
@pytest.fixture(scope="session")
def whole():
    note("whole begins"); yield; note("whole ends")
@pytest.fixture(scope="module")
def part():
    note("part begins"); yield; note("part ends")
""")
    for name in "1234":
        (project / f"test_{name}.py").write_text("""
import os
def test_a(whole, part): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_b(whole, part): pass
""")
    assert run(project, *(f"test_{name}.py" for name in "1234"))[::2] == (0, "8 passed")
    for file in project.glob("seen-*"):
        first, *parts, last = file.read_text().splitlines()
        assert (first, last) == ("whole begins", "whole ends")
        assert parts == ["part begins", "part ends"] * (len(parts) // 2)


def test_after_the_first_failure_option_x_stops_both(project):
    (project / "test_bad.py").write_text("def test_bad(): assert False\n")
    (project / "test_long.py").write_text("import time\ndef test_long(): time.sleep(50)\n")
    began = time.time()
    status, output, last = run(project, "-x", "test_bad.py", "test_long.py")
    assert status == 1 and last == "1 failed" and "stopping after 1 failures" in output and time.time() - began < 30
    assert not alive(project)


def test_ctrl_c_ends_all_and_fixtures_are_torn_down(project):
    for name in ("test_1.py", "test_2.py"):
        (project / name).write_text(NOTE + """
import pytest
@pytest.fixture
def thing():
    yield
    note("torn down")
def test_long(thing): note("begun"); time.sleep(50)
""")
    (project / "two").touch()
    process = start(project, "test_1.py", "test_2.py")
    while processes(project) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "KeyboardInterrupt" in output and not alive(project)
    assert all(file.read_text() == "begun\ntorn down\n" for file in project.glob("seen-*"))
