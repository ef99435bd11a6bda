# shellcheck shell=bash
# Sourced by launch/local.sh and tests/run.sh: makes .venv if missing, installs what is needed.
# Usage: source launch/setup.sh ROOT REQUIREMENTS; leaves the interpreter's path in $python.

root=$1 requirements=$2 stamp=$1/.venv/installed
if [ ! -x "$root/.venv/bin/python" ]; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "${base:-}" ]; then
        echo "error: Python >= 3.11 was not found; name it with PYTHON=/path/to/python3" >&2
        exit 2
    fi
    echo "making $root/.venv with $("$base" --version)" >&2
    "$base" -m venv "$root/.venv"
fi
python=$root/.venv/bin/python
want=$(cat "$requirements" "$root/requirements.txt" | cksum)
if ! grep -qsxF "$want" "$stamp"; then
    echo "installing $requirements" >&2
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    echo "$want" >>"$stamp"
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Compiled programs are kept, so that the same command starts faster the next time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$root/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
