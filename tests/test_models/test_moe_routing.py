"""Every way to route, on worked numbers and against plain float64 loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GPT2LMHeadModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.moe_layer import (
    MoELayer,
    TopKRouter,
)
from flash_experts.models.router import ExpertChoiceRouter, make_router
from flash_experts.models.router_metrics import router_metrics
from tests.test_moe import IMPLEMENTATIONS, gradients, make_layer

LOG = torch.tensor([[0.0, math.log(2), math.log(5)]])  # softmax 1/8, 2/8, 5/8; sigmoid 1/2, 2/3, 5/6


def router_with(logits_TE: torch.Tensor, **fields: object) -> tuple[nn.Module, torch.Tensor]:
    """A router and the input for which it has these logits: the input is the logits, the weight the identity."""
    width = logits_TE.shape[1]
    router = make_router(GPT2MoEConfig(n_embd=width, n_head=1, n_layer=2, num_experts=width, **fields))
    with torch.no_grad():
        router.weight.copy_(torch.eye(width))
    return router.to(logits_TE.dtype), logits_TE.clone()


def mlp(layer: MoELayer, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    experts = layer.experts
    hidden = F.gelu(x_D @ experts.up_proj[expert] + experts.up_proj_bias[expert], approximate="tanh")
    return hidden @ experts.down_proj[expert] + experts.down_proj_bias[expert]


def assert_equal_with_gradients(layer: MoELayer, x_TD: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    inputs = [x_TD, *layer.parameters()]
    out = layer(x_TD)
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    for mine, plain in zip(gradients(layer, out, inputs), gradients(layer, expected, inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=atol)


def use(layer: MoELayer, implementation: str) -> tuple[torch.dtype, float]:
    layer.experts.config._experts_implementation = implementation
    # PyTorch's grouped_mm has no float64.
    dtype, tolerance = (torch.float32, 5e-5) if implementation == "grouped_mm" else (torch.float64, 1e-10)
    layer.to(dtype)
    return dtype, tolerance


# ------------------------------------------------------------------------------------------------ token choice: gates


@pytest.mark.parametrize(
    ("fields", "gates"),
    [
        ({"scoring_func": "softmax"}, [5 / 7, 2 / 7]),
        ({"scoring_func": "softmax", "norm_topk_prob": False}, [5 / 8, 2 / 8]),
        ({"scoring_func": "topk_softmax"}, [5 / 7, 2 / 7]),
        ({"scoring_func": "sigmoid"}, [5 / 9, 4 / 9]),
        ({"scoring_func": "sigmoid", "norm_topk_prob": False}, [5 / 6, 2 / 3]),
    ],
)
def test_gates_on_worked_numbers(fields: dict[str, object], gates: list[float]) -> None:
    router, x_TD = router_with(LOG, num_experts_per_tok=2, **fields)
    for training in (True, False):
        _, gates_TK, experts_TK = router.train(training)(x_TD)
        assert experts_TK.tolist() == [[2, 1]]
        torch.testing.assert_close(gates_TK, torch.tensor([gates]))


def test_softmax_before_and_after_the_top_k_are_the_same_mathematics() -> None:
    """Normalised gates: equal in value and gradient. The balancing bias is where they differ: on p, or on logits."""
    torch.manual_seed(0)
    logits_TE = torch.randn(7, 6, dtype=torch.float64)
    results = []
    for scoring_func in ("softmax", "topk_softmax"):
        router, x_TD = router_with(logits_TE, num_experts_per_tok=3, scoring_func=scoring_func)
        _, gates_TK, experts_TK = router.train()(x_TD.requires_grad_())
        (gradient,) = torch.autograd.grad((gates_TK * torch.arange(21).view(7, 3)).sum(), x_TD)
        results.append((gates_TK, experts_TK, gradient))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    chosen = []
    for scoring_func in ("softmax", "topk_softmax"):
        router, x_TD = router_with(LOG, num_experts_per_tok=1, scoring_func=scoring_func)
        router.selection_bias_E.copy_(torch.tensor([0.0, 0.5, 0.0]))  # 2/8 + 1/2 > 5/8, but log 2 + 1/2 < log 5
        chosen.append(router(x_TD)[2].item())
    assert chosen == [1, 2]


def test_sigmoids_that_vanish_still_give_gates_that_sum_to_one() -> None:
    """In float32 sigmoid(-200) is zero, and zero over a sum of zeros is NaN."""
    router, x_TD = router_with(LOG - 200, num_experts_per_tok=3, scoring_func="sigmoid")
    _, gates_TK, experts_TK = router(x_TD)
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8]]).gather(1, experts_TK)
    torch.testing.assert_close(gates_TK, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sigmoid_layer_with_shared_experts_equals_the_plain_loop(implementation: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(5, 2, scoring_func="sigmoid", num_shared_experts=2).eval()
    dtype, tolerance = use(layer, implementation)
    x_TD = torch.randn(6, 12, dtype=dtype, requires_grad=True)
    shared = layer.shared_experts
    assert shared.c_fc.weight.shape == (12, 40), "two experts of 20 hidden units"
    rows = []
    for x_D in x_TD:
        scores = (layer.router.weight @ x_D).sigmoid()
        chosen = sorted(range(5), key=lambda e, scores=scores: -float(scores[e].detach()))[:2]
        routed = sum(scores[e] / sum(scores[c] for c in chosen) * mlp(layer, e, x_D) for e in chosen)
        hidden = F.gelu(x_D @ shared.c_fc.weight + shared.c_fc.bias, approximate="tanh")
        rows.append(routed + hidden @ shared.c_proj.weight + shared.c_proj.bias)
    assert_equal_with_gradients(layer, x_TD, torch.stack(rows), tolerance)


# --------------------------------------------------------------------------------------------------- expert choice


def test_expert_choice_on_worked_numbers() -> None:
    """Four tokens, two experts, k = 1: each expert takes two. p_0 = 8/9, 3/4, 1/2, 1/5: it takes the first two."""
    logits_TE = torch.tensor([[8.0, 1.0], [3.0, 1.0], [1.0, 1.0], [1.0, 4.0]]).log()
    router, x_TD = router_with(logits_TE, num_experts_per_tok=1, routing="expert_choice", norm_topk_prob=False)
    _, gates_EC, tokens_EC = router(x_TD)
    assert tokens_EC.tolist() == [[0, 1], [3, 2]]
    torch.testing.assert_close(gates_EC, torch.tensor([[8 / 9, 3 / 4], [4 / 5, 1 / 2]]))
    router.norm_topk_prob = True
    torch.testing.assert_close(router.eval()(x_TD)[1], torch.ones(2, 2), msg="one expert each: the gate is its sum")


def test_expert_choice_of_sigmoids_that_vanish_is_zero_not_nan() -> None:
    router, x_TD = router_with(torch.full((2, 2), -200.0), routing="expert_choice", scoring_func="sigmoid")
    assert router(x_TD)[1].tolist() == [[0.0, 0.0]] * 2


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 19),
    num_experts=st.integers(1, 6),
    factor=st.sampled_from([None, 0.5, 1.0, 2.0]),
    data=st.data(),
)
def test_each_expert_takes_exactly_its_capacity(
    tokens: int, num_experts: int, factor: float | None, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(tokens)
    layer = make_layer(num_experts, top_k, routing="expert_choice", capacity_factor=factor)
    x_TD = torch.randn(tokens, 12, dtype=torch.float64)
    _, gates_EC, tokens_EC = layer.router(x_TD)
    capacity = min(tokens, math.ceil((factor or 1.0) * tokens * top_k / num_experts))
    assert gates_EC.shape == tokens_EC.shape == (num_experts, capacity)
    assert all(len(set(row)) == capacity for row in tokens_EC.tolist()), "no token twice"
    sums_T = torch.zeros(tokens, dtype=torch.float64).index_add(0, tokens_EC.reshape(-1), gates_EC.reshape(-1))
    taken = tokens_EC.unique()
    torch.testing.assert_close(sums_T[taken], torch.ones(len(taken), dtype=torch.float64))
    assert layer(x_TD).shape == x_TD.shape


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_expert_choice_equals_the_plain_loop(implementation: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(4, 1, routing="expert_choice", capacity_factor=0.8).eval()  # 2 tokens each, of 9
    dtype, tolerance = use(layer, implementation)
    x_TD = torch.randn(9, 12, dtype=dtype, requires_grad=True)
    probs_TE = torch.stack([(layer.router.weight @ x_D).softmax(0) for x_D in x_TD])
    taken = [sorted(range(9), key=lambda t, e=e: -float(probs_TE[t, e].detach()))[:2] for e in range(4)]
    rows = []
    for t, x_D in enumerate(x_TD):
        takers = [e for e in range(4) if t in taken[e]]
        total = sum(probs_TE[t, e] for e in takers)
        rows.append(sum((probs_TE[t, e] / total * mlp(layer, e, x_D) for e in takers), torch.zeros_like(x_D)))
    assert any(not row.any() for row in rows), "some tokens are not taken"
    assert_equal_with_gradients(layer, x_TD, torch.stack(rows), tolerance)


def small_model(dense: GPT2LMHeadModel, **fields: object) -> GPT2MoEForCausalLM:
    """Experts and routers that matter, no dropout."""
    torch.manual_seed(0)
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, **fields)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if ".mlp." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for module in moe.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return moe


def test_expert_choice_generates_only_when_allowed(dense: GPT2LMHeadModel) -> None:
    moe = small_model(dense, routing="expert_choice")
    ids = torch.arange(10)[None]
    out = moe(ids, labels=ids, output_router_logits=True)
    assert out.past_key_values is None and out.aux_loss.item() == 1.0
    for attempt in (
        lambda: moe(ids, use_cache=True),
        lambda: moe(ids, past_key_values=DynamicCache()),
        lambda: moe(ids, cache=DynamicCache()),  # transformers 5.24's name for it
        lambda: moe.generate(ids, max_new_tokens=2),
        lambda: moe.generate(ids, max_new_tokens=2, use_cache=False),
    ):
        with pytest.raises(ValueError, match=r"not causal.*allow_noncausal_generation = True"):
            attempt()
    later = ids.clone()
    later[0, 9] = 99
    assert not torch.allclose(moe(later).logits[0, :9], moe(ids).logits[0, :9]), "it is not causal, as documented"
    moe.config.allow_noncausal_generation = True
    assert moe(ids).past_key_values is not None
    assert moe.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape == (1, 12)


@pytest.mark.parametrize("fields", [{"routing": "expert_choice"}, {"capacity_factor": 0.5}])
def test_padding_takes_no_capacity(dense: GPT2LMHeadModel, fields: dict[str, object]) -> None:
    moe = small_model(dense, **fields).train()
    ids = torch.arange(10)[None]
    padded, mask = F.pad(ids, (0, 6)), (torch.arange(16) < 10).long()[None]
    with_padding = moe(padded, attention_mask=mask).logits[:, :10]
    torch.testing.assert_close(with_padding, moe(ids).logits, rtol=0, atol=1e-4)
    metrics = []
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        moe(**inputs, labels=inputs["input_ids"])
        metrics.append(router_metrics(moe))
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


@pytest.mark.parametrize("fields", [{"routing": "expert_choice"}, {"capacity_factor": 0.5}])
def test_gradient_checkpointing_routes_the_same_again(dense: GPT2LMHeadModel, fields: dict[str, object]) -> None:
    moe = small_model(dense, **fields).train()
    padded, mask = F.pad(torch.arange(10)[None], (0, 6)), (torch.arange(16) < 10).long()[None]

    def router_gradient() -> torch.Tensor:
        moe.zero_grad()
        moe(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss.backward()
        return moe.transformer.h[1].mlp.router.weight.grad.clone()

    plain = router_gradient()
    moe.gradient_checkpointing_enable()
    torch.testing.assert_close(router_gradient(), plain)


# ------------------------------------------------------------------------------------------------------- capacity


def test_capacity_drops_the_lowest_scores_and_counts_them() -> None:
    """Four tokens, two experts, k = 1: two places each. Three want expert 0, with p = 3/4, 8/9, 2/3: one is out."""
    logits_TE = torch.tensor([[3.0, 1.0], [8.0, 1.0], [2.0, 1.0], [1.0, 4.0]]).log()
    router, x_TD = router_with(logits_TE, num_experts_per_tok=1, capacity_factor=1.0)
    _, gates_TK, experts_TK = router.train()(x_TD)
    assert experts_TK[:, 0].tolist() == [0, 0, 0, 1], "the choice stands, for the balancing loss"
    torch.testing.assert_close(gates_TK[:, 0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    router.record(logits_TE, experts_TK, None)
    metrics = router_metrics(nn.ModuleList([router]))
    assert metrics["router/0/drop_rate"] == pytest.approx(1 / 4)
    assert metrics["router/0/max_load"] == pytest.approx(3 / 2)
    assert router.eval()(x_TD)[1].tolist() == [[1.0]] * 4, "nothing is dropped in evaluation"
    tied, x_TD = router_with(torch.zeros(3, 2), num_experts_per_tok=1, capacity_factor=1.0)
    chosen = tied.train()(x_TD)[2]
    assert len(chosen.unique()) == 1
    assert tied(x_TD)[1][:, 0].tolist() == [1.0, 1.0, 0.0], "of equal scores the earlier token's goes first"


def test_a_rounding_error_of_the_capacity_factor_is_not_a_further_place() -> None:
    """1.1 * 100 / 10 is 11; in floating point it is 11.000000000000002."""
    assert make_layer(10, 1, capacity_factor=1.1).router.capacity(100) == 11


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 15),
    num_experts=st.integers(1, 5),
    factor=st.floats(0.1, 3.0),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_no_expert_takes_more_than_its_capacity(
    tokens: int, num_experts: int, factor: float, data: st.DataObject, seed: int
) -> None:
    """Scores of few values, so that there are ties; padding besides."""
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(seed)
    layer = make_layer(num_experts, top_k, capacity_factor=factor)
    router = layer.router
    assert isinstance(router, TopKRouter)
    scores_TE = torch.randint(0, 4, (tokens, num_experts)).double()
    scores_TK, experts_TK = scores_TE.topk(top_k)
    mask_T = torch.rand(tokens) < 0.8
    kept_TK = router.within_capacity(scores_TK, experts_TK, mask_T)
    capacity = router.capacity(int(mask_T.sum()))
    for e in range(num_experts):
        wanted = (experts_TK == e) & mask_T[:, None]
        kept = wanted & kept_TK
        assert kept.sum() == min(capacity, int(wanted.sum()))
        if kept.any() and (wanted & ~kept_TK).any():
            assert scores_TK[kept].min() >= scores_TK[wanted & ~kept_TK].max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("factor", [0.01, 0.6, 9.0])
def test_capacity_layer_equals_the_plain_loop(implementation: str, factor: float) -> None:
    """Also the way without leaving pairs out, which runs where a count would have to be waited for."""
    torch.manual_seed(0)
    layer = make_layer(4, 2, capacity_factor=factor).train()
    dtype, tolerance = use(layer, implementation)
    x_TD = torch.randn(9, 12, dtype=dtype, requires_grad=True)
    _, gates_TK, experts_TK = layer.router(x_TD)
    per_expert = torch.bincount(experts_TK[gates_TK != 0], minlength=4)
    assert per_expert.max() <= math.ceil(factor * 9 * 2 / 4)
    rows = [
        sum((gates_TK[t, k] * mlp(layer, int(experts_TK[t, k]), x_TD[t]) for k in range(2)), torch.zeros_like(x_TD[t]))
        for t in range(9)
    ]
    assert_equal_with_gradients(layer, x_TD, torch.stack(rows), tolerance)
    torch.testing.assert_close(layer.experts(x_TD, experts_TK, gates_TK), torch.stack(rows), rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------- configuration, saving


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "expert_choise"}, "did you mean 'expert_choice'"),
        ({"scoring_func": "sigmoids"}, "did you mean 'sigmoid'"),
        ({"router_aux_loss_scope": "global"}, "did you mean 'global_batch'"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": math.inf}, "capacity_factor"),
        ({"scoring_func": "topk_softmax", "norm_topk_prob": False}, "sums to one"),
        ({"allow_noncausal_generation": True}, "token choice is causal"),
        ({"routing": "expert_choice", "scoring_func": "topk_softmax"}, "no token has a top k"),
        ({"routing": "expert_choice", "router_bias_update_rate": 0.1}, "balanced by construction"),
        ({"routing": "expert_choice", "router_aux_loss_scope": "sequence"}, "balanced by construction"),
        ({"capacity_facto": 1.0}, "did you mean 'capacity_factor'"),
    ],
)
def test_contradictions_are_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GPT2MoEConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "expert_choice", "capacity_factor": 1.5},
        {"scoring_func": "sigmoid", "num_shared_experts": 1, "moe_intermediate_size": 16, "capacity_factor": 2.0},
    ],
)
def test_a_new_model_trains_and_comes_back_from_disk(fields: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2MoEConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32, num_experts=4, **fields)
    moe = GPT2MoEForCausalLM(config).train()
    ids = torch.arange(12)[None]
    moe(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    moe.save_pretrained(tmp_path)
    loaded = GPT2MoEForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.transformer.h[1].mlp.router, ExpertChoiceRouter) == ("routing" in fields)
    torch.testing.assert_close(loaded(ids).logits, moe.eval()(ids).logits, rtol=0, atol=0)
