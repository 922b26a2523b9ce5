"""Random numbers that are a function of a key and a position only.

With a stateful generator a draw depends on everything drawn before it, so another batch order, another number of
processes, or a resumed run gives other noise. Here a draw is `Philox4x32-7(counter, key)` (Salmon, Moraes, Dror, Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), a keyed bijection of 128-bit counters, so any draw can be made
by itself, in any order, and repeated. Seven rounds are the fewest that pass BigCrush (table 2 there); the paper's
default of ten adds a safety margin. Seven are used because noise costs as much as the matrix product of a small layer.

    key      64 bits   `Key`: folded from the run's seed, the purpose, the step, the layer, ...
    counter 128 bits   (column // 4: 64 bits, row id: 64 bits); word `column % 4` of the block belongs to the column

Normal numbers come from the Box-Muller transform of the word pairs (0, 1) and (2, 3): with `u = (w0 + 1/2) / 2^32` and
an angle `t`,

    r = sqrt(-2 ln u),   eps[even column] = r cos t,   eps[odd column] = r sin t.

30 bits of `w1` give an angle uniform in [-pi/4, pi/4); one more bit exchanges cosine and sine, and another negates the
cosine; the result is uniform on the circle. Logarithm, sine and cosine are float32 polynomials made of additions and
multiplications only. IEEE 754 rounds each of these correctly, and so is the square root (which torch takes in float64),
so torch's eager operators and C++ compiled with `-ffp-contract=off` give the same bits. The polynomials change eps by
less than 4e-6; the largest possible |eps| is 6.76, which a true normal exceeds with probability 1.4e-11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .backend import kernels_for, may_use_triton, thread_count, uses_triton

_MASK64 = (1 << 64) - 1
_MASK32 = 0xFFFFFFFF
# Philox4x32 multipliers and Weyl key increments (Salmon et al. 2011, section 3.3 and the Random123 sources).
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 7


def _mix(z: int) -> int:
    """SplitMix64's output function: a bijection of 64 bits with full avalanche (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)


@dataclass(frozen=True, slots=True)
class Key:
    """A 64-bit key of the counter-based generator; `fold` derives independent keys from it.

    Raises:
        ValueError: if `value` does not fit into 64 unsigned bits.
    """

    value: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= _MASK64:
            raise ValueError(f"a key must be in [0, 2^64), but is {self.value}; use Key.from_seed for any integer")

    @classmethod
    def from_seed(cls, seed: int) -> Key:
        """The key of a run with this seed, which may be any integer."""
        return cls(_mix((seed + 0x9E3779B97F4A7C15) & _MASK64))

    def fold(self, *parts: int | str) -> Key:
        """Derive the key of a part of the work, such as `key.fold("noise", step)`.

        The order of the parts matters, the integer 1 and the string "1" differ, and folding two parts at once is the
        same as folding them one after the other.
        """
        value = self.value
        for part in parts:
            if isinstance(part, str):
                digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
                # Different constants keep strings and integers in different streams.
                word = int.from_bytes(digest, "little") ^ 0x5851F42D4C957F2D
            else:
                word = (int(part) * 0x9E3779B97F4A7C15 + 0x14057B7EF767814F) & _MASK64
            value = _mix(((value << 1 | value >> 63) & _MASK64) ^ _mix(word))
        return Key(value)


def signed(key: Key) -> int:
    """The 64 bits of a key as a signed integer, which is what an operator of torch takes."""
    return key.value - (1 << 64) if key.value >= 1 << 63 else key.value


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, as int64 tensors that hold unsigned 32-bit values."""
    product = a * multiplier  # int64 wraps modulo 2^64, which keeps all 64 bits of the unsigned product
    return (product >> 32) & _MASK32, product & _MASK32


def key_of(value: int) -> Key:
    """The key whose `signed` value this is."""
    return Key(value & _MASK64)


def fractions_of(words: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Words of 32 random bits as numbers in [0, 1), multiples of 2^-24 (float32)."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def philox_bits(
    key: Key, low: Int[Tensor, "*shape"], high: Int[Tensor, "*shape"]
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"], Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Four words of 32 random bits, as int64, for each 128-bit counter with these low and high halves (int64)."""
    c0, c1, c2, c3 = low & _MASK32, (low >> 32) & _MASK32, high & _MASK32, (high >> 32) & _MASK32
    k0, k1 = key.value & _MASK32, key.value >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


# Minimax polynomials, highest power first, weighted for a small relative error of the result (7e-6, 1.4e-6, 4e-8) of
# -2 ln(1 + x) / x on [sqrt(1/2) - 1, sqrt(2) - 1]; sin(x) / x and (cos(x) - 1) / x^2 in x^2 on [0, (pi/4)^2].
_LOG = (
    0.2858414053916931,
    -0.4411187171936035,
    0.508065402507782,
    -0.6651604771614075,
    0.9998043775558472,
    -2.000009059906006,
)
_SIN = (0.008151635527610779, -0.16662479937076569, 0.9999985694885254)
_COS = (-0.0013591853203251958, 0.041655778884887695, -0.4999988377094269)
_MINUS_TWO_LN_2 = -1.3862943649291992
_ANGLE_STEP = float.fromhex("0x1.921fb6p-32")  # pi/4 / 2^31
_SQRT_HALF_BITS = 0x3F3504F3


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate a polynomial by Horner's rule; each step is one rounded product and one rounded sum."""
    p = x * coefficients[0]
    p += coefficients[1]
    for coefficient in coefficients[2:]:
        p *= x
        p += coefficient
    return p


def _negative_two_log(word: Tensor) -> Tensor:
    """`-2 ln((word + 1/2) / 2^32)` in float32."""
    f = word.to(torch.float32) + 0.5
    # f = 2^(e + 32) (1 + x) with 1 + x in [sqrt(1/2), sqrt(2)); subtracting these bits separates e from x.
    shifted = f.view(torch.int32) - (_SQRT_HALF_BITS + (32 << 23))
    exponent = (shifted >> 23).to(torch.float32)
    x = ((shifted & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1.0
    return _polynomial(x, _LOG) * x + exponent * _MINUS_TWO_LN_2


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two words of 32 bits."""
    # Through float64, because torch's float32 square root (MKL's) is not correctly rounded. The float64 root rounded to
    # float32 is, even if it errs in its last place: no root of a float32 lies that close to the middle of two float32.
    r = torch.sqrt(_negative_two_log(word0).to(torch.float64)).to(torch.float32)
    # Bits 0 to 29 as a signed fraction of pi/4: shift bit 29 into int32's sign.
    signed = (word1 << 2 & _MASK32) - ((word1 << 3) & 0x1_0000_0000)
    x = signed.to(torch.float32) * _ANGLE_STEP
    z = x * x
    s = _polynomial(z, _SIN) * x
    c = _polynomial(z, _COS) * z + 1.0
    c = torch.where((word1 & 0x4000_0000) != 0, -c, c)
    exchange = (word1 & 0x8000_0000) != 0
    return r * torch.where(exchange, s, c), r * torch.where(exchange, c, s)


def _counters(rows: Tensor, first: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column and row counters of the groups of four that cover `[first, first + columns)`; offset of `first` in one."""
    offset = first & 3
    groups = (columns + 3 + 3) // 4
    low = (first >> 2).unsqueeze(-1) + torch.arange(groups, device=rows.device)
    return low, rows.unsqueeze(-1).expand_as(low), offset


def _cut(values: Tensor, offset: Tensor, columns: int) -> Tensor:
    """The `columns` values of each row of [rows, 4 * groups] that start at its `offset` (0 to 3)."""
    if values.is_cpu and not torch.compiler.is_compiling() and not bool(offset.any()):
        return values[:, :columns]
    return values.gather(1, offset.unsqueeze(-1) + torch.arange(columns, device=values.device))


def word_rows(
    key: Key, rows: Int[Tensor, " rows"], first: Int[Tensor, " rows"], columns: int
) -> Int[Tensor, "rows {columns}"]:
    """Random words of 32 bits (as int64) for row ids and first columns, on the torch path."""
    low, high, offset = _counters(rows, first, columns)
    words = torch.stack(philox_bits(key, low, high), dim=-1)  # [rows, groups, 4]
    return _cut(words.flatten(1), offset, columns)


def normal_rows(
    key: Key, rows: Int[Tensor, " rows"], first: Int[Tensor, " rows"], columns: int
) -> Float[Tensor, "rows {columns}"]:
    """Standard normals (float32) for row ids and first columns, on the torch path."""
    low, high, offset = _counters(rows, first, columns)
    w0, w1, w2, w3 = philox_bits(key, low, high)
    values = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1)  # [rows, groups, 4]
    return _cut(values.flatten(1), offset, columns)


_NORMALS, _UNIFORMS = 1, 2  # the enum `Draw` of kernels/philox.h


def _draw(kind: int, key: Key, ids: Tensor, columns: int, first: Tensor | None = None) -> Tensor:
    """Draws [rows, columns] of one kind (float32)."""
    if may_use_triton(ids) and first is None:
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.roundoff.draw(kind, ids, columns, signed(key))
            return result
        return _launched(kind, key, ids, columns)
    kernels = kernels_for(ids)
    if kernels is None:
        return _plain_draw(kind, key, ids, columns, first)
    # torch's default dtype and device may be anything, so both are named.
    out = torch.empty(ids.shape[0], columns, dtype=torch.float32, device=ids.device)
    if out.numel():
        ids = ids.contiguous()
        threads = thread_count(out.numel())
        starts = None if first is None else first.data_ptr()
        kernels.draw(kind, out.data_ptr(), ids.shape[0], columns, ids.data_ptr(), starts, key.value, threads)
    return out


def _plain_draw(kind: int, key: Key, ids: Tensor, columns: int, first: Tensor | None = None) -> Tensor:
    first = torch.zeros_like(ids) if first is None else first
    if kind == _NORMALS:
        return normal_rows(key, ids, first, columns)
    return fractions_of(word_rows(key, ids, first, columns))


def _launched(kind: int, key: Key, ids: Tensor, columns: int) -> Tensor:
    """Draws by Triton's kernels, if they can be used."""
    if not uses_triton(ids):
        return _plain_draw(kind, key, ids, columns)
    from .triton_kernels import launch

    out = torch.empty(ids.shape[0], columns, dtype=torch.float32, device=ids.device)
    launch.draw(kind, out, key.value, ids.contiguous())
    return out


@torch.library.custom_op(
    "roundoff::draw", mutates_args=(), schema="(int kind, Tensor ids, int columns, int key) -> Tensor"
)
def _operator(kind: int, ids: Tensor, columns: int, key: int) -> Tensor:
    return _launched(kind, key_of(key), ids, columns).contiguous()


@_operator.register_fake
def _(kind: int, ids: Tensor, columns: int, key: int) -> Tensor:
    return torch.empty(ids.shape[0], columns, dtype=torch.float32, device=ids.device)


def _row_ids(shape: Sequence[int], rows: Tensor | None, device: torch.device | str) -> tuple[Tensor, int]:
    """Row ids [rows] (the default counts from 0) and the number of columns of a tensor of this shape."""
    leading, columns = tuple(shape[:-1]), int(shape[-1])
    if rows is None:
        count = 1
        for size in leading:
            count *= size
        return torch.arange(count, device=device), columns
    if tuple(rows.shape) != leading or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 of shape {leading}, but is {rows.dtype} of {tuple(rows.shape)}")
    return rows.reshape(-1), columns


def uniform(
    key: Key, shape: Sequence[int], *, rows: Int[Tensor, "*rows"] | None = None, device: torch.device | str = "cpu"
) -> Float[Tensor, "*rows columns"]:
    """Uniform float32 numbers in [0, 1), multiples of 2^-24, keyed by row id and column.

    Args:
        key: key of the draws.
        shape: shape of the result; the last axis holds the columns.
        rows: identity of each row, int64; the default counts the rows from 0.
        device: device of the result if `rows` is not given.

    Raises:
        ValueError: if `rows` does not have the leading shape or is not int64.
    """
    ids, columns = _row_ids(shape, rows, device)
    return _draw(_UNIFORMS, key, ids, columns).reshape(tuple(shape))


def normal(
    key: Key,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    rows: Int[Tensor, "*rows"] | None = None,
    column_start: Int[Tensor, "*rows"] | None = None,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "*rows columns"]:
    """Standard normal numbers keyed by row id and column: the eps of `matmul_noise` with the same key.

    Args:
        key: key of the draws.
        shape: shape of the result; the last axis holds the columns.
        dtype: dtype to which the float32 draws are rounded.
        rows: identity of each row, int64; the default counts the rows from 0.
        column_start: logical index of each row's first column, int64; default 0. With it, an accelerator computes the
            draws by plain torch.
        device: device of the result if `rows` is not given.

    Raises:
        ValueError: if `rows` does not have the leading shape or is not int64.
    """
    ids, columns = _row_ids(shape, rows, device)
    first = None if column_start is None else column_start.reshape(-1).contiguous()
    return _draw(_NORMALS, key, ids, columns, first).to(dtype).reshape(tuple(shape))
