"""Several processes of the trainer on this machine: what `local.sh --processes=N` runs.

    python launch/processes.py PROCESSES DEVICES OPTIONS...

Each process has DEVICES CPU devices, and OPTIONS are the trainer's. Ctrl-C, SIGTERM or SIGHUP stops
all of them after the same step, with a checkpoint; a third Ctrl-C stops them at once. When one
dies, so do the others, and its exit code is ours. Shown are the output of process 0, and that of
another which was the first to fail.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

GRACE_SECONDS = 5  # between the first failure and the end of the others: they may fail alike


def environment(count: int, devices: int) -> dict[str, str]:
    """What each process needs to know of the others; only its PROCESS_ID is missing."""
    flags = os.environ.get("XLA_FLAGS", "")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "COORDINATOR_ADDRESS": f"localhost:{port}",
        "NUM_PROCESSES": str(count),
    }


def run(command: list[str], count: int, devices: int) -> int:
    """Runs `command` in `count` processes to the end of all; returns the exit code."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: signals.append(number))
    env = environment(count, devices)
    with contextlib.ExitStack() as files:
        # The output of all but process 0 is kept aside.
        logs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        children = []
        for i, log in enumerate([None, *logs]):
            # In a session of its own, so that it hears of Ctrl-C from us, once.
            options = dict(stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_us)
            children.append(subprocess.Popen(command, env=env | {"PROCESS_ID": str(i)}, **options))
        failed = supervise(children, signals)
        if not failed:
            return 0
        codes = [128 - c.returncode if c.returncode < 0 else c.returncode for c in children]
        culprit = failed[0]
        if codes[culprit] == codes[0] in (2, 130):  # a mistake, Ctrl-C: process 0 has said so
            return codes[0]
        text = f"process {culprit} ended with code {codes[culprit]}; the others were stopped\n"
        if culprit:
            logs[culprit - 1].seek(0)
            text = logs[culprit - 1].read().decode(errors="replace") + text
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stderr.write(text)
        return codes[culprit]


def supervise(children: Sequence[subprocess.Popen], signals: Sequence[int]) -> list[int]:
    """Waits for the end of all, passing on `signals`; returns who failed, in order of time."""
    failed: list[int] = []
    passed_on, deadline = 0, float("inf")
    while True:
        running = [child for child in children if child.poll() is None]
        new = [i for i, c in enumerate(children) if c.returncode and i not in failed]
        # Of two that have ended since the last look, one that was killed is the reason.
        failed += sorted(new, key=lambda i: children[i].returncode > 0)
        if not running:
            return failed
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        while passed_on < len(signals):
            passed_on += 1
            seen = signals[:passed_on]
            if seen[-1] == signal.SIGINT and seen.count(signal.SIGINT) > 2:
                number = signal.SIGKILL
            else:  # JAX takes SIGTERM for itself, and would answer a second one with silence
                number = signal.SIGINT if passed_on == 1 else signal.SIGHUP
            for child in running:
                child.send_signal(number)
        if time.monotonic() > deadline:
            for child in running:
                child.kill()
        time.sleep(0.02)


def _end_with_us() -> None:
    """On Linux, kills this process when the launcher dies, however that happens."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    count, devices, *options = sys.argv[1:]
    trainer = [sys.executable, "-m", "data2vec_jax.train", *options]
    sys.exit(run(trainer, int(count), int(devices)))
