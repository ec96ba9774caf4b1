"""Processes that tests start: none outlives its time limit, and what it printed is shown."""
import subprocess
import threading

import psutil


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
