"""Processes that tests start: none outlives its time limit, and what it printed is shown.

`python(...)` starts them without the seconds of imports that each would need, from a fork server that has them.
"""
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Mapping
from multiprocessing import forkserver
from weakref import WeakSet

import psutil

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "scipy.optimize", "diffusers.models", "ucdm.method.generate", "ucdm.method.training",
    "ucdm.method.store_commands", "ucdm.baselines.semi_supervised", "ucdm.runs.run", "ucdm.batch.cli",
    "ucdm.evaluation.metrics", "ucdm.report.claims",
])
STARTED = WeakSet() # for those that a failed test leaves


def kill_tree(pid):
    "Kill a process and everything that it started."
    try: family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess: return
    for process in family:
        try: process.kill()
        except psutil.NoSuchProcess: pass


def read_until(process, wanted, seconds=120):
    """The lines that a process prints, up to the first for which `wanted` is true.

    AssertionError, with all that it printed, if that line is not there in time or the process ends without it; the
    process is dead then.
    """
    lines, late = [], threading.Event()
    def stop():
        late.set()
        kill_tree(process.pid)
    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if wanted(line): return lines
    finally: timer.cancel()
    status = process.wait()
    why = f"it did not come within {seconds} s" if late.is_set() else f"the process ended with status {status}"
    errors = process.stderr.read() if process.stderr else ""
    raise AssertionError(f"the line that the test waits for: {why}. Printed:\n{''.join(lines)}{errors}")


def finish(process, seconds=240):
    """What a process prints until it ends, as (stdout, stderr); not for one that `read_until` reads.

    AssertionError, with what it printed, if it does not end in time; it is dead then.
    """
    try: return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        printed = "".join(text for text in process.communicate() if text)
        raise AssertionError(f"the process did not end within {seconds} s. Printed:\n{printed}") from None


class Child:
    "A process from the fork server, with what tests use of `subprocess.Popen`."
    def __init__(self, process, stdout, stderr): self.process, self.stdout, self.stderr = process, stdout, stderr

    @property
    def pid(self): return self.process.pid
    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.process.exitcode
    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def kill(self): self.process.kill()
    def terminate(self): self.process.terminate()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        said = {}
        def read(name, stream): said[name] = stream.read()
        named = [(name, s) for name in ("stdout", "stderr") if (s := getattr(self, name))]
        readers = [threading.Thread(target=read, args=one, daemon=True) for one in named]
        for r in readers: r.start()
        self.wait(timeout)
        for r in readers: r.join()
        return said.get("stdout"), said.get("stderr")


def _live(words, streams, env, cwd):
    "What a child does: be `python words...`, with other streams."
    for number, connection in streams.items(): os.dup2(connection.fileno(), number)
    for connection in set(streams.values()): connection.close()
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", errors="backslashreplace", closefd=False) for n in (1, 2))
    forkserver._forkserver.__init__() # where it starts a fork server it is one of its own
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if env.get("OMP_NUM_THREADS"):
        import torch
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    option, what, *rest = words
    sys.argv = ["-c" if option == "-c" else what, *rest]
    sys.path.insert(0, "" if option == "-c" else cwd)
    if option == "-m":
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning, "runpy") # that is the point
        return runpy.run_module(what, run_name="__main__", alter_sys=True)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


def python(option, what, *words, # -c and code, or -m and a module; arguments
           cwd=None, env: Mapping[str, str] | None = None, # the whole environment, that of this process if None
           merged=False, # stderr goes where stdout goes
          ) -> Child:
    """Start `python -c code ...` or `python -m module ...`, with its output to be read.

    What is read from the environment at import was read by the fork server; tests that depend on it start an
    interpreter of their own.
    """
    assert option in ("-c", "-m"), option
    out, error = multiprocessing.Pipe(duplex=False), None if merged else multiprocessing.Pipe(duplex=False)
    streams = {1: out[1], 2: (error or out)[1]}
    arguments = ([option, *map(str, [what, *words])], streams, dict(os.environ if env is None else env), str(cwd or os.getcwd()))
    process = CONTEXT.Process(target=_live, args=arguments)
    process.start()
    for pipe in (out, error):
        if pipe: pipe[1].close()
    opened = [pipe and io.open(os.dup(pipe[0].fileno()), encoding="utf-8", errors="replace") for pipe in (out, error)]
    child = Child(process, *opened)
    STARTED.add(child)
    return child


def ran(*words, timeout=240, **options) -> subprocess.CompletedProcess:
    "`subprocess.run` with its output captured, by `python`."
    child = python(*words, **options)
    stdout, stderr = finish(child, timeout)
    return subprocess.CompletedProcess(words, child.returncode, stdout, stderr)
