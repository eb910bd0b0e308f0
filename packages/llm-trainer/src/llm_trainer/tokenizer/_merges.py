"""From the merges of a `tokenizer.json` to the ranks that tiktoken takes, and back.

Hugging Face joins only the pairs that are listed, in their order. tiktoken joins any two neighbours whose
bytes together are a token, the token of the lowest rank first. Both do the same if every token arises, from
its bytes alone, by a listed merge of two tokens that arose before it: take any text, and the neighbours l, r
at some stage. No merge has crossed their border, so at that stage l + r alone would be just these two. If
l + r is a token t, it has arisen by now (and l, r are not neighbours), or t's merge is that of l and r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[bytes, bytes]


def all_merges(ranks: Mapping[bytes, int]) -> list[Pair]:
    """List every pair of tokens that joins into a token, in order of the result's rank."""
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            left_rank, right_rank = ranks.get(left), ranks.get(right)
            if left_rank is not None and right_rank is not None:
                merges.append((rank, left_rank, right_rank, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def order_of_merges(
    tokens: Sequence[bytes], merges: Sequence[Pair], *, whole_pieces: bool
) -> list[bytes] | None:
    """Order the tokens so that tiktoken encodes as the listed merges do; None if no order does.

    Tokens that no text is encoded to are left out.

    Args:
        tokens: All of the vocabulary, in order of their ids, each byte among them.
        merges: Pairs that are joined, the first ones first; each result is a token.
        whole_pieces: A piece that is a token is not merged at all (`ignore_merges`).
    """
    if whole_pieces:
        by_id = {token: rank for rank, token in enumerate(tokens)}
        if list(merges) == all_merges(by_id):
            # Written from tiktoken's ranks: it is the same procedure.
            return list(tokens)
    arisen = _arise(tokens, merges)
    if arisen is None:
        return None
    order = sorted(arisen.when, key=arisen.when.__getitem__)
    if not whole_pieces:
        return order
    # The others are only ever a whole piece. tiktoken would also join their parts, if those can be
    # neighbours.
    rest = [token for token in tokens if token not in arisen.when]
    for token in rest:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in arisen.when and right in arisen.when and arisen.neighbours(left, right, len(merges)):
                return None
    return order + rest


def _arise(tokens: Iterable[bytes], merges: Sequence[Pair]) -> _Arisen | None:
    """Follow the merges; None if one comes before a part of its result has arisen, and could matter."""
    listed: dict[Pair, int] = {}
    for index, pair in enumerate(merges):
        listed.setdefault(pair, index)
    single = [token for token in tokens if len(token) == 1]
    arisen = _Arisen(listed, {token: index - len(single) for index, token in enumerate(single)}, {})
    early: list[Pair] = []
    for pair, index in listed.items():
        left, right = pair
        token = left + right
        if left not in arisen.when or right not in arisen.when:
            early.append(pair)
        elif token not in arisen.when and arisen.neighbours(left, right, index):
            arisen.when[token] = index
            arisen.parts[token] = pair
    for left, right in early:
        if left in arisen.when and right in arisen.when:
            both = max(arisen.when[left], arisen.when[right])
            if arisen.when.get(left + right, len(merges)) >= both:
                return None
    return arisen


@dataclass(frozen=True)
class _Arisen:
    listed: Mapping[Pair, int]
    when: dict[bytes, int]
    """The index of the merge by which a token arises; below 0 for bytes."""
    parts: dict[bytes, Pair]

    def neighbours(self, left: bytes, right: bytes, limit: int) -> bool:
        """Whether the bytes of two tokens are just these two once the merges before `limit` are done.

        Undoes the youngest merge on either side of the border, again and again, and looks each time whether
        a merge across it would have come before. Of equals the left one comes first.
        """
        while True:
            across = self.listed.get((left, right))
            if across is not None and across < limit:
                return False
            left_when, right_when = self.when[left], self.when[right]
            if left_when > right_when and left_when >= 0:
                left, limit = self.parts[left][1], left_when
            elif right_when >= 0:
                right, limit = self.parts[right][0], right_when + 1
            else:
                return True
