#!/usr/bin/env bash
# Compiles the pod configs for their TPUs and compares memory and collectives with their budgets.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2329 # take_arguments calls it
usage() {
  cat <<'USAGE'
usage: launch/check_budgets.sh [--write] [NAME ...]

Compiles the train step of configs/NAME.py for the topology in configs/budgets/NAME.json, and prints one line for each
NAME: whether memory and collectives are within the budget (docs/aot.md). Without names, checks every config that has a
budget. No TPU is needed. A config takes 2 to 8 CPU-minutes and up to 8 GiB of memory.

  --write   write the budgets from the compiled programs instead of comparing
  --help    this text

Exit status: 0 if all are within their budgets, 1 if not, 2 for bad arguments.
PYTHON=/path/to/python selects the Python that .venv is made with.
USAGE
}

write='' words=()
take_arguments "" write "" "" "$@"
names=(${words[@]+"${words[@]}"})
for name in ${names[@]+"${names[@]}"}; do
  [[ -e configs/budgets/$name.json ]] ||
    fail "there is no configs/budgets/$name.json: name a config that has a budget (see --help)"
done
if [[ ${#names[@]} -eq 0 ]]; then
  for budget in configs/budgets/*.json; do names+=("$(basename "$budget" .json)"); done
fi

use_environment dev

status=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for name in "${names[@]}"; do
  budget=configs/budgets/$name.json
  read -r topology slices < <(
    python -c 'import json, sys; b = json.load(open(sys.argv[1])); print(b["topology"], b["num_slices"])' "$budget"
  )
  flags=(--config="configs/$name.py" --topology="$topology" --num_slices="$slices" --budget="$budget")
  if python -m msllm aot "${flags[@]}" ${write:+--write_budget} >"$log" 2>&1; then
    result=ok
  else
    result=FAILED
    status=1
  fi
  # The lines of the report on memory, exceeded limits and errors.
  summary=$(grep -E '^  (fits|does not fit)|^over budget|^error' "$log" | sed 's/^ *//' | paste -sd ';' | sed 's/;/; /g') || true
  printf '%-22s %-14s %-6s  %s\n' "$name" "$slices x $topology" "$result" "${summary:-$(tail -n 1 "$log")}"
done
exit "$status"
