"""The demo model's tokenizer: Kimi's pre-tokenizer, byte-level BPE, the tiktoken rule for encoding."""
import collections

import regex

_CASED = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PIECES = regex.compile("|".join([
    r"[\p{Han}]+", _WORD + rf"[\p{{Lu}}\p{{Lt}}{_CASED}]*[\p{{Ll}}{_CASED}]+" + _SUFFIX,
    _WORD + rf"[\p{{Lu}}\p{{Lt}}{_CASED}]+[\p{{Ll}}{_CASED}]*" + _SUFFIX,
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]), regex.V1)


def train_bpe(text, n_merges):
    """Byte-level BPE; returns the token byte strings in rank order (the 256 single bytes first)."""
    words = [[[bytes([b]) for b in piece.encode()], n] for piece, n in collections.Counter(PIECES.findall(text)).items()]
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(n_merges):
        pairs = collections.Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        a, b = max(pairs, key=lambda p: (pairs[p], p))       # ties broken by content: deterministic
        tokens.append(a + b)
        for word in words:
            parts, i = word[0], 0
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
    assert len(set(tokens)) == len(tokens)
    return tokens


class Tokenizer:
    def __init__(self, tokens):
        self.tokens, self.ranks, self.cache = tokens, {t: r for r, t in enumerate(tokens)}, {}

    def _piece(self, piece):
        parts = [bytes([b]) for b in piece.encode()]
        while len(parts) > 1:                                # the tiktoken rule: lowest rank first, leftmost on ties
            rank, i = min((self.ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ranks[p] for p in parts]

    def encode(self, text):
        ids = []
        for piece in PIECES.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self._piece(piece)
            ids += self.cache[piece]
        return ids

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens))
