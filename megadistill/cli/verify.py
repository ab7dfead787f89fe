"""``megadistill verify A B``: whether two models are the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser, refuse_unwritable, value_of
from megadistill.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt
from megadistill.errors import ConfigError
from megadistill.files import to_jsonable, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadistill.evaluation.compare import Comparison

_DEFAULT_MAX_TOKENS = 256
DIFFERENT = 1


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns 0 where the models are the same within the tolerance, 1 where they differ."""
    parsed = _parser().parse(arguments)
    from megadistill.evaluation.compare import TOLERANCES

    if parsed.json is not None:
        refuse_unwritable(parsed.json, is_file=True)
    tolerance = TOLERANCES[parsed.dtype] if parsed.tolerance is None else parsed.tolerance
    comparison, difference = _compare(parsed)
    if comparison is not None:
        print(_table(comparison))
        difference = difference or comparison.difference(tolerance)
    if parsed.json is not None:
        settings = {"a": parsed.a, "b": parsed.b, "text": parsed.text, "dtype": parsed.dtype, "tolerance": tolerance}
        result = {} if comparison is None else to_jsonable(comparison)
        write_json(parsed.json, {**settings, "same": difference is None, "difference": difference, **result})
    print("same" if difference is None else f"different: {difference}")
    return 0 if difference is None else DIFFERENT


def _parser() -> Parser:
    parser = Parser(
        "verify",
        "Checks a conversion: KL(A||B) between the outputs of both models on text, and the tokens that both generate\n"
        "greedily. Exit code 0: no KL over the tolerance; 1: different, with one line about where; 2: wrong usage.",
        "examples:\n"
        "  megadistill verify runs/demo exported/student\n"
        "  python tools/verify_checkpoint.py BASE MERGED --text rows.jsonl --tolerance 1e-3 --json result.json\n\n"
        "One process; both models are in memory at once in --dtype, on the GPU if there is one (CUDA_VISIBLE_DEVICES=\n"
        "keeps them on the CPU). Greedy texts that differ at a token where the KL is within the tolerance (both\n"
        "tokens are practically equally likely) are shown, but do not count as different.",
    )
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="model folder, hub name, checkpoint or run directory")
    parser.add_argument("--text", metavar="FILE", help=".txt, or rows as for training; default: built-in text")
    parser.add_argument(
        "--text-field", default="instruction", metavar="NAME", help="field of rows to read; default: instruction"
    )
    parser.add_argument(
        "--tolerance",
        type=value_of(NonNegativeFloat),
        metavar="NATS",
        help="largest KL of a position; default: 1e-5 in fp32, 1e-2 in bf16",
    )
    parser.add_argument(
        "--greedy-tokens",
        type=value_of(NonNegativeInt),
        default=32,
        metavar="N",
        help="tokens to generate after each of 4 prompts; 0: none; default: 32",
    )
    parser.add_argument("--rows", type=value_of(PositiveInt), default=32, metavar="N", help="rows of text; default: 32")
    parser.add_argument(
        "--max-tokens", type=value_of(PositiveInt), metavar="N",
        help=f"tokens per row; default: {_DEFAULT_MAX_TOKENS}, or fewer where the models read fewer",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="type that both models are loaded in; default: fp32"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="default: the models' own, which must be equal if both have one"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every number to FILE")
    return parser


def _compare(parsed: argparse.Namespace) -> tuple[Comparison | None, str | None]:
    """The comparison (None where the tokenizers already differ), and a difference that is not in its numbers."""
    from megadistill.launch.world import default_device

    device = default_device()
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.data.tokenize import vocabulary_size
    from megadistill.evaluation.compare import compare_models, prompts_of, text_rows
    from megadistill.models.folder_checks import has_weights, is_sharded
    from megadistill.models.loading import load_model, load_model_config, whole_model
    from megadistill.models.positions import check_positions
    from megadistill.observability.progress import progress_bar

    folders = {name: model_folder(path) for name, path in (("A", parsed.a), ("B", parsed.b))}
    configs = {name: load_model_config(folder, name) for name, folder in folders.items()}
    for name, folder in folders.items():
        if not has_weights(folder) and not is_sharded(folder):
            raise ConfigError(f"{name}: {folder} has no weights")
    tokenizer, difference = _tokenizer(parsed.tokenizer, folders)
    if difference is not None:
        return None, difference
    max_tokens = parsed.max_tokens or min(
        _DEFAULT_MAX_TOKENS,
        *(getattr(c, "max_position_embeddings", None) or _DEFAULT_MAX_TOKENS for c in configs.values()),
    )
    rows = text_rows(parsed.text, tokenizer, max_rows=parsed.rows, max_tokens=max_tokens, text_field=parsed.text_field)
    prompts = prompts_of(rows) if parsed.greedy_tokens else []
    longest = max(map(len, prompts), default=0) + parsed.greedy_tokens
    for name, config in configs.items():
        check_positions(config, max(map(len, rows)), "--max-tokens", f"{name} ({folders[name]})")
        check_positions(config, longest, "prompt + --greedy-tokens", f"{name} ({folders[name]})")
    size = vocabulary_size(tokenizer)
    known = {name: min(size, config.vocab_size) for name, config in configs.items()}
    if known["A"] != known["B"]:
        difference = f"of {size} tokens A has {known['A']} and B has {known['B']} vocabulary rows"
    shared = min(known.values())
    if max(map(max, rows)) >= shared:
        raise ConfigError(f"the text has token {max(map(max, rows))}, but the models share {shared} vocabulary rows")
    models: list[Any] = []
    for name, folder in folders.items():
        loaded = load_model(folder, dtype=parsed.dtype, vocab_size=shared, seed=0, attention="sdpa", where=name)
        models.append(whole_model(loaded, device))
    with progress_bar(description="comparing", total=len(rows) + len(prompts), unit="row") as bar:
        return compare_models(
            models[0], models[1], rows, num_greedy=parsed.greedy_tokens, progress=bar.update
        ), difference


def _tokenizer(path: str | None, folders: dict[str, str]) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer to use, and how those of the models differ."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.data.pairing import assert_same_vocabulary
    from megadistill.data.tokenize import has_tokenizer, load_tokenizer

    if path is not None:
        return load_tokenizer(model_folder(path)), None
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items() if has_tokenizer(folder)}
    if not tokenizers:
        raise ConfigError("neither A nor B has a tokenizer; give --tokenizer PATH")
    difference = None
    if len(tokenizers) == 2:
        try:
            assert_same_vocabulary(tokenizers["A"], tokenizers["B"], names=("A", "B"))
        except ConfigError as error:
            difference = f"the tokenizers: {error}"
    return next(iter(tokenizers.values())), difference


def _table(comparison: Comparison) -> str:
    from megadistill.evaluation.report import text_table

    texts = comparison.greedy
    rows = [
        ("mean KL(A||B), nats per token", f"{comparison.mean_kl:.3g}"),
        ("max KL(A||B), nats", f"{comparison.max_kl:.3g}"),
        ("max |logit difference|", f"{comparison.max_logit_difference:.3g}"),
        ("same most likely token, %", f"{100 * comparison.same_top:.2f}"),
        ("positions", f"{comparison.num_positions} in {comparison.num_rows} rows"),
        ("classes", str(comparison.num_classes)),
        ("equal greedy texts", f"{sum(t.first_difference is None for t in texts)} of {len(texts)}"),
    ]
    rows += [
        (f"  row {t.row} differs at token", f"{t.first_difference} (KL {t.kl:.3g})")
        for t in texts
        if t.first_difference is not None
    ]
    return text_table(("measure", "value"), rows)
