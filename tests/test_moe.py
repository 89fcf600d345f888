"""The MoE layer against plain float64 loops, its losses on worked numbers, and its model as transformers uses it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.kernels import cpu
from flash_experts.kernels.cpu import grouped_mlp, linear
from flash_experts.models.moe import GPT2MoEOutput
from flash_experts.models.moe_layer import MoELayer, TopKRouter, load_balancing_loss, router_z_loss
from flash_experts.models.router_metrics import router_metrics, update_router_biases

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "fe_experts")


def make_layer(num_experts: int, top_k: int, **fields: float | bool) -> MoELayer:
    """A float64 layer, width 12, with random weights and biases."""
    config = GPT2MoEConfig(
        n_embd=12,
        n_head=2,
        n_layer=1,
        moe_layer_freq=1,
        moe_intermediate_size=20,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        resid_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        **fields,
    )
    config._experts_implementation = "eager"
    layer = MoELayer(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def plain_layer(layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition, one token and one expert at a time: softmax, the k largest, their share, the weighted sum."""
    rows = []
    experts = layer.experts
    for x_D in x_TD:
        probs = (layer.router.weight @ x_D).softmax(0)
        chosen = sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))[: layer.router.top_k]
        total = sum(probs[e] for e in chosen)
        row = torch.zeros_like(x_D)
        for e in chosen:
            hidden = F.gelu(x_D @ experts.up_proj[e] + experts.up_proj_bias[e], approximate="tanh")
            row = row + probs[e] / total * (hidden @ experts.down_proj[e] + experts.down_proj_bias[e])
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


def gradients(layer: MoELayer, out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (5, 5)])
def test_layer_equals_the_plain_loop(implementation: str, num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    layer = make_layer(num_experts, top_k).eval()
    layer.experts.config._experts_implementation = implementation
    # PyTorch's grouped_mm has no float64.
    dtype, tolerance = (torch.float32, 2e-5) if implementation == "grouped_mm" else (torch.float64, 1e-11)
    layer.to(dtype)
    x_TD = torch.randn(9, 12, dtype=dtype, requires_grad=True)
    inputs = [x_TD, *layer.parameters()]
    out, expected = layer(x_TD), plain_layer(layer, x_TD)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    for mine, plain in zip(gradients(layer, out, inputs), gradients(layer, expected, inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 17),
    num_experts=st.integers(1, 6),
    seed=st.integers(0, 99),
    batched=st.sampled_from([True, False, None]),
)
def test_grouped_mlp_equals_eager_for_any_routing(
    data: st.DataObject, tokens: int, num_experts: int, seed: int, batched: bool | None
) -> None:
    """Also no token, one token, all tokens to one expert, the same expert twice."""
    top_k = data.draw(st.integers(1, num_experts))
    choice = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k)
    rows = data.draw(st.lists(choice, min_size=tokens, max_size=tokens))
    experts_TK = torch.tensor(rows, dtype=torch.int64).view(tokens, top_k)
    torch.manual_seed(seed)
    experts = make_layer(num_experts, top_k).experts
    x_TD = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    gates_TK = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    eager = type(experts).forward.__wrapped__(experts, x_TD, experts_TK, gates_TK)
    weights = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    ours = grouped_mlp(x_TD, experts_TK, gates_TK, *weights, experts.act_fn, batched)
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)
    if tokens:
        inputs = [x_TD, gates_TK, *weights]
        for mine, plain in zip(gradients(experts, ours, inputs), gradients(experts, eager, inputs), strict=True):
            torch.testing.assert_close(mine, plain, rtol=0, atol=1e-11)


def test_a_token_is_multiplied_as_one_row_and_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of decoding: rows that fill up an expert's would cost several times as much."""
    rows: list[int] = []

    def counted(x_ND: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        rows.append(len(x_ND))
        return linear(x_ND, *others)

    monkeypatch.setattr(cpu, "linear", counted)
    torch.manual_seed(0)
    layer = make_layer(4, 2).eval()
    for activation in ("gelu_pytorch_tanh", "relu"):
        layer.experts.activation, layer.experts.act_fn = activation, ACT2FN[activation]
        for tokens in (1, 2):
            x_TD = torch.randn(tokens, 12, dtype=torch.float64)
            expected = plain_layer(layer, x_TD) if activation != "relu" else layer(x_TD)
            layer.experts.config._experts_implementation = "fe_experts"
            with torch.no_grad():
                torch.testing.assert_close(layer(x_TD), expected, rtol=0, atol=1e-12)
            layer.experts.config._experts_implementation = "eager"
    assert rows and max(rows) <= 2, rows


def test_with_onednn_many_rows_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "uses_onednn", lambda x_ND: True)
    monkeypatch.setattr(cpu, "linear", lambda x_ND, weight_DF, bias_F=0: x_ND @ weight_DF + bias_F)  # takes float64
    torch.manual_seed(0)
    experts = make_layer(3, 1).experts
    experts_TK = torch.tensor([0] * 40 + [2] * 5 + [0] * 3)[:, None]
    groups = cpu._Groups.of(experts_TK, torch.tensor([43, 0, 5]), fills=True)
    assert (groups.counts, groups.filled) == ([43, 0, 5], [64, 0, 5])
    x_TD = torch.randn(48, 12, dtype=torch.float64, requires_grad=True)
    gates_TK = torch.rand(48, 1, dtype=torch.float64, requires_grad=True)
    weights = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    eager = type(experts).forward.__wrapped__(experts, x_TD, experts_TK, gates_TK)
    ours = grouped_mlp(x_TD, experts_TK, gates_TK, *weights, experts.act_fn, batched=False)
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)
    inputs = [x_TD, gates_TK, *weights]
    for mine, plain in zip(gradients(experts, ours, inputs), gradients(experts, eager, inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", [{}, {"experts_implementation": "eager"}])
def test_a_layer_by_itself_has_the_default_implementation(
    fields: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    ours = ALL_EXPERTS_FUNCTIONS["fe_experts"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._local_mapping, "fe_experts", lambda *given: called.append("fe_experts") or ours(*given)
    )
    config = GPT2MoEConfig(n_embd=12, n_head=2, **fields)
    layer = MoELayer(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer(torch.randn(3, 12))
    assert called == ([] if fields else ["fe_experts"])
    assert "experts_implementation" not in config.to_json_string()


@pytest.mark.parametrize("batched", [True, False])
def test_grouped_mlp_passes_gradcheck_and_skips_frozen_weights(batched: bool) -> None:
    torch.manual_seed(0)
    experts = make_layer(3, 2).experts
    experts_TK = torch.tensor([[0, 2], [2, 0], [0, 2]])
    weights = [w.detach().clone().requires_grad_() for w in experts.parameters()]
    x_TD = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    gates_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def run(x_TD: torch.Tensor, gates_TK: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return grouped_mlp(x_TD, experts_TK, gates_TK, *weights, experts.act_fn, batched)

    assert torch.autograd.gradcheck(run, (x_TD, gates_TK, *weights), fast_mode=True)
    weights[0].requires_grad_(False)
    run(x_TD, gates_TK, *weights).sum().backward()
    assert weights[0].grad is None
    assert not weights[2].grad[1].any(), "an expert without tokens has a zero gradient"
    (gradient,) = torch.autograd.grad(run(x_TD, gates_TK, *weights).square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_router_gates_and_order() -> None:
    """Worked numbers: logits log(1), log(2), log(5) give p = 1/8, 2/8, 5/8; the two best share 7/8."""
    router = TopKRouter(GPT2MoEConfig(n_embd=4, n_head=1, n_layer=2, num_experts=3, num_experts_per_tok=2))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]).expand(3, 4) / 4)
    logits, gates, experts = router(torch.ones(1, 4))
    torch.testing.assert_close(logits, torch.tensor([[0.0, math.log(2), math.log(5)]]))
    assert experts.tolist() == [[2, 1]]
    torch.testing.assert_close(gates, torch.tensor([[5 / 7, 2 / 7]]))
    router.norm_topk_prob = False
    torch.testing.assert_close(router(torch.ones(1, 4))[1], torch.tensor([[5 / 8, 2 / 8]]))


def test_router_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = make_layer(4, 2).float()
    x_TD = torch.randn(6, 12)
    expected = layer.router(x_TD)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, _ = layer.router(x_TD)
        out = layer(x_TD)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(out.float(), layer(x_TD), rtol=0.05, atol=0.05)


def test_jitter_affects_only_the_router() -> None:
    torch.manual_seed(0)
    layer = make_layer(4, 4, router_jitter_noise=0.3)
    x_TD = torch.randn(5, 12, dtype=torch.float64)
    layer.train()
    assert not torch.equal(layer.router(x_TD)[0], layer.router(x_TD)[0])
    layer.eval()
    assert torch.equal(layer.router(x_TD)[0], layer.router(x_TD)[0])


def test_jitter_is_uniform_around_one() -> None:
    torch.manual_seed(0)
    router = make_layer(4, 1, router_jitter_noise=0.3).router.train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 12))  # so the logits are the first inputs, and here their factors
    factors = router(torch.ones(1000, 12))[0]
    assert 0.7 <= factors.min() < 0.72 and 1.28 < factors.max() <= 1.3
    assert factors.mean().item() == pytest.approx(1, abs=0.02)


def test_load_balancing_loss_on_worked_numbers() -> None:
    """Two tokens, two experts. p = (3/4, 1/4) for both, both to expert 0: 2 * (1 * 3/4 + 0 * 1/4) = 3/2."""
    logits = torch.tensor([[math.log(3), 0.0]]).repeat(2, 1)
    assert load_balancing_loss(logits, torch.tensor([[0], [0]])).item() == pytest.approx(1.5)
    assert load_balancing_loss(logits, torch.tensor([[0], [1]])).item() == pytest.approx(1.0)
    both = torch.tensor([[0, 1], [1, 0]])
    assert load_balancing_loss(logits, both).item() == pytest.approx(1.0), "one at balance, whatever k is"
    padded = torch.cat([logits, torch.tensor([[0.0, 99.0]])])
    mask = torch.tensor([True, True, False])
    assert load_balancing_loss(padded, torch.tensor([[0], [0], [1]]), mask).item() == pytest.approx(1.5)


def test_z_loss_on_worked_numbers() -> None:
    """logsumexp(log 1, log 2, log 5) = log 8 and logsumexp(0, 0, 0) = log 3."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [0.0, 0.0, 0.0]])
    expected = (math.log(8) ** 2 + math.log(3) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected)
    assert router_z_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(math.log(8) ** 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "freq"), [(1, 1, 1), (2, 1, 2), (4, 2, 1), (8, 2, 2), (8, 8, 4), (5, 3, 3)]
)
def test_upcycling_is_exact(
    dense: GPT2LMHeadModel, num_experts: int, top_k: int, freq: int, implementation: str
) -> None:
    ids = torch.arange(40).view(2, 20)
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts, top_k, freq)
    moe.set_experts_implementation(implementation)
    with torch.no_grad():
        assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5
        moe.train()
        dense.train()
        for model in (moe, dense):
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5, "also with the training-time gates"
    has_experts = [isinstance(block.mlp, MoELayer) for block in moe.transformer.h]
    assert has_experts == [(i + 1) % freq == 0 for i in range(4)]


def test_the_router_learns_from_the_first_step_after_upcycling(dense: GPT2LMHeadModel) -> None:
    """Identical experts with gates that sum to one give the router no gradient but for the straight-through term."""
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    ids = torch.arange(20)[None]
    moe.train()(ids, labels=ids).loss.backward()
    assert moe.transformer.h[1].mlp.router.weight.grad.abs().max() > 1e-6


def test_from_dense_takes_a_folder_and_leaves_the_dense_model(dense: GPT2LMHeadModel, tmp_path: object) -> None:
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    dense.save_pretrained(tmp_path)
    moe = GPT2MoEForCausalLM.from_dense(str(tmp_path), num_experts=4)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    GPT2MoEForCausalLM.from_dense(dense).generation_config.eos_token_id = 7
    assert dense.generation_config.eos_token_id != 7
    with pytest.raises(ValueError, match="has experts already"):
        GPT2MoEForCausalLM.from_dense(moe)


def test_losses_reach_the_training_loss_by_default(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    moe.train()
    for module in moe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(20)[None]
    out = moe(ids, labels=ids)
    cross_entropy = F.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, cross_entropy + 0.5 * out.aux_loss + 0.25 * out.z_loss)
    assert out.router_logits is None
    moe.eval()
    torch.testing.assert_close(moe(ids, labels=ids).loss, cross_entropy)
    asked = moe(ids, output_router_logits=True)
    assert [tuple(logits.shape) for logits in asked.router_logits] == [(20, 4), (20, 4)]
    assert asked.aux_loss >= 1 - 1e-6


@pytest.mark.parametrize("shifted", [False, True])
def test_losses_of_micro_batches_add_up_to_the_batch(dense: GPT2LMHeadModel, shifted: bool) -> None:
    """As transformers' Trainer counts them: nothing predicts the first token of a row."""
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, router_aux_loss_coef=0.0, router_z_loss_coef=0.25)
    moe.train().apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    ids = torch.arange(28).view(4, 7)

    def out(rows: slice) -> GPT2MoEOutput:
        labels = {"shift_labels": F.pad(ids[rows, 1:], (0, 1), value=-100)} if shifted else {}
        return moe(ids[rows], labels=ids[rows], num_items_in_batch=24, output_router_logits=True, **labels)

    whole = out(slice(4))
    cross_entropy = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, cross_entropy + 0.25 * whole.z_loss)
    torch.testing.assert_close(out(slice(2)).loss + out(slice(2, 4)).loss, whole.loss)


def test_padding_stays_out_of_the_router_losses(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2)
    ids = torch.arange(10)[None]
    padded = F.pad(ids, (0, 6))
    mask = (torch.arange(16) < 10).long()[None]
    alone = moe(ids, output_router_logits=True)
    with_padding = moe(padded, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(with_padding.aux_loss, alone.aux_loss)
    torch.testing.assert_close(with_padding.z_loss, alone.z_loss)


def test_router_metrics_and_balancing_bias(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 1, 4, router_bias_update_rate=0.1)
    assert router_metrics(dense) == {}
    router = moe.transformer.h[3].mlp.router
    with torch.no_grad():
        router.weight.zero_()
        router.selection_bias_E.copy_(torch.tensor([0.75, -0.25, -0.25, -0.25]))
    ids = torch.arange(20)[None]
    moe.train()(ids, labels=ids)
    metrics = router_metrics(moe)
    assert metrics["router/3/max_load"] == pytest.approx(4.0), "all tokens went to one of four experts"
    assert metrics["router/3/entropy"] == pytest.approx(1.0), "and the probabilities were uniform"
    assert metrics["router/3/top1"] == pytest.approx(0.25)
    before = router.selection_bias_E.clone()
    update_router_biases(moe)
    change = router.selection_bias_E - before
    assert change[0] < 0 < change[1] and not router.step_counts_E.any()
    assert router_metrics(moe) == {}, "reading resets the counts"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"num_experts": 0}, "between 1 and num_experts \\(0\\)"),
        ({"moe_layer_freq": 13}, "moe_layer_freq"),
        ({"n_inner": 0}, "n_inner must be 1 or more, not 0"),
        ({"n_embd": 10, "n_head": 3}, "multiple of n_head"),
        ({"n_head": 0}, "multiple of n_head"),
        ({"router_jitter_noise": 1.5}, "router_jitter_noise"),
        ({"router_aux_loss_coef": math.nan}, "router_aux_loss_coef is nan, but it must be from 0 to 1,000,000"),
        ({"router_bias_update_rate": math.inf}, "router_bias_update_rate is inf, but it must be"),
        ({"activation_function": "swiglu"}, "no activation_function 'swiglu': did you mean 'silu'"),
        ({"activation_function": "?"}, "no activation_function .*: it is one of .*gelu_new"),
        ({"num_expert": 4}, "did you mean 'num_experts'"),
    ],
)
def test_configuration_errors_name_the_field(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2MoEConfig(**fields)


def test_our_implementation_is_registered_next_to_transformers() -> None:
    assert {"batched_mm", "grouped_mm", "fe_experts"} <= set(ALL_EXPERTS_FUNCTIONS.keys())
