# shellcheck shell=bash
# Functions shared by the scripts in this folder, which source this file from the root of the repository.

# Ctrl-C ends the script even if the running command handles it and exits with status 0. Without this trap, bash would
# continue with the next command.
trap 'exit 130' INT

# Prints a Python that runs, is at least 3.11 and can make virtual environments. With $PYTHON set, tries only that one.
find_python() {
  local candidate
  # A name on the PATH may be a version manager's shim that only prints an error, so each candidate is run.
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    if [[ -n ${PYTHON:-} ]]; then
      echo "error: PYTHON=$PYTHON does not run, is older than 3.11 or lacks venv: name another, or unset PYTHON" >&2
      return 1
    fi
  done
  echo "error: found no Python >= 3.11 with venv and ensurepip: install one (on Debian with python3-venv), or name it:" \
    "PYTHON=/path/to/python $0" >&2
  return 1
}

# use_environment [EXTRA]: makes .venv if needed, installs msllm[EXTRA] if pyproject.toml has changed, and activates it.
use_environment() {
  local extra=${1:-} python stamp
  if ! .venv/bin/python -c '' >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" -VV)"
    "$python" -m venv --clear .venv
  fi
  stamp=.venv/installed${extra:+-$extra}
  if [[ ! $stamp -nt pyproject.toml ]]; then
    echo "installing msllm${extra:+[$extra]} in .venv (once)"
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch .venv/installed "$stamp" # an extra includes the installation without extras
  fi
  export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
  unset PYTHONHOME
}

# fail MESSAGE: bad input; the message names the value, the rule and the remedy.
fail() {
  echo "error: $*" >&2
  exit 2
}

# need_number NAME VALUE LEAST: fails unless VALUE is a whole number of at least LEAST.
need_number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2': must be a whole number of at least $3 (see --help)"
  fi
}

# need_config FILE: fails unless FILE exists. It must be in this repository, so that all hosts have it at the same path.
need_config() {
  [[ -n $1 ]] || fail "--config is missing: name a file, e.g. --config=configs/quickstart.py (see --help)"
  [[ -f $1 ]] || fail "the config is '$1': there is no such file; name one, e.g. configs/quickstart.py, from the root"
}

# quoted WORD ...: prints the words as one line, quoted for a shell.
quoted() {
  local word line=
  for word in "$@"; do
    # shellcheck disable=SC1003
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+^-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# do_or_say WORD ...: runs a command, or only prints it if dry_run is set.
do_or_say() {
  if [[ -n ${dry_run:-} ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# environment_of cpu|gpu|tpu: prints the VARIABLE=VALUE lines of flags.env for that hardware.
environment_of() {
  sed -n "s/^$1 //p" launch/flags.env
}
