"""Do parallel copies of a text help more than the same operations in one stream?

    msllm study configs/combine/study.py --out=runs/combine

ParScale (arXiv 2505.10475) reads a text with P copies of a model that share its weights, and
aggregates their predictions. It reports that P copies act like N (1 + k log P) parameters. Here
each copy is a stream with an embedding of its own, and `streams.combine` aggregates the
predictions.

Arms, for P = 2, 4 and 8:

- `one`: a single stream.
- `mixture, P` and `product, P`: P copies, combined by a mixture of their distributions, or by a
  weighted sum of their logits (as in ParScale's code).
- `longer, P`: one stream, trained for as many more steps as P copies cost operations.
- `wider, P`: one stream in a wider model, whose steps cost as much as those of P copies.

Every arm is trained with all learning rates of LEARNING_RATES, and the report takes the best of
each. Copies and baselines read the same text in the same order.

music.py asks the same of part music.

Data: data/tinyshakespeare/input.txt in the folder that MSLLM_SHARED names (default: `shared` beside
the repository). The last tenth is held out.
Cost: 0.16 M parameters; about a CPU-minute for `one`, and P times as much for each other arm.
"""

from __future__ import annotations

import parallel_copies

from msllm.data.files import shared_file
from msllm.study import Study

VOCABULARY = 68  # about that of the data


def get_config():
    """Returns the settings of one stream."""
    config = parallel_copies.get_config()
    config.data.path = shared_file("data/tinyshakespeare/input.txt", __file__)
    config.data.tokenizer.model_type = "char"
    config.data.split = "tail"
    config.data.eval_percent = 10.0
    return config


def get_study() -> Study:
    """The study."""
    return parallel_copies.make_study(get_config(), VOCABULARY)
