#!/usr/bin/env bash
# Trainer and index builder on one machine, each on devices of its own.
#
#   launch/local.sh [--dry_run] [--platform=gpu|tpu|cpu] [--builder_devices=N] \
#       --config=experiments/realm_base.py --workdir=runs/realm [--FLAG=VALUE..]
#
# All else goes to `realm-jax train`. The last N GPUs or cores embed the corpus,
# by default a fifth (of TPU chips always half); a single device is shared. On
# SIGTERM and Ctrl-C the trainer saves a checkpoint and exits with 143, and so
# does this. A builder that fails is started up to five times; then the trainer
# is asked to save and stop. REALM_JAX: the command, if not realm-jax.
set -euo pipefail
platform=cpu share='' workdir='' dry_run='' flags=()
! command -v nvidia-smi >/dev/null || platform=gpu
! compgen -G '/dev/accel*' >/dev/null || platform=tpu
for flag; do
  case $flag in
    --dry_run) dry_run=1 ;;
    --platform=*) platform=${flag#*=} ;;
    --builder_devices=*) share=${flag#*=} ;;
    *) [[ $flag != --workdir=* ]] || workdir=${flag#*=}; flags+=("$flag") ;;
  esac
done
case $platform in
  gpu) ids=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}
    prefix='env CUDA_VISIBLE_DEVICES=%'
    [[ $ids = *[$',\n']* ]] || prefix+=' XLA_PYTHON_CLIENT_PREALLOCATE=false' ;;
  tpu) ids=$(compgen -G '/dev/accel*' | grep -o '[0-9]*$')
    share=$(($(wc -w <<<"$ids") / 2)) bounds=(0 '1,1,1' '1,2,1' 0 '2,2,1')
    prefix="env TPU_VISIBLE_CHIPS=% TPU_CHIPS_PER_PROCESS_BOUNDS=${bounds[share]}" ;;
  cpu) ids=$(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0)))')
    prefix='taskset -c %' ;;
  *) echo "$0: --platform=$platform is none of gpu, tpu, cpu" >&2; exit 2 ;;
esac
read -ra ids <<<"${ids//[$',\n']/ }"
n=${#ids[@]} share=${share:-$(((${#ids[@]} + 4) / 5))}
if [[ -z $workdir || ! $share =~ ^[1-9][0-9]*$ ]] || ((share >= n && n > 1)); then
  echo "$0: give --workdir=FOLDER, --builder_devices less than $n" >&2 && exit 2
fi
on() { # FIRST COUNT COMMAND..: becomes the command, on those devices.
  local mine=${ids[*]:$1:$2}
  read -ra command <<<"${prefix//%/${mine// /,}} ${REALM_JAX:-realm-jax}"
  command+=("${@:3}")
  [[ $dry_run ]] || exec "${command[@]}"
  printf '%q ' "${command[@]}" && echo
}
train() { on 0 $((n > 1 ? n - share : 1)) train "${flags[@]}"; }
build() { on $((n > 1 ? n - share : 0)) "$share" index "--workdir=$workdir" --follow; }
if [[ $dry_run ]]; then train && build && exit; fi
train & trainer=$!
(
  trap 'kill -TERM $!; wait; exit' TERM
  for _ in 1 2 3 4 5; do build & wait $! && exit; sleep 2; done
  kill -TERM "$trainer"
) & builder=$!
trap 'stopped=1; kill -TERM "$trainer"' TERM INT
while stopped='' code=0; wait "$trainer" || code=$?; [[ $stopped ]]; do :; done
((code == 0)) || kill -TERM "$builder" || :
wait "$builder" || :
exit "$code"
