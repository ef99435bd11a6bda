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
# On a CPU: large pages for large arrays, which are fetched anew in every step. It saves a tenth to a
# fourth of a step with glibc >= 2.35, and other systems ignore it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

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
    exec "$python" -m data2vec_jax.train ${options[@]+"${options[@]}"}
fi
exec "$python" "$here/launch/processes.py" "$processes" 1 ${options[@]+"${options[@]}"}
