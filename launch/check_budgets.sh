#!/usr/bin/env bash
# Compiles the pod configs for their TPUs and compares memory and collectives with their budgets.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'USAGE'
usage: launch/check_budgets.sh [--write] [NAME ...]

Compiles the train step of each configs/NAME.py that has a configs/budgets/NAME.json, for the topology that the budget
names, and prints one line for each: whether memory and collectives keep the budget (docs/aot.md). Without names: all of
them.
No TPU is needed; a config takes 2 to 8 CPU-minutes and up to 8 GiB of memory.

  --write   write the budgets from what is compiled, instead of comparing
  --help    this text

Exit status: 0 if all keep their budgets, 1 if not, 2 for bad arguments.
PYTHON=/path/to/python chooses the Python that .venv is made with.
USAGE
}

write=
names=()
for argument in "$@"; do
  case $argument in
    --help | -h)
      usage
      exit
      ;;
    --write) write=--write_budget ;;
    *)
      if [[ ! -e configs/budgets/$argument.json ]]; then
        echo "error: there is no configs/budgets/$argument.json (see --help)" >&2
        exit 2
      fi
      names+=("$argument")
      ;;
  esac
done
if [[ ${#names[@]} -eq 0 ]]; then
  for budget in configs/budgets/*.json; do names+=("$(basename "$budget" .json)"); done
fi

# shellcheck source=/dev/null
. launch/common.sh
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
  if python -m msllm aot "${flags[@]}" ${write:+"$write"} >"$log" 2>&1; then
    result=ok
  else
    result=FAILED
    status=1
  fi
  # What it says of memory, and what is wrong.
  said=$(grep -E '^  (fits|does not fit)|^over budget|^error' "$log" | sed 's/^ *//' | paste -sd ';' | sed 's/;/; /g') || true
  printf '%-22s %-14s %-6s  %s\n' "$name" "$slices x $topology" "$result" "${said:-$(tail -n 1 "$log")}"
done
exit "$status"
