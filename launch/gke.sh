#!/usr/bin/env bash
# data2vec on Google Kubernetes Engine: fills in launch/gke.yaml and applies it.
#
#   bash launch/gke.sh tpu --topology=v5e:16x16 --slices=2 -- --config=... --workdir=/shared/run
#   bash launch/gke.sh gpu --nodes=4 --gpu=nvidia-h100-80gb -- --config=... --workdir=/shared/run
#
#   --gpus=N          of a node (8)
#   --name=NAME       of the JobSet (data2vec)
#   --claim=NAME      of the volume claim that all pods mount as /shared (data2vec)
#   --image=IMAGE     with Python 3.11 or newer (python:3.12)
#   --delete          only deletes the JobSet
#   --dry-run         prints the manifest and the command, and applies nothing
#
# The same command resumes, after `--delete` too: the run is in its workdir.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
hardware=${1:-} topology='' slices=1 nodes=2 gpu=nvidia-h100-80gb gpus=8
name=data2vec claim=data2vec image=python:3.12 dry='' delete=''
[[ $hardware = tpu || $hardware = gpu ]] || fail "usage: bash launch/gke.sh {tpu|gpu} ... -- --config=..."
shift
while [ $# -gt 0 ]; do
    case $1 in
        --) shift && break ;;
        --topology=*) topology=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --gpu=*) gpu=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --claim=*) claim=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --delete) delete=yes ;;
        --dry-run) dry=yes ;;
        *) fail "unknown option '$1'; see the head of $0" ;;
    esac
    shift
done
if [ -n "$delete" ]; then
    echo "+ kubectl delete jobset $name" >&2
    [ -n "$dry" ] || kubectl delete jobset "$name"
    exit 0
fi
for number in "$slices" "$nodes" "$gpus"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--slices, --nodes and --gpus are numbers, not '$number'"
done
[[ " $* " == *" --config="* && " $* " == *" --workdir="* ]] ||
    fail "after -- come --config=NAME:VARIANT and --workdir=DIR"
[[ "$*" =~ ^[[:alnum:]_./:=,@%+\ -]+$ ]] || fail "options with quotes or other signs: '$*'"

accelerator=$gpu chips=4 hosts=0
if [ "$hardware" = tpu ]; then
    case $topology in
        v4:*) accelerator=tpu-v4-podslice ;;
        v5e:*) accelerator=tpu-v5-lite-podslice ;;
        v5p:*) accelerator=tpu-v5p-slice ;;
        v6e:*) accelerator=tpu-v6e-slice ;;
        tpu7x:*) accelerator=tpu7x ;;
        *) fail "--topology='$topology' is not one of v4, v5e, v5p, v6e, tpu7x, as in v5e:16x16" ;;
    esac
    topology=${topology#*:}
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology: '$topology' is no shape"
    hosts=$((${topology//x/*} / chips))
    [ $hosts -ge 1 ] || fail "--topology: '$topology' has fewer than the $chips chips of a host"
fi

# The manifest of this hardware, with our value wherever the comment names one.
manifest=$(awk -v RS='---\n' "/hardware: $hardware/" "$here/gke.yaml" | sed -E \
    -e "s|: [^#]* # name$|: $name # name|" \
    -e "s|: [^#]* # slices$|: $slices # slices|" \
    -e "s|: [^#]* # hosts$|: $hosts # hosts|" \
    -e "s|: [^#]* # nodes$|: $nodes # nodes|" \
    -e "s|: [^#]* # accelerator$|: $accelerator # accelerator|" \
    -e "s|: [^#]* # topology$|: $topology # topology|" \
    -e "s|: [^#]* # chips$|: $chips # chips|" \
    -e "s|: [^#]* # gpus$|: $gpus # gpus|" \
    -e "s|: [^#]* # image$|: $image # image|" \
    -e "s|: [^#]* # claim$|: $claim # claim|" \
    -e "s|: [^#]* # coordinator$|: $name-nodes-0-0.$name:8476 # coordinator|" \
    -e "s|: [^#]* # processes$|: \"$nodes\" # processes|" \
    -e "s|: [^#]* # options$|: $* # options|")
if [ -n "$dry" ]; then
    echo "$manifest"
    echo "+ kubectl apply --filename=- <the manifest above" >&2
    exit 0
fi
echo "$manifest" | kubectl apply --filename=-
echo "follow it with: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name" >&2
