#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on one slice or several, until the run is complete. Requests them as a
# queued resource.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE --project=PROJECT [OPTION ...]

Commands, each of which can be repeated:
  create    requests the TPU VMs (a queued resource), unless they exist or have been requested
  install   copies this repository at --commit to every host and installs it
  start     starts training in the background on every host, after ending a run that is in progress
  status    prints the state of the queued resource, and how many hosts are running or have ended
  logs      follows the log of one host
  stop      ends training on every host, which finishes the step and saves
  delete    deletes the TPU VMs and the queued resource
  run       does all of this: creates, waits, installs, starts and watches. After a preemption it requests new VMs, and
            after a crash it restarts training. It deletes the VMs when the run is complete or the input is bad. If the
            command is interrupted, training goes on, and the same command watches it again

Options:
  --type=TYPE               accelerator type, e.g. v5litepod-256, v6e-256, v5p-128 (create, run)
  --config=FILE             a config of this repository (start, run)
  --workdir=PLACE           gs://BUCKET/FOLDER, or the full path of a folder that all hosts share (start, run)
  --data=gs://BUCKET/FOLDER prepared data. install copies it to data/FOLDER in the repository on every host;
                            --config.data.dir must name that folder
  --slices=N                number of slices of that type; default 1
  --spot                    use VMs that may be preempted
  --reserved                use a reservation
  --runtime=VERSION         runtime version; default: that of the type in launch/tpus.txt
  --service-account=EMAIL, --network=NAME, --subnetwork=NAME
                            settings of the VMs; default: those of the project
  --commit=REVISION         the commit to install; default HEAD
  --repository=URL          a repository to clone on the hosts; default: a copy of this one
  --env=VARIABLE=VALUE      a variable for the hosts, beside the tpu lines of launch/flags.env; may be repeated (start,
                            run). The values are sent in a file, not on a command line
  --env=VARIABLE            the same, with the value that it has here: use this for secrets
  --ssh-option=OPTION       an option for gcloud's ssh and scp, e.g. --ssh-option=--tunnel-through-iap; may be repeated
  --slice=I, --worker=J     the host whose log is shown; default 0 and 0
  --poll=SECONDS            how often run checks the state; default 60
  --restarts=R              how often run restarts training after a crash; default 20. Preemptions do not count
  --keep                    do not delete the VMs at the end of run
  --config.KEY=VALUE, --initialization_timeout=SECONDS, --heartbeat_timeout=SECONDS
                            passed on to msllm train (start, run)
  --dry-run                 print the commands without running them
  --help                    this text

Exit status of run: 0 if complete; 2 for bad input; 75 if stopped with `stop`, and `start` continues; 1 otherwise.
EOF
}

name='' zone='' project='' type='' config='' workdir='' data='' slices=1 spot='' reserved='' runtime=''
service_account='' network='' subnetwork='' commit=HEAD repository='' slice=0 worker=0 poll=60 restarts=20 keep=''
dry_run='' words=() passed=() all_env=() all_ssh_option=() variables=()
take_arguments \
  "name zone project type config workdir data slices runtime service-account network subnetwork commit repository slice \
worker poll restarts" "spot reserved keep dry-run" "env ssh-option" train "$@"
[[ ${#words[@]} -le 1 ]] || fail "unexpected argument '${words[1]}': the command is already ${words[0]} (see --help)"
command=${words[0]-}
case $command in
  start | run) ;;
  create | install | status | logs | stop | delete)
    for argument in ${passed[@]+"${passed[@]}"} ${all_env[@]+"--env=${all_env[@]%%=*}"}; do
      fail "$command takes no $argument: only start and run pass it on (see --help)"
    done
    ;;
  '') fail "the command is missing: create, install, start, status, logs, stop, delete or run (see --help)" ;;
  *) fail "unknown command '$command': one of create, install, start, status, logs, stop, delete, run (see --help)" ;;
esac
for needed in name zone project; do
  [[ -n ${!needed} ]] || fail "--$needed is missing: every command needs --name, --zone and --project (see --help)"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] ||
  fail "--name is '$name': lower-case letters, digits and hyphens, a letter first, at most 42 characters"
[[ -z $data || $data == gs://?*/?* ]] || fail "--data is '$data': must be gs://BUCKET/FOLDER"
need_number --slices "$slices" 1
need_number --slice "$slice" 0
need_number --worker "$worker" 0
need_number --poll "$poll" 1
need_number --restarts "$restarts" 0
take_variables
if [[ $command == create || $command == run ]]; then
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || fail "--type is '$type': must be an accelerator type, e.g. v5litepod-256"
  runtime=${runtime:-$(awk -v type="${type%-*}" '$1 !~ /^#/ && $2 == type { print $3 }' launch/tpus.txt)}
  [[ -n $runtime ]] || fail "--type is '$type': launch/tpus.txt has no runtime version for it; give --runtime=VERSION"
  [[ -z $spot || -z $reserved ]] || fail "--spot and --reserved exclude each other: choose one"
fi
if [[ $command == start || $command == run ]]; then
  use_config "$config"
  [[ $config != /* ]] || fail "--config is '$config': the hosts get only files of this repository; copy it to configs/"
  [[ $workdir == gs://?* || $workdir == /* ]] ||
    fail "--workdir is '$workdir': every host must see the same place; give gs://BUCKET/FOLDER or a shared folder"
fi
if [[ $command == install || $command == run ]]; then
  revision=$(git rev-parse --verify --quiet "$commit^{commit}") || fail "--commit is '$commit': git knows no such commit"
fi
if [[ $command == run ]]; then
  git cat-file -e "$revision:${config%%:*}" 2>/dev/null ||
    fail "--config is '$config': --commit=$commit, which the hosts get, has no such file; commit it"
fi
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"

# A folder for the files that are sent to the hosts. Only this user can read it.
if [[ -n $dry_run ]]; then
  scratch=${TMPDIR:-/tmp}/msllm.XXXXXX
else
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/msllm.XXXXXX")
  trap 'rm -rf -- "$scratch"' EXIT
fi

queued_resources() {
  local verb=$1
  shift
  do_or_say gcloud compute tpus queued-resources "$verb" "$@" --zone="$zone" --project="$project"
}

# on_hosts SLICE WORKER COMMAND: runs a shell command on one host, or on `all`.
on_hosts() {
  queued_resources ssh "$name" --node="$1" --worker="$2" --command="$3" ${all_ssh_option[@]+"${all_ssh_option[@]}"}
}

# send FILE NAME: copies a file to the home folder of every host.
send() {
  queued_resources scp "$1" "$name:$2" --node=all --worker=all ${all_ssh_option[@]+"${all_ssh_option[@]}"}
}

# Prints the state of the queued resource, or MISSING if it does not exist. Fails if gcloud gets no
# answer.
state() {
  local answer
  answer=$(queued_resources list --filter="name ~ /queuedResources/$name\$" --format="value(state.state)") || return 1
  printf '%s\n' "${answer:-MISSING}"
}

# statuses SLICE WORKER: prints the status that on_host.sh reports on each host. Fails if a host
# does not answer.
statuses() {
  local answer
  answer=$(on_hosts "$1" "$2" \
    'if [ -e msllm/launch/on_host.sh ]; then bash msllm/launch/on_host.sh status; else echo none; fi') || return 1
  if [[ -n $dry_run ]]; then printf '%s\n' "$answer"; fi
  grep -xE 'none|running|stopped|exit [0-9]+' <<<"$answer"
}

create() {
  local options=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices > 1)); then
    options+=(--node-count="$slices" --node-prefix="$name")
  else
    options+=(--node-id="$name")
  fi
  if [[ -n $spot ]]; then options+=(--spot); fi
  if [[ -n $reserved ]]; then options+=(--reserved); fi
  if [[ -n $service_account ]]; then options+=(--service-account="$service_account"); fi
  if [[ -n $network ]]; then options+=(--network="$network"); fi
  if [[ -n $subnetwork ]]; then options+=(--subnetwork="$subnetwork"); fi
  queued_resources create "$name" "${options[@]}"
}

delete() {
  queued_resources delete "$name" --force --quiet
}

install() {
  local archive make="bash msllm/launch/on_host.sh install${data:+ $(quoted "${data%/}")}"
  if [[ -n $repository ]]; then
    on_hosts all all "if [ ! -d msllm/.git ]; then git clone -q $(quoted "$repository") msllm; fi && \
git -C msllm fetch -q origin && git -C msllm checkout -q $revision && $make"
    return
  fi
  archive=$scratch/msllm.tar.gz
  do_or_say git archive --format=tar.gz --output="$archive" "$revision" &&
    send "$archive" msllm.tar.gz &&
    on_hosts all all "mkdir -p msllm && \
find msllm -mindepth 1 -maxdepth 1 ! -name .venv ! -name data -exec rm -rf {} + && \
tar -xzf msllm.tar.gz -C msllm && $make"
}

start() {
  local with=
  if [[ ${#variables[@]} -gt 0 ]]; then
    with="--environment "
    if [[ -z $dry_run ]]; then (umask 077 && printf '%s\0' "${variables[@]}" >"$scratch/environment"); fi
    send "$scratch/environment" msllm-environment || return 1
  fi
  on_hosts all all "bash msllm/launch/on_host.sh start $with-- $(training_arguments)"
}

# Prints the arguments of msllm train, quoted for a shell.
training_arguments() {
  quoted --config="$config" --workdir="$workdir" ${passed[@]+"${passed[@]}"}
}

# Fails if the run on the hosts has other arguments than this command. Options that take no effect
# must not be accepted.
check_same_arguments() {
  local theirs
  theirs=$(on_hosts 0 0 'bash msllm/launch/on_host.sh arguments') || return 0 # no answer, or started by an older version
  theirs=${theirs##*$'\n'}
  if [[ $theirs == --config=* && $theirs != "$(training_arguments)" ]]; then
    fail "training is already running, with other arguments: $theirs; give these, or end it with the command stop"
  fi
}

show_logs() { # show_logs LINES [follow]
  on_hosts "$slice" "$worker" "tail -n $1 ${2:+-F }msllm-run/train.log"
}

say() {
  echo "tpu_vm: $(date -u +%H:%M:%S) $*" >&2
}

# Requests the VMs and returns when they are ready. Requests new ones after a preemption.
bring_up() {
  local now before=
  while true; do
    now=$(state) || now=unknown
    if [[ $now != "$before" ]]; then say "$name is $now"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      MISSING) create || say "could not request $name; trying again" ;;
      SUSPENDED | FAILED)
        delete || true
        continue
        ;;
      *) ;; # in transition to one of these states
    esac
    sleep "$poll"
  done
}

# Waits until training has ended and sets `outcome` to a status of on_host.sh, `preempted` or
# `lost`.
watch() {
  local now silent=0
  while true; do
    sleep "$poll"
    now=$(state) || continue # gcloud got no answer, which says nothing about the pod
    if [[ $now != ACTIVE ]]; then
      outcome=preempted
      return
    fi
    if outcome=$(statuses 0 0); then
      silent=0
      if [[ $outcome != running ]]; then return; fi
    elif ((++silent >= 10)); then
      outcome=lost
      return
    fi
  done
}

finish() { # finish STATUS
  if [[ -z $keep ]]; then delete || say "could not delete $name: delete it, because it still costs money"; fi
  exit "$1"
}

run() {
  local crashes=0 outcome
  while true; do
    bring_up
    if [[ $(statuses 0 0) != running ]]; then
      say "installing and starting $revision"
      if ! { install && start; }; then
        outcome="not started"
        sleep "$poll"
      else
        watch
      fi
    else
      check_same_arguments
      say "training is already running"
      watch
    fi
    say "training: $outcome"
    # If the first host failed because another one had bad input, only that other host has status 2.
    if [[ $outcome == "exit "* && $outcome != "exit 0" ]] && statuses all all | grep -qx "exit 2"; then
      outcome="exit 2"
    fi
    case $outcome in
      "exit 0") finish 0 ;;
      "exit 2")
        show_logs 50 >&2 || true
        finish 2
        ;;
      stopped) exit 75 ;;
      "exit 75" | preempted) ;; # continue as soon as there are VMs
      *)
        if ((++crashes > restarts)); then
          show_logs 50 >&2 || true
          say "more than $restarts crashes: $name is still there and costs money: delete it or run again"
          exit 1
        fi
        if [[ $outcome == lost ]]; then delete || true; fi
        ;;
    esac
  done
}

case $command in
  create)
    now=$(if [[ -z $dry_run ]]; then state; else echo MISSING; fi) || exit 1
    if [[ $now == MISSING ]]; then
      create
    else
      say "$name already exists: $now"
    fi
    ;;
  install) install ;;
  start) start ;;
  status)
    if [[ -n $dry_run ]]; then
      queued_resources list --filter="name ~ /queuedResources/$name\$" --format="value(state.state)"
      statuses all all || true
    else
      now=$(state) || exit 1
      echo "$now"
      if [[ $now == ACTIVE ]]; then statuses all all | sort | uniq -c; fi
    fi
    ;;
  logs) show_logs 200 follow ;;
  stop) on_hosts all all "bash msllm/launch/on_host.sh stop" ;;
  delete) delete ;;
  run)
    if [[ -n $dry_run ]]; then
      create
      queued_resources list --filter="name ~ /queuedResources/$name\$" --format="value(state.state)"
      install
      start
      statuses 0 0 || true
      if [[ -z $keep ]]; then delete; fi
    else
      run
    fi
    ;;
esac
