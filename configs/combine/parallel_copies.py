"""What the studies of parallel copies share: model, arms, measurement and report.

study.py describes the arms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from msllm.config import default_config, from_config_dict
from msllm.evals import likelihood
from msllm.runtime.flops import train_flops
from msllm.streams import StreamSpec
from msllm.study import Arm, Metric, Plot, Results, Small, Study

COPIES = (2, 4, 8)
LEARNING_RATES = (2e-3, 4e-3)
MODES = ("mixture", "product")
STEPS = 800
WIDTHS = {2: 96, 4: 128, 8: 192}  # of the wider models; the feed-forward layer makes up the rest
EXAMPLES = 16  # held-out examples of 64 predictions in a record
LOSS = Metric("loss", "nll", weight="targets")


def get_config():
    """Returns the settings of one stream, without those of the data."""
    config = default_config()
    config.steps = STEPS
    config.log_every = 50
    config.eval_every = 0

    config.streams.names = ("text",)
    config.streams.kinds = ("output",)
    config.streams.visibility = "isolated"

    config.data.converter = "single"
    config.data.options = {"stream": "text"}
    config.data.tokenizer.vocab_size = 256
    config.data.rows = 65  # 64 predictions
    config.data.batch_size = 16

    config.model.d_model = 64
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.d_ff = 192
    config.model.rope_theta = 1e4

    config.optim.warmup_steps = 50
    config.optim.b2 = 0.99
    config.checkpoint.every = 0
    return config


def copies(number: int, mode: str) -> dict[str, Any]:
    """The settings of a text in `number` streams that predict it together."""
    names = ("text", *(f"copy{i}" for i in range(1, number)))
    return {
        "streams.names": names,
        "streams.kinds": ("output",) + ("input",) * (number - 1),
        "streams.mail": tuple((name, "text", "0", "0:") for name in names[1:]),
        "streams.combine": (("text", mode, ",".join(names)),),
    }


def operations(settings: dict[str, Any], vocabulary: int) -> int:
    """Floating-point operations of a step of an arm, with about the vocabulary of the data."""
    found = get_config()
    found.update_from_flattened_dict(settings | {"model.vocab_size": vocabulary})
    config = from_config_dict(found)
    spec = StreamSpec.from_config(config.streams)
    return train_flops(config.model, spec, config.data.batch_size, config.data.rows)


def wider(number: int, vocabulary: int) -> dict[str, Any]:
    """The settings of one stream whose step costs as much as that of `number` copies."""
    width = WIDTHS[number]
    settings = {
        "model.d_model": width,
        "model.num_heads": width // 16,
        "model.num_kv_heads": width // 16,
    }
    budget = operations(copies(number, "product"), vocabulary)
    none, one = (operations(settings | {"model.d_ff": size}, vocabulary) for size in (1, 2))
    return settings | {"model.d_ff": 1 + round((budget - none) / (one - none))}


def get_arms(vocabulary: int) -> dict[str, Arm]:
    """All arms, each with every learning rate."""
    once = operations({}, vocabulary)
    found: dict[str, tuple[dict[str, Any], str, int]] = {"one": ({}, "one", 1)}
    for number in COPIES:
        for mode in MODES:
            found[f"{mode}, {number}"] = (copies(number, mode), mode, number)
        ratio = operations(copies(number, "product"), vocabulary) / once
        found[f"longer, {number}"] = ({"steps": round(STEPS * ratio)}, "longer", number)
        found[f"wider, {number}"] = (wider(number, vocabulary), "wider", number)
    return {
        arm_name(name, rate): Arm(
            settings | {"optim.lr": rate},
            options={"name": name, "kind": kind, "copies": number},
        )
        for name, (settings, kind, number) in found.items()
        for rate in LEARNING_RATES
    }


def arm_name(name: str, rate: float) -> str:
    """The name of an arm with a learning rate."""
    return f"{name}, lr {rate:g}"


def measure(model, point) -> Iterator[dict[str, Any]]:
    """The loss of the text in groups of held-out examples, in nats per token."""
    units = likelihood.evaluate(model, point.config.data.dir)
    text = model.streams.index("text")
    for start in range(0, len(units.nll), EXAMPLES):
        part = slice(start, start + EXAMPLES)
        yield {
            "item": start // EXAMPLES,
            "nll": float(units.nll[part, text].sum()),
            "targets": float(units.targets[part, text].sum()),
        }


def make_study(config: ml_collections.ConfigDict, vocabulary: int) -> Study:
    """Returns the study of a text.

    Args:
      config: the settings of one stream.
      vocabulary: about that of the data.
    """
    return Study(
        base=config,
        arms=get_arms(vocabulary),
        seeds=(0, 1, 2),
        tokenizer={"streams.names": ("text",)},
        measure=measure,
        metrics=(LOSS,),
        plots=(
            Plot("flops", "loss", by="kind", log="x"),
            Plot("copies", "loss", by="kind", log="x"),
        ),
        report=report,
        small=Small(
            settings={"steps": 2, "data.batch_size": 4, "data.max_examples": 200, "log_every": 1},
            arms=tuple(
                arm_name(name, LEARNING_RATES[0]) for name in ("one", "mixture, 2", "wider, 2")
            ),
        ),
    )


# Reporting


def report(results: Results) -> str:
    """Each arm with its best learning rate, what it costs, and ParScale's law."""
    best = best_arms(results)
    lines = [
        "## With the best learning rate of each arm",
        "",
        "Differences are in nats per token; below 0, the first arm is better.",
        "",
        "| arm | learning rate | loss | minus `one` | parameters | operations | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in best.items():
        parts = [name, f"{results.axis('optim.lr', arm):g}", str(results.estimate(LOSS, arm))]
        parts.append("" if name == "one" else str(results.estimate(LOSS, arm, best["one"])))
        costs = [results.axis(fact, arm) for fact in ("parameters", "flops", "cpu_seconds")]
        parts += ["" if cost is None else f"{cost:.3g}" for cost in costs]
        lines.append(f"| {' | '.join(parts)} |")
    lines += ["", "## Copies against the same operations in one stream", ""]
    for number in COPIES:
        for mode in MODES:
            for other in ("longer", "wider"):
                pair = [best.get(f"{kind}, {number}") for kind in (mode, other)]
                if all(pair):
                    found = results.estimate(LOSS, *pair)
                    lines.append(f"- `{mode}, {number}` minus `{other}, {number}`: {found}")
    lines += ["", "## ParScale's law", "", *law_lines(results, best)]
    return "\n".join(lines) + "\n"


def best_arms(results: Results) -> dict[str, str]:
    """{name: its arm with the lowest mean loss}."""
    losses = {arm: pair[0].value for arm, pair in results.estimates(LOSS).items()}
    found: dict[str, str] = {}
    for point in results.points:
        name, arm = point["options"]["name"], point["arm"]
        if name not in found or losses[arm] < losses[found[name]]:
            found[name] = arm
    return found


def law_lines(results: Results, best: dict[str, str]) -> list[str]:
    """The fit of loss = E + A / (N (1 + k log P)) ^ a, with k for each mode."""
    wide = [best[name] for name in ("one", *(f"wider, {p}" for p in COPIES)) if name in best]
    if len(wide) < 4:
        return ["The fit needs the wider models of all P."]
    estimates = {arm: pair[0] for arm, pair in results.estimates(LOSS).items()}

    def losses(arms: list[str]) -> np.ndarray:
        """[1 + resamples, arms]: the values, and those of all resamples."""
        return np.stack(
            [np.r_[estimates[arm].value, estimates[arm].resampled] for arm in arms], axis=1
        )

    sizes = np.array([results.axis("parameters", arm) for arm in wide], float)
    law = np.array([fit_sizes(sizes, row) for row in losses(wide)])
    lines = [
        "loss = E + A / (N (1 + k log P)) ^ a, where E, A and a are fitted to `one` and the wider"
        " models (P = 1), and k to the copies, with N of `one`.",
        "",
        f"- E {_interval(law[:, 0])}, a {_interval(law[:, 2])}",
    ]
    for mode in MODES:
        arms = [best[f"{mode}, {p}"] for p in COPIES]
        gain = equivalent_size(losses(arms), law) / sizes[0] - 1  # k log P
        log_p = np.log(COPIES)
        lines.append(f"- {mode}: k {_interval(gain @ log_p / (log_p @ log_p))}")
        for number, one in zip(COPIES, gain.T):
            lines.append(f"  - P = {number}: as good as {_interval(1 + one)} times the parameters")
    return lines


def fit_sizes(sizes: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """(E, A, a) of loss = E + A / N ^ a by least squares of log(loss - E), over a grid of E."""
    x = np.log(sizes)
    tried = np.linspace(0, 1, 200, endpoint=False)[:, None] * losses.min()
    y = np.log(losses - tried)
    centred = x - x.mean()
    slope = y @ centred / (centred @ centred)
    level = y.mean(1) - slope * x.mean()
    law = tried + np.exp(level[:, None] + slope[:, None] * x)
    i = int(np.argmin(((law - losses) ** 2).sum(1)))
    return float(tried[i, 0]), float(np.exp(level[i])), float(-slope[i])


def equivalent_size(losses: np.ndarray, law: np.ndarray) -> np.ndarray:
    """The parameters of a model of one stream with these losses; inf below the least loss E.

    Args:
      losses: [R, arms].
      law: [R, 3], from `fit_sizes`.
    """
    least, factor, exponent = (law[:, [i]] for i in range(3))
    above = losses - least
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above > 0, (factor / above) ** (1 / exponent), np.inf)


def _interval(values: np.ndarray) -> str:
    """The first value, with the interval of the others."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975], method="nearest")
    return f"{values[0]:.3g} [{low:.3g}, {high:.3g}]"
