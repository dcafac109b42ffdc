#!/usr/bin/env bash
# GKE: one JobSet of trainer pods and index builder pods.
#
#   launch/gke_jobset.sh [--dry_run] --image=IMAGE --claim=CLAIM [--name=realm] \
#       [--trainer=16x4,tpu-v5p-slice,4x4x4] [--builder=4x4,tpu-v5p-slice,2x2x4] \
#       --config=experiments/realm_base.py --workdir=/data/realm [--FLAG=VALUE..]
#
# Pods are HOSTSxCHIPS,ACCELERATOR,TOPOLOGY, or of GPUs 8x8,nvidia-h100-80gb.
# Every other argument goes to `realm-jax train`; the image has realm-jax on its
# path. The claim, a ReadWriteMany volume, is mounted at /data. --dry_run prints
# the YAML and does not apply it. A pod that is taken away saves a checkpoint
# first; JobSet then restarts all of them, and they resume from there.
# With XPK, whose workloads have one kind of pod, the pair is two workloads:
# `xpk workload create --command='realm-jax train .. --distributed'`, the other
# with 'realm-jax index --follow --workdir=.. --distributed'.
set -euo pipefail
name=realm image='' claim='' workdir='' dry_run='' flags=()
trainer=16x4,tpu-v5p-slice,4x4x4 builder=4x4,tpu-v5p-slice,2x2x4
for flag; do
  case $flag in
    --dry_run) dry_run=1 ;;
    --name=* | --image=* | --claim=* | --trainer=* | --builder=*)
      declare "${flag#--}" ;;
    *) [[ $flag != --workdir=* ]] || workdir=${flag#*=}; flags+=("$flag") ;;
  esac
done
if [[ -z $image || -z $claim || -z $workdir ]]; then
  echo "$0: give --image, --claim and --workdir" >&2 && exit 2
fi
pods() { # ROLE PODS WORD..: the pods that run `realm-jax WORD..`, as YAML.
  local shape kind topology gke=cloud.google.com/gke resource=nvidia.com/gpu
  IFS=, read -r shape kind topology <<<"$2"
  local hosts=${shape%x*} role=$1 words node="$gke-accelerator: $kind"
  [[ -z $topology ]] || resource=google.com/tpu \
    node="$gke-tpu-accelerator: $kind, $gke-tpu-topology: $topology"
  words=("${@:3}" "--coordinator=$name-$role-0-0.$name:12321"
    "--num_processes=$hosts" "--process_id=\$(JOB_COMPLETION_INDEX)")
  words=("${words[@]//\'/\'\'}")
  echo "  - name: $role
    template: {spec: {parallelism: $hosts, completions: $hosts, backoffLimit: 0,
      template: {spec: {restartPolicy: Never, terminationGracePeriodSeconds: 300,
        nodeSelector: {$node},
        volumes: [{name: data, persistentVolumeClaim: {claimName: '$claim'}}],
        containers: [{name: $role, image: '$image', command: [realm-jax
          $(printf ", '%s'" "${words[@]}")],
          resources: {limits: {$resource: ${shape#*x}}},
          volumeMounts: [{name: data, mountPath: /data}]}]}}}}"
}
yaml="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: $name}
spec:
  failurePolicy: {maxRestarts: 20}
  successPolicy: {operator: All}
  replicatedJobs:
$(pods trainer "$trainer" train "${flags[@]}")
$(pods builder "$builder" index "--workdir=$workdir" --follow)"
if [[ $dry_run ]]; then echo "$yaml"; else kubectl apply -f - <<<"$yaml"; fi
