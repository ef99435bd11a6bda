#!/usr/bin/env bash
# data2vec on a Cloud TPU slice, or several: asks for it, installs, trains on all workers, asks again
# when it is taken away, and deletes it at the end.
#
#   bash launch/tpu_pod.sh NAME --zone=us-west4-a --type=v5litepod-256 --spot \
#       --prepare='sudo mkdir -p /data && sudo mount 10.0.0.2:/share /data' \
#       -- --config=vision_v2:large --workdir=/data/run
#
#   --slices=N          slices of that type (1)
#   --runtime=IMAGE     of the machines (by type: v2-alpha-tpuv5-lite, ...)
#   --project=ID        gcloud's own choice if left out
#   --spot, --reserved  cheaper and taken away at any time; from your reservation
#   --prepare=COMMAND   run by every worker first: what mounts the folder of data and workdir
#   --delete            only deletes the slice
#   --dry-run           prints what it would do
#
# Everything after -- goes to `python -m data2vec_jax.train`. The workdir must outlive the slice and
# be the same folder on all workers (Filestore or another NFS). The same command resumes: it goes on
# with the slice and the run that it finds.
set -euo pipefail
STOPPED=130 # exit code of a run that was interrupted and can be resumed

fail() {
    echo "error: $1" >&2
    exit 2
}

here=$(cd "$(dirname "$0")/.." && pwd)
name='' zone='' type='' slices=1 runtime='' prepare=true dry='' delete='' project=() tier=()
while [ $# -gt 0 ]; do
    case $1 in
        --) shift && break ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --project=*) project=("$1") ;;
        --spot | --reserved) tier=("$1") ;;
        --prepare=*) prepare=${1#*=} ;;
        --delete) delete=yes ;;
        --dry-run) dry=yes ;;
        -*) fail "unknown option '$1'; see the head of $0" ;;
        *) [ -z "$name" ] || fail "two names, '$name' and '$1'" && name=$1 ;;
    esac
    shift
done
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME '$name' is not lower-case letters, digits and dashes"
[ -n "$zone" ] || fail "--zone=ZONE is missing"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a positive number"
if [ -z "$delete" ]; then
    [ -n "$type" ] || fail "--type=TYPE is missing, such as v5litepod-256"
    [[ " $* " == *" --config="* && " $* " == *" --workdir="* ]] ||
        fail "after -- come --config=NAME:VARIANT and --workdir=DIR"
fi
if [ -z "$runtime" ]; then
    case $type in
        v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) [ -n "$delete" ] || fail "--runtime=IMAGE is missing: none is known for type '$type'" ;;
    esac
fi
nodes=("$name")
of_slices=(--node-id="$name")
if [ "$slices" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
    of_slices=(--node-count="$slices" --node-prefix="$name")
fi

say() { # a command, as one could type it
    local word line=+
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "$line" >&2
}

note() { echo "# $*" >&2; }

run() {
    say "$@"
    [ -n "$dry" ] || "$@"
}

where=(--zone="$zone" ${project[@]+"${project[@]}"})
queued() { run gcloud compute tpus queued-resources "$1" "$name" "${@:2}" "${where[@]}"; }
machines() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }

state() { # of the request: NONE if there is none, UNKNOWN if gcloud cannot say
    local text
    if text=$(gcloud compute tpus queued-resources describe "$name" \
        --format='value(state.state)' "${where[@]}" 2>&1); then
        echo "${text##*$'\n'}"
    elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
        echo NONE
    else
        echo "$text" >&2
        echo UNKNOWN
    fi
}

remove() { queued delete --quiet --force; }

everywhere() { # a command on all workers of all slices
    local node
    for node in "${nodes[@]}"; do machines ssh "$node" --worker=all --command="$1"; done
}

first() { # a command on the first worker, in silence
    gcloud compute tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command="$1" "${where[@]}" 2>/dev/null
}

install() {
    local node archive=${TMPDIR:-/tmp}/data2vec-$$.tar.gz
    run tar -czf "$archive" -C "$here" --exclude=.venv --exclude=.git --exclude=runs \
        --exclude='.*_cache' --exclude=__pycache__ . || return
    for node in "${nodes[@]}"; do
        machines scp "$archive" "$node:data2vec.tar.gz" --worker=all || return
    done
    run rm "$archive"
    # Some images have an older Python than the 3.11 that is needed.
    everywhere "$prepare && \
{ command -v python3.12 || { sudo add-apt-repository -y ppa:deadsnakes/ppa && \
sudo apt-get install -y python3.12-venv; }; } && \
mkdir -p data2vec && tar -xzf data2vec.tar.gz -C data2vec && cd data2vec && \
bash -c 'source launch/setup.sh \$PWD launch/requirements-tpu.txt'"
}

# The run goes on without us; each worker leaves its exit code in data2vec/exit_code.
RUNNING='pgrep -f [d]ata2vec_jax.train >/dev/null' # [d]: or it would find itself
start() {
    everywhere "timeout 120 sh -c 'while $RUNNING; do sleep 1; done'" # what is left of the last one
    everywhere "cd data2vec && rm -f exit_code && \
{ COORDINATOR_ADDRESS=auto PYTHONPATH=. nohup sh -c '.venv/bin/python -m data2vec_jax.train $1; \
echo \$? >exit_code' >>train.log 2>&1 </dev/null & }"
}

if [ -n "$delete" ]; then
    remove
    exit 0
fi
[[ "$*" != *"'"* ]] || fail "the run's options cannot hold a single quote: $*"
options=$(printf '%q ' "$@")

if [ -n "$dry" ]; then
    note "unless $name is there already:"
    queued create --accelerator-type="$type" --runtime-version="$runtime" \
        "${of_slices[@]}" ${tier[@]+"${tier[@]}"}
    note "every minute, until it is ACTIVE:"
    queued describe --format='value(state.state)'
    note "unless it trains already:"
    install
    start "$options"
    note "every minute, beside the state: the exit code of the run"
    machines ssh "${nodes[0]}" --worker=0 --command='cat data2vec/exit_code'
    note "SUSPENDED, which is taken away: delete and begin again; exit code 0: delete and end"
    remove
    exit 0
fi

before=''
started=''
while true; do
    now=$(state)
    [ "$now" = "$before" ] || echo "$(date +%T) $name: $now" >&2
    case $now in
        NONE)
            started=''
            queued create --accelerator-type="$type" --runtime-version="$runtime" \
                "${of_slices[@]}" ${tier[@]+"${tier[@]}"}
            ;;
        ACTIVE)
            if [ -z "$started" ]; then
                # If a worker is taken away just now, the state says so the next time.
                if first "$RUNNING" || { install && start "$options"; }; then started=yes; fi
            else
                code=$(first 'cat data2vec/exit_code' || true)
                case $code in
                    '') ;;
                    0) remove && exit 0 ;;
                    "$STOPPED") started='' ;; # interrupted: go on, if the slice stays
                    *)
                        first 'tail -n 30 data2vec/train.log' >&2 || true
                        echo "error: the run ended with exit code $code; $name is still there" >&2
                        exit "$code"
                        ;;
                esac
            fi
            ;;
        SUSPENDING | SUSPENDED) remove ;; # taken away: ask again
        FAILED)
            echo "error: the request $name failed; see gcloud compute tpus queued-resources" \
                "describe $name ${where[*]}, then delete it with --delete" >&2
            exit 1
            ;;
        UNKNOWN) [ -n "$before" ] || exit 1 ;; # gcloud has said why; later it may be the network
    esac
    before=$now
    sleep "${POLL_SECONDS:-60}"
done
