#!/usr/bin/env bash
# A TPU slice on Google Kubernetes Engine: renders a JobSet and applies it.
#
#   launch/gke/gke.sh apply --name=base --image=REGION-docker.pkg.dev/P/R/beit_jax --accelerator=v5e --topology=8x8 \
#     --bucket=my-bucket -- --config=configs/beit_base.py --workdir=gs://my-bucket/base \
#     --config.pretrain.data.data_dir=/mnt/bucket/tfds
#   launch/gke/gke.sh render|apply|status|logs|delete --name=NAME [...]
#
# --accelerator: v4, v5e, v5p, v6e, tpu7x        --topology: chips of the node pool: 4x4, 2x2x4, ...
# --bucket: a Cloud Storage bucket, mounted at /mnt/bucket in all pods (Cloud Storage FUSE CSI driver), for data; a workdir
#   gs://BUCKET/RUN needs no mount
# --service-account: Kubernetes service account that can access the bucket     --namespace=default      --spot
# --restarts=50: restarts of the JobSet when a pod is evicted or fails         --grace=120: seconds to save when evicted
#   (Spot pods get 15 s unless the node pool is configured otherwise)
# apply: first deletes a JobSet of that name that has ended, which Kubernetes would not start again; the run resumes in the
#   same workdir
# --dry-run: prints the commands. The image is built from launch/Dockerfile with --build-arg EXTRA=tpu,gcs
#
# The cluster needs JobSet 0.6 or newer (https://jobset.sigs.k8s.io).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

action=${1:---help}
if (($#)); then shift; fi
flags+=([name]='' [image]='' [accelerator]='' [topology]='' [bucket]='' [service-account]='' [namespace]=default
  [spot]=no [restarts]=50 [grace]=120)
[[ $action != --help ]] || set -- --help
given=("$@")
parse "$@"
check name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "lower-case letters, digits and dashes, 40 at most"
check namespace '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' "a Kubernetes namespace"
kubectl=(kubectl "--namespace=${flags[namespace]}")
# Foreground: waits until its Jobs are deleted too, since the next JobSet uses the same names.
delete=("${kubectl[@]}" delete "jobset/${flags[name]}" --cascade=foreground)
selector=jobset.sigs.k8s.io/jobset-name=${flags[name]}

plan() {
  check image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "a container image"
  check topology '[0-9]+x[0-9]+(x[0-9]+)?' "chips such as 4x4 or 2x2x4"
  check bucket '[a-z0-9][a-z0-9._-]*' "optional, a bucket's name, without gs://"
  check service-account '[a-z0-9][a-z0-9.-]*' "optional, a Kubernetes service account"
  check restarts '[0-9]+' "a number"
  check grace '[0-9]+' "a number of seconds"
  require_config
  local dims
  case ${flags[accelerator]} in
    v4) selected=tpu-v4-podslice dims=3 ;;
    v5e) selected=tpu-v5-lite-podslice dims=2 ;;
    v5p) selected=tpu-v5p-slice dims=3 ;;
    v6e) selected=tpu-v6e-slice dims=2 ;;
    tpu7x) selected=tpu7x dims=3 ;;
    *) die "--accelerator=${flags[accelerator]}: must be one of v4, v5e, v5p, v6e, tpu7x" ;;
  esac
  local a b c all=1x1,2x2,2x4,4x4,4x8,8x8,8x16,16x16
  IFS=x read -r a b c <<<"${flags[topology]}"
  chips=$((10#$a * 10#$b * 10#${c:-1}))
  if ((dims == 2)); then
    [[ ,$all, == *,${flags[topology]},* ]] || die "--topology=${flags[topology]}: ${flags[accelerator]} has $all"
    per_host=$((chips <= 8 ? chips : 4))
  else
    if [[ -z $c ]] || ((chips == 0 || chips % 4)); then
      die "--topology=${flags[topology]}: ${flags[accelerator]} has AxBxC with a multiple of 4 chips, such as 2x2x4"
    fi
    per_host=4
  fi
}

# A JSON string, which is also a YAML string. Kubernetes expands $(NAME) in commands; $$ is a dollar sign.
text() {
  local s=${1//\\/\\\\}
  s=${s//\"/\\\"} s=${s//$'\n'/\\n} s=${s//$'\t'/\\t}
  printf '"%s"' "${s//\$/\$\$}"
}

# Prints the template with a value for every @name@.
render() {
  local word line n=$'\n'
  local -A value=([hosts]=$((chips / per_host)) [per_host]=$per_host [selected]=$selected [command]=''
    [annotations]='{}' [spot]='' [account]='' [mounts]='' [volumes]='')
  for word in name namespace image topology restarts grace; do value[$word]=${flags[$word]}; done
  for word in python -m beit_jax.main "${rest[@]}"; do value[command]+="${value[command]:+, }$(text "$word")"; done
  if [[ ${flags[spot]} == yes ]]; then
    value[spot]="$n                cloud.google.com/gke-spot: \"true\""
  fi
  if [[ -n ${flags[service-account]} ]]; then
    value[account]="$n              serviceAccountName: ${flags[service-account]}"
  fi
  if [[ -n ${flags[bucket]} ]]; then
    local key # resource limits of the sidecar that mounts the bucket; "0": no limit
    value[annotations]='gke-gcsfuse/volumes: "true"'
    for key in cpu memory ephemeral-storage; do value[annotations]+=", gke-gcsfuse/$key-limit: \"0\""; done
    value[annotations]="{${value[annotations]}}"
    value[mounts]=', {name: bucket, mountPath: /mnt/bucket}'
    value[volumes]="$n                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: \"${flags[bucket]}\"
                      mountOptions: \"implicit-dirs,rename-dir-limit=10000\""
  fi
  while IFS= read -r line; do
    [[ $line != \#* ]] || continue
    while [[ $line =~ ^([^@]*)@([a-z_]+)@(.*)$ ]]; do
      printf '%s%s' "${BASH_REMATCH[1]}" "${value[${BASH_REMATCH[2]}]}"
      line=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$line"
  done <"$ROOT/launch/gke/jobset.yaml"
}

# Prints shell commands that delete a JobSet that has ended.
clear_ended() {
  local get=("${kubectl[@]}" get "jobset/${flags[name]}" --ignore-not-found '--output=jsonpath={.status.terminalState}')
  echo "ended=\$($(quote "${get[@]}"))"
  echo "case \$ended in Completed | Failed) $(quote "${delete[@]}") ;; esac"
}

case $action in
  render) plan && render ;;
  apply)
    plan
    commands=$(clear_ended)
    if [[ ${flags[dry-run]} == yes ]]; then
      for i in "${!given[@]}"; do
        [[ ${given[i]} == -- ]] && break
        [[ ${given[i]} == --dry-run ]] && unset "given[i]"
      done
      echo "$commands"
      echo "$(quote "$ROOT/launch/gke/gke.sh" render "${given[@]}") | $(quote "${kubectl[@]}" apply --filename=-)"
    else
      eval "$commands"
      render | "${kubectl[@]}" apply --filename=-
    fi
    ;;
  status)
    run "${kubectl[@]}" get jobset "${flags[name]}" --output=wide
    run "${kubectl[@]}" get pods "--selector=$selector" --output=wide
    ;;
  logs) run "${kubectl[@]}" logs --follow --tail=100 "--selector=$selector,batch.kubernetes.io/job-completion-index=0" ;;
  delete) run "${delete[@]}" ;;
  *) die "unknown command '$action': render, apply, status, logs or delete; see --help" ;;
esac
