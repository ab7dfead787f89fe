"""Whether two models are the same: the KL between their outputs on text, and the tokens that both generate greedily.

Both models are in memory at once; weights are memory-mapped where the type on disk is that of the comparison. Rows are
read one at a time, so nothing is padded or masked; the logits [T, V] of both models for the T tokens of one row and the
float64 log-probabilities of a few positions are in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megadistill.data.columns import FieldNames
from megadistill.data.dataset import load_examples
from megadistill.data.hub import check_name
from megadistill.data.synthetic import CorpusSizes, generate_corpus
from megadistill.data.tokenize import encode_texts, leading_special_ids
from megadistill.errors import DataError
from megadistill.files import os_errors_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Largest KL, in nats, of two models that count as the same. A bf16 logit has 8 bits: the same weights with another
# order of summation differ by this much.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
_CHUNK = 32
_CHARS_PER_TOKEN = 16  # the most that is read: a file may be larger than memory
_BUILT_IN_ROWS = 400
_MAX_PROMPTS, _MAX_PROMPT_TOKENS = 4, 16


@dataclass(frozen=True)
class GreedyText:
    """What both models generate after the beginning of a row; EOS does not end it.

    Attributes:
        row: Index of the row.
        prompt_tokens: Tokens of the row that both models read first.
        tokens_a: What A generates.
        tokens_b: What B generates.
        first_difference: Index of the first token that differs, or None.
        kl: KL(A||B) in nats there, where both models have read the same tokens: within the tolerance, the two tokens
            are practically equally likely.
    """

    row: int
    prompt_tokens: int
    tokens_a: tuple[int, ...]
    tokens_b: tuple[int, ...]
    first_difference: int | None
    kl: float | None


@dataclass(frozen=True)
class Comparison:
    """How much two models A and B differ.

    Attributes:
        num_rows: Rows read.
        num_positions: Token positions read.
        num_classes: Classes of the logits.
        mean_kl: KL(A||B) in nats per token.
        max_kl: The largest KL of a position.
        max_row: Its row.
        max_position: Its position in the row: the number of tokens read before.
        max_logit_difference: The largest difference of two logits.
        same_top: Share of positions with the same most likely token.
        greedy: Greedy texts of both models.
    """

    num_rows: int
    num_positions: int
    num_classes: int
    mean_kl: float
    max_kl: float
    max_row: int
    max_position: int
    max_logit_difference: float
    same_top: float
    greedy: tuple[GreedyText, ...]

    def difference(self, tolerance: float) -> str | None:
        """Where the models differ, in one line; None where no KL exceeds ``tolerance``. NaN counts as more."""
        if not self.max_kl <= tolerance:
            return f"row {self.max_row}, position {self.max_position}: KL {self.max_kl:.3g} is over {tolerance:g} nats"
        for text in self.greedy:
            if text.first_difference is not None and text.kl is not None and not text.kl <= tolerance:
                return (
                    f"row {text.row}, greedy token {text.first_difference} after {text.prompt_tokens} tokens: "
                    f"KL {text.kl:.3g} is over {tolerance:g} nats"
                )
        return None


def text_rows(
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_rows: int,
    max_tokens: int,
    text_field: str = "instruction",
) -> list[list[int]]:
    """Text as rows of equal length, each beginning with the tokenizer's leading special ids.

    Args:
        path: A .txt file, or a data file of which instructions, inputs and outputs are read; None: a built-in corpus.
        tokenizer: That of both models.
        max_rows: Largest number of rows.
        max_tokens: Tokens of a row; the last one may be shorter.
        text_field: Column of a data file with the instruction.

    Raises:
        DataError: The file cannot be read or has no text.
    """
    limit = max_rows * max_tokens * _CHARS_PER_TOKEN
    text = ""
    for part in _parts(path, text_field, limit):
        text += part + "\n\n"
        if len(text) >= limit:
            break
    prefix = list(leading_special_ids(tokenizer))
    ids = encode_texts(tokenizer, [text.strip()])[0]
    size = max_tokens - len(prefix)
    if not ids:
        raise DataError(f"{path}: there is no text to compare on")
    if size < 1:
        raise DataError(f"rows of {max_tokens} token(s) have no place for text after {len(prefix)} special token(s)")
    starts = itertools.islice(range(0, len(ids), size), max_rows)
    return [prefix + ids[start : start + size] for start in starts]


def _parts(path: str | None, text_field: str, limit: int) -> Iterable[str]:
    if path is None:
        sizes = CorpusSizes(teacher=_BUILT_IN_ROWS, references=0, prompts=0, valid=0, test=0)
        rows = generate_corpus(0, sizes)["teacher_train"]
        return ["\n".join(filter(None, row.values())) for row in rows]
    if Path(path).suffix.lower() != ".txt":
        examples = load_examples(path, fields=FieldNames(text_field), prompts_only=True).examples
        return ("\n".join(filter(None, (row.instruction, row.input, *row.references[:1]))) for row in examples)
    check_name(path, error=DataError)
    try:
        with os_errors_as(DataError, path, "cannot be read"), Path(path).open(encoding="utf-8") as file:
            return [file.read(limit)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start}") from None


def prompts_of(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Beginnings of the first rows, for greedy generation."""
    return [row[: max(1, min(len(row) // 2, _MAX_PROMPT_TOKENS))] for row in rows[:_MAX_PROMPTS]]


@torch.no_grad()
def compare_models(
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    num_greedy: int,
    progress: Callable[[int], Any] | None = None,
) -> Comparison:
    """Compares two causal language models of transformers, which must have logits of the same classes.

    Args:
        model_a: The first model.
        model_b: The second model, on the same device.
        rows: Token ids to read.
        num_greedy: Tokens to generate after the beginning of each of the first rows; 0: none.
        progress: Called with 1 after every row read and every text generated.
    """
    device = next(model_a.parameters()).device
    kls: list[torch.Tensor] = []
    differences: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    places: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        ids = torch.tensor([list(row)], device=device)
        kl, difference, is_same = _differences(
            *(m(input_ids=ids, use_cache=False).logits[0] for m in (model_a, model_b))
        )
        kls.append(kl)
        differences.append(difference)
        same.append(is_same)
        places += [(index, position) for position in range(len(row))]
        if progress:
            progress(1)
    greedy = []
    for index, prompt in enumerate(prompts_of(rows) if num_greedy else []):
        greedy.append(_compare_greedy(model_a, model_b, index, prompt, num_greedy))
        if progress:
            progress(1)
    kl = torch.cat(kls)
    largest = int(kl.argmax())  # a NaN counts as the largest
    num_classes = model_a.get_output_embeddings().weight.shape[0]
    return Comparison(
        num_rows=len(rows),
        num_positions=len(kl),
        num_classes=num_classes,
        mean_kl=float(kl.mean()),
        max_kl=float(kl[largest]),
        max_row=places[largest][0],
        max_position=places[largest][1],
        max_logit_difference=float(torch.cat(differences).max()),
        same_top=float(torch.cat(same).double().mean()),
        greedy=tuple(greedy),
    )


def _differences(logits_a: torch.Tensor, logits_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(A||B) in nats [T] float64, largest |difference| [T], same top class [T] of logits [T, V]; on the CPU."""
    parts = []
    for a, b in zip(logits_a.split(_CHUNK), logits_b.split(_CHUNK), strict=True):
        log_a, log_b = (chunk.double().log_softmax(-1) for chunk in (a, b))
        kl = (log_a.exp() * (log_a - log_b)).sum(-1)
        parts.append((kl, (a.double() - b.double()).abs().amax(-1), a.argmax(-1) == b.argmax(-1)))
    kl, difference, same = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return kl.clamp_min(0.0), difference, same


def _compare_greedy(
    model_a: PreTrainedModel, model_b: PreTrainedModel, row: int, prompt: Sequence[int], num_tokens: int
) -> GreedyText:
    (tokens_a, logits_a), (tokens_b, logits_b) = (_write(model, prompt, num_tokens) for model in (model_a, model_b))
    pairs = enumerate(zip(tokens_a, tokens_b, strict=True))
    first = next((index for index, (a, b) in pairs if a != b), None)
    kl = None if first is None else float(_differences(logits_a[first : first + 1], logits_b[first : first + 1])[0])
    return GreedyText(row, len(prompt), tokens_a, tokens_b, first, kl)


def _write(model: nn.Module, prompt: Sequence[int], num_tokens: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """The model's own most likely tokens and the logits [num_tokens, V] that they were chosen by, on the CPU."""
    device = next(model.parameters()).device
    new, cache, tokens, chosen_by = list(prompt), None, [], []
    for _ in range(num_tokens):
        out = model(input_ids=torch.tensor([new], device=device), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        new = [int(logits.argmax())]
        tokens += new
        chosen_by.append(logits.cpu())
    return tuple(tokens), torch.stack(chosen_by)
