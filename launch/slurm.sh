#!/usr/bin/env bash
# SLURM: one heterogeneous job of trainer nodes and index builder nodes.
#
#   launch/slurm.sh [--dry_run] [--trainer_nodes=8] [--builder_nodes=2] \
#       [--sbatch='--gpus-per-node=8 --partition=P --time=24:00:00'] \
#       --config=experiments/realm_base.py --workdir=/shared/realm [--FLAG=VALUE..]
#
# Submits itself; every other argument goes to `realm-jax train`. The workdir
# and the corpus are on storage that all nodes see. A process each node drives
# all of its GPUs. Five minutes before the end of the time, and on pre-emption,
# SLURM sends SIGTERM: the trainer saves a checkpoint and exits with 143, which
# is then the exit code of the job. The same command resumes from there.
# REALM_JAX: the command, if not realm-jax.
set -euo pipefail
trainers=8 builders=2 options='--gpus-per-node=8' workdir='' dry_run='' flags=()
for flag; do
  case $flag in
    --dry_run) dry_run=1 ;;
    --trainer_nodes=*) trainers=${flag#*=} ;;
    --builder_nodes=*) builders=${flag#*=} ;;
    --sbatch=*) options=${flag#*=} ;;
    *) [[ $flag != --workdir=* ]] || workdir=${flag#*=}; flags+=("$flag") ;;
  esac
done
[[ $workdir ]] || { echo "$0: give --workdir=FOLDER" >&2; exit 2; }
read -ra realm_jax <<<"${REALM_JAX:-realm-jax}"
run() { if [[ $dry_run ]]; then printf '%q ' "$@" && echo; else exec "$@"; fi; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  read -ra options <<<"$options"
  options+=(--ntasks-per-node=1)
  run sbatch --job-name=realm --signal=TERM@300 --requeue --open-mode=append \
    "${options[@]}" "--nodes=$trainers" : "${options[@]}" "--nodes=$builders" \
    "$0" "--trainer_nodes=$trainers" "--builder_nodes=$builders" "${flags[@]}"
fi

step() { # GROUP PROCESSES PORT COMMAND..: the command on all nodes of a group.
  local nodes="SLURM_JOB_NODELIST_HET_GROUP_$1" host=HOST
  [[ $dry_run ]] || host=$(scontrol show hostnames "${!nodes}" | sed -n 1p)
  # shellcheck disable=SC2016  # The process number is known on the node only.
  run srun "--het-group=$1" --kill-on-bad-exit=1 --export=ALL bash -c \
    'exec "$@" "--process_id=$SLURM_PROCID"' task "${realm_jax[@]}" "${@:4}" \
    "--coordinator=$host:$3" "--num_processes=$2"
}
train() { step 0 "$trainers" 12321 train "${flags[@]}"; }
build() { step 1 "$builders" 12322 index "--workdir=$workdir" --follow; }
if [[ $dry_run ]]; then train && build && exit; fi
train & trainer=$!
for _ in 1 2 3 4 5; do ! (build) || break; sleep 5; done & builder=$!
trap 'stopped=1; kill -TERM "$trainer"' TERM
while stopped='' code=0; wait "$trainer" || code=$?; [[ $stopped ]]; do :; done
# With this script SLURM ends the builder too; after a full run it leaves itself.
((code)) || wait "$builder" || :
exit "$code"
