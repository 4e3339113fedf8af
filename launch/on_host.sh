#!/usr/bin/env bash
# tpu_vm.sh runs this on every host of a pod: it installs msllm and keeps one training process in
# the background.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/on_host.sh install [DATA] | start [--environment] -- ARGUMENT ... | arguments | status | stop

  install   makes .venv with msllm in it, with a newer Python if that of the host is too old, and copies the folder DATA
            (gs://BUCKET/FOLDER) to data/FOLDER
  start     ends the running process, then runs `msllm train ARGUMENT ...` in the background. With --environment, it gets
            the variables in ~/msllm-environment, VARIABLE=VALUE entries that end with a NUL byte. The file is deleted
  arguments prints the arguments of the last start
  status    prints none, running, stopped or "exit STATUS"
  stop      ends the running process, which finishes the step and saves

The log is ~/msllm-run/train.log. A new start appends to it.
EOF
}

state=$HOME/msllm-run

# Prints the id of this boot. Process ids from before a reboot are invalid.
boot() {
  cat /proc/sys/kernel/random/boot_id 2>/dev/null || true
}

# runs FILE: whether the process whose id is in the file is running.
runs() {
  [[ -e $1 && $(cat "$state/boot" 2>/dev/null) == "$(boot)" ]] && kill -0 "$(cat "$1")" 2>/dev/null
}

alive() { runs "$state/pid"; }
supervised() { runs "$state/session"; }

# end_process SECONDS: sends SIGTERM to the process and, after SECONDS, SIGKILL to everything that
# it has started.
end_process() {
  local waited
  if ! alive; then return; fi
  kill -TERM "$(cat "$state/pid")" 2>/dev/null || true
  for ((waited = 0; waited < $1 * 5; waited++)); do
    if ! alive; then return; fi
    sleep 0.2
  done
  kill -KILL -- "-$(cat "$state/session")" 2>/dev/null || true
  echo 137 >"$state/exit-status"
}

# Runs in a session of its own: waits for the process and records its exit status.
supervise() {
  local pid status=0
  trap '' TERM INT HUP # at shutdown all processes get the signal: training saves, and this process waits for it
  echo $$ >"$state/session"
  (
    trap - TERM INT HUP
    exec .venv/bin/python -m msllm train "$@"
  ) &
  pid=$!
  echo "$pid" >"$state/pid"
  wait "$pid" || status=$?
  echo "$status" >"$state/exit-status.new"
  mv "$state/exit-status.new" "$state/exit-status"
}

case ${1:---help} in
  --help | -h) usage ;;
  install)
    if ! .venv/bin/python -c '' 2>/dev/null && ! find_python >/dev/null 2>&1; then
      # The images of Cloud TPU are Ubuntu 22.04, with Python 3.10.
      python3 -m pip install -q --user uv
      python3 -m uv venv -q --seed --python 3.12 .venv
    fi
    use_environment tpu
    if [[ -n ${2:-} ]]; then
      folder=data/$(basename -- "$2")
      mkdir -p "$folder"
      gcloud storage rsync --recursive "$2" "$folder"
    fi
    ;;
  start)
    shift
    mkdir -p "$state"
    end_process 60
    rm -f "$state"/{exit-status,stopped,pid,session}
    boot >"$state/boot"
    while read -r line; do export "${line?}"; done < <(environment_of tpu)
    if [[ ${1:-} == --environment ]]; then
      while IFS= read -r -d '' line; do export "${line?}"; done <"$HOME/msllm-environment"
      shift
    fi
    rm -f "$HOME/msllm-environment"
    [[ ${1:-} == -- ]] || fail "start takes --environment, then -- and the arguments of msllm train, not '${1:-}'"
    shift
    quoted "$@" >"$state/arguments"
    setsid -f bash launch/on_host.sh supervise "$@" </dev/null >>"$state/train.log" 2>&1
    for _ in {1..50}; do
      if [[ -e $state/pid ]]; then exit; fi
      sleep 0.1
    done
    fail "the process did not start within 5 s: see $state/train.log"
    ;;
  supervise)
    shift
    supervise "$@"
    ;;
  arguments) cat "$state/arguments" ;;
  status)
    # Check for a running process before its files, so that a stop or an end in between does not
    # look like a crash.
    if alive; then
      echo running
      exit
    fi
    for _ in {1..50}; do # the supervisor records the exit status a moment later
      if [[ -e $state/exit-status || -e $state/stopped ]] || ! supervised; then break; fi
      sleep 0.1
    done
    if [[ -e $state/stopped ]]; then
      echo stopped
    elif [[ -e $state/exit-status ]]; then
      echo "exit $(cat "$state/exit-status")"
    elif [[ -e $state/pid ]]; then
      echo "exit 137" # the host was rebooted, or the process was killed together with its supervisor
    else
      echo none
    fi
    ;;
  stop)
    mkdir -p "$state"
    touch "$state/stopped"
    end_process 300
    ;;
  *) fail "unknown command '$1': one of install, start, arguments, status, stop (see --help)" ;;
esac
