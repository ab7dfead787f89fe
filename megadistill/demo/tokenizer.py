"""Trains a SentencePiece tokenizer and stores it as a fast tokenizer folder.

Spaces are ordinary text here: no dummy prefix, no whitespace cleanup, no normalization. So decode(encode(text)) is the
text, and a prompt and a response that are tokenized separately decode together to the joined text, without a stray
space.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from megadistill.errors import DataError

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS)


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int, seed: int = 0) -> None:
    """Writes a folder that ``AutoTokenizer.from_pretrained`` loads as a fast tokenizer.

    BPE pieces (a frequent word becomes one token) with byte fallback, so every text can be encoded; only U+2581, which
    SentencePiece itself uses for the space, decodes to a space. The same texts give the same files. Beside the fast
    tokenizer the folder holds SentencePiece's ``tokenizer.model``; both give the same ids.

    Args:
        texts: What to train on.
        folder: Where to write.
        vocab_size: Largest number of tokens.
        seed: Seed of SentencePiece's generator; nothing is sampled.

    Raises:
        DataError: There is no text, or ``vocab_size`` is too small for the special tokens, the 256 bytes and the
            characters of the texts.
    """
    import sentencepiece

    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError("tokenizer training: there is no text")
    smallest = 256 + len(SPECIAL_TOKENS) + len({c for line in lines for c in line}) + 2
    if vocab_size < smallest:
        raise DataError(
            f"tokenizer training: vocab_size={vocab_size} is too small for these texts; it must be at least {smallest}"
        )
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=PAD,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        num_threads=1,
        minloglevel=2,
    )
    _save_fast(model.getvalue(), Path(folder))


def _save_fast(model_proto: bytes, folder: Path) -> None:
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(vocab), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Metaspace(prepend_scheme="never", split=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, pieces.bos_id())]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model_proto)


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece stores only merged pieces, in merging order; any two pieces that spell a piece merge into it."""
    merges = []
    for piece, rank in vocab.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += [(rank, vocab[left], vocab[right], (left, right)) for left, right in pairs]
    return [pair for *_, pair in sorted(merges)]
