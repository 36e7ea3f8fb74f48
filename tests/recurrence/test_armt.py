"""What open rows read of memories in pages: single rows where these lie, layers side by side; longer pieces a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.grouped import on_rank, process_weights
from tests.support.near import assert_near
from vllm_armt.core import MemoryRule
from vllm_armt.core.pages import LayerPages, PageLayout, StateTensor
from vllm_armt.linear.rows import Rows
from vllm_armt.recurrence import armt as associative
from vllm_armt.recurrence.armt import ARMTRecurrence, TailMemories
from vllm_armt.recurrence.armt_projections import MemoryProjections
from vllm_armt.recurrence.armt_reads import Closings, Reads
from vllm_armt.recurrence.armt_reads_gather import GatheredRows

RULES = [
    MemoryRule(),
    MemoryRule(normalize=False),
    MemoryRule(use_denom=False),
    MemoryRule(heads=2),
    MemoryRule(use_denom=False, heads=5),
]
PAGES, LAYERS = 6, 3


def random_recurrence(rule: MemoryRule, d_mem: int, hidden_size: int) -> ARMTRecurrence:
    with on_rank():
        projections = MemoryProjections(LAYERS, hidden_size, d_mem, rule.heads, rule, torch.float32)
    for layer in range(LAYERS):
        projections.read_projection.weight.load("W_mq", layer, torch.randn(d_mem, hidden_size))
    process_weights(projections)
    return ARMTRecurrence(projections, nn.Parameter(torch.empty(2, hidden_size), requires_grad=False), 2)


READS = [
    *(
        (width, False, ids, keys_stay)
        for width in (1, 3)
        for ids in ([3], [5, 0, 3], [2, 2, 1, 4])
        for keys_stay in (False, True)
    ),
    # Triton's interpreter takes its time
    (1, True, [5, 0, 3, 3], True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("state_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("width", "kernel", "ids", "keys_stay"), READS)
def test_pieces_are_added_what_the_rule_reads(
    width: int,
    kernel: bool,
    ids: list[int],
    keys_stay: bool,
    state_dtype: torch.dtype,
    tolerance: float,
    rule: MemoryRule,
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    if kernel:
        pytest.importorskip("triton", reason="not built for this system, and needed on GPUs alone")
        from vllm_armt.recurrence import armt_reads_triton as row_kernel

        # several tiles, and parts of one
        monkeypatch.setattr(row_kernel, "BLOCK_K", 16)
        monkeypatch.setattr(row_kernel, "BLOCK_D", 8)
    monkeypatch.setattr(associative, "has_row_kernel", lambda device: kernel)
    d_mem, hidden_size, h = 10, 20, rule.heads
    device = torch.device("cuda" if kernel and torch.cuda.is_available() else "cpu")
    K, recurrence = 6 * d_mem, random_recurrence(rule, d_mem, hidden_size).to(device)
    state = {"M": StateTensor((h, K // h, hidden_size // h), state_dtype), "z": StateTensor((h, K // h), state_dtype)}
    layout = PageLayout(5, 7, 2, 4, torch.bfloat16, state, keys_stay)
    # other layers, other pages and what is beside a memory in its page are NaN
    pool = torch.full((PAGES, LAYERS, layout.page_bytes), -1, dtype=torch.int8, device=device)
    pages = [LayerPages(layout, pool[:, layer]) for layer in range(LAYERS)]
    # there are more rows than those that read, in another order
    rows = torch.randperm(width * len(ids) + 2, device=device)[: width * len(ids)].view(-1, width)
    # page ids as block tables have them; what is read is found once and used at every layer
    page_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    gathered = None if kernel or width > 1 else GatheredRows.of(page_ids, pages[0].state["M"])
    index = TailMemories([Reads(width, rows, page_ids)], [], gathered)
    for layer in range(LAYERS):
        M, z = pages[layer].state["M"], pages[layer].state["z"]
        M[ids] = torch.randn(len(ids), h, K // h, hidden_size // h).to(device, state_dtype)
        z[ids] = rule.split_heads(rule.phi(torch.randn(len(ids), 7, d_mem))).sum(2).to(device, state_dtype)
        x = torch.randn(width * len(ids) + 2, hidden_size).to(device)
        q = recurrence.projections.queries(x, Rows(layer, (len(x),)))
        expected = x.clone()
        for piece, page in zip(rows, ids, strict=True):
            read = rule.read(rule.split_heads(q[piece]), M[page].float(), z[page].float())
            expected[piece] += rule.merge_heads(read)
        recurrence.before_tails(index, layer, pages, x)
        assert_near(x, expected, tolerance)


def test_first_segments_read_nothing():
    x = torch.randn(4, 20)
    before = x.clone()
    random_recurrence(MemoryRule(), 10, 20).before_tails(TailMemories([], []), 0, None, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_segments_that_end_together_leave_the_memories_that_each_leaves_alone(rule: MemoryRule):
    torch.manual_seed(0)
    d_mem, hidden_size, h, m = 10, 20, rule.heads, 2
    K, recurrence = 6 * d_mem, random_recurrence(rule, d_mem, hidden_size)
    for parameter in recurrence.projections.parameters():
        parameter.data.normal_()
    state = {
        "M": StateTensor((h, K // h, hidden_size // h), torch.float32),
        "z": StateTensor((h, K // h), torch.float32),
    }
    layout = PageLayout(5, 7, 2, 4, torch.bfloat16, state, keys_stay=False)
    read_pages, own_pages, firsts = [0, 1, 2, 0], [3, 4, 5, 6], [False, False, True, False]

    def closings(chosen: list[int]) -> Closings:
        return Closings(
            torch.tensor([[m * i, m * i + 1] for i in chosen]),
            torch.tensor([own_pages[i] for i in chosen]),
            torch.tensor([read_pages[i] for i in chosen]),
            torch.tensor([firsts[i] for i in chosen]) if any(firsts[i] for i in chosen) else None,
        )

    x, left = torch.randn(m * len(own_pages), hidden_size), []
    M, z = torch.randn(7, h, K // h, hidden_size // h), torch.rand(7, h, K // h) + 1
    for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [1], [0], [2]]):
        pages = LayerPages(layout, torch.zeros(7, layout.page_bytes, dtype=torch.int8))
        pages.state["M"].copy_(M)
        pages.state["z"].copy_(z)
        recurrence.after_tails(TailMemories([], [closings(part) for part in parts]), 0, [pages], x)
        left.append(pages.state)
    together = left[0]
    assert torch.equal(together["M"][:3], M[:3])
    assert (together["M"][own_pages] != M[own_pages]).flatten(1).any(dim=1).all()
    for alone in left[1:]:
        assert_near(alone["M"], together["M"], 1e-5)
        assert_near(alone["z"], together["z"], 1e-5)
