"""`python -m msllm COMMAND`."""

import runpy
import sys

MODULES = {
    "train": "train",
    "prepare": "data.prepare",
    "inspect": "view.prepared",
    "score": "evals.score",
    "generate": "cli.generate",
    "evaluate": "evals.exact_match",
    "convert": "weights.convert",
    "chat": "cli.chat",
    "aot": "pod.aot",
    "bench": "bench.main",
    "likelihood": "evals.likelihood",
    "interruptions": "evals.interruptions",
}

if __name__ == "__main__":
    module = MODULES[sys.argv.pop(1)]
    runpy.run_module(f"msllm.{module}", run_name="__main__", alter_sys=True)
