"""Instruction data: reading, prompting, tokenizing, sampling, batching, and the spans of responses."""

from megadistill.data.collate import IGNORE_INDEX, PromptBatch, SequenceBatch, left_padded, right_padded
from megadistill.data.columns import FieldNames
from megadistill.data.dataset import Example, LoadedExamples, load_examples
from megadistill.data.encode import Tokenized, TokenizedExample, tokenize_examples
from megadistill.data.pairing import assert_same_vocabulary
from megadistill.data.prompts import TEMPLATES, PromptSettings, render_prompt
from megadistill.data.sampler import BatchSampler, SampledRow
from megadistill.data.spans import SPAN_PRIORS, SpanPrior, make_span_prior, pair_mask_from_span_ids, token_span_ids
from megadistill.data.tokenize import decode_responses, encode_responses, load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "SPAN_PRIORS",
    "TEMPLATES",
    "BatchSampler",
    "Example",
    "FieldNames",
    "LoadedExamples",
    "PromptBatch",
    "PromptSettings",
    "SampledRow",
    "SequenceBatch",
    "SpanPrior",
    "Tokenized",
    "TokenizedExample",
    "assert_same_vocabulary",
    "decode_responses",
    "encode_responses",
    "left_padded",
    "load_examples",
    "load_tokenizer",
    "make_span_prior",
    "pair_mask_from_span_ids",
    "render_prompt",
    "right_padded",
    "token_span_ids",
    "tokenize_examples",
]
