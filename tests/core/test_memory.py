"""The memory's feature map, read and write against the formulas of the authors' code, written out in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_armt.core import MemoryRule
from vllm_armt.core.memory import EPS, NU

V1, V2 = MemoryRule(normalize=False), MemoryRule()
RULES = [
    pytest.param(MemoryRule(normalize, correction, use_denom), id=f"{normalize=}-{correction=}-{use_denom=}")
    for normalize in (False, True)
    for correction in (False, True)
    for use_denom in (False, True)
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def phi_by_index(u: Tensor) -> Tensor:
    """Block j of phi holds x[i] x[(i - j) mod 2p] for j = 1, 2, 3, with x = [relu(u), relu(-u)]."""
    p = u.shape[0]
    x = [max(float(a), 0.0) for a in u] + [max(-float(a), 0.0) for a in u]
    return torch.tensor([x[i] * x[(i - j) % (2 * p)] for j in range(1, NU + 1) for i in range(2 * p)], dtype=u.dtype)


def write_by_loops(rule: MemoryRule, k: Tensor, v: Tensor, beta: Tensor, M: Tensor, z: Tensor, first: bool):
    """One segment's write, token by token; every token sees the memory as it was before the segment."""
    new_M, new_z = M.clone(), z.clone()
    for k_j, v_j, beta_j in zip(k, v, beta, strict=True):
        prev, gamma = torch.zeros_like(v_j), 1.0
        if not first:
            den = float(k_j @ z) + EPS
            prev = k_j @ M / den if rule.use_denom else k_j @ M
            if rule.correction:
                norm2 = float(k_j @ k_j) + (0.0 if rule.normalize else EPS)
                gamma = min(max(1 - den / norm2, 0.0), 1.0)
        new_M += torch.outer(k_j, beta_j * (v_j - prev))
        if rule.use_denom:
            new_z += gamma * k_j
    return new_M, new_z


def segment(rule: MemoryRule, *batch: int, p: int = 3, d: int = 5, m: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Random k, v and beta of a segment, in float64."""
    k = rule.phi(torch.randn(*batch, m, p, dtype=torch.float64))
    return k, torch.randn(*batch, m, d, dtype=torch.float64), torch.rand(*batch, m, 1, dtype=torch.float64)


def memory(rule: MemoryRule, *batch: int, p: int = 3, d: int = 5) -> tuple[Tensor, Tensor]:
    """A memory as it is after some writes: z is a sum of features."""
    M = torch.randn(*batch, 6 * p, d, dtype=torch.float64)
    return M, rule.phi(torch.randn(*batch, 7, p, dtype=torch.float64)).sum(-2)


def write(rule: MemoryRule, k: Tensor, v: Tensor, beta: Tensor, M: Tensor, z: Tensor, first: Tensor | bool):
    residual, dz = rule.update(k, v, beta, k @ M, z, first)
    return M + k.transpose(-1, -2) @ residual, z + dz


@pytest.mark.parametrize("p", [1, 2, 3, 4, 64])
def test_phi_multiplies_each_entry_by_the_one_j_places_before_it(p: int):
    u = torch.randn(p, dtype=torch.float64)
    torch.testing.assert_close(V1.phi(u), phi_by_index(u))


@pytest.mark.parametrize("p", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_is_the_authors_product_with_its_rolled_self_to_the_bit(p: int, dtype: torch.dtype):
    u = torch.randn(2, 5, p).to(dtype)
    x = torch.cat([u.relu(), (-u).relu()], dim=-1)
    expected = torch.cat([x * x.roll(j, dims=-1) for j in range(1, NU + 1)], dim=-1)
    assert V1.phi(u).shape == (2, 5, 6 * p)
    assert V1.phi(u).dtype == dtype
    assert torch.equal(V1.phi(u), expected)


def test_phi_of_known_numbers_is_in_the_authors_order():
    # x = [1, 2, 0, 0]: rolled by 1 [0, 1, 2, 0], by 2 [0, 0, 1, 2], by 3 [2, 0, 0, 1]
    blocks = V1.phi(torch.tensor([1.0, 2.0])).view(3, 4)
    assert blocks.tolist() == [[0, 2, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]


def test_phi_of_v2_is_that_of_v1_divided_by_its_norm():
    u = torch.randn(5, 4, dtype=torch.float64)
    x = V1.phi(u)
    torch.testing.assert_close(V2.phi(u), x / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("rule", [V1, V2])
def test_phi_of_zero_is_zero(rule: MemoryRule):
    assert not rule.phi(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_keeps_the_dtype_and_is_six_times_as_wide(dtype: torch.dtype):
    features = V2.phi(torch.randn(2, 3, 4, dtype=dtype))
    assert features.dtype == dtype
    assert features.shape == (2, 3, 24)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_memory_reads_exactly_zero(rule: MemoryRule):
    q = rule.phi(torch.randn(7, 3))
    assert torch.equal(rule.read(q, torch.zeros(18, 5), torch.zeros(18)), torch.zeros(7, 5))


@pytest.mark.parametrize("rule", RULES)
def test_a_read_is_the_weighted_mean_of_the_memory(rule: MemoryRule):
    M, z = memory(rule)
    q = rule.phi(torch.randn(4, 3, dtype=torch.float64))
    expected = torch.stack([q_t @ M / (float(q_t @ z) + EPS if rule.use_denom else 1.0) for q_t in q])
    torch.testing.assert_close(rule.read(q, M, z), expected)


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_how_much_of_each_row_of_the_memory_a_read_takes(rule: MemoryRule):
    M, z = memory(rule, 2)
    q = rule.phi(torch.randn(2, 4, 3, dtype=torch.float64))
    weights = rule.weights(q, z)
    for i in range(2):
        for t in range(4):
            expected = q[i, t] / (float(q[i, t] @ z[i]) + EPS) if rule.use_denom else q[i, t]
            torch.testing.assert_close(weights[i, t], expected)
    torch.testing.assert_close(weights @ M, rule.read(q, M, z))


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_in_the_dtype_of_the_features_though_z_is_not(rule: MemoryRule):
    _, z = memory(rule)
    q = rule.phi(torch.randn(4, 3)).to(torch.bfloat16)
    weights = rule.weights(q, z.float())
    assert weights.dtype == torch.bfloat16
    expected = rule.weights(q.double(), z)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-2, atol=1e-3)


def test_without_denominator_z_is_not_looked_at():
    rule = MemoryRule(use_denom=False)
    M, z = memory(rule)
    q = rule.phi(torch.randn(4, 3, dtype=torch.float64))
    assert torch.equal(rule.weights(q, torch.full_like(z, torch.nan)), q)
    assert torch.equal(rule.read(q, M, z), rule.read(q, M, torch.full_like(z, torch.nan)))
    k, v, beta = segment(rule)
    residual, dz = rule.update(k, v, beta, k @ M, torch.full_like(z, torch.nan), first=False)
    assert residual.isfinite().all()
    assert not dz.any()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_write_agrees_with_the_loop_over_memory_tokens(rule: MemoryRule, first: bool):
    k, v, beta = segment(rule)
    M, z = memory(rule)
    if first:
        M, z = torch.zeros_like(M), torch.zeros_like(z)
    actual = write(rule, k, v, beta, M, z, first)
    torch.testing.assert_close(actual, write_by_loops(rule, k, v, beta, M, z, first))


def test_the_first_segment_is_written_to_z_in_full_even_where_the_formula_would_damp_it():
    k = 0.001 * V1.phi(torch.randn(4, 3, dtype=torch.float64))
    M, z = torch.zeros(18, 5, dtype=torch.float64), torch.zeros(18, dtype=torch.float64)
    v, beta = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    torch.testing.assert_close(V1.update(k, v, beta, k @ M, z, first=True)[1], k.sum(0))
    assert V1.update(k, v, beta, k @ M, z, first=False)[1].norm() < 0.5 * k.sum(0).norm()


@pytest.mark.parametrize("rule", RULES)
def test_first_may_be_a_tensor_with_one_flag_a_cell(rule: MemoryRule):
    k, v, beta = segment(rule, 3)
    M, z = memory(rule, 3)
    first = torch.tensor([True, False, True])
    M[first], z[first] = 0.0, 0.0
    actual = write(rule, k, v, beta, M, z, first)
    for i in range(3):
        expected = write(rule, k[i], v[i], beta[i], M[i], z[i], bool(first[i]))
        torch.testing.assert_close((actual[0][i], actual[1][i]), expected)


@pytest.mark.parametrize("rule", RULES)
def test_batched_equals_one_at_a_time(rule: MemoryRule):
    k, v, beta = segment(rule, 2, 3)
    M, z = memory(rule, 2, 3)
    A, (new_M, new_z) = rule.read(k, M, z), write(rule, k, v, beta, M, z, False)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(A[i, j], rule.read(k[i, j], M[i, j], z[i, j]))
            expected = write(rule, k[i, j], v[i, j], beta[i, j], M[i, j], z[i, j], False)
            torch.testing.assert_close((new_M[i, j], new_z[i, j]), expected)


def test_without_correction_a_key_counts_fully_every_time_it_is_written():
    rule = MemoryRule(correction=False)
    k, v, beta = segment(rule)
    M, z = memory(rule)
    torch.testing.assert_close(rule.update(k, v, beta, k @ M, z, first=False)[1], k.sum(0))


def test_with_correction_a_key_that_z_already_holds_is_not_counted_again():
    k, v, beta = segment(V2, m=1)
    M, z = memory(V2)
    assert not V2.update(k, v, beta, k @ M, z + k[0], first=False)[1].any()


@pytest.mark.parametrize("rule", RULES)
def test_reads_and_writes_have_gradients(rule: MemoryRule):
    M, z = memory(rule)
    u, v, logit = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 5, 1))

    def step(u: Tensor, v: Tensor, logit: Tensor) -> Tensor:
        k = rule.phi(u)
        residual, dz = rule.update(k, v, logit.sigmoid(), k @ M, z, first=True)
        return rule.read(k, M + k.T @ residual, z + dz)

    assert torch.autograd.gradcheck(step, (u, v, logit))


def test_no_gradient_flows_through_gamma():
    M, z = memory(V1)
    k = (5 * V1.phi(torch.randn(4, 3, dtype=torch.float64))).requires_grad_()
    v, beta = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    z = 0.1 * z
    _, dz = V1.update(k, v, beta, k @ M, z, first=False)
    with torch.no_grad():
        gamma = (1 - (k @ z[:, None] + EPS) / (k.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1)
        assert ((gamma > 0) & (gamma < 1)).any()
    (grad,) = torch.autograd.grad(dz.sum(), k)
    torch.testing.assert_close(grad, gamma.expand_as(grad))


class TestHeads:
    """With h heads there are h memories, each of p/h of the queries and keys and d/h of the values."""

    RULES = [  # noqa: RUF012
        pytest.param(MemoryRule(use_denom=use_denom, heads=heads), id=f"{heads=}-{use_denom=}")
        for heads in (1, 2, 4)
        for use_denom in (False, True)
    ]

    def test_split_and_merge_are_each_others_inverse(self):
        rule, x = MemoryRule(heads=4), torch.randn(2, 3, 5, 8)
        assert rule.split_heads(x).shape == (2, 3, 4, 5, 2)
        assert torch.equal(rule.merge_heads(rule.split_heads(x)), x)

    def test_a_head_is_a_stretch_of_channels(self):
        x = torch.randn(5, 8)
        assert torch.equal(MemoryRule(heads=4).split_heads(x)[1], x[:, 2:4])

    @pytest.mark.parametrize("normalize", [False, True])
    def test_phi_is_of_each_head_by_itself(self, normalize: bool):
        u = torch.randn(5, 8, dtype=torch.float64)
        rule, one = MemoryRule(normalize, heads=4), MemoryRule(normalize)
        assert rule.phi(u).shape == (5, 48)
        torch.testing.assert_close(rule.phi(u), torch.cat([one.phi(part) for part in u.chunk(4, dim=-1)], dim=-1))

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("rule", RULES)
    def test_each_reads_and_writes_as_if_it_were_alone(self, rule: MemoryRule, first: bool, gated: bool):
        h, p, d, m = rule.heads, 8, 12, 3
        u, v = torch.randn(m, p, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
        beta = torch.rand(m, d if gated else h, dtype=torch.float64)
        k, v, beta = (rule.split_heads(x) for x in (rule.phi(u), v, beta))
        M = torch.randn(h, 6 * p // h, d // h, dtype=torch.float64)
        z = k.sum(-2) + torch.rand(h, 6 * p // h, dtype=torch.float64)
        if first:
            M, z = torch.zeros_like(M), torch.zeros_like(z)
        read, (new_M, new_z) = rule.read(k, M, z), write(rule, k, v, beta, M, z, first)
        for i in range(h):
            torch.testing.assert_close(read[i], rule.read(k[i], M[i], z[i]))
            expected = write_by_loops(rule, k[i], v[i], beta[i], M[i], z[i], first)
            torch.testing.assert_close((new_M[i], new_z[i]), expected)
