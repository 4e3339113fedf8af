#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  cat <<'EOF'
usage: launch/test.sh [PYTEST ARGUMENTS]

Makes .venv if it does not exist, installs msllm with its dev extra, and runs the tests in two processes, the quick ones
first. The summary gives the reason for each skipped test. Tests on external data look for it in $MSLLM_SHARED, or in a
folder `shared` beside the repository.

  launch/test.sh                          all tests
  launch/test.sh tests/test_model.py      one file
  launch/test.sh -m "not slow"            only the quick ones
  launch/test.sh --long -m long           those that take minutes, which run only with --long
  launch/test.sh -n 0 -x --pdb -k name    in one process, with the debugger

PYTHON=/path/to/python selects the Python that .venv is made with.
EOF
  exit
fi

use_environment dev
exec python -m pytest -q -rs -n 2 --dist worksteal "$@"
