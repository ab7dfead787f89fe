"""Tiny tokenizers of the kinds that causal models bring, made on the spot."""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
    "The quick brown fox jumps over the lazy dog, and the old dog sleeps in the warm house by the river.",
    "She didn't know why the engineers in the small town had built two bridges across the cold stream.",
    "A café in Paris sells naïve paintings; größer, straße, façade, 北京欢迎你, привет мир.",
] * 4


def byte_level(folder: Path, *, bos: bool = False) -> Any:
    """GPT-2's kind: byte-level BPE, no special token at the start unless `bos` (OPT's kind)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"] + (["<s>"] if bos else [])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"eos_token": "<|endoftext|>"} | ({"bos_token": "<s>"} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def sentence_piece(folder: Path) -> Any:
    """Llama's kind: SentencePiece BPE with byte fallback, an artificial first space, and BOS before every text."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "add_bos_token": True, "legacy": False}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def word_piece(folder: Path) -> Any:
    """BERT's kind of pieces, whose text depends on their neighbors."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def edited(source: Path, target: Path, **settings: Any) -> Path:
    """A copy of a tokenizer with other settings; None removes one."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    kept = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}), encoding="utf-8")
    (target / "special_tokens_map.json").unlink(missing_ok=True)
    return target
