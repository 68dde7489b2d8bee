"""The language of the needle model: a vocabulary of words and bytes, and lines of text that hold facts.

    @ amber falcon river stone cloud;          a record: a key of two words, then its value
    @ amber falcon river stone > bold heron    a record that points on to another key instead of ending
    ? amber falcon =                           a question; the answer repeats the key, reads on, follows pointers:
     amber falcon river stone > bold heron cliff;
    ? amber falcon ? bold heron =              several questions, answered in this order
    ! amber falcon =                           invent a value for this key (and answer for it later)
    # =                                        name the most common words

Any other text is filler. Keys and values may be any text; what is not in the word list is spelled in bytes.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WORDS = tuple((Path(__file__).parent / "word_list.txt").read_text().split())
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPECIALS = ("<|pad|>", "<|end|>")
_MARKS = ("Ġ=", "Ġ>")
_TOKENS = [*_BYTES, *_SPECIALS, *_MARKS, *(f"Ġ{word}" for word in WORDS)]
_ID = {token: i for i, token in enumerate(_TOKENS)}

VOCAB_SIZE = len(_TOKENS)
FIRST_WORD = VOCAB_SIZE - len(WORDS)  # ids from here on are words with a blank before them
BLANK, NEWLINE = _ID["Ġ"], _ID["Ċ"]
RECORD, QUESTION, INVENT, COMMON, END = (_ID[mark] for mark in "@?!#;")
ANSWER, POINTER = (_ID[mark] for mark in _MARKS)


def tokens_of(characters: str) -> tuple[int, ...]:
    """One token for each character, none of which is a blank."""
    return tuple(_ID[character] for character in characters)


LETTERS = tokens_of("abcdefghijklmnopqrstuvwxyz")
DIGITS = tokens_of("0123456789")


def build_tokenizer(max_position: int) -> tuple[Tokenizer, dict]:
    """Build the tokenizer: a listed word with its blank is one token, everything else one token per byte.

    Returns
    -------
    The tokenizer and the content of its tokenizer_config.json. Any text survives the round trip. The chat template
    puts messages one after the other, a line each: a question is asked as it stands.
    """
    # Viterbi over log probabilities: a listed word is likelier than its bytes.
    scores = [-1.0 if i >= FIRST_WORD or token in _MARKS else -10.0 for i, token in enumerate(_TOKENS)]
    tokenizer = Tokenizer(models.Unigram(list(zip(_TOKENS, scores, strict=True)), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=" ", behavior="merged_with_next"),
            pre_tokenizers.Split(pattern="\n", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
        "chat_template": "{% for message in messages %}{{ message['content'] | trim }}{% if not loop.last %}\n"
        "{% endif %}{% endfor %}",
    }
