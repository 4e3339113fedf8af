# shellcheck shell=bash
# The scripts define and read variables of these functions.
# shellcheck disable=SC2034,SC2154
# Functions shared by the scripts in this folder. A script sources this file first. That changes to
# the root of the repository and sets `start`, the folder in which the user started the script.

# With CDPATH set, `cd` may go to a folder of the same name elsewhere.
unset CDPATH
start=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

# Ctrl-C ends the script even if the running command handles it and exits with status 0. Without
# this trap, bash would continue with the next command.
trap 'exit 130' INT

# Prints a Python that runs, is at least 3.11 and can make virtual environments. With $PYTHON set,
# tries only that one.
find_python() {
  local candidate
  # A name on the PATH may be a version manager's shim that only prints an error, so each candidate
  # is run.
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

# use_environment [EXTRA]: makes .venv if needed, installs msllm[EXTRA] if pyproject.toml has
# changed, and activates it.
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

# take_arguments OPTIONS SWITCHES LISTS PASSED WORD ...: parses the arguments of a script. All
# scripts use this parser.
#
# OPTIONS   names of options with a value: --some-name=VALUE sets the variable some_name
# SWITCHES  names of options without a value: --some-name sets some_name to 1
# LISTS     names of options that can be repeated: --some-name=VALUE appends to the array
#           all_some_name
# PASSED    which arguments the script passes on to msllm: nothing, `config` (--config.KEY=VALUE),
#           or `train` (the timeouts of msllm train as well). They are appended to the array passed
#
# Words that are not options are appended to the array words. Anything else fails.
take_arguments() {
  local options=" $1 " switches=" $2 " lists=" $3 " forward=$4 argument option variable
  shift 4
  words=() passed=()
  for argument in "$@"; do
    if [[ $argument == *[[:cntrl:]]* ]]; then
      fail "the argument $(printf %q "$argument") contains a line break or another control character: remove it"
    fi
    option=${argument%%=*}
    option=${option#--}
    variable=${option//-/_}
    case $argument in
      --help | -h)
        usage
        exit
        ;;
      --config.*)
        [[ -n $forward ]] || fail "unknown argument $argument: this script overrides no config (see --help)"
        [[ $argument =~ ^--config\.[A-Za-z_][A-Za-z0-9_.]*= ]] ||
          fail "the override is '$argument': write --config.KEY=VALUE, in one word"
        passed+=("$argument")
        ;;
      --initialization_timeout=* | --heartbeat_timeout=*)
        [[ $forward == train ]] || fail "unknown argument $argument (see --help)"
        need_number "--$option" "${argument#*=}" 1
        passed+=("$argument")
        ;;
      --*)
        if [[ $argument == *=* && $options == *" $option "* ]]; then
          printf -v "$variable" %s "${argument#*=}"
        elif [[ $argument == *=* && $lists == *" $option "* ]]; then
          eval "all_$variable+=(\"\${argument#*=}\")"
        elif [[ $argument != *=* && $switches == *" $option "* ]]; then
          printf -v "$variable" 1
        elif [[ $argument != *=* && "$options$lists" == *" $option "* ]]; then
          fail "--$option has no value: write --$option=VALUE, in one word (see --help)"
        elif [[ $switches == *" $option "* ]]; then
          fail "--$option takes no value: remove =${argument#*=} (see --help)"
        else
          fail "unknown argument $argument (see --help)"
        fi
        ;;
      -*) fail "unknown argument $argument (see --help)" ;;
      *) words+=("$argument") ;;
    esac
  done
}

# need_number NAME VALUE LEAST: fails unless VALUE is a whole number of at least LEAST. bash would
# read a number that begins with 0 as octal.
need_number() {
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    fail "$1 is '$2': must be a whole number of at least $3 (see --help)"
  fi
}

# from_start PATH: prints a path of the command line so that it is valid in the root of the
# repository. The path may be relative to the folder in which the user started the script, or begin
# with ~.
from_start() {
  local path=$1
  # shellcheck disable=SC2088
  if [[ $path == '~' || $path == '~/'* ]]; then path=$HOME${path#'~'}; fi
  if [[ -n $path && $path != /* && $path != *://* && $start != "$PWD" ]]; then path=$start/$path; fi
  printf '%s\n' "$path"
}

# use_config FILE: sets `config` to the path of a config file, relative to the root if it is in this
# repository. Fails if there is no such file. FILE is relative to the folder in which the user
# started the script, or to the root. It may end with :ARGUMENT, for a config that takes an
# argument.
use_config() {
  local file=${1%%:*} folder
  [[ -n $1 ]] || fail "--config is missing: name a file, e.g. --config=configs/quickstart.py (see --help)"
  if [[ ! -f $file || -f $start/$file ]]; then file=$(from_start "$file"); fi
  [[ -f $file ]] || fail "the config is '$1': there is no such file; name one, e.g. configs/quickstart.py"
  folder=$(cd -- "$(dirname -- "$file")" && pwd)/
  if [[ $folder == "$PWD"/* ]]; then folder=${folder#"$PWD"/}; fi
  config=$folder${file##*/}${1#"${1%%:*}"}
}

# take_variables: checks the values of --env, and sets `variables` to NAME=VALUE words and
# `inherited` to the names of those whose values come from the environment of this script. Every
# user of a machine can see its command lines, so secrets must not be on one.
take_variables() {
  local entry name secret='_(api_?)?(key|token|secret|passwd|password)_'
  variables=() inherited=()
  for entry in ${all_env[@]+"${all_env[@]}"}; do
    name=${entry%%=*}
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env is '$entry': must be NAME=VALUE, or NAME for a value from here"
    if [[ $entry != *=* ]]; then
      [[ -n ${!name+set} ]] || fail "--env is '$name': there is no such variable here; export it, or give $name=VALUE"
      inherited+=("$name")
      entry=$name=${!name}
    elif (shopt -s nocasematch && [[ _${name}_ =~ $secret ]]); then
      fail "--env sets $name to a value on the command line, which others can see: export $name and give --env=$name"
    fi
    variables+=("$entry")
  done
}

# quoted WORD ...: prints the words as one line, quoted for a shell.
quoted() {
  local word name line=
  for word in "$@"; do
    if ! [[ $word =~ ^[A-Za-z0-9_./:=,@%+^-]+$ ]]; then
      name=
      if [[ $word =~ ^--[A-Za-z0-9_.-]+= ]]; then name=${BASH_REMATCH[0]}; fi
      word=${word#"$name"}
      # shellcheck disable=SC1003
      word="$name'${word//\'/\'\\\'\'}'"
    fi
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# check_training PYTHON ARGUMENT ...: fails if msllm train refuses these arguments, before they wait
# in a queue. Checks nothing if msllm does not run with that Python here.
check_training() {
  local python=$1
  shift
  if ! "$python" -c 'import msllm' 2>/dev/null; then return; fi
  "$python" -c 'import sys
from msllm.cli import base, main
sys.exit(base.execute(lambda: main.parser_of("train").parse(sys.argv[1:]) and None))' "$@" || exit
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
