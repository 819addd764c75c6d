"""Runs train.py and sample.py as fresh processes in a fraction of a second: forked from one that has imported torch.

The forked child is the script from its first line on, with its own memory, files and end, so that a hang, a crash of a
C library and the peak of memory are seen of each case alone. In the child an audit hook reports every file opened for
writing outside the allowed folder, every class that a pickle asks for, and every use of the network.
"""
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# How a job's process is started and ended, if not as usual. `streams`: which are "closed", "broken" or "full".
JOB = dict(count=False, kill=None, signal=None, file_size=None, user=None, umask=None, streams={})
PATIENCE = 10           # as slow a busy machine may be
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
NEVER = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.system", "os.posix_spawn",
         "subprocess.Popen")
# calls into C between which a file can be torn: a killed process may leave what lies on the disk between any two
TOUCHES = {"open", "replace", "rename", "serialize_file", "write", "writelines", "flush", "close", "unlink", "mkdir",
           "sendfile", "truncate", "link", "remove", "rmdir", "fsync", "__exit__"}


class Warm:
    """Call it: warm(cwd, "train.py", "clip.mp4", ...) -> status, out, err, broken rules, seconds, peak memory in MB.

    limit: seconds of computing, after which it is ended; or PATIENCE times as many by the clock.
    """

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | ONE_THREAD)

    def __call__(self, cwd, script, *args, limit=60, allowed=".", **job):
        job |= dict(cwd=str(cwd), script=script, args=[str(arg) for arg in args], limit=limit, allowed=allowed)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def warm():
    """The one warm process that all tests of this process use."""
    return Warm()


def serve():
    """The warm process: one JSON job a line, each answered by a line."""
    sys.path.insert(0, str(ROOT))
    import av  # noqa: F401
    import torch
    import torch._dynamo  # what the optimizer would import
    import torch._inductor.config

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = SimpleNamespace(**JOB | json.loads(line))
        files = dict(zip(("out", "err", "broken", "touches"), map(os.memfd_create, "oebt")))
        pid = os.fork()
        if pid == 0:
            child(job, files)
        answer = watch(pid, job)
        for name, file in files.items():
            answer[name] = os.pread(file, 10 ** 6, 0).decode(errors="replace")
            os.close(file)
        print(json.dumps(answer), flush=True)


def watch(pid, job):
    """Waits for the child; sends it the signal that the job asks for; ends it at the time limit."""
    began, sent, hang = time.time(), False, False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        seconds = time.time() - began
        if job.signal and not sent and seconds > job.signal[1]:
            os.kill(pid, job.signal[0])
            sent = True
        if not hang and seconds > job.limit and (own_seconds(pid) > job.limit or seconds > PATIENCE * job.limit):
            os.kill(pid, signal.SIGKILL)
            hang = True
        time.sleep(0.002)
    return dict(status=os.waitstatus_to_exitcode(ended[1]), hang=hang, seconds=time.time() - began, sent=sent,
                peak=ended[2].ru_maxrss // 1024)


def own_seconds(pid):
    """How long a process has computed. On a machine that is busy with others this is far less than the clock says."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child(job, files):
    """Becomes the script. Never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)
    sys.stdout = stream(1, files["out"], job.streams.get("out"), "strict")
    sys.stderr = stream(2, files["err"], job.streams.get("err"), "backslashreplace")
    sys.dont_write_bytecode = True
    code = 1
    try:
        os.chdir(job.cwd)
        if job.umask is not None:
            os.umask(job.umask)
        if job.user is not None:
            import tinytav.editing  # noqa: F401  Python's own folder may be closed to that user
            os.setgid(job.user), os.setuid(job.user)
        if job.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size, job.file_size))
        sys.addaudithook(guard(os.path.realpath(job.allowed), files["broken"]))
        sys.argv = [job.script, *job.args]
        if job.count or job.kill:
            sys.setprofile(Touches(job.kill, files["touches"]))
        runpy.run_path(str(ROOT / job.script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        for file in (sys.stdout, sys.stderr):
            try:
                file.flush()
            except (AttributeError, ValueError):        # it is closed
                pass
            except OSError:
                code = code or 120                      # as Python ends when it cannot flush
        os._exit(code)


def stream(number, file, fault, errors):
    """The stream of this number, written to `file`, or with a fault, as Python opens it; None where it is closed."""
    if fault == "closed":
        os.close(number)
        return None
    if fault == "broken":
        reader, file = os.pipe()
        os.close(reader)
    elif fault == "full":
        file = os.open("/dev/full", os.O_WRONLY)
    os.dup2(file, number)
    return os.fdopen(number, "w", buffering=1 if number == 2 or not fault else -1, errors=errors)


def guard(allowed, report):
    """An audit hook that writes broken rules into the file `report`."""
    def inside(path):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True                                 # an open file's number
        path = os.fsdecode(path)
        return path == os.devnull or f"{os.path.realpath(path)}/".startswith(f"{allowed}/")

    def hook(event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES and not inside(args[0]):
            os.write(report, f"opens {args[0]!r} for writing\n".encode())
        elif event in CHANGES and not all(inside(path) for path in args[:2 if event == "os.rename" else 1]):
            os.write(report, f"{event} {args!r}\n".encode())
        elif event in NEVER:
            os.write(report, f"{event} {args!r}\n".encode())
    return hook


class Touches:
    """A profile hook: counts the moments at which files are touched, and at the chosen one kills the process.

    kill: (signal's number, moment, seconds to wait); with seconds, an alarm kills it in the midst of the call.
    """

    def __init__(self, kill, report):
        self.kill, self.report, self.count = kill, report, 0

    def __call__(self, frame, event, function):
        if event not in ("c_call", "c_return") or function.__name__ not in TOUCHES:
            return
        self.count += 1
        os.pwrite(self.report, str(self.count).encode(), 0)
        if self.kill and self.count == self.kill[1]:
            if self.kill[2]:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, self.kill[2])
            else:
                os.kill(os.getpid(), self.kill[0])


if __name__ == "__main__":
    serve()
