"""What token ids stand for, and the ids that two tokenizers share.

Every id is put down as the bytes it stands for, whatever its tokenizer's way of writing them: byte-level BPE
(``Ġ``), sentencepiece (``▁``, ``<0x0A>``), WordPiece (``##``), added tokens. Ids of two tokenizers are a pair
if they stand for the same bytes; special tokens if they have the same content or play the same part (end,
beginning, padding). The pairs are one to one: "token-level intersection" of Timor et al. 2502.05202, section 4.
Built once for a pair of tokenizers and kept as long as both live.

Knows no model and no text in progress. Read next: ``rewriting.py``.
"""

from __future__ import annotations

import codecs
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from specdec.errors import InvalidInput

T = TypeVar("T")
ROLES = ("eos_token_id", "bos_token_id", "pad_token_id")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# put in front of a text to keep a tokenizer from adding a space of its own there, and cut off again
SENTINELS = ("\n", ".", "|")


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Pieces:
    """The ids of one tokenizer.

    Attributes:
        of: bytes that each id stands for, by id; ``b""`` where there is no such id. A special token stands for
            its content.
        special: ids of special tokens.
        fallback: ids that exist to write a single byte (sentencepiece).
        roles: attribute of the tokenizer -> id, for those it has.
        unknown: the id for what cannot be written, or None.
        kind: "byte-level", "sentencepiece", "wordpiece" or "plain".
        starts_with_space: the tokenizer puts a space before a text.
    """

    of: list[bytes]
    special: frozenset[int]
    fallback: frozenset[int]
    roles: dict[str, int]
    unknown: int | None
    kind: str
    starts_with_space: bool

    def join(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of several ids; ids that do not exist (padded vocabularies) stand for nothing."""
        return b"".join(self.of[i] for i in ids if 0 <= i < len(self.of))


@dataclass(frozen=True)
class Shared:
    """Ids that stand for the same in both vocabularies, pair by pair.

    Attributes:
        draft_ids, target_ids: (n,) int64; pair i is ``draft_ids[i]`` and ``target_ids[i]``. One to one.
        of_draft, of_target: n as a fraction of each vocabulary.
    """

    draft_ids: np.ndarray
    target_ids: np.ndarray
    of_draft: float
    of_target: float


class Vocabulary:
    """A tokenizer with its pieces."""

    def __init__(self, tokenizer: Any) -> None:
        """Look at ``tokenizer``; what was found is kept for the next time."""
        self.tokenizer = tokenizer
        self.pieces = pieces_of(tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each of ``texts`` as text that stands somewhere inside: no special tokens or space added.

        Special tokens that are spelt out in a text become their ids.
        """
        if not texts:
            return []
        if not self.pieces.starts_with_space:
            return _encode(self.tokenizer, texts)
        out: list[list[int] | None] = [None] * len(texts)
        for sentinel in SENTINELS:
            alone, *ids = _encode(self.tokenizer, [sentinel, *(sentinel + text for text in texts)])
            for place, found in enumerate(ids):
                if out[place] is None and found[: len(alone)] == alone:
                    out[place] = found[len(alone) :]
            if all(one is not None for one in out):
                break
        # nothing kept the space away: better with it than not at all, for a guess need not be right
        pairs = zip(out, texts, strict=True)
        return [_encode(self.tokenizer, [text])[0] if one is None else one for one, text in pairs]

    def encode_start(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole texts from their beginning, as the tokenizer would: its beginning token, its space."""
        with_special, without = (
            _encode(self.tokenizer, ["a"], add_special_tokens=flag)[0] for flag in (True, False)
        )
        places = range(len(with_special) - len(without) + 1)
        before = next((at for at in places if with_special[at : at + len(without)] == without), 0)
        return [[*with_special[:before], *ids] for ids in _encode(self.tokenizer, texts)]


def split_unfinished(data: bytes) -> tuple[str, bytes]:
    """The text of ``data``, and the bytes at its end that begin a character and do not finish it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, bytes(decoder.getstate()[0])


_PIECES: weakref.WeakKeyDictionary[Any, tuple[int, Pieces]] = weakref.WeakKeyDictionary()
_Kept = weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, tuple[Any, T]]]  # by target, by draft
_SHARED: _Kept[Shared] = weakref.WeakKeyDictionary()
_SAME: _Kept[bool] = weakref.WeakKeyDictionary()


def pieces_of(tokenizer: Any) -> Pieces:
    """The pieces of ``tokenizer``; made anew when tokens were added to it."""
    size = len(tokenizer)
    kept = _PIECES.get(tokenizer)
    if kept is None or kept[0] != size:
        kept = _PIECES[tokenizer] = (size, _pieces(tokenizer))
    return kept[1]


def shared_ids(target: Any, draft: Any) -> Shared:
    """The pairs of ids of the tokenizers ``target`` and ``draft``.

    Raises:
        InvalidInput: one of them is no tokenizer.
    """
    for name, given in (("tokenizer", target), ("draft_tokenizer", draft)):
        if not hasattr(given, "get_vocab"):
            raise InvalidInput(
                f"{name} is a {type(given).__name__}; wanted is what AutoTokenizer.from_pretrained(...) returns"
            )
    return _once(_SHARED, target, draft, lambda: pair(pieces_of(target), pieces_of(draft)))


def same_ids(target: Any, draft: Any) -> bool:
    """Whether nearly all ids of the tokenizers ``target`` and ``draft`` mean the same, and none something else."""
    try:
        return _once(_SAME, target, draft, lambda: _compared(target, draft))
    except TypeError:  # something of the caller's that has a vocabulary, and no length or no reference to it
        return _compared(target, draft)


def _once(known: _Kept[T], target: Any, draft: Any, make: Callable[[], T]) -> T:
    """What ``make()`` gives for a pair of tokenizers; made anew when tokens were added to one of them."""
    sizes = (len(target), len(draft))
    of_target = known.setdefault(target, weakref.WeakKeyDictionary())
    kept = of_target.get(draft)
    if kept is None or kept[0] != sizes:
        kept = of_target[draft] = (sizes, make())
    return kept[1]


def _compared(target: Any, draft: Any) -> bool:
    ours, theirs = target.get_vocab(), draft.get_vocab()
    others = any(ours.get(token, one) != one for token, one in theirs.items())
    return not others and len(ours.keys() - theirs.keys()) <= 0.01 * len(ours)


def pair(target: Pieces, draft: Pieces) -> Shared:
    """The pairs of ids that stand for the same."""
    ours, theirs = _by_piece(target), _by_piece(draft)
    pairs = {theirs[piece]: ours[piece] for piece in theirs.keys() & ours.keys()}
    taken = set(pairs.values())
    for role in ROLES:
        one, other = draft.roles.get(role), target.roles.get(role)
        if one is not None and other is not None and one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)
    # by id: the order of a tokenizer's dictionary means nothing
    draft_ids = np.array(sorted(pairs), dtype=np.int64)
    target_ids = np.array([pairs[one] for one in draft_ids.tolist()], dtype=np.int64)
    if len(np.unique(target_ids)) != len(draft_ids):
        raise RuntimeError("two ids of the draft became one of the target; this is a bug in specdec")
    sizes = [max(sum(map(bool, pieces.of)), 1) for pieces in (draft, target)]
    return Shared(draft_ids, target_ids, len(draft_ids) / sizes[0], len(draft_ids) / sizes[1])


def _by_piece(pieces: Pieces) -> dict[tuple[bool, bytes], int]:
    """(special, bytes) -> id; of several ids for the same bytes, the one that is no byte token, then the first."""
    order = sorted(range(len(pieces.of)), key=lambda i: (i in pieces.fallback, i))
    found: dict[tuple[bool, bytes], int] = {}
    for one in order:
        if pieces.of[one] and one != pieces.unknown:
            found.setdefault((one in pieces.special, pieces.of[one]), one)
    return found


def _pieces(tokenizer: Any) -> Pieces:
    vocabulary = {token: int(one) for token, one in tokenizer.get_vocab().items()}
    added = {int(one): token for one, token in tokenizer.added_tokens_decoder.items()}
    special = {int(one) for one in tokenizer.all_special_ids}
    special |= {one for one, token in added.items() if token.special}
    ordinary = [token for token, one in vocabulary.items() if one not in added and isinstance(token, str)]
    kind = _kind(ordinary)
    of = [b""] * (1 + max([*vocabulary.values(), *added], default=-1))
    fallback = set()
    for token, one in vocabulary.items():
        if isinstance(token, bytes):
            of[one] = token
        elif one in special:
            of[one] = token.encode()
        elif kind == "sentencepiece" and BYTE_TOKEN.fullmatch(token):
            of[one] = bytes.fromhex(token[3:5])
            fallback.add(one)
        elif one not in added:
            of[one] = _bytes_of(token, kind)
    for one, token in added.items():
        if one not in fallback:
            of[one] = str(token.content).encode()
    roles = {role: getattr(tokenizer, role, None) for role in ROLES}
    begins = _encode(tokenizer, ["a"])[0]
    return Pieces(
        of=of,
        special=frozenset(special - fallback),
        fallback=frozenset(fallback),
        roles={role: int(one) for role, one in roles.items() if one is not None},
        unknown=getattr(tokenizer, "unk_token_id", None),
        kind=kind,
        starts_with_space=bool(begins) and of[begins[0]].startswith(b" ") and kind != "wordpiece",
    )


def _kind(tokens: list[str]) -> str:
    """How a tokenizer writes its tokens, judged by all of them."""
    spelt = sum(all(char in ALPHABET for char in token) for token in tokens)
    if any("Ġ" in token for token in tokens) and spelt > 0.98 * len(tokens):
        return "byte-level"
    if any("▁" in token for token in tokens):
        return "sentencepiece"
    if sum(token.startswith("##") for token in tokens) > 0.01 * len(tokens):
        return "wordpiece"
    return "plain"


def _bytes_of(token: str, kind: str) -> bytes:
    if kind == "byte-level" and all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    if kind == "sentencepiece":
        token = token.replace("▁", " ")
    elif kind == "wordpiece":
        token = token[2:] if token.startswith("##") and len(token) > 2 else " " + token
    # what is no valid text (half of a surrogate pair) stands for nothing
    return token.encode("utf-8", "ignore")


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    try:
        ids = tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, padding=False,
            truncation=False, verbose=False,
        )["input_ids"]  # fmt: skip
    except Exception:
        # a tokenizer without a token for the unknown may refuse a text; that text has no ids, the others have
        if len(texts) == 1:
            return [[]]
        return [_encode(tokenizer, [text], add_special_tokens=add_special_tokens)[0] for text in texts]
    return [list(map(int, one)) for one in ids]
