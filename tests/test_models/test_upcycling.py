"""Each way to make experts of a dense layer: the dense model's logits at step 0, or exactly what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import GPT2MoEForCausalLM
from flash_experts.cli import main
from flash_experts.models.loading import load_model
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.upcycling import Upcycling, fill_from_dense
from tests.helpers.command_line import FIRST, SECOND

IDS = torch.arange(40).view(2, 20)
SIZES = [(1, 1), (2, 1), (4, 2), (8, 2), (5, 3), (8, 8)]


def without_dropout(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def largest_difference(moe: GPT2MoEForCausalLM, dense: GPT2LMHeadModel) -> float:
    """Of the logits, with the gates of evaluation and with those of training."""
    differences = []
    for training in (False, True):
        models = [without_dropout(model).train(training) for model in (moe, dense)]
        with torch.no_grad():
            logits = [model(IDS).logits for model in models]
        differences.append((logits[0] - logits[1]).abs().max().item())
    return max(differences)


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "copy", "router_init": "orthogonal"},
        {"method": "copy", "router_init": "zeros"},
        {"method": "copy", "scoring_func": "sigmoid"},
        {"method": "copy", "scoring_func": "topk_softmax"},
        {"method": "noise", "noise_scale": 0.0},
        {"method": "drop", "drop_ratio": 0.0},
        {"method": "granular", "granularity": 1},
        {"method": "granular", "granularity": 4},
        {"method": "granular", "granularity": 32},
        {"method": "granular", "granularity": 2, "scoring_func": "sigmoid"},
        {"method": "shared"},
        {"method": "shared", "granularity": 4},
        {"method": "shared", "norm_topk_prob": False},
        {"method": "shared", "routing": "expert_choice"},
    ],
    ids=str,
)
def test_exact_methods_give_the_dense_logits(
    dense: GPT2LMHeadModel, num_experts: int, top_k: int, fields: dict[str, object]
) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts, top_k, 2, **fields)
    granularity = fields.get("granularity", 1)
    assert moe.config.num_experts == num_experts * granularity
    assert moe.config.num_experts_per_tok == top_k * granularity
    assert moe.config.expert_size == 128 // granularity
    assert largest_difference(moe, dense) <= 1e-5


def test_virtual_groups_are_what_they_are_said_to_be(dense: GPT2LMHeadModel) -> None:
    """Expert r * g + s holds shard s; a group shares a router row; g is on the second matrix and on no bias."""
    moe = GPT2MoEForCausalLM.from_dense(dense, 3, 2, 4, method="granular", granularity=4)
    layer, mlp = moe.transformer.h[3].mlp, dense.transformer.h[3].mlp
    for e in range(12):
        shard = slice(e % 4 * 32, e % 4 * 32 + 32)
        assert torch.equal(layer.experts.up_proj[e], mlp.c_fc.weight[:, shard])
        assert torch.equal(layer.experts.up_proj_bias[e], mlp.c_fc.bias[shard])
        assert torch.equal(layer.experts.down_proj[e], 4 * mlp.c_proj.weight[shard])
        assert torch.equal(layer.experts.down_proj_bias[e], mlp.c_proj.bias)
        assert torch.equal(layer.router.weight[e], layer.router.weight[e // 4 * 4])
    assert len(layer.router.weight.unique(dim=0)) == 3
    experts_TK = layer.router(torch.randn(50, 32))[2]
    for chosen in experts_TK.tolist():
        groups = {e // 4 for e in chosen}
        assert sorted(chosen) == [4 * r + s for r in sorted(groups) for s in range(4)], "whole groups, all their shards"


def test_noise_moves_the_output_in_proportion(dense: GPT2LMHeadModel) -> None:
    differences = []
    for scale in (1e-4, 1e-3):
        torch.manual_seed(0)
        moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, method="noise", noise_scale=scale)
        differences.append(largest_difference(moe, dense))
        experts, weight = moe.transformer.h[1].mlp.experts, dense.transformer.h[1].mlp.c_fc.weight
        for e in range(4):
            assert (experts.up_proj[e] - weight).std().item() == pytest.approx(scale * weight.std().item(), rel=0.1)
        assert len(experts.up_proj.detach().unique(dim=0)) == 4, "experts differ"
        assert torch.equal(experts.up_proj_bias[0], dense.transformer.h[1].mlp.c_fc.bias)
    assert 5 < differences[1] / differences[0] < 20
    assert 1e-5 < differences[1] < 0.05


def test_dropped_units_are_the_whole_difference(dense: GPT2LMHeadModel) -> None:
    """Each expert: int(r * F) units redrawn, the others unchanged; the output moves by just those units' part."""
    torch.manual_seed(0)
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 4, method="drop", drop_ratio=0.3).double()
    layer, mlp = moe.transformer.h[3].mlp, dense.transformer.h[3].mlp.double().eval()
    experts = layer.experts
    x_TD = torch.randn(9, 32, dtype=torch.float64)
    parts_TED, redrawn, sets = [], [], set()
    for e in range(4):
        new = (experts.up_proj[e] != mlp.c_fc.weight).all(0)
        assert new.sum() == int(0.3 * 128)
        assert torch.equal(new, (experts.down_proj[e] != mlp.c_proj.weight).all(1)), "one set for both matrices"
        assert torch.equal(new, experts.up_proj_bias[e] != mlp.c_fc.bias)
        assert torch.equal(experts.up_proj[e][:, ~new], mlp.c_fc.weight[:, ~new])
        assert torch.equal(experts.down_proj[e][~new], mlp.c_proj.weight[~new])
        after = F.gelu(x_TD @ experts.up_proj[e] + experts.up_proj_bias[e], approximate="tanh")[:, new]
        before = F.gelu(x_TD @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")[:, new]
        parts_TED.append(after @ experts.down_proj[e][new] - before @ mlp.c_proj.weight[new])
        redrawn.append(experts.up_proj[e][:, new].detach())
        sets.add(tuple(new.tolist()))
    _, gates_TK, experts_TK = layer.eval().router(x_TD)
    chosen_TKD = torch.stack(parts_TED, 1).gather(1, experts_TK[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(layer(x_TD) - mlp(x_TD), (gates_TK[:, :, None] * chosen_TKD).sum(1), rtol=0, atol=1e-9)
    assert len(sets) == 4, "each expert has its own"
    numbers = torch.cat([part.reshape(-1) for part in redrawn])
    assert numbers.std().item() == pytest.approx(mlp.c_fc.weight.std().item(), rel=0.1)
    assert numbers.mean().item() == pytest.approx(mlp.c_fc.weight.mean().item(), abs=0.1 * numbers.std().item())


def test_expert_choice_is_exact_for_the_tokens_that_are_taken(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 8, 1, 4, routing="expert_choice").eval()
    layer, mlp = moe.transformer.h[3].mlp, dense.transformer.h[3].mlp
    x_TD = torch.randn(24, 32)
    taken = layer.router(x_TD)[2].unique()
    assert 0 < len(taken) < 24
    expected = torch.zeros(24, 32).index_copy(0, taken, mlp(x_TD)[taken])
    torch.testing.assert_close(layer(x_TD), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"method": "copy"}, {"method": "noise"}, {"method": "drop"}, {"method": "granular", "granularity": 4}]
)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_router_learns_from_the_first_step(
    dense: GPT2LMHeadModel, fields: dict[str, object], scoring_func: str
) -> None:
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 1, 2, scoring_func=scoring_func, **off, **fields)
    moe.train()(IDS, labels=IDS).loss.backward()
    assert moe.transformer.h[1].mlp.router.weight.grad.abs().max() > 1e-6


def test_silent_experts_speak_after_a_step_and_then_the_router_learns(dense: GPT2LMHeadModel) -> None:
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2, method="shared", **off).train()
    layer = moe.transformer.h[1].mlp
    assert isinstance(layer, MoELayer)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        moe(IDS, labels=IDS).loss.backward()
        gradients.append((layer.router.weight.grad.abs().max().item(), layer.experts.down_proj.grad.abs().max().item()))
        optimizer.step()
    assert gradients[0][0] == 0 < gradients[0][1] and gradients[1][0] > 0


def test_orthogonal_rows(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 8, 2, 4, router_init="orthogonal")
    weight_ED = moe.transformer.h[3].mlp.router.weight
    torch.testing.assert_close(weight_ED @ weight_ED.T, 0.02**2 * 32 * torch.eye(8), rtol=0, atol=1e-6)


def test_from_a_folder_it_is_the_same_and_lets_go_of_the_dense_model(dense: GPT2LMHeadModel, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    models = []
    for source in (load_model(tmp_path, "cpu"), tmp_path):
        torch.manual_seed(3)
        models.append(GPT2MoEForCausalLM.from_dense(source, 4, method="drop"))
    for (name, first), (_, second) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert torch.equal(first, second), name
    assert models[1].lm_head.weight is models[1].transformer.wte.weight
    fill_from_dense(models[0], dense, Upcycling(), take=True)
    assert sum(parameter.numel() for parameter in dense.parameters()) == 0, "nothing of it is left in memory"


def test_an_untied_head_and_another_dtype_come_along(dense: GPT2LMHeadModel) -> None:
    dense.config.tie_word_embeddings = False
    dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    moe = GPT2MoEForCausalLM.from_dense(dense, 4)
    assert torch.equal(moe.lm_head.weight, dense.lm_head.weight)
    assert not torch.equal(moe.lm_head.weight, moe.transformer.wte.weight)
    assert GPT2MoEForCausalLM.from_dense(dense.bfloat16(), 4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields", [{}, {"method": "drop", "router_init": "orthogonal"}, {"method": "granular", "granularity": 4}]
)
def test_bfloat16_from_a_folder(dense: GPT2LMHeadModel, tmp_path: Path, fields: dict[str, object]) -> None:
    """The dense weights as they are when rounded, whichever dtype the folder has; a given model is left as it is."""
    dense.save_pretrained(tmp_path / "full")
    copy.deepcopy(dense).bfloat16().save_pretrained(tmp_path / "half")
    models = []
    for source in (tmp_path / "full", tmp_path / "half", dense):
        torch.manual_seed(3)
        models.append(GPT2MoEForCausalLM.from_dense(source, 4, dtype=torch.bfloat16, **fields))
    assert dense.dtype == torch.float32
    for name, weight in models[0].named_parameters():
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all(), name
        assert torch.equal(weight, models[1].get_parameter(name)), name
        if fields.get("method") != "drop":  # its statistics are of the weights before they are rounded
            assert torch.equal(weight, models[2].get_parameter(name)), name
    assert torch.equal(models[0].transformer.wte.weight, dense.transformer.wte.weight.bfloat16())
    assert models[0](IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "copies"}, "did you mean 'copy'"),
        ({"upcycling": "shared"}, "no option 'upcycling': give method, dtype or one of granularity"),
        ({"drop_rate": 0.5}, "no option 'drop_rate': did you mean 'drop_ratio'"),
        ({"router_init": "zero"}, "did you mean 'zeros'"),
        ({"granularity": 0}, "granularity is 0, but it must be from 1"),
        ({"granularity": 4}, "take method 'granular' or 'shared'"),
        ({"method": "granular", "granularity": 3}, "does not divide the 128 hidden units"),
        ({"method": "granular", "granularity": 2, "router_init": "zeros"}, "ties them all"),
        ({"method": "noise", "noise_scale": -1.0}, "noise_scale"),
        ({"method": "drop", "drop_ratio": 1.5}, "drop_ratio"),
        ({"moe_intermediate_size": 64}, "leave it out and set granularity"),
        ({"num_shared_experts": 1}, "num_shared_experts = 1 would change"),
        ({"method": "shared", "granularity": 2, "num_shared_experts": 1}, "as many as the granularity"),
        ({"n_layer": 3}, "n_layer = 3 would change the dense model's output, whose n_layer is 4: leave it out"),
        ({"num_hidden_layers": 3}, "n_layer = 3 would change"),
        ({"vocab_size": 98}, "vocab_size = 98 would change"),
        ({"n_head": 2}, "n_head = 2 would change"),
        ({"activation_function": "relu"}, "activation_function = relu would change"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False would change"),
        ({"norm_topk_prob": False, "num_experts_per_tok": 1}, "norm_topk_prob=False would change"),
        ({"num_experts": 33, "router_init": "orthogonal"}, "cannot be orthogonal"),
    ],
)
def test_what_would_change_the_output_is_refused(
    dense: GPT2LMHeadModel, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GPT2MoEForCausalLM.from_dense(dense, **fields)
    assert "\n" not in str(error.value)


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a dense GPT-2 or its folder, not a NoneType"):
        GPT2MoEForCausalLM.from_dense(None)


def test_the_command(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(tmp_path / "dense"), str(tmp_path / "moe")
    dense.save_pretrained(source)
    tokenizer.save_pretrained(source)
    made = ["upcycle", source, "--out", out, "--num-experts", "3", "--num-experts-per-tok", "1"]
    assert main([*made, "--method", "granular", "--granularity", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 12
    moe = load_model(out, "cpu")
    assert moe.config.num_experts_per_tok == 4 and largest_difference(moe, dense) <= 1e-5
    half = str(tmp_path / "half")
    assert main(["upcycle", source, "--out", half, "--num-experts", "3", "--dtype", "bfloat16"]) == 0
    weights = load_file(Path(half, "model.safetensors"))
    kept = {name for name, weight in weights.items() if weight.dtype != torch.bfloat16}
    assert all(".router." in name and name not in dict(moe.named_parameters()) for name in kept), "counts and biases"
    assert torch.equal(weights["transformer.wte.weight"], dense.transformer.wte.weight.bfloat16())
    assert load_model(half, "cpu").dtype == torch.float32
    capsys.readouterr()
    for wrong, status, message in (
        (["--dtype", "float61"], 2, "float61"),
        (["--method", "copi"], 2, "copy"),
        (["--granularity", "4"], 1, "take method 'granular'"),
        (["--num-experts", "0"], 1, "--num-experts"),
    ):
        assert main([*made, "--overwrite", *wrong]) == status
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert main(["upcycle", out, "--out", str(tmp_path / "again")]) == 1
    assert "has experts already" in capsys.readouterr().err


@pytest.mark.slow
def test_train_makes_and_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"{first} {second}" for first in FIRST for second in SECOND), "utf-8")
    data = str(tmp_path / "data")
    assert main(["prepare", "--source", str(tmp_path / "names.txt"), "--out", data]) == 0
    shape = "--model.n-layer=2 --model.n-embd=32 --model.n-head=2 --model.vocab-size=300 --training.max-steps=2".split()
    where = [f"--data={data}", f"--training.output-dir={tmp_path}", "--training.run-name=run"]
    options = ["--model.upcycling=granular", "--model.granularity=4", "--model.router-aux-loss-scope=sequence"]
    assert main(["train", *where, *shape, *options, "--model.capacity-factor=1.0"]) == 0, capsys.readouterr().err
    config = load_model(tmp_path / "run", "cpu").config
    assert (config.num_experts, config.router_aux_loss_scope, config.capacity_factor) == (32, "sequence", 1.0)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < line.get("router/1/drop_rate", 0) < 1 for line in logged)
    capsys.readouterr()
    assert main(["train", *where, *shape, "--model.routing=expert_choice", "--training.sample-every=1"]) == 1
    assert "draws no sample names" in capsys.readouterr().err
