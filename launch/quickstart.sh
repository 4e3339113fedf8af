#!/usr/bin/env bash
# From a fresh clone to a trained three-stream model that answers, on a CPU.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: launch/quickstart.sh [--config.KEY=VALUE ...]

Makes .venv with msllm in it, prepares data, trains configs/quickstart.py, evaluates the model on held-out questions and
lets it answer one question. All output goes to .venv, data/quickstart and runs/quickstart. You can run the script again
at any time: it skips what is finished and continues an interrupted training.

  --config.KEY=VALUE   overrides a setting, e.g. --config.steps=100 for a shorter training. Delete runs/quickstart
                       before you change the model or the data, because a run continues from its checkpoints
  --help               this text

PYTHON=/path/to/python selects the Python (3.11 or later) that .venv is made with.
EOF
}

words=() passed=()
take_arguments "" "" "" config "$@"
[[ ${#words[@]} -eq 0 ]] || fail "unexpected argument '${words[0]}': only --config.KEY=VALUE is passed on (see --help)"

question="please take 2 then add 3 no wait add 4 and double it ?" # not among the examples; the answer is 12

# Prints a command, then runs it.
run() {
  printf '\n$ %s\n' "$(quoted "$@")"
  "$@"
}

steps() {
  run msllm prepare --config=configs/quickstart.py "$@"
  run msllm train --config=configs/quickstart.py --workdir=runs/quickstart "$@"
  run msllm evaluate --checkpoint=runs/quickstart
  run msllm generate --checkpoint=runs/quickstart --input="user=$question" --rows=22
}

use_environment
# shellcheck source=/dev/null
. launch/env.sh

TIMEFORMAT=$'\nCPU time without installation: %U s user, %S s system; wall time: %R s.'
time steps ${passed[@]+"${passed[@]}"}

cat <<'EOF'

The table above has a row per time step. The user's words are given; the model generates thought and output.

Next (after `. .venv/bin/activate && . launch/env.sh`):
  another question          msllm generate --checkpoint=runs/quickstart --rows=16 \
                              --input="user=ok take 9 subtract 4 um plus 2 ?"
  a conversation            pip install -e '.[chat]'; msllm chat --checkpoint=runs/quickstart
  the same in one stream    msllm prepare --config=configs/quickstart_single.py
                            msllm train --config=configs/quickstart_single.py --workdir=runs/quickstart_single
                            msllm evaluate --checkpoint=runs/quickstart_single
  losses as curves          runs/quickstart/metrics.jsonl, or: tensorboard --logdir=runs (needs: pip install -e ".[tensorboard]")
  your own data             msllm init NAME --from=FILE (README.md, docs/data.md)
  real text                 configs/gsm8k.py with --config.data.path=FILE
  settings, resuming        docs/training.md
EOF
