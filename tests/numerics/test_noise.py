"""Noise is replayable and Gaussian; every statistical test states its interval."""

import itertools
import math

import pytest
import torch
from scipy import stats

from roundoff.numerics.backend import DTYPES, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key, normal, philox_bits, uniform

KEY = Key.from_seed(7)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Random123's known answers for philox4x32 with 7 rounds (kat_vectors).
        (0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    c = torch.tensor([counter])
    assert tuple(int(w) for w in philox_bits(Key(key), c, c)) == words


class TestKey:
    def test_fold_is_pure_ordered_and_typed(self):
        key = Key.from_seed(0)
        assert key.fold("a", 1) == key.fold("a", 1) == key.fold("a").fold(1)
        different = [key, key.fold("a", 1), key.fold(1, "a"), key.fold(1), key.fold("1"), key.fold(-1), key.fold(0)]
        assert len(set(different)) == len(different)

    def test_values_never_change(self):
        # A change here changes the noise of every run.
        assert Key.from_seed(0).value == 16294208416658607535  # SplitMix64's first output for seed 0
        assert Key.from_seed(0).fold("layer", 3).value == 902207877832966386

    def test_neighbouring_seeds_and_folds_differ_in_half_their_bits(self):
        keys = [Key.from_seed(s) for s in range(200)] + [KEY.fold(i) for i in range(200)]
        flips = [(a.value ^ b.value).bit_count() for a, b in itertools.pairwise(keys)]
        # 399 x 64 fair bits: mean 32, standard error 4 / sqrt(399) = 0.2; 5 of them
        assert abs(sum(flips) / len(flips) - 32) < 1.0

    def test_a_key_must_fit_into_64_bits(self):
        with pytest.raises(ValueError, match="2\\^64"):
            Key(-1)


@pytest.fixture(params=["compiled", "torch"])
def backend(request):
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("backend")
class TestReplay:
    def y(self, dtype, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def test_is_the_formula(self, dtype):
        y = self.y(dtype, 6, 50)
        eps = normal(KEY, y.shape)
        expected = (y.float() + y.float().abs() * 0.05 * eps).to(dtype)
        assert torch.equal(matmul_noise(y, 0.05, KEY), expected)

    def test_zero_noise_gives_the_same_bits(self, dtype):
        y = self.y(dtype, 4, 33)
        y[0, :3] = torch.tensor([-0.0, float("inf"), float("nan")])
        out = matmul_noise(y, 0.0, KEY)
        integers = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(out.view(integers), y.view(integers)) and out.data_ptr() != y.data_ptr()

    def test_same_key_same_bits_other_key_other_bits(self, dtype):
        y = self.y(dtype, 4, 64)
        assert torch.equal(matmul_noise(y, 0.05, KEY), matmul_noise(y, 0.05, KEY))
        assert not torch.equal(matmul_noise(y, 0.05, KEY), matmul_noise(y, 0.05, KEY.fold(1)))

    def test_rows_may_be_split_and_permuted(self, dtype):
        y, rows = self.y(dtype, 12, 37), torch.randint(0, 2**60, (12,))
        whole = matmul_noise(y, 0.05, KEY, rows=rows)
        for order in (torch.randperm(12), torch.tensor([5]), torch.arange(3, 9)):
            assert torch.equal(matmul_noise(y[order], 0.05, KEY, rows=rows[order]), whole[order])

    def test_padding_does_not_shift_draws(self, dtype):
        # Rows of 20 logical columns with 0 to 5 columns of left padding: logical column j is at j + padding.
        y, rows = self.y(dtype, 6, 20), torch.arange(6) + 100
        alone = matmul_noise(y, 0.05, KEY, rows=rows)
        padded = torch.zeros(6, 26, dtype=dtype)
        padding = torch.arange(6)
        for i in range(6):
            padded[i, i : i + 20] = y[i]
        out = matmul_noise(padded, 0.05, KEY, rows=rows, column_start=-padding)
        for i in range(6):
            assert torch.equal(out[i, i : i + 20], alone[i])

    def test_out_may_be_the_product_or_have_gaps(self, dtype):
        y = self.y(dtype, 5, 40)
        expected, wide = matmul_noise(y, 0.05, KEY), torch.zeros(5, 80, dtype=dtype)
        matmul_noise(y, 0.05, KEY, out=wide[:, ::2])
        assert torch.equal(wide[:, ::2], expected) and not wide[:, 1::2].any()
        assert torch.equal(matmul_noise(y.t().contiguous().t(), 0.05, KEY), expected)
        assert matmul_noise(y, 0.05, KEY, out=y) is y and torch.equal(y, expected)

    def test_out_may_overlap_the_product(self, dtype):
        for begin, end in ((0, 5), (5, 0)):
            buffer = self.y(dtype, 1, 1500)
            y, out = buffer[:, begin : begin + 1400], buffer[:, end : end + 1400]
            expected = matmul_noise(y.clone(), 0.05, KEY)
            assert matmul_noise(y, 0.05, KEY, out=out) is out and torch.equal(out, expected)

    def test_a_bias_is_added_after_the_noise_and_in_the_dtype(self, dtype):
        y, bias = self.y(dtype, 5, 40), self.y(dtype, 40)
        expected = matmul_noise(y, 0.05, KEY) + bias
        assert torch.equal(matmul_noise(y, 0.05, KEY, bias=bias), expected)
        assert torch.equal(matmul_noise(y, 0.0, KEY, bias=bias), y + bias)
        assert matmul_noise(y, 0.05, KEY, bias=bias, out=y) is y and torch.equal(y, expected)
        y = self.y(dtype, 5, 40)  # a bias that lies where the result is written
        expected = matmul_noise(y, 0.05, KEY) + y[0].clone()
        assert torch.equal(matmul_noise(y, 0.05, KEY, bias=y[0], out=y), expected)

    def test_leading_axes_count_as_rows(self, dtype):
        y = self.y(dtype, 2, 3, 4, 16)
        flat = matmul_noise(y.reshape(24, 16), 0.05, KEY)
        assert torch.equal(matmul_noise(y, 0.05, KEY), flat.reshape(y.shape))
        rows = torch.arange(24).reshape(2, 3, 4)
        assert torch.equal(matmul_noise(y, 0.05, KEY, rows=rows), flat.reshape(y.shape))

    def test_normal_is_rounded_to_the_dtype(self, dtype):
        rows = torch.tensor([9, 4])
        eps = normal(KEY, (2, 30), rows=rows, dtype=dtype)
        assert eps.dtype is dtype and torch.equal(eps, normal(KEY, (2, 30), rows=rows).to(dtype))


@pytest.mark.parametrize("options", [{}, {"rows": torch.arange(3)}])
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_noise_is_refused_before_anything_is_written(options):
    y = torch.ones(3, 8)
    for s in (-0.1, math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match="relative_std must be finite and not negative"):
            matmul_noise(y, s, KEY, out=y, **options)
    for bad in (torch.ones(3, 8, dtype=torch.float64), torch.ones(3, 8, dtype=torch.int64)):
        with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
            matmul_noise(bad, 0.1, KEY, **options)
    with pytest.raises(TypeError, match=r"draws by a Key .* but got 7"):
        matmul_noise(y, 0.1, 7, out=y, **options)
    with pytest.raises(ValueError, match=r"rows must be int64 of shape \(3,\)"):
        matmul_noise(y, 0.1, KEY, rows=torch.arange(4), out=y)
    with pytest.raises(ValueError, match="column_start must be int64"):
        matmul_noise(y, 0.1, KEY, column_start=torch.zeros(3), out=y)
    for bias in (torch.ones(9), torch.ones(8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(8,\)"):
            matmul_noise(y, 0.1, KEY, bias=bias, out=y)
    with pytest.raises(ValueError, match="out must be like y"):
        matmul_noise(y, 0.1, KEY, out=torch.ones(3, 9))
    assert torch.equal(y, torch.ones(3, 8))


@pytest.mark.usefixtures("backend")
def test_draws_are_float32_whatever_torchs_default_is():
    expected = uniform(KEY, (3, 8)), normal(KEY, (3, 8))
    torch.set_default_dtype(torch.float64)  # model loaders do this; under bfloat16 a kernel would write out of bounds
    try:
        drawn = uniform(KEY, (3, 8)), normal(KEY, (3, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(d.dtype is torch.float32 and torch.equal(d, e) for d, e in zip(drawn, expected, strict=True))


def check_moments(total, chunk):
    """Check moments and tails of `total` draws within 4 standard errors each; by chance 1 run in 1,500 fails."""
    sums, tails, over = torch.zeros(4, dtype=torch.float64), [1.0, 2.0, 3.0, 4.0, 5.0], torch.zeros(5)
    for part in range(total // chunk):
        eps = normal(KEY.fold("moments", part), (chunk // 1000, 1000)).double()
        sums += torch.stack([eps.sum(), eps.square().sum(), (eps**3).sum(), (eps**4).sum()])
        over += torch.tensor([float((eps.abs() > t).sum()) for t in tails])
    mean = (sums / total).tolist()
    # variances of x, x^2, x^3, x^4 under N(0, 1): 1, 2, 15, 96
    for got, expected, variance in zip(mean, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(got - expected) < 4 * math.sqrt(variance / total)
    for t, count in zip(tails, over.tolist(), strict=True):
        p = math.erfc(t / math.sqrt(2))
        assert abs(count - p * total) < 4 * math.sqrt(p * (1 - p) * total) + 1, (t, count, p * total)


def test_moments_and_tails_are_those_of_a_normal():
    check_moments(1_000_000, 500_000)


@pytest.mark.slow
def test_moments_and_tails_of_a_hundred_million_are_those_of_a_normal():
    check_moments(100_000_000, 4_000_000)


def test_each_position_is_normal():
    # A Kolmogorov-Smirnov test for each of the four words of a counter, at a level of 10^-4 each.
    eps = normal(KEY, (50_000, 4))
    for column in range(4):
        assert stats.kstest(eps[:, column].double().numpy(), "norm").pvalue > 1e-4


def test_neighbours_are_independent():
    # The correlation of n independent pairs has standard error 1 / sqrt(n); 5 are allowed, for values and squares.
    eps = normal(KEY, (1000, 1000)).double()
    pairs = [(eps[:, :-k], eps[:, k:]) for k in (1, 2, 3, 4, 5)] + [(eps[:-k], eps[k:]) for k in (1, 2, 4)]
    pairs.append((eps, normal(KEY.fold(1), (1000, 1000)).double()))
    for a, b in pairs:
        for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
            correlation = (x * y).mean() / (x.std() * y.std())
            assert abs(correlation) < 5 / math.sqrt(x.numel())


def test_uniform_draws_are_uniform():
    u = uniform(KEY, (1000, 1000)).double()
    assert u.min() >= 0 and u.max() < 1
    # mean 1/2 with standard error sqrt(1/12) / 1000
    assert abs(u.mean().item() - 0.5) < 4 * math.sqrt(1 / 12) / 1000
    assert stats.kstest(u.flatten()[:100_000].numpy(), "uniform").pvalue > 1e-4


def test_relative_standard_deviation_is_the_requested_one():
    # The standard deviation of (out - y) / |y| has standard error s / sqrt(2 n), n = 10^6; 4 are allowed.
    y = torch.full((1000, 1000), -3.0)
    relative = (matmul_noise(y, 0.05, KEY) - y).double() / 3.0
    assert abs(relative.std().item() - 0.05) < 4 * 0.05 / math.sqrt(2e6)
