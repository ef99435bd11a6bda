"""Settings of every test: eight simulated devices, compiled programs kept between runs.

What a test records as `line` is printed at the end of the run, whichever process ran the test.
"""

import collections
import gc
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Under nohup SIGHUP is ignored, here and in all processes that tests start to send them one.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Eight devices on two busy cores may wait for each other longer than XLA's 40 s, after which it
    # aborts the process.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs after a module once there are many: each is some mapped pieces of
    memory, and Linux kills a process that has more of them than 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def light_compilation():
    """For tests that compile much and run little: their modules are compiled in about half of the
    time, to slower programs."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_probes():
    """One classifier for each block, where the choice among more is not what is tested."""
    from data2vec_jax.tasks import probe

    with pytest.MonkeyPatch.context() as patch:
        for name, choices in {"MIDDLE": (1.0,), "PRIORS": (1.0,), "SCALINGS": ("each",)}.items():
            patch.setattr(probe, name, choices)
        yield


@pytest.hookimpl(trylast=True)  # in a log that is cut, the end is left
def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    reports = [report for report in reports if hasattr(report, "when")]
    calls = [report for report in reports if report.when == "call"]
    lines = [text for r in calls for name, text in r.user_properties if name == "line"]
    if lines:
        terminalreporter.section("worst relative error of each stage")
        for text in sorted(lines):
            terminalreporter.write_line(text)
    seconds = collections.Counter()
    for report in reports:
        seconds[report.location[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest files: seconds of one worker")
        slowest = [f"{name} {total:.0f}" for name, total in seconds.most_common(40)]
        terminalreporter.write_line(textwrap.fill("  ".join(slowest), 100))
