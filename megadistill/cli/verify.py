"""``megadistill verify A B``: whether two models say the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser, natural, positive, refuse_unwritable
from megadistill.errors import ConfigError

if TYPE_CHECKING:
    from megadistill.evaluation.compare import Comparison

_DEFAULT_MAX_TOKENS = 256
DIFFERENT = 1


def run(arguments: Sequence[str]) -> int:
    """0: the same within the tolerance; 1: different."""
    parsed = _parser().parse(arguments)
    from megadistill.evaluation.compare import TOLERANCES
    from megadistill.evaluation.report import to_jsonable, write_json

    if parsed.json is not None:
        refuse_unwritable(parsed.json, is_file=True)
    tolerance = TOLERANCES[parsed.dtype] if parsed.tolerance is None else parsed.tolerance
    found, difference = _compare(parsed)
    if found is not None:
        print(_table(found))
        difference = difference or found.difference(tolerance)
    if parsed.json is not None:
        settings = {"a": parsed.a, "b": parsed.b, "text": parsed.text, "dtype": parsed.dtype, "tolerance": tolerance}
        result = {} if found is None else to_jsonable(found)
        write_json(parsed.json, {**settings, "same": difference is None, "difference": difference, **result})
    print("same" if difference is None else f"different: {difference}")
    return 0 if difference is None else DIFFERENT


def _parser() -> Parser:
    parser = Parser(
        "verify",
        "Proves a conversion: KL(A||B) between the outputs of both models on text, and the tokens that both write\n"
        "greedily. Exit code 0: no KL over the tolerance; 1: different, and one line says where; 2: wrong usage.",
        "examples:\n"
        "  megadistill verify runs/demo exported/student\n"
        "  python tools/verify_checkpoint.py BASE MERGED --text rows.jsonl --tolerance 1e-3 --json result.json\n\n"
        "One process; both models are held at once in --dtype, on the GPU where there is one (CUDA_VISIBLE_DEVICES=\n"
        "keeps them on the CPU). Greedy texts that differ at a token where the KL is within the tolerance (two tokens\n"
        "as good as equally likely) are shown and do not count.",
    )
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="model folder, hub name, checkpoint or run directory")
    parser.add_argument("--text", metavar="FILE", help=".txt, or rows as for training; default: a built-in text")
    parser.add_argument(
        "--text-field", default="instruction", metavar="NAME", help="field of rows to read; default: instruction"
    )
    parser.add_argument(
        "--tolerance", type=_nats, metavar="NATS", help="largest KL of a position; default: 1e-5 in fp32, 1e-2 in bf16"
    )
    parser.add_argument(
        "--greedy-tokens", type=natural, default=32, metavar="N", help="after each of 4 prompts; 0: none; default: 32"
    )
    parser.add_argument("--rows", type=positive, default=32, metavar="N", help="rows of text; default: 32")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N",
        help=f"tokens of a row; default: {_DEFAULT_MAX_TOKENS}, or what the models read",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="both models are loaded in it; default: fp32"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="default: the models' own, which must be the same where both have one"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number there")
    return parser


def _nats(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _compare(parsed: argparse.Namespace) -> tuple[Comparison | None, str | None]:
    """The comparison (None where tokenizers already differ), and a difference beside those in its numbers."""
    from megadistill.launch.world import default_device

    device = default_device()
    from megadistill.cli.inference import model_folder
    from megadistill.data.tokenize import vocabulary_size
    from megadistill.evaluation.compare import compare_models, prompts_of, text_rows
    from megadistill.models.loading import (
        check_positions,
        has_weights,
        is_sharded,
        load_model,
        load_model_config,
        whole_model,
    )
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
    models: list[Any] = [
        whole_model(load_model(folder, dtype=parsed.dtype, vocab_size=shared, seed=0, attention="sdpa", where=name))
        .to(device)
        .eval()
        for name, folder in folders.items()
    ]
    with progress_bar(description="comparing", total=len(rows) + len(prompts), unit="row") as bar:
        return compare_models(*models, rows, num_greedy=parsed.greedy_tokens, progress=bar.update), difference


def _tokenizer(path: str | None, folders: dict[str, str]) -> tuple[Any, str | None]:
    """The tokenizer to use, and how the models' own differ."""
    from megadistill.data.tokenize import assert_same_vocabulary, load_tokenizer
    from megadistill.training.setup import has_tokenizer

    if path is not None:
        return load_tokenizer(path), None
    found = {name: load_tokenizer(folder) for name, folder in folders.items() if has_tokenizer(folder)}
    if not found:
        raise ConfigError("neither A nor B has a tokenizer; give --tokenizer PATH")
    if len(found) == 2:
        try:
            assert_same_vocabulary(found["A"], found["B"], names=("A", "B"))
        except ConfigError as error:
            return None, f"the tokenizers: {error}"
    return next(iter(found.values())), None


def _table(found: Comparison) -> str:
    from megadistill.evaluation.report import text_table

    texts = found.greedy
    rows = [
        ("mean KL(A||B), nats a token", f"{found.mean_kl:.3g}"),
        ("max KL(A||B), nats", f"{found.max_kl:.3g}"),
        ("max |logit difference|", f"{found.max_logit_difference:.3g}"),
        ("same most likely token, %", f"{100 * found.same_top:.2f}"),
        ("positions", f"{found.num_positions} in {found.num_rows} rows"),
        ("classes", str(found.num_classes)),
        ("equal greedy texts", f"{sum(t.first_difference is None for t in texts)} of {len(texts)}"),
    ]
    rows += [
        (f"  row {t.row} differs at token", f"{t.first_difference} (KL {t.kl:.3g})")
        for t in texts
        if t.first_difference is not None
    ]
    return text_table(("measure", "value"), rows)
