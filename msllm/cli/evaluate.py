"""Evaluate the answers to held-out examples.

First predicts what each generated stream says in the examples, given the rows
before: the negative log-likelihood and the accuracy of its tokens, by turn.

Then feeds the input streams of each example row by row and lets the model
generate all other streams. An answer is exact if every output stream says what
it says in the example, ignoring silence. Prints the share of exact answers and
the number of rows until the answer.

With --suite, runs a security suite instead: does the model obey instructions
that are injected into data? Prints rates, utility and fidelity with 95 %
intervals (docs/security.md).

--intervene and --ablate measure what the thoughts are worth, and --transcripts
writes what the streams said, for msllm monitor (docs/monitoring.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from msllm.cli.base import (
    Parser,
    Switch,
    comma_list,
    load_model,
    non_negative_int,
    output_file,
    positive_int,
    write_json,
    write_text,
)
from msllm.errors import UserError

if TYPE_CHECKING:
    from msllm.evals import exact_match
    from msllm.evals.intervene import Expected
    from msllm.weights.load import LoadedModel

EXAMPLES = """
msllm evaluate --checkpoint=runs/quickstart
msllm evaluate --checkpoint=runs/gsm8k --after='####' --votes=8 --json=result.json
msllm evaluate --checkpoint=models/smollm2 --suite=sep --items=items.jsonl
msllm evaluate --checkpoint=runs/quickstart --intervene='\\d' --ablate
"""
VOTE_FLAGS = ("vote_on", "temperature", "seed")
SUITE_FLAGS = ("suite_data", "roles", "template", "answer_rows", "items")


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.combine import VOTED

    parser.add_checkpoint()
    parser.add_data()
    parser.add_argument(
        "--examples",
        metavar="N",
        type=positive_int,
        default=500,
        help="Maximum number of held-out examples, spread evenly over all of them; of a suite, of "
        "attacks.",
    )
    parser.add_argument(
        "--after",
        metavar="TEXT",
        default="",
        help="Compare only what an output says after the last occurrence of this text. "
        "Default: compare everything.",
    )
    parser.add_argument(
        "--votes",
        metavar="N",
        type=positive_int,
        help="Answer each example by a vote of this many sampled runs. Default: one run, with the "
        "most likely tokens.",
    )
    parser.add_argument(
        "--vote_on",
        choices=VOTED,
        help="What the runs vote on: whole answers, or each token of the outputs. Default: "
        "answers.",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help="Temperature of the runs of a vote. Default: 1.",
    )
    parser.add_argument(
        "--seed", metavar="N", type=non_negative_int, help="Seed of a vote. Default: 0."
    )
    parser.add_argument(
        "--suite", choices=("sep", "bipia", "struq"), help="Run this security suite."
    )
    parser.add_argument(
        "--suite_data",
        metavar="DIR",
        help="Folder with the data of the suite. Default: in the folder data of what the "
        "environment variable MSLLM_SHARED names, or of ../shared.",
    )
    parser.add_argument(
        "--roles",
        metavar="ROLE=STREAM,...",
        type=comma_list(str),
        help="The streams of the roles system, data and output. Default: as in the training data, "
        "or by the names and kinds of the streams.",
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help="For a model of one stream: chatml, plain, or a text with {system} and {data}. "
        "Default: as in the training data; chatml if the tokenizer has it; otherwise plain.",
    )
    parser.add_argument(
        "--answer_rows", metavar="N", type=positive_int, help="Rows of an answer. Default: 48."
    )
    parser.add_argument(
        "--items",
        metavar="FILE",
        type=output_file,
        help="Also write every item of the suite to this file, as a line of JSON.",
    )
    parser.add_argument(
        "--intervene",
        metavar="PATTERN",
        help="Force one token of a thought that matches this regular expression to another such "
        "token, stream by stream, and count how often the output changes. '.' matches all tokens.",
    )
    parser.add_argument(
        "--ablate",
        action=Switch,
        default=False,
        help="Answer the examples without each stream in turn.",
    )
    parser.add_argument(
        "--transcripts",
        metavar="FILE",
        type=output_file,
        help="Write what each stream said to this file, one example per line, as JSON.",
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Evaluates the checkpoint and prints the result."""
    from msllm import flow
    from msllm.decode.lanes import find_lanes
    from msllm.evals import by_turn, exact_match
    from msllm.evals.lanes import text_likelihood

    given = [name for name in SUITE_FLAGS if getattr(flags, name) is not None]
    if given and not flags.suite:
        raise UserError(f"--{given[0]} is for a security suite: name one by --suite")
    if flags.suite and (flags.data or flags.after):
        raise UserError(f"--suite={flags.suite} takes no --data and no --after: use --suite_data")
    runs = [name for name in ("intervene", "ablate", "transcripts") if getattr(flags, name)]
    if flags.suite and runs:
        raise UserError(f"--suite={flags.suite} takes no --{runs[0]}: give it without --suite")
    given = [name for name in VOTE_FLAGS if getattr(flags, name) is not None]
    if given and flags.votes is None:
        raise UserError(f"--{given[0]} is for a vote: give the number of runs by --votes")
    if flags.votes and (flags.suite or runs):
        other = "suite" if flags.suite else runs[0]
        raise UserError(f"--votes does not go with --{other}: give one of the two")
    model = load_model(flags)
    for line in flow.summary(model.streams, model.config.vocab_size):
        print(line)
    if flags.suite:
        _run_suite(flags, model)
        return
    predicted = by_turn.evaluate(model, flags.data, flags.examples)
    result: dict[str, Any] = {"predicted": [one._asdict() for one in predicted]}
    step = "" if model.step is None else f"step {model.step}: "
    print(f"{step}what each stream says, given the rows before")
    print(by_turn.describe(predicted), end="\n\n")
    if find_lanes(model):
        text = text_likelihood(model, flags.data)
        low, high = text.interval()
        result["bits_per_byte"] = {"mean": text.bits_per_byte, "low": low, "high": high}
        print(
            f"{text.bits_per_byte:.4f} bits per byte of the joined text (95 % interval"
            f" {low:.4f} .. {high:.4f}, {int(text.bytes.sum()):,} bytes)"
        )
    if exact_match.is_applicable(model):
        try:
            exact = exact_match.evaluate(
                model, flags.data, flags.examples, flags.after, _vote(flags)
            )
            result |= dataclasses.asdict(exact)
            if flags.votes:
                print(f"by a vote of {flags.votes} runs on {flags.vote_on or 'answers'}:")
            print(exact_match.describe(exact))
        except exact_match.NoAnswers as error:
            print(error)
    elif flags.after or flags.votes:
        name = "after" if flags.after else "votes"
        raise UserError(f"--{name} needs answers, and the model has no input and output stream")
    result |= _free_runs(flags, model)
    write_json(flags.json, result)


def _vote(flags: argparse.Namespace) -> exact_match.Vote | None:
    """The vote that the flags ask for."""
    from msllm.decode.script import DecodeOptions
    from msllm.evals.exact_match import Vote

    if flags.votes is None:
        return None
    temperature = 1.0 if flags.temperature is None else flags.temperature
    options = DecodeOptions(temperature=temperature, seed=flags.seed or 0)
    return Vote(flags.votes, flags.vote_on or "answers", options)


def _run_suite(flags: argparse.Namespace, model: LoadedModel) -> None:
    """Runs a security suite and prints its figures."""
    from msllm.evals import security
    from msllm.evals.prompts import roles_of

    roles = roles_of(model, _pairs(flags.roles or []), flags.template or "")
    result = security.run(
        model,
        flags.suite,
        roles,
        folder=flags.suite_data or "",
        items=flags.examples,
        rows=flags.answer_rows or 48,
    )
    step = "" if model.step is None else f"step {model.step}: "
    print(f"{step}security suite {flags.suite}, 95 % intervals over items")
    for line in result.lines:
        print(line)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
    write_text(flags.items, "".join(lines))
    write_json(flags.json, {"suite": flags.suite, **result.summary})


def _pairs(texts: list[str]) -> dict[str, str]:
    """The roles and streams of --roles. Raises UserError."""
    pairs = dict[str, str]()
    for text in texts:
        role, separator, stream = text.partition("=")
        if not separator:
            raise UserError(f"--roles names {text!r}: write ROLE=STREAM, such as data=tool")
        pairs[role] = stream
    return pairs


def _free_runs(flags: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """What --intervene, --ablate and --transcripts ask for."""
    if not (flags.intervene or flags.ablate or flags.transcripts):
        return {}
    from msllm.evals import free_run
    from msllm.evals.ablate import ablate
    from msllm.evals.ablate import as_json as ablation_json
    from msllm.evals.ablate import describe as describe_ablation
    from msllm.evals.intervene import describe, intervene

    examples = free_run.read_examples(model, flags.data, flags.examples)
    result: dict[str, Any] = {}
    if flags.intervene:
        found = intervene(examples, pattern=flags.intervene, expected=_expected(model))
        print("\n" + describe(found))
        result["interventions"] = {
            **found._asdict(),
            "streams": [one._asdict() for one in found.streams],
            "outcomes": [one._asdict() for one in found.outcomes],
        }
    if flags.ablate:
        ablation = ablate(examples)
        print("\n" + describe_ablation(ablation))
        result["ablation"] = ablation_json(ablation)
    if flags.transcripts:
        records = free_run.transcripts(examples, free_run.run(examples))
        write_text(flags.transcripts, free_run.as_json_lines(records))
    return result


def _expected(model: LoadedModel) -> Expected | None:
    """What a faithful output says, where msllm knows it."""
    from msllm.evals import misreport

    config = model.run_config
    is_known = config is not None and config.data.converter == "misreport"
    return misreport.expected(model) if is_known else None
