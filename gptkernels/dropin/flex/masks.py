"""The forms of a mask that attention's options say: bands, ends of the keys, documents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptkernels.dropin.flex import expression
from gptkernels.dropin.flex.expression import BATCH, KEY, QUERY, Name, Term, Unknown, position

KNOWN = (
    "q_idx >= kv_idx, bounds of q_idx - kv_idx on either side, kv_idx < lengths[b], "
    "documents[q_idx] == documents[kv_idx] and their conjunctions"
)
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


@dataclass(frozen=True)
class Mask:
    """Key j is visible from query i where i - left <= j <= i + right, j is below every one of
    `ends`, and every one of `documents` has one value for both. None: no bound."""

    left: int | None = None
    right: int | None = None
    ends: tuple[Any, ...] = ()  # numbers, and expressions of b
    documents: tuple[Any, ...] = ()  # expressions of b and q_idx

    def band(self, left: int | None = None, right: int | None = None) -> Mask:
        """The same with these bounds too."""
        lefts = [bound for bound in (self.left, left) if bound is not None]
        rights = [bound for bound in (self.right, right) if bound is not None]
        return replace(self, left=min(lefts, default=None), right=min(rights, default=None))

    def intervals(self, B: int, Tq: int, Tk: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and the last key that query i of entry b sees, (B, Tq) int64; the last is less
        where it sees none. Raises as `numbers`, and for documents of other keys than queries."""
        i = torch.arange(Tq, device=device).expand(B, Tq)
        first = torch.zeros_like(i) if self.left is None else (i - self.left).clamp(min=0)
        last = torch.full_like(i, Tk) if self.right is None else i + self.right
        lengths = self.lengths(B, Tk, device)
        ends = torch.tensor(Tk, device=device) if lengths is None else lengths[:, None]
        last = torch.minimum(last, ends - 1)
        if not self.documents:
            return first, last
        if Tq != Tk:
            raise NotImplementedError(
                f"documents are known where queries and keys are the same tokens, got {Tq} "
                f"queries and {Tk} keys"
            )
        numbers = self.numbers(B, Tq, device)
        first = torch.maximum(first, torch.searchsorted(numbers, numbers))
        return first, torch.minimum(last, torch.searchsorted(numbers, numbers, right=True) - 1)

    def lengths(self, B: int, Tk: int, device: torch.device) -> Tensor | None:
        """The keys of each batch entry, (B,) int64 in 0...Tk; None: all."""
        if not self.ends:
            return None
        b = torch.arange(B, device=device)
        found = torch.full((B,), Tk, device=device)
        for end in self.ends:
            keys = torch.as_tensor(expression.value(end, {BATCH: b}), device=device)
            if keys.is_floating_point():
                raise Unknown(f"{end}, which ends the keys, must be an integer")
            found = torch.minimum(found, keys)
        return found.clamp(0, Tk)

    def numbers(self, B: int, T: int, device: torch.device) -> Tensor:
        """The document's number of each token, (B, T) int64, from 0 on. Raises NotImplementedError
        where a document's tokens do not follow each other."""
        b, i = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)
        starts = torch.zeros(B, T, dtype=torch.bool, device=device)
        for document in self.documents:
            ids = expression.value(document, {BATCH: b, QUERY: i}).expand(B, T)
            changes = ids[:, 1:] != ids[:, :-1]
            starts[:, 1:] |= changes
            in_order = ids.sort(dim=1).values
            kinds = (in_order[:, 1:] != in_order[:, :-1]).sum(1)
            if not torch.equal(kinds, changes.sum(1)):
                raise NotImplementedError(
                    f"the documents {document} lie in pieces: the tokens of each have to follow "
                    "each other"
                )
        return starts.cumsum(1)


EVERYTHING = Mask()


def known(visible: Any, mask: Mask = EVERYTHING) -> Mask:
    """The mask of an expression, and of another mask. Raises Unknown."""
    if visible is True:
        return mask
    if isinstance(visible, Term) and not visible.options:
        match visible.operation, visible.arguments:
            case "and", (x, y):
                return known(y, known(x, mask))
            case "where", (condition, then, False):
                return known(then, known(condition, mask))
            case ("lt" | "le" | "gt" | "ge") as relation, (x, y):
                found = _compared(relation, x, y, mask)
                if found is not None:
                    return found
            case "eq", (x, y):
                for of_query, of_key in ((x, y), (y, x)):
                    own = QUERY in expression.names(of_query) <= {BATCH, QUERY}
                    if own and expression.renamed(of_query, QUERY, KEY) == of_key:
                        return replace(mask, documents=(*mask.documents, of_query))
    raise Unknown(f"no option of attention is the mask {visible}; known are {KNOWN}")


def _compared(relation: str, x: Any, y: Any, mask: Mask) -> Mask | None:
    """The mask where x relates to y."""
    if relation in ("gt", "ge"):
        relation, x, y = _MIRRORED[relation], y, x
    # x < y or x <= y from here on.
    more = 0 if relation == "le" else 1
    if isinstance(x, Term) and x.operation == "abs" and len(x.arguments) == 1:
        (inner,) = x.arguments
        below = _compared(relation, inner, y, mask)
        negated = Term("neg", (inner,), (), torch.neg)
        return None if below is None else _compared(relation, negated, y, below)
    if x == Name(KEY) and expression.names(y) == {BATCH}:
        end = y if more else Term("add", (y, 1), (), torch.add)
        return replace(mask, ends=(*mask.ends, end))
    left, right = position(x), position(y)
    if left is None or right is None:
        return None
    query, key, least = (a - b for a, b in zip(left, right, strict=True))
    least += more  # query q_idx + key kv_idx + least <= 0
    match query, key:
        case -1, 1:
            return mask.band(right=-least)
        case 1, -1:
            return mask.band(left=-least)
        case 0, 1:
            return replace(mask, ends=(*mask.ends, 1 - least))
        case 0, -1 if least <= 0:
            return mask
    return None
