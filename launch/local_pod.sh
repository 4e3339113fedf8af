#!/usr/bin/env bash
# Rehearses a pod: runs several processes of `msllm train` with CPU devices on this machine and
# restarts them.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/local_pod.sh PROCESSES CONFIG [OPTION ...]

Trains CONFIG (e.g. configs/quickstart.py) with PROCESSES processes on this machine, connected over the loopback
interface in the same way as the hosts of a pod. The output of process I of start K goes to
WORKDIR/logs/attempt-K/process-I.log, and its process id to process-I.pid in the same folder. The output of process 0 is
also shown here, without the stacks of C++ code. If a process dies, the others get some time to end by themselves before they are killed.

  --devices=D               CPU devices of each process; default 1
  --workdir=DIR             folder for checkpoints, metrics and logs; default runs/local_pod
  --restarts=R              maximum number of restarts after a process has died or the run was preempted; default 0.
                            There is no restart after status 2 or after you stop the script
  --grace=SECONDS           how long the other processes may take to end once one has died, or once you stop the script.
                            The default, 150, is longer than the heartbeat timeout, after which a host counts as lost
  --config.KEY=VALUE, --initialization_timeout=SECONDS, --heartbeat_timeout=SECONDS
                            passed on to msllm train
  --python=PROGRAM          the Python that runs msllm; default: that of .venv, which is made if missing
  --dry-run                 print the commands without running them
  --help                    this text

Exit status: 0 if complete, or stopped with Ctrl-C and saved; 2 for bad input; 75 if stopped with SIGTERM and saved, and
the same command continues; otherwise the status of the process that died first.
EOF
}

devices=1 workdir=runs/local_pod restarts=0 grace=150 python='' dry_run='' config='' words=() passed=()
take_arguments "devices workdir restarts grace python" dry-run "" train "$@"
[[ ${#words[@]} -ge 2 ]] ||
  fail "PROCESSES or CONFIG are missing: e.g. launch/local_pod.sh 4 configs/quickstart.py (see --help)"
[[ ${#words[@]} -eq 2 ]] ||
  fail "unexpected argument '${words[2]}': PROCESSES and CONFIG are already given (see --help)"
processes=${words[0]}
need_number PROCESSES "$processes" 1
need_number --devices "$devices" 1
need_number --restarts "$restarts" 0
need_number --grace "$grace" 1
use_config "${words[1]}"
[[ -n $workdir && $workdir != *://* ]] ||
  fail "--workdir is '$workdir': the logs of a rehearsal are local files; name a local folder"
if [[ $workdir != runs/local_pod ]]; then workdir=$(from_start "$workdir"); fi
if [[ $python == */* ]]; then python=$(from_start "$python"); fi

# Prints a free port of the loopback interface, below the range from which the kernel assigns ports.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      printf '%s\n' "$port"
      return
    fi
  done
  echo "error: found no free port between 20000 and 32000 in 100 tries" >&2
  return 1
}

# set_command I: sets `command` to the command of process I. The user's XLA_FLAGS come last, because
# XLA uses the last value of a repeated flag.
set_command() {
  local line flags=
  command=(env)
  while read -r line; do
    if [[ $line == XLA_FLAGS=* ]]; then flags=${line#*=}; else command+=("$line"); fi
  done < <(environment_of cpu)
  command+=("XLA_FLAGS=$flags --xla_force_host_platform_device_count=$devices${XLA_FLAGS:+ $XLA_FLAGS}")
  command+=("$python" -m msllm train --config="$config" --workdir="$workdir" --coordinator_address="127.0.0.1:$port")
  command+=(--num_processes="$processes" --process_id="$1" ${passed[@]+"${passed[@]}"})
}

if [[ -n $dry_run ]]; then
  python=${python:-.venv/bin/python} port=$(free_port)
  for ((i = 0; i < processes; i++)); do
    set_command "$i"
    quoted "${command[@]}"
  done
  exit
fi

if [[ -z $python ]]; then
  use_environment
  python=.venv/bin/python
fi
command -v "$python" >/dev/null || fail "--python is '$python': no such program; name a Python that has msllm"
# shellcheck source=/dev/null
. launch/env.sh

exec 3>&2 # for this script's messages: stderr is discarded below to hide the shell's messages about killed processes
say() {
  echo "local_pod: $*" >&3
}

set -m # each process leads a process group: Ctrl-C reaches only this script, and kill reaches an entire group
pids=() alive=() deadline='' tail_pid='' stop=''

# If this script is killed and cannot clean up, the kernel ends its processes.
guard=()
if setpriv --pdeathsig TERM true 2>/dev/null; then guard=(setpriv --pdeathsig TERM); fi

# From one of these lines on, a log holds only the stacks of a process that is about to die. They
# stay in the log, and are not shown on the screen: a line of C++ with level F (fatal), an error of
# jax's coordination service, a signal.
fatal='^(F[0-9]{4} [0-9]|E[0-9]{4} .*coordination_service|\*\*\* (SIG|Check failure)|Fatal Python error: )'

# cause LOG STATUS: prints why a process ended, in one line.
cause() {
  local line name
  line=$(grep -aE '^error: ' "$1" | tail -n 1)
  if [[ -z $line ]]; then line=$(grep -aE '^[A-Za-z_][A-Za-z0-9_.]*(Error|Exception)(: |$)' "$1" | tail -n 1); fi
  if [[ -z $line ]]; then line=$(grep -aE '^(F[0-9]{4} [0-9]|Fatal Python error: )' "$1" | head -n 1 | sed 's/^F.*[0-9]\] //'); fi
  line=${line#error: }
  if [[ -z $line && $2 -eq 75 ]]; then line="stopped and saved"; fi
  if [[ -z $line && $2 -gt 128 ]] && name=$(kill -l "$2"); then
    line="killed by SIG$name"
    if [[ $name == KILL ]]; then line+=", by hand or by the kernel for lack of memory"; fi
  fi
  printf '%s\n' "${line:-its log does not say why}"
}

# say_waiting: says which processes have not ended, and how long this script waits for them.
say_waiting() {
  local i left=()
  for ((i = 0; i < processes; i++)); do
    if [[ " ${alive[*]-} " == *" ${pids[i]} "* ]]; then left+=("$i"); fi
  done
  if [[ ${#left[@]} -eq 0 ]]; then return; fi
  say "waiting up to $grace s (--grace) for ${#left[@]} process(es) to end by themselves: ${left[*]}"
}

# Kills processes, together with everything that they have started.
kill_groups() {
  local pid
  for pid in "$@"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

leave() {
  kill_groups ${pids[@]+"${pids[@]}"}
  if [[ -n $tail_pid ]]; then kill -- "-$tail_pid" 2>/dev/null || true; fi
}
trap leave EXIT

# forward INT|TERM: passes the signal on as SIGTERM, once.
forward() {
  local pid
  if [[ -n $stop ]]; then return; fi
  stop=$1
  say "stopping: the step is finished and saved"
  for pid in ${alive[@]+"${alive[@]}"}; do kill -TERM "$pid" 2>/dev/null || true; done
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP

# attempt LOGS: runs all processes once and sets `status`.
attempt() {
  local logs=$1 i code pid rest killed='' port
  port=$(free_port)
  mkdir -p "$logs"
  pids=() alive=() deadline='' status=0
  for ((i = 0; i < processes; i++)); do
    set_command "$i"
    "${guard[@]}" "${command[@]}" </dev/null >"$logs/process-$i.log" 2>&1 3>&- &
    pids+=($!) alive+=($!)
    echo $! >"$logs/process-$i.pid"
  done
  { tail -n +1 -s 0.1 --pid="${pids[0]}" -f "$logs/process-0.log" | sed -u -E "/$fatal/,\$d"; } 2>/dev/null 3>&- &
  tail_pid=$!
  # The signal may have arrived before the processes were started.
  if [[ -n $stop ]]; then kill -TERM "${alive[@]}" 2>/dev/null || true; fi
  while [[ ${#alive[@]} -gt 0 ]]; do
    sleep 0.2
    rest=()
    for ((i = 0; i < processes; i++)); do
      pid=${pids[i]}
      if [[ " ${alive[*]} " != *" $pid "* ]]; then continue; fi
      if kill -0 "$pid" 2>/dev/null; then
        rest+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if [[ $code -ne 0 ]]; then
        if [[ -n $killed ]]; then
          say "process $i ended with status $code"
        else
          say "process $i ended with status $code: $(cause "$logs/process-$i.log" "$code") ($logs/process-$i.log)"
        fi
        # The status of bad input takes precedence, then that of the first process that died and was
        # not killed here. 75 is used only if no process died, and 76 (another process was lost)
        # only if the lost process is not seen.
        if [[ $code -eq 2 || $status -eq 0 || ($status -eq 75 && -z $killed) ]] ||
          [[ $status -eq 76 && -z $killed && $code -ne 134 && $code -ne 75 ]]; then
          status=$code
        fi
      fi
    done
    alive=(${rest[@]+"${rest[@]}"})
    if [[ -z $deadline && ($status -ne 0 || -n $stop) ]]; then
      deadline=$((SECONDS + grace))
      say_waiting
    fi
    if [[ -n $deadline && -z $killed && ${#alive[@]} -gt 0 ]] && ((SECONDS >= deadline)); then
      killed=1
      say "killing ${#alive[@]} process(es) that did not end within $grace s"
      kill_groups "${alive[@]}"
    fi
  done 2>/dev/null
  kill_groups "${pids[@]}"
  { wait "$tail_pid"; } 2>/dev/null || true
  pids=() tail_pid=''
}

number=1
for ((start = 0; ; start++)); do
  while [[ -e $workdir/logs/attempt-$number ]]; do number=$((number + 1)); done
  attempt "$workdir/logs/attempt-$number"
  if [[ $stop == INT && ($status -eq 0 || $status -eq 75) ]]; then exit 0; fi
  if [[ $status -eq 0 || $status -eq 2 || -n $stop ]]; then exit "$status"; fi
  if ((start >= restarts)); then
    say "ended with status $status; the same command continues from the last checkpoint"
    exit "$status"
  fi
  say "starting again after status $status ($((start + 1)) of $restarts)"
done
