"""Pretrain and run multi-stream language models in JAX.

    import msllm

    msllm.configure_jax()  # in notebooks and scripts, before jax first uses a device
    model = msllm.load("runs/quickstart")
    with msllm.Engine(model).open(msllm.DecodeOptions(temperature=0.7)) as session:
        session.feed("user", "hello")
        rows = session.run(24)

Names are imported on first use. `import msllm` is therefore fast, does not import jax and has no
side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msllm.config import Config, default_config, from_config_dict
    from msllm.data.prepare import prepare
    from msllm.decode.engine import Engine, Session, generate
    from msllm.decode.script import DecodeOptions, Stop
    from msllm.errors import RunError, UserError
    from msllm.evals.exact_match import evaluate
    from msllm.evals.score import score
    from msllm.hooks import Hook, Run
    from msllm.runtime.environment import configure_jax
    from msllm.streams import StreamSpec
    from msllm.tokenizer import Tokenizer
    from msllm.training import train
    from msllm.weights.load import LoadedModel, load
    from msllm.weights.warm_start import fine_tune

__version__ = "0.1.0"
__all__ = [
    "Config",
    "DecodeOptions",
    "Engine",
    "Hook",
    "LoadedModel",
    "Run",
    "RunError",
    "Session",
    "Stop",
    "StreamSpec",
    "Tokenizer",
    "UserError",
    "configure_jax",
    "default_config",
    "evaluate",
    "fine_tune",
    "from_config_dict",
    "generate",
    "load",
    "prepare",
    "score",
    "train",
]

# {module: the public names that it defines}
_MODULES = {
    "config": ("Config", "default_config", "from_config_dict"),
    "data.prepare": ("prepare",),
    "decode.engine": ("Engine", "Session", "generate"),
    "decode.script": ("DecodeOptions", "Stop"),
    "errors": ("RunError", "UserError"),
    "evals.exact_match": ("evaluate",),
    "evals.score": ("score",),
    "hooks": ("Hook", "Run"),
    "runtime.environment": ("configure_jax",),
    "streams": ("StreamSpec",),
    "tokenizer": ("Tokenizer",),
    "training": ("train",),
    "weights.load": ("LoadedModel", "load"),
    "weights.warm_start": ("fine_tune",),
}

if not TYPE_CHECKING:  # type checkers see the imports above and report names that do not exist

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"msllm.{module}"), name)
        raise AttributeError(f"module 'msllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
