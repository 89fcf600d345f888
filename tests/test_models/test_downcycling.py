"""From experts back to a dense GPT-2: the dense weights if nothing was trained, else the mean that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.cli import main
from flash_experts.models.loading import load_model
from flash_experts.models.router_metrics import router_metrics
from flash_experts.models.upcycling import measure_loads, to_dense
from tests.helpers.command_line import FIRST, SECOND

IDS = torch.arange(40).view(2, 20)


def trained(dense: GPT2LMHeadModel, **fields: object) -> GPT2MoEForCausalLM:
    """Experts that differ."""
    torch.manual_seed(0)
    moe = GPT2MoEForCausalLM.from_dense(dense, 3, 1, 2, **fields)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return moe


@pytest.mark.parametrize("num_experts", [1, 3, 7, 8])
@pytest.mark.parametrize("loads", [None, [0.1, 0.7, 0.2, 5.0, 3.0, 0.0, 1.0, 9.0]])
def test_copies_give_back_the_dense_weights(
    dense: GPT2LMHeadModel, num_experts: int, loads: list[float] | None
) -> None:
    """To the bit, for any number of experts and any loads."""
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts, 1, 2)
    by_block = None if loads is None else {i: torch.tensor(loads[:num_experts]) for i in (1, 3)}
    back = to_dense(moe, by_block)
    assert back.generation_config is not moe.generation_config
    assert type(back) is GPT2LMHeadModel and back.config.model_type == "gpt2" and not back.training
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    torch.testing.assert_close(back(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", [2, 4, 32])
def test_virtual_groups_give_back_the_dense_weights(dense: GPT2LMHeadModel, granularity: int) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, 3, 1, 2, method="granular", granularity=granularity)
    back = to_dense(moe)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("load", [None, [6.0, 3.0, 1.0]])
def test_the_mean_of_trained_experts(dense: GPT2LMHeadModel, load: list[float] | None) -> None:
    moe = trained(dense)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    back = to_dense(moe, None if load is None else {1: torch.tensor(load), 3: torch.tensor(load)})
    share = torch.full((3,), 1 / 3) if load is None else torch.tensor([0.6, 0.3, 0.1])
    experts, mlp = moe.transformer.h[1].mlp.experts, back.transformer.h[1].mlp
    torch.testing.assert_close(mlp.c_fc.weight, torch.einsum("e,edf->df", share, experts.up_proj))
    torch.testing.assert_close(mlp.c_fc.bias, share @ experts.up_proj_bias)
    torch.testing.assert_close(mlp.c_proj.weight, torch.einsum("e,efd->fd", share, experts.down_proj))
    torch.testing.assert_close(mlp.c_proj.bias, share @ experts.down_proj_bias)
    assert torch.equal(back.transformer.h[0].mlp.c_fc.weight, moe.transformer.h[0].mlp.c_fc.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in moe.state_dict().items()), "it is left as it was"


@pytest.mark.parametrize("fields", [{}, {"routing": "expert_choice"}])
def test_measured_loads_are_what_the_routers_counted(dense: GPT2LMHeadModel, fields: dict[str, object]) -> None:
    moe = trained(dense, **fields).train()
    moe.transformer.h[0].eval()  # a part that is frozen
    modes = [module.training for module in moe.modules()]
    loads = measure_loads(moe, [{"input_ids": IDS}, {"input_ids": IDS[:, :7]}])
    assert sorted(loads) == [1, 3] and [module.training for module in moe.modules()] == modes
    places = 40 + 14 if not fields else 3 * (14 + 5)  # with expert choice each of three experts takes a third
    assert all(load_E.sum() == places for load_E in loads.values())
    for module in moe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for ids in (IDS, IDS[:, :7]):
        moe(ids, labels=ids)
    largest = router_metrics(moe)["router/1/max_load"]
    assert loads[1].max() / loads[1].mean() == pytest.approx(largest)
    to_dense(moe, loads)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({1: [1.0, 1.0, 1.0]}, "no loads for block 3"),
        ({1: [1.0, 1.0], 3: [1.0, 1.0]}, "block 1 has 3 experts, but 2 loads"),
        ({1: [0.0, 0.0, 0.0], 3: [1.0, 1.0, 1.0]}, "not all 0"),
        ({1: [1.0, -1.0, 1.0], 3: [1.0, 1.0, 1.0]}, "must be 0 or more"),
        ({1: [1.0, float("nan"), 1.0], 3: [1.0, 1.0, 1.0]}, "must be 0 or more"),
    ],
)
def test_loads_that_do_not_fit(dense: GPT2LMHeadModel, loads: dict[int, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_dense(trained(dense), {block: torch.tensor(load) for block, load in loads.items()})


def test_gates_that_do_not_sum_to_one_are_refused(dense: GPT2LMHeadModel) -> None:
    moe = trained(dense)
    moe.config.norm_topk_prob = False
    with pytest.raises(ValueError, match="norm_topk_prob is false"):
        to_dense(moe)


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("moe_layer_freq", [1, 2])
def test_shared_experts_keep_their_place(dense: GPT2LMHeadModel, granularity: int, moe_layer_freq: int) -> None:
    """Routed experts are silent before training, so the logits are the dense model's."""
    moe = GPT2MoEForCausalLM.from_dense(dense, 4, 1, moe_layer_freq, method="shared", granularity=granularity)
    back = to_dense(moe)
    assert type(back) is GPT2LMHeadModel and back.config.n_inner == 256, "as wide as the shared and a routed one"
    torch.testing.assert_close(back(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-5)
    back(IDS, labels=IDS).loss.backward()
    assert all(block.mlp.c_proj.weight.grad.norm(dim=1).all() for block in back.transformer.h), "every unit can learn"


@pytest.mark.parametrize("fields", [{"num_shared_experts": 2, "moe_intermediate_size": 40}, {"num_shared_experts": 1}])
def test_equal_experts_next_to_shared_ones_are_exact(fields: dict[str, int]) -> None:
    """A model that was not upcycled, whose routed experts are all the same."""
    shape = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 300, "num_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    moe = GPT2MoEForCausalLM(GPT2MoEConfig(**shape, **fields)).eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        experts = moe.transformer.h[1].mlp.experts
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    back = to_dense(moe)
    assert back.transformer.h[0].mlp.c_fc.nf == (128 if "moe_intermediate_size" in fields else 256)
    torch.testing.assert_close(back(IDS).logits, moe(IDS).logits, rtol=0, atol=1e-4)


@pytest.fixture
def folder(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A dense model, and what upcycle makes of it."""
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert main(["upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--num-experts", "3"]) == 0
    return tmp_path


def test_up_and_down_again(folder: Path, dense: GPT2LMHeadModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "dense", str(folder / "moe"), "--out", str(folder / "back")]) == 0
    back = load_model(folder / "back", "cpu")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert (folder / "back" / "tokenizer.json").is_file()
    printed = capsys.readouterr().out
    assert "differ from the source's by at most" in printed and "to fine-tune it: train --base" in printed
    for arguments, message in (
        ([str(folder / "dense")], "has no experts"),
        ([str(folder / "moe"), "--loads", "loads.json"], "--loads is for --weighting load"),
        ([str(folder / "moe"), "--weighting", "load", "--loads", str(folder / "moe/config.json")], "no loads by block"),
        ([str(folder / "moe"), "--weighting", "load", "--data", str(folder / "nowhere")], "nowhere"),
    ):
        assert main(["export", "dense", *arguments, "--out", str(folder / "other")]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        assert not (folder / "other").exists(), "nothing half-written"


@pytest.mark.slow
def test_loads_measured_printed_and_passed_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.txt").write_text("\n".join(f"{first} {second}" for first in FIRST for second in SECOND), "utf-8")
    data = str(folder / "data")
    assert main(["prepare", "--source", str(folder / "names.txt"), "--out", data]) == 0
    weighted = ["export", "dense", str(folder / "moe"), "--weighting", "load", "--json"]
    capsys.readouterr()
    assert main([*weighted, "--data", data, "--out", str(folder / "measured")]) == 0
    printed = capsys.readouterr().out
    loads = json.loads(printed)["loads"]
    assert sorted(loads) == ["1", "3"] and all(sum(load) > 0 for load in loads.values())
    (folder / "loads.json").write_text(printed)
    assert main([*weighted, "--loads", str(folder / "loads.json"), "--out", str(folder / "given")]) == 0
    assert json.loads(capsys.readouterr().out)["loads"] == loads
    models = [load_model(folder / name, "cpu").state_dict() for name in ("measured", "given")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
