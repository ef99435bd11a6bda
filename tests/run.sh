#!/usr/bin/env bash
# All tests, from a bare machine with Python >= 3.11: makes .venv, installs, runs pytest.
# Options are passed to pytest: bash tests/run.sh tests/test_masking.py
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/launch/setup.sh" "$here" "$here/tests/requirements.txt"
cd "$here"
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest --numprocesses="${TEST_PROCESSES:-2}" --dist=loadgroup --durations=10 "$@"
