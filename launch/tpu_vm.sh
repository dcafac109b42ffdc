#!/usr/bin/env bash
# TPU VM: one slice for the trainer, one for the index builder.
#
#   launch/tpu_vm.sh [--dry_run] --trainer=NAME --builder=NAME --zone=ZONE \
#       [--create=v5p-128,v5p-32 [--version=v2-alpha-tpuv5]] [--setup='COMMANDS'] \
#       --config=experiments/realm_base.py --workdir=/mnt/shared/realm [--FLAG=VALUE..]
#
# --create makes the two slices first; --setup runs on all of their hosts, to
# mount the storage that both see and to install. Every other argument goes to
# `realm-jax train`. SIGTERM and Ctrl-C reach every host: the trainer saves a
# checkpoint and exits with 143. The slices stay; delete them yourself:
# `gcloud compute tpus tpu-vm delete NAME --zone=ZONE`.
set -euo pipefail
trainer='' builder='' zone='' create='' version=v2-alpha-tpuv5 setup='' workdir=''
dry_run='' flags=()
for flag; do
  case $flag in
    --dry_run) dry_run=1 ;;
    --trainer=*) trainer=${flag#*=} ;;
    --builder=*) builder=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --create=*) create=${flag#*=} ;;
    --version=*) version=${flag#*=} ;;
    --setup=*) setup=${flag#*=} ;;
    *) [[ $flag != --workdir=* ]] || workdir=${flag#*=}; flags+=("$flag") ;;
  esac
done
if [[ -z $trainer || -z $builder || -z $zone || -z $workdir ]]; then
  echo "$0: give --trainer, --builder, --zone and --workdir" >&2 && exit 2
fi
run() { if [[ $dry_run ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { run gcloud compute tpus tpu-vm "$1" "$2" --zone="$zone" "${@:3}"; }
on() { tpu ssh "$1" --worker=all --command="$2"; } # SLICE COMMAND: on its hosts.
job() { # SLICE FLAG..: `realm-jax` on all hosts of a slice, as one job.
  local flags
  printf -v flags ' %q' "${@:2}"
  on "$1" "echo \$\$ >/tmp/realm_jax.pid; exec ${REALM_JAX:-realm-jax}$flags"
}
train() { job "$trainer" train "${flags[@]}" --distributed; }
build() { job "$builder" index "--workdir=$workdir" --follow --distributed; }

if [[ $create ]]; then
  tpu create "$trainer" --accelerator-type="${create%,*}" --version="$version"
  tpu create "$builder" --accelerator-type="${create#*,}" --version="$version"
fi
for slice in $trainer $builder; do [[ -z $setup ]] || on "$slice" "$setup"; done
if [[ $dry_run ]]; then train && build && exit; fi
train & job=$!
for _ in 1 2 3 4 5; do ! build || break; sleep 5; done &
stop() { on "$1" "kill -TERM \$(cat /tmp/realm_jax.pid)"; }
trap 'again=1 stopped=143; stop "$trainer"' TERM INT
stopped='' code=0
while again=''; wait "$job" || code=$?; [[ $again ]]; do :; done
code=${stopped:-$code} # gcloud does not hand the trainer's on.
((code == 0)) || stop "$builder" || :
wait
exit "$code"
