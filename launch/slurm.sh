#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster: submits a job that saves before its time limit and requeues
# itself until the run is complete.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/slurm.sh --config=FILE --workdir=DIR [OPTION ...]

Submits a training job. Shortly before its time limit the job saves and requeues itself. It also requeues itself, a
limited number of times, when a process has died. Run this script in a clone of the repository that all nodes see.

  --config=FILE             the config, e.g. configs/1b_h100_8.py
  --workdir=DIR             folder for checkpoints, metrics and the log, which all nodes must see
  --nodes=N                 number of nodes; default 1
  --gpus=G                  GPUs per node; default 8
  --per=node|gpu            one process per node (default) or per GPU. Per node, the data are read once and one Python
                            process drives all GPUs. Per GPU, each Python process has less to do: try it if GPUs wait
                            for the host, or if collectives hang with several GPUs in a process
  --time=[D-]HH:MM:SS       time limit; default 24:00:00
  --save-seconds=S          how long before the time limit the job saves; default 300. A step and writing a checkpoint
                            must fit into this time
  --grace=SECONDS           how long the other processes may take to end once one has ended. The default, 150, is longer
                            than the heartbeat timeout
  --requeues=R              how often the job requeues itself after a crash; default 10. Time limits and preemptions do
                            not count
  --name=NAME               name of the job; default msllm
  --sbatch=OPTION           an option for sbatch, e.g. --sbatch=--partition=gpu; may be repeated
  --env=VARIABLE=VALUE      a variable for the processes, beside the gpu lines of launch/flags.env; may be repeated
  --env=VARIABLE            the same, with the value that it has here, which sbatch passes on: use this for secrets
  --python=PROGRAM          the Python that runs msllm on the nodes; default: that of .venv, which is made if missing
  --config.KEY=VALUE, --initialization_timeout=SECONDS, --heartbeat_timeout=SECONDS
                            passed on to msllm train
  --dry-run                 print the job's script without submitting it
  --help                    this text
EOF
}

config='' workdir='' nodes=1 gpus=8 per=node time=24:00:00 save_seconds=300 grace=150 requeues=10 name=msllm python=''
dry_run='' words=() passed=() all_sbatch=() variables=() inherited=()
# shellcheck disable=SC2034 # take_variables reads it
all_env=()
take_arguments "config workdir nodes gpus per time save-seconds grace requeues name python" dry-run "env sbatch" train "$@"
[[ ${#words[@]} -eq 0 ]] || fail "unexpected argument '${words[0]}': write options as --name=value (see --help)"
use_config "$config"
[[ -n $workdir && $workdir != *://* ]] || fail "--workdir is '$workdir': must be a folder that all nodes see"
[[ $workdir != *\\* ]] || fail "--workdir is '$workdir': sbatch reads a backslash as an escape; choose another name"
workdir=$(from_start "$workdir")
[[ $workdir == /* ]] || workdir=$PWD/$workdir
if [[ $python == */* ]]; then python=$(from_start "$python"); fi
need_number --nodes "$nodes" 1
need_number --gpus "$gpus" 1
need_number --save-seconds "$save_seconds" 1
need_number --grace "$grace" 1
need_number --requeues "$requeues" 0
[[ $per == node || $per == gpu ]] || fail "--per is '$per': must be node or gpu (one process per node or per GPU)"
[[ $time =~ ^(([0-9]{1,4})-)?([0-9]{1,2}):([0-9]{2}):([0-9]{2})$ ]] ||
  fail "--time is '$time': must be [D-]HH:MM:SS, e.g. 24:00:00"
limit=$((((10#${BASH_REMATCH[2]:-0} * 24 + 10#${BASH_REMATCH[3]}) * 60 + 10#${BASH_REMATCH[4]}) * 60 + 10#${BASH_REMATCH[5]}))
((limit > save_seconds)) ||
  fail "--time is '$time': must be longer than --save-seconds=$save_seconds, or the job saves as soon as it starts"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name is '$name': use only letters, digits, dots, hyphens and underscores"
for option in ${all_sbatch[@]+"${all_sbatch[@]}"}; do
  [[ $option =~ ^(--[a-z][a-z-]*(=.*)?|-[A-Za-z][^\ ]*)$ && $option != *\\* ]] ||
    fail "--sbatch is '$option': must be one option of sbatch without backslashes, e.g. --sbatch=--partition=gpu"
  case ${option%%=*} in
    --job-name | --nodes | --ntasks-per-node | --gpus-per-node | --time | --signal | --no-requeue | --open-mode | --output)
      fail "--sbatch is '$option': this script sets ${option%%=*} (see --help)"
      ;;
  esac
done
take_variables

# Prints the job's script. jax finds the other processes and the coordinator from Slurm's variables.
script() {
  local option line tasks=1
  if [[ $per == gpu ]]; then tasks=$gpus; fi
  echo "#!/usr/bin/env bash"
  # sbatch splits these lines into words as a shell does, and replaces %-patterns in the name of the
  # log.
  for option in --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" --gpus-per-node="$gpus" --time="$time" \
    --signal="B:TERM@$save_seconds" --requeue --open-mode=append --output="${workdir//%/%%}/slurm-%j.log" \
    ${inherited[@]+--export=ALL} ${all_sbatch[@]+"${all_sbatch[@]}"}; do
    echo "#SBATCH $(quoted "$option")"
  done
  cat <<EOF

cd $(quoted "$PWD") || exit 2
requeues=$requeues
crashes_file=$(quoted "$workdir")/slurm-\$SLURM_JOB_ID.crashes

EOF
  while read -r line; do echo "export ${line%%=*}=$(quoted "${line#*=}")"; done < <(environment_of gpu)
  if [[ $per == node ]]; then
    echo "# By default under Slurm, jax gives each process only the GPU with its local number."
    echo "export JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))"
  fi
  for line in ${variables[@]+"${variables[@]}"}; do
    if [[ " ${inherited[*]-} " == *" ${line%%=*} "* ]]; then
      # sbatch passes the environment on, so that the value is in no file.
      echo "[[ -n \${${line%%=*}+set} ]] || { echo 'error: the job did not get ${line%%=*} from sbatch' >&2; exit 2; }"
    else
      echo "export ${line%%=*}=$(quoted "${line#*=}")"
    fi
  done
  line=$(quoted "$python" -m msllm train --config="$config" --workdir="$workdir" ${passed[@]+"${passed[@]}"})
  cat <<EOF

# The job gets SIGTERM shortly before its time limit, and when it is preempted. Only this script
# gets the signal, so scancel passes it on to all processes. They finish the step, save and end with
# status 75.
trap 'scancel --signal=TERM "\$SLURM_JOB_ID"' TERM

# When one process ends, give the others time to end by themselves, because they may be saving.
srun --kill-on-bad-exit=0 --wait=$grace $line &
EOF
  cat <<'EOF'
srun=$!
wait "$srun"
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done # a signal interrupts wait
wait "$srun"
status=$?

case $status in
  0 | 2)
    rm -f "$crashes_file"
    exit "$status" # complete, or bad input, which a restart cannot repair
    ;;
  75) echo "slurm: saved" ;;
  *)
    crashes=$(cat "$crashes_file" 2>/dev/null)
    if ! [[ $crashes =~ ^[1-9][0-9]{0,8}$ ]]; then crashes=0; fi
    crashes=$((crashes + 1))
    echo "$crashes" >"$crashes_file"
    echo "slurm: ended with status $status, crash $crashes"
    if ((crashes > requeues)); then
      echo "slurm: more than $requeues crashes: giving up"
      exit "$status"
    fi
    ;;
esac

# Do not requeue a job that was cancelled, or that has Requeue=0 (scontrol update JobId=ID
# Requeue=0).
job=$(scontrol show job "$SLURM_JOB_ID")
if [[ $job == *JobState=RUNNING* && $job == *Requeue=1* ]]; then
  echo "slurm: requeueing"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
EOF
}

if [[ -n $dry_run ]]; then
  python=${python:-$PWD/.venv/bin/python}
  script
  exit
fi
command -v sbatch >/dev/null || fail "sbatch is not installed here: run this on a login node of the cluster"
if [[ -z $python ]]; then
  use_environment cuda
  python=$PWD/.venv/bin/python
fi
check_training "$python" --config="$config" --workdir="$workdir" ${passed[@]+"${passed[@]}"}
mkdir -p "$workdir"
sbatch < <(script)
