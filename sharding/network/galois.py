"""Finite fields of prime-power order as tables, for the graphs built on them."""

import itertools
import math
from typing import NamedTuple

import numpy as np


class Field(NamedTuple):
    """GF(q): element 0 is zero; sums and products of elements as tables."""

    sum_QQ: np.ndarray
    product_QQ: np.ndarray
    powers: tuple[int, ...]  # of a primitive element: its powers 0 to q - 2


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, n) with p prime and q = p^n, or None.

    >>> prime_power(27), prime_power(28)
    ((3, 3), None)
    """
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    n = round(math.log(q, p))
    return (p, n) if p**n == q else None


def field(q: int) -> Field:
    """GF(q). An element is the number whose base-p digits are its coefficients.

    Raises:
      ValueError: q is not a power of a prime.
    """
    found = prime_power(q)
    if found is None:
        raise ValueError(f"{q=} is not a power of a prime: there is no field of that size")
    p, n = found
    digits_QN = np.stack([np.arange(q) // p**i % p for i in range(n)], axis=1)
    value_N = p ** np.arange(n)
    sum_QQ = ((digits_QN[:, None] + digits_QN[None]) % p) @ value_N
    # The modulus is tried, not tested: a polynomial is irreducible if no product of two elements
    # that are not zero is zero, and then some element is primitive.
    for low_N in itertools.product(range(p), repeat=n):
        product_QQ = _products(digits_QN, np.asarray(low_N), p) @ value_N
        if (product_QQ[1:, 1:] != 0).all():
            break
    for element in range(1, q):
        powers = [1]
        while (following := int(product_QQ[powers[-1], element])) != 1:
            powers.append(following)
        if len(powers) == q - 1:
            return Field(sum_QQ, product_QQ, tuple(powers))
    raise AssertionError(f"GF({q}) has a primitive element")


def _products(digits_QN: np.ndarray, low_N: np.ndarray, p: int) -> np.ndarray:
    """Digits of all products of polynomials modulo x^n + low; [Q, Q, N]."""
    q, n = digits_QN.shape
    product_QQD = np.zeros((q, q, 2 * n - 1), np.int64)
    for i in range(n):
        product_QQD[..., i : i + n] += digits_QN[:, None, i, None] * digits_QN[None]
    for high in range(2 * n - 2, n - 1, -1):
        # x^high = -low * x^(high - n).
        product_QQD[..., high - n : high] -= product_QQD[..., high, None] * low_N
    return product_QQD[..., :n] % p
