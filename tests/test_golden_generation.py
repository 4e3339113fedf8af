"""Generation gives the rows and logits of each run that the reference implementation recorded."""

import golden_cases
import numpy as np
import pytest

from msllm.decode.engine import FREE, DecodeOptions, generate
from msllm.weights.load import load

RUNS = [
    ("s7_c10_block", "interactive"),
    ("s7_c10_block", "penalty"),
    ("s7_c10_block", "forced"),
    ("s7_c10_block", "seed"),
    ("s7_c10_skip", "skip"),
    ("s7_c1_block", "greedy"),
    ("s7_c3_pad", "interactive"),
]


def test_all_recorded_runs_are_tested():
    names = [name for name in golden_cases.COPIED if name.startswith("s7_")]
    recorded = [(name, run) for name in names for run in golden_cases.case(name).meta["generation"]]
    assert sorted(recorded) == sorted(RUNS)


@pytest.mark.parametrize("name, run", RUNS)
def test_generation_equals_the_recorded_run(name, run):
    """Maps the recorded settings to arguments of `generate`."""
    case = golden_cases.case(name)
    settings = case.meta["generation"][run].get("settings", {})

    def record(array):
        return case[f"gen_{run}__{array}"]

    shown, read, step_logits = record("rows_yielded"), record("rows_fed"), record("step_logits")
    model = load(case.path).with_streams(skip_silence=bool(settings.get("skip_silence")))
    size = model.streams.size
    first = max(int(record("is_prefill").sum()), 1)  # without a prefill, row 0 is given
    rows = len(shown) - first

    # Streams are user, output, then thoughts.
    thoughts = [settings.get("think_silence_penalty", 0.0)] * size
    penalty = [0.0, settings.get("silence_penalty", 0.0), *thoughts][:size]
    ablated = tuple(f"stream{s}" for s in settings.get("ablate_channels") or ())
    forced, start = np.full((rows, size), FREE), None
    if f"gen_{run}__user_tokens" in case:
        text, at = record("user_tokens"), settings["pre_think"] - first
        forced[at : at + len(text), 0] = text
        start = settings["pre_think"] + len(text)
    elif size > 1:
        # In the reference, the model itself chooses the user's cell of the first row after the
        # prefill.
        only = generate(
            model,
            1,
            prefill=shown[:first],
            keep_logits=True,
            silence_id=case.meta["spec"]["silence"],
        )
        forced[0, 0] = np.argmax(only.logits[0][0, 0])

    result = generate(
        model,
        rows,
        DecodeOptions(silence_penalty=tuple(penalty), penalty_start=start, ablated=ablated),
        prefill=shown[:first],
        forced=forced,
        fed=[
            (int(row), 0, int(token))
            for row, token in zip(record("inject_row"), record("inject_token"))
        ],
        keep_logits=True,
        silence_id=case.meta["spec"]["silence"],
    )
    np.testing.assert_array_equal(result.shown[0], shown)
    np.testing.assert_array_equal(result.read[0], read)
    logits = golden_cases.thin("logits", np.concatenate(result.logits))
    np.testing.assert_allclose(logits, step_logits, rtol=0, atol=1e-4)
