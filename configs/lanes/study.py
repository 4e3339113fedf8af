"""What does it cost to write a text in S lanes at once?

    msllm study configs/lanes/study.py --out=runs/lanes

A text of N characters is cut into S parts that run side by side, in N / S rows
(msllm/data/converters/lanes.py). Each part but the first begins without what comes before it, so
the model pays for the beginning of each part. The study measures this tax: by how many percent of
the bits per byte of one stream the text costs more.

Arms, for texts of N = 2,048 and 512 characters:

- `S, N=...`: S = 1, 2, 4 and 8 lanes. A cell sees all lanes up to its own row.
- at S = 4 and N = 2,048 also `block_causal` (lanes see each other a row later), `tokens` (they see
  each other's characters, and not their states), `lines` (they see where the others' lines end),
  `isolated` (they do not see each other), `delays` (each lane begins 32 rows after the one before
  it) and `plan` (a stream says how the later parts begin, before they do).

All arms read the same pieces of the text in the same order, and all of a text counts, with the plan
and what ends a text. They have the same parameters, except for an embedding for each stream.

Data: data/tinyshakespeare/input.txt in the folder that MSLLM_SHARED names (default: `shared` beside
the repository). The last tenth is held out.
Cost: 0.5 M parameters; 1,000 steps of 4,096 characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from msllm.config import default_config
from msllm.data.files import shared_file
from msllm.evals.lanes import text_likelihood
from msllm.study import Arm, Metric, Plot, Results, Small, Study

LANES = (1, 2, 4, 8)
LENGTHS = (2048, 512)  # characters of a text
CHARACTERS = 4096  # of a batch
DELAY = 32  # rows from lane to lane
PLAN = 16  # characters of each part that the plan says
WAYS = ("block_causal", "tokens", "lines", "isolated", "delays", "plan")  # of 4 lanes
BITS = Metric("bits per byte", "bits", weight="bytes")


def get_config():
    """Returns the settings that all arms share."""
    config = default_config()
    config.steps = 1000
    config.log_every = 50
    config.eval_every = 0

    config.streams.visibility = "same_row"

    config.data.converter = "lanes"
    config.data.path = shared_file("data/tinyshakespeare/input.txt", __file__)
    config.data.tokenizer.model_type = "char"
    config.data.tokenizer.vocab_size = 256
    config.data.split = "tail"
    config.data.eval_percent = 10.0

    config.model.d_model = 96
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.num_kv_heads = 6
    config.model.head_dim = 16
    config.model.d_ff = 288
    config.model.rope_theta = 1e4

    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.optim.b2 = 0.99
    config.checkpoint.every = 0
    return config


def lanes(number: int, length: int, delays: tuple[int, ...] = (), **changes: Any) -> Arm:
    """The arm of texts of `length` characters in lanes.

    Args:
      number: the number of lanes.
      length: of a text; its pieces fill a table each.
      delays: the rows by which each lane is late.
      **changes: further settings, with "__" in place of ".".
    """
    names = tuple(f"lane{i}" for i in range(number))
    settings = {
        "streams.names": names,
        "streams.kinds": ("output",) * number,
        "streams.delays": delays,
        "data.options": {"lanes": list(names)},
        "data.rows": 1 + length // number + max(delays, default=0),
        "data.batch_size": CHARACTERS // length,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return Arm(settings, options={"lanes": number, "length": length, "share": number / length})


def get_arms() -> dict[str, Arm]:
    """All arms."""
    found = {arm_name(n, length): lanes(n, length) for length in LENGTHS for n in LANES}
    length, names = LENGTHS[0], tuple(f"lane{i}" for i in range(4))
    late = PLAN * 3  # rows that the plan takes
    ways = {
        "block_causal": lanes(4, length, streams__visibility="block_causal"),
        "tokens": lanes(4, length, streams__visibility_medium="tokens"),
        "lines": lanes(
            4,
            length,
            streams__visibility="isolated",
            streams__token_sets={"lines": ("\n",)},
            streams__lags=tuple(
                (one, other, "0 tokens:lines") for one in names for other in names if one != other
            ),
        ),
        "isolated": lanes(4, length, streams__visibility="isolated"),
        "delays": lanes(4, length, (0, DELAY, 2 * DELAY, 3 * DELAY)),
        "plan": lanes(
            4,
            length,
            (0, 0, late, late, late),
            streams__names=("plan", *names),
            streams__kinds=("thought", *("output",) * 4),
            data__options={"lanes": list(names), "plan": "plan", "plan_tokens": PLAN},
        ),
    }
    return found | {f"{arm_name(4, length)}, {way}": ways[way] for way in WAYS}


def arm_name(number: int, length: int) -> str:
    """The name of the arm with this number of lanes."""
    return f"{number}, N={length}"


def measure(model, point) -> Iterator[dict[str, Any]]:
    """The bits of each held-out piece of the text."""
    found = text_likelihood(model, point.config.data.dir)
    for i, (bits, count) in enumerate(zip(found.bits, found.bytes)):
        # Pieces are stored in the order of the text.
        yield {
            "item": f"{point.options['length']}-{i:04}",
            "bits": float(bits),
            "bytes": float(count),
        }


def get_study() -> Study:
    """The study."""
    return Study(
        base=get_config(),
        arms=get_arms(),
        seeds=(0, 1, 2),
        measure=measure,
        metrics=(BITS,),
        baseline=arm_name(1, LENGTHS[0]),
        same=("steps",),
        plots=(Plot("lanes", BITS.name, by="length", log="x"),),
        report=report,
        small=Small(
            settings={
                "steps": 2,
                "log_every": 1,
                "data.max_examples": 40,
                "model.d_model": 16,
                "model.num_layers": 1,
            },
            arms=("1, N=512", "4, N=512", "4, N=2048, plan"),
        ),
    )


# Reporting


def report(results: Results) -> str:
    """The tax of every arm, and how it grows with S / N."""
    lines = [
        "## The tax",
        "",
        "Bits per byte above those of one stream, in percent, with rows per text.",
        "",
        "| arm | rows | bits per byte | tax, % |",
        "|---|---|---|---|",
    ]
    estimates = {arm: pair[0] for arm, pair in results.estimates(BITS).items()}
    shares, taxes = [], []
    for arm in results.arms:
        number, length = (int(results.axis(name, arm) or 0) for name in ("lanes", "length"))
        one = arm_name(1, length)
        tax = ""
        if arm != one and one in estimates:
            ratio = [np.r_[estimates[name].value, estimates[name].resampled] for name in (arm, one)]
            percent = 100 * (ratio[0] / ratio[1] - 1)
            tax = interval(percent)
            if arm == arm_name(number, length):
                shares.append((number - 1) / length)
                taxes.append(percent)
        rows = results.axis("data.rows", arm)
        lines.append(f"| {arm} | {rows:.0f} | {estimates[arm]} | {tax} |")
    if len(taxes) > 1:
        share = np.array(shares)
        slope = share @ np.stack(taxes) / (share @ share) / 100
        lines += ["", f"tax = k (S - 1) / N, by least squares: k {interval(slope)}"]
    return "\n".join(lines) + "\n"


def interval(values: np.ndarray) -> str:
    """The first value, with the interval of the others."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return f"{values[0]:.3g} [{low:.3g}, {high:.3g}]"
