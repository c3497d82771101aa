"""The ends of back-substitution: margins as differences of logits, and rows over the input's box."""

from torch import Tensor

from evocert.bounds.compiled.loops import array, compiled


def differences(terms: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """Rows of logits ``[P, 1, 1, K, *cell]``, labels ``[B]``, rivals ``[B, M]`` -> of the margins ``[P, B, 1, M, *cell]``."""
    new = terms.new_empty(len(terms), *rivals.shape[:1], 1, *rivals.shape[1:], *terms.shape[4:])
    _differences(array(terms.flatten(4).flatten(1, 3)), array(labels), array(rivals), new.flatten(4).squeeze(2).numpy())
    return new


@compiled
def _differences(terms, labels, rivals, new):  # type: ignore[no-untyped-def]
    """Terms ``[P, K, N]``, labels ``[B]``, rivals ``[B, M]``, new ``[P, B, M, N]``."""
    for p in range(new.shape[0]):
        for b in range(new.shape[1]):
            own = terms[p, labels[b]]
            for m in range(new.shape[2]):
                other, to = terms[p, rivals[b, m]], new[p, b, m]
                for n in range(len(to)):
                    to[n] = own[n] - other[n]


def magnitude_product(terms: Tensor, radius: Tensor) -> Tensor:
    """``<|A|, r>``: ``[P, I, L, Q, *cell]``, ``[1 or P, I, L, 1, *cell]`` -> ``[P, I, L, Q]``."""
    found = terms.new_zeros(terms.shape[:4])
    arrays = (each.flatten(4).flatten(1, 2) for each in (terms, radius))
    _magnitude_product(*map(array, arrays), array(found.flatten(1, 2)))
    return found


@compiled
def _magnitude_product(terms, radius, found):  # type: ignore[no-untyped-def]
    """Terms ``[P, G, Q, N]``, radius ``[1 or P, G, 1, N]``, found ``[P, G, Q]``, zero."""
    for p in range(terms.shape[0]):
        for g in range(terms.shape[1]):
            row = radius[p % radius.shape[0], g, 0]
            for q in range(terms.shape[2]):
                each = terms[p, g, q]
                total = found[p, g, q]
                for n in range(len(each)):
                    total += abs(each[n]) * row[n]
                found[p, g, q] = total


def pair_products(terms: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """``<|s - d|, r>`` and ``<|s + d|, r>`` of rows of the form PAIR: ``[P, I, L, 2 * Q, *cell]`` -> each ``[P, I, L, Q]``."""
    shape = (*terms.shape[:3], terms.shape[3] // 2)
    less, more = terms.new_zeros(shape), terms.new_zeros(shape)
    arrays = (each.flatten(4).flatten(1, 2) for each in (terms, radius))
    _pair_products(*map(array, arrays), array(less.flatten(1, 2)), array(more.flatten(1, 2)))
    return less, more


@compiled
def _pair_products(terms, radius, less, more):  # type: ignore[no-untyped-def]
    """Terms ``[P, G, 2 * Q, N]``, radius ``[1 or P, G, 1, N]``, less and more ``[P, G, Q]``, zero."""
    rows = less.shape[2]
    for p in range(terms.shape[0]):
        for g in range(terms.shape[1]):
            row = radius[p % radius.shape[0], g, 0]
            for q in range(rows):
                s, d = terms[p, g, q], terms[p, g, rows + q]
                a, b = less[p, g, q], more[p, g, q]
                for n in range(len(s)):
                    a += abs(s[n] - d[n]) * row[n]
                    b += abs(s[n] + d[n]) * row[n]
                less[p, g, q], more[p, g, q] = a, b
