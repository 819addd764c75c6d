"""`python -m pytest` in two processes of one thread each, wherever tests of several files are chosen.

The parent collects the tests and starts two workers: the same command once more. A worker asks for a file, runs its
tests, and asks for the next. The parent hands each report to pytest as if the test had run there. So pytest prints,
counts and exits as it does without workers.
"""
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe, connection
from warnings import WarningMessage

import pytest

WORKERS = 2
PATIENCE = 10       # seconds in which a worker that is told to end must end
ALONE = ("collectonly", "usepdb", "trace", "basetemp", "setupshow", "setuponly", "setupplan")  # options for one process
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
PIPE = os.environ.pop("PYTEST_WORKERS_PIPE", None)      # of a worker: the number of its end


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Runs all tests in workers and returns True; returns None where pytest's own loop is right."""
    if PIPE:
        return work(session, connection.Connection(int(PIPE)))
    files, options = {}, session.config.option
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    alone = any(getattr(options, name, None) for name in ALONE) or getattr(options, "capture", None) == "no"
    xdist = hasattr(session.config, "workerinput")
    if alone or xdist or len(files) < 2 or session.testsfailed:
        return None
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.showfspath = False     # the files take turns: letters without names
    gather(session, list(files.values()))
    return True


# ---- in a worker ---------------------------------------------------------------------------------

def work(session, parent):
    """Runs the tests of the files that the parent names, until it names none."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # so that the parent's stop tears fixtures down
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    session.config.pluginmanager.register(Teller(session.config, parent))
    items = {item.nodeid: item for item in session.items}
    while names := ask(parent):
        tests = [items[name] for name in names]
        for item, following in zip(tests, [*tests[1:], session]):     # after a file the session's fixtures stay alive
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return True


def ask(parent):
    parent.send(("next", None))
    return parent.recv()


class Teller:
    """A plugin that sends to the parent what pytest tells it."""

    def __init__(self, config, parent):
        self.config, self.parent = config, parent

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.parent.send(("report", data))

    def pytest_runtest_logfinish(self, nodeid):
        self.parent.send(("finish", nodeid))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        of = warning_message
        message = str(of.message), of.category, of.filename, of.lineno
        self.parent.send(("warning", dict(message=message, when=when, nodeid=nodeid, location=location)))


# ---- in the parent -------------------------------------------------------------------------------

class Worker:
    """A worker as the parent sees it. `tests`: what it has got and not finished; `status`: how it must end, 1 or 0."""

    def __init__(self, arguments):
        self.pipe, there = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments], stdout=subprocess.DEVNULL, pass_fds=[there.fileno()],
            env=os.environ | ENVIRONMENT | {"PYTEST_WORKERS_PIPE": str(there.fileno())})
        there.close()
        self.tests, self.status = {}, 0

    def end(self):
        """Waits for its end, after a while with force -> its exit status, or the number of a signal below zero."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def gather(session, queue):
    """Starts the workers, hands out the files and hands on the reports, until all workers have ended."""
    workers = [Worker(session.config.invocation_params.args) for _ in range(WORKERS)]
    at_work = {worker.pipe: worker for worker in workers}
    try:
        while at_work:
            for pipe in connection.wait(at_work):
                try:
                    take(session, queue, at_work[pipe], *pipe.recv())
                except EOFError:
                    worker = at_work.pop(pipe)
                    if worker.end() != worker.status or worker.tests:
                        where = next(iter(worker.tests), "no test")
                        raise session.Interrupted(f"a worker ended with status {worker.end()} in {where}") from None
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
    finally:
        for worker in at_work.values():
            worker.process.terminate()
        for worker in at_work.values():
            worker.end()


def take(session, queue, worker, kind, what):
    """Does what one message of a worker asks for."""
    hook = session.config.hook
    if kind == "next":
        new = {item.nodeid: item for item in queue.pop(0)} if queue else {}
        worker.tests |= new
        worker.pipe.send(list(new))
    elif kind == "report":
        report = hook.pytest_report_from_serializable(config=session.config, data=what)
        worker.status |= report.failed
        hook.pytest_runtest_logreport(report=report)
    elif kind == "finish":
        hook.pytest_runtest_logfinish(nodeid=what, location=worker.tests.pop(what).location)
    elif kind == "warning":
        message = WarningMessage(*what.pop("message"))
        hook.pytest_warning_recorded.call_historic(kwargs=dict(what, warning_message=message))
