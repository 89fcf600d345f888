"""What the routers log: worked numbers, nothing that waits for the device, and a warning where experts die."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.cards import Card
from flash_experts.models.router import make_router
from flash_experts.models.router_metrics import (
    READS_BEFORE_WARNING,
    advice,
    diagnose_loads,
    load_metrics,
    pair_metrics,
    router_metrics,
)
from flash_experts.training.tracking import Callback
from flash_experts.training.trainer import Trainer
from flash_experts.training.training_config import TrainingConfig


def router_of(logits_TE: torch.Tensor, **fields: Any) -> tuple[Any, torch.Tensor]:
    """A router and the tokens for which its logits are these."""
    T, E = logits_TE.shape
    router = make_router(GPT2MoEConfig(n_embd=T, n_head=1, n_layer=2, num_experts=E, **fields)).train()
    with torch.no_grad():
        router.weight.copy_(logits_TE.T)
    return router, torch.eye(T)


# ----------------------------------------------------------------------------------------------------- worked numbers


def test_load_metrics_on_worked_numbers() -> None:
    """Loads 1, 1, 2, 4: mean 2, deviation sqrt(3/2), shares 1/8, 1/8, 1/4, 1/2 with an entropy of 7/4 bits."""
    assert load_metrics(torch.tensor([1.0, 1.0, 2.0, 4.0])) == pytest.approx(
        {"load_cv": math.sqrt(1.5) / 2, "max_load": 2.0, "load_entropy": 1.75 / 2}
    )


def test_pair_metrics_on_worked_numbers() -> None:
    """Three experts, pairs (0,1) twice, (0,2) once, (1,2) once: mean 4/3, entropy 3/2 bits of log2(3)."""
    pairs = torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [1.0, 1.0, 2.0]])
    assert pair_metrics(pairs) == pytest.approx({"max_pair": 1.5, "pair_entropy": 1.5 / math.log2(3)})
    assert pair_metrics(torch.diag(torch.tensor([3.0, 2.0, 1.0]))) == {}, "with one expert per token there are no pairs"
    assert pair_metrics(torch.tensor([[3.0, 3.0], [3.0, 3.0]])) == {}, "one pair is all that two experts have"


def test_router_metrics_on_worked_numbers() -> None:
    """Four tokens, three experts, two each; the last token is padding."""
    p_TE = torch.tensor([[0.5, 0.25, 0.25001], [0.25, 0.5, 0.24999], [0.1, 0.4, 0.5], [0.1, 0.1, 0.8]])
    p_TE = p_TE / p_TE.sum(-1, keepdim=True)
    router, x_TD = router_of(p_TE.log(), num_experts_per_tok=2)
    logits_TE, _, experts_TK = router(x_TD)
    mask_T = torch.tensor([True, True, True, False])
    router.record(logits_TE, experts_TK, mask_T)
    together = router.window_pairs_EE.clone()
    assert together.tolist() == [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    assert together.diagonal().tolist() == router.window_counts_E.tolist()
    metrics = router_metrics(nn.ModuleList([router]))
    entropy = -(p_TE[:3] * p_TE[:3].log()).sum(-1).mean().item() / math.log(3)
    assert metrics == pytest.approx(
        {
            "router/0/load_cv": 0.0,
            "router/0/max_load": 1.0,
            "router/0/load_entropy": 1.0,
            "router/0/max_pair": 1.0,
            "router/0/pair_entropy": 1.0,
            "router/0/entropy": entropy,
            "router/0/top1": 0.5,
            "router/0/load/0": 1.0,
            "router/0/load/1": 1.0,
            "router/0/load/2": 1.0,
        },
        abs=1e-4,
    )
    assert not router.window_pairs_EE.any() and router_metrics(nn.ModuleList([router])) == {}, "the counts are reset"


def test_forwards_of_a_window_add_up() -> None:
    """Gradient accumulation: two tokens to expert 0, then one to each."""
    router, _ = router_of(torch.zeros(2, 2), num_experts_per_tok=1)
    for chosen in ([[0], [0]], [[0], [1]]):
        router.record(torch.zeros(2, 2), torch.tensor(chosen), None)
    assert router.step_counts_E.tolist() == [3.0, 1.0]
    metrics = router_metrics(nn.ModuleList([router]))
    assert [metrics["router/0/load/0"], metrics["router/0/load/1"]] == [1.5, 0.5]


def test_entropy_of_sigmoids_is_that_of_their_shares() -> None:
    """Sigmoids 1/2, 2/3 and 5/6 are 3, 4 and 5 twelfths of their sum."""
    logits_TE = torch.tensor([[0.0, math.log(2), math.log(5)]])
    router, x_TD = router_of(logits_TE, num_experts_per_tok=1, scoring_func="sigmoid")
    logits_TE, _, experts_TK = router(x_TD)
    router.record(logits_TE, experts_TK, None)
    metrics = router_metrics(nn.ModuleList([router]))
    assert metrics["router/0/top1"] == pytest.approx(5 / 12)
    entropy = math.log(12) - (3 * math.log(3) + 4 * math.log(4) + 5 * math.log(5)) / 12
    assert metrics["router/0/entropy"] == pytest.approx(entropy / math.log(3))


def test_expert_choice_counts_pairs_too() -> None:
    """Four tokens, two experts of two each, both wanting tokens 0 and 1: one pair of experts, two tokens untaken."""
    logits_TE = torch.tensor([[2.0, 2.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    router, x_TD = router_of(logits_TE, num_experts_per_tok=1, routing="expert_choice", scoring_func="sigmoid")
    logits_TE, _, tokens_EC = router(x_TD)
    router.record(logits_TE, tokens_EC, None)
    assert router.window_pairs_EE.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert router_metrics(nn.ModuleList([router]))["router/0/untaken_rate"] == pytest.approx(0.5)


def test_counts_are_exact_under_autocast() -> None:
    """bfloat16 has eight bits: a count of 300 would be 300 in steps of two."""
    router, _ = router_of(torch.zeros(3, 3), num_experts_per_tok=2)
    experts_TK = torch.tensor([[0, 1]]).expand(301, 2)
    with torch.autocast("cpu", torch.bfloat16):
        router.record(torch.zeros(301, 3), experts_TK, None)
    assert router.window_pairs_EE.tolist() == [[301.0, 301.0, 0.0], [301.0, 301.0, 0.0], [0.0, 0.0, 0.0]]


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: reading a number, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 1.0}, {"routing": "expert_choice"}])
def test_recording_waits_for_nothing(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    router, x_TD = router_of(torch.randn(12, 4), num_experts_per_tok=2, **fields)
    with NoWaiting():
        logits_TE, _, choices = router(x_TD)
        router.record(logits_TE, choices, None)
    assert router.window_pairs_EE.diagonal().sum() == 24
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(logits_TE.detach().sum())


# ------------------------------------------------------------------------------------------------- dead and collapsed


@pytest.mark.parametrize(
    ("loads", "top_k", "expected"),
    [
        ([1.0] * 8, 2, None),
        ([3.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5], 2, None),  # unequal, but all at work
        ([100.0] * 7 + [0.8], 1, "expert 7 of 8 is dead"),
        ([100.0] * 7 + [0.9], 1, None),  # 1% of the mean is 0.876
        ([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0], 2, "experts 0, 3 of 8 are dead"),
        ([1.0] + [0.0] * 7, 1, "collapsed, 8 experts have the load of 1.0"),
        ([1.0, 1.0] + [0.0] * 6, 2, "collapsed, 8 experts have the load of 2.0"),
        ([0.74] + [0.26 / 7] * 7, 1, "collapsed, 8 experts have the load of 2.9"),  # of moe-emergence, by step 500
        ([1.0, 1.0], 2, None),  # every token goes to both: nothing can collapse
        *(([1.0] * experts, experts, None) for experts in range(3, 17)),
    ],
)
def test_trouble_begins_at_the_documented_thresholds(loads: list[float], top_k: int, expected: str | None) -> None:
    found = diagnose_loads(torch.tensor(loads), top_k)
    assert found is None if expected is None else found is not None and expected in found


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"router_aux_loss_coef": 0.0}, "set router_aux_loss_coef (now 0) to 0.01, or router_bias_update_rate (now 0)"),
        ({"router_aux_loss_coef": 0.02}, "raise router_aux_loss_coef (now 0.02), or set router_bias_update_rate"),
        ({"router_bias_update_rate": 1e-4}, "raise router_bias_update_rate (now 0.0001)"),
    ],
)
def test_advice_names_the_setting_and_its_value(fields: dict[str, Any], setting: str) -> None:
    assert setting in advice(GPT2MoEConfig(n_embd=8, n_head=1, n_layer=2, **fields))


def collapsing(dense: GPT2LMHeadModel, coefficient: float) -> GPT2MoEForCausalLM:
    """A model whose second block with experts sends all tokens to expert 0."""
    torch.manual_seed(0)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(dense.config, name, 0.0)
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 1, 2, router_aux_loss_coef=coefficient).train()
    with torch.no_grad():
        block = model.transformer.h[3]
        block.ln_2.bias.fill_(1.0)  # what all tokens have in common
        block.mlp.router.weight.normal_(std=0.02)
        block.mlp.router.weight[0] += 0.3
    return model


def reads(model: GPT2MoEForCausalLM, count: int) -> list[str]:
    """Warnings over n reads, each after a forward of 512 tokens."""
    ids = torch.randint(5, 250, (8, 64), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            model(ids, labels=ids)
            router_metrics(model)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def test_a_collapse_is_warned_of_once_and_the_advised_setting_cures_it(dense: GPT2LMHeadModel) -> None:
    model = collapsing(dense, 0.0)
    assert reads(model, READS_BEFORE_WARNING - 1) == [], "routers start unbalanced: no warning at once"
    (warning,) = reads(model, 1)
    assert warning.startswith("block 3: its router has collapsed, 4 experts have the load of 1.0")
    assert "set router_aux_loss_coef (now 0) to 0.01" in warning
    assert reads(model, 2 * READS_BEFORE_WARNING) == [], "once is enough"

    cured = collapsing(dense, 0.5)
    ids = torch.randint(5, 250, (8, 64), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(cured.transformer.h[3].mlp.router.parameters(), lr=0.006)
    for _ in range(100):
        optimizer.zero_grad()
        cured(ids, labels=ids).loss.backward()
        optimizer.step()
    router_metrics(cured)
    assert reads(cured, 2 * READS_BEFORE_WARNING) == []


def test_a_spell_and_few_tokens_are_no_collapse() -> None:
    router, _ = router_of(torch.zeros(4, 4), num_experts_per_tok=1)
    routers = nn.ModuleList([router])

    def read(loads: list[float]) -> None:
        router.window_counts_E.copy_(torch.tensor(loads))
        router.window_sums[0] = sum(loads)
        router_metrics(routers)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            for _ in range(READS_BEFORE_WARNING - 1):
                read([1000.0, 0.0, 0.0, 0.0])
            read([250.0, 250.0, 250.0, 250.0])
        for _ in range(2 * READS_BEFORE_WARNING):
            read([40.0, 0.0, 0.0, 0.0])  # ten choices for each expert: it may be chance
    with pytest.warns(UserWarning, match="block 0: .*: raise router_aux_loss_coef or router_bias_update_rate"):
        for _ in range(READS_BEFORE_WARNING):
            read([1000.0, 0.0, 0.0, 0.0])


# ------------------------------------------------------------------------------------------------------------- a run


class Recorder(Callback):
    """Records what a tracker receives."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, step: int, metrics: Any) -> None:
        self.lines.append(dict(metrics))


def test_a_run_logs_every_layer_to_its_record_and_to_trackers(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2)
    cards = [Card(f"Goblin {i}", "Creature", (), ("Creature",), (), ("R",), 1, str(i)) for i in range(30)]
    config = TrainingConfig(
        output_dir=str(tmp_path), run_name="run", max_steps=4, tokens_per_batch=256, log_every=2, tracker="none"
    )
    recorder = Recorder()
    Trainer(model, tokenizer, cards[:24], cards[24:], config, callbacks=[recorder]).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    logged = [line for line in lines if line["event"] == "train"]
    names = ("load_cv", "max_load", "load_entropy", "entropy", "top1", "max_pair", "pair_entropy")
    assert len(logged) == len(recorder.lines) == 2
    for record, received in zip(logged, recorder.lines, strict=True):
        for block in (1, 3):
            assert all(record[f"router/{block}/{name}"] == received[f"router/{block}/{name}"] for name in names)
            loads = [record[f"router/{block}/load/{expert}"] for expert in range(4)]
            assert sum(loads) == pytest.approx(4.0, abs=1e-3)
            assert max(loads) == pytest.approx(record[f"router/{block}/max_load"], abs=1e-3)
