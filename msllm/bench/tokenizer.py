"""Compares tokenizers that are trained on a corpus: how many tokens, and how hard to predict."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

from msllm.bench.texts import texts as texts_of
from msllm.config import TokenizerConfig
from msllm.errors import UserError
from msllm.tokenizer import train

_HELD_OUT = 10  # every tenth text is held out
_ORDER = 3  # of the model that predicts the held-out tokens
_DISCOUNT = 0.75


def tokenizer_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains tokenizers of several kinds on one corpus and measures them on its held-out texts.

    Bits per character are those of a trigram model of the tokens (absolute discounting) that is
    trained on the other texts. They compare vocabularies, because their unit does not depend on the
    tokens.

    Args:
      case: the settings of `runner.SETTINGS["tokenizer"]`, with one name in `texts`.
    """
    found = texts_of(case["texts"])
    held_out = found[::_HELD_OUT]
    training = [text for i, text in enumerate(found) if i % _HELD_OUT]
    if not training:
        raise UserError(f"--texts: {case['texts']} has {len(found)} texts: give at least 2")
    characters, words = sum(map(len, held_out)), sum(len(text.split()) for text in held_out)
    results = []
    for kind in case["model_types"]:
        for size in case["vocab_sizes"]:
            start = time.process_time()
            tokenizer = train(training, TokenizerConfig(model_type=kind, vocab_size=size))
            seconds = time.process_time() - start
            tokens = [tokenizer.encode(text) for text in held_out]
            count = sum(map(len, tokens))
            bits = _bits(list(map(tokenizer.encode, training)), tokens, tokenizer.vocab_size)
            results.append(
                {
                    "benchmark": "tokenizer",
                    "texts": case["texts"],
                    "characters": sum(map(len, found)),
                    "model_type": kind,
                    "vocab_size": size,
                    "pieces": tokenizer.vocab_size,
                    "tokens_per_word": round(count / max(words, 1), 2),
                    "characters_per_token": round(characters / max(count, 1), 2),
                    "bits_per_character": round(bits / characters, 3),
                    "training_cpu_seconds": round(seconds, 2),
                }
            )
    return results


def _bits(training: Sequence[list[int]], held_out: Sequence[list[int]], size: int) -> float:
    """Returns the bits of held-out texts under an n-gram model of the training texts.

    Args:
      training, held_out: the token ids of texts. The end of each text is predicted as well.
      size: the number of pieces.
    """
    counts: list[dict[tuple[int, ...], collections.Counter[int]]] = [
        collections.defaultdict(collections.Counter) for _ in range(_ORDER)
    ]
    for ids in training:
        padded = [-1] * (_ORDER - 1) + ids + [size]
        for i in range(_ORDER - 1, len(padded)):
            for order in range(_ORDER):
                counts[order][tuple(padded[i - order : i])][padded[i]] += 1
    totals = [{seen: following.total() for seen, following in one.items()} for one in counts]
    bits = 0.0
    for ids in held_out:
        padded = [-1] * (_ORDER - 1) + ids + [size]
        for i in range(_ORDER - 1, len(padded)):
            share = 1 / (size + 1)
            for order in range(_ORDER):
                seen = tuple(padded[i - order : i])
                total = totals[order].get(seen)
                if total:
                    following = counts[order][seen]
                    own = max(following[padded[i]] - _DISCOUNT, 0)
                    share = (own + _DISCOUNT * len(following) * share) / total
            bits -= math.log2(share)
    return bits
