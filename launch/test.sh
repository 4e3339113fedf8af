#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  cat <<'EOF'
usage: launch/test.sh [PYTEST ARGUMENTS]

Makes .venv if there is none, installs msllm with its dev extra, and runs the tests in two processes, quick ones first.
Skipped tests say why. Tests on external data look in $MSLLM_SHARED, else in a folder `shared` beside the repository.

  launch/test.sh                          all tests
  launch/test.sh tests/test_model.py      one file
  launch/test.sh -m "not slow"            only the quick ones
  launch/test.sh -n 0 -x --pdb -k name    in one process, with the debugger

PYTHON=/path/to/python chooses the Python that .venv is made with.
EOF
  exit
fi

# shellcheck source=/dev/null
. launch/common.sh
use_environment dev
exec python -m pytest -q -rs -n 2 "$@"
