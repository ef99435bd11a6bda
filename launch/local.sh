#!/usr/bin/env bash
# data2vec on this machine.
#
#   bash launch/local.sh                             the demo: pretrain, probe, report (runs/demo/)
#   bash launch/local.sh --config=... --workdir=...  python -m data2vec_jax.train with these options
#   bash launch/local.sh --processes=2 --config=...  the same in 2 processes, one CPU device each
#
# Makes .venv and installs requirements.txt if that has not been done. The exit code is the
# trainer's.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/launch/setup.sh" "$here" "$here/requirements.txt"

if [ $# -eq 0 ]; then
    cd "$here"
    exec "$python" launch/demo.py
fi

processes=1 options=()
for option in "$@"; do
    case $option in
        --processes=*) processes=${option#*=} ;;
        *) options+=("$option") ;;
    esac
done
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --processes=$processes is not a positive number" >&2
    exit 2
fi
if [ "$processes" -eq 1 ]; then
    exec "$python" -m data2vec_jax.train "${options[@]}"
fi

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 NUM_PROCESSES=$processes
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export COORDINATOR_ADDRESS=localhost:$port
pids=()
for ((i = 0; i < processes; i++)); do
    PROCESS_ID=$i "$python" -m data2vec_jax.train "${options[@]}" &
    pids+=($!)
done
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT TERM
code=0
for ((i = 0; i < processes; i++)); do
    # The first process to fail ends the others: they would wait for it in vain.
    wait -n && status=0 || status=$?
    if [ $status -ne 0 ] && [ $code -eq 0 ]; then
        code=$status
        kill "${pids[@]}" 2>/dev/null || true
    fi
done
exit $code
