"""The losses that keep the load balanced, on worked numbers; collapse; several processes that learn as one."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.moe_layer import (
    MoELayer,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from flash_experts.models.router import make_router
from flash_experts.models.router_metrics import router_metrics, update_router_biases
from tests.test_models.test_moe_routing import LOG, small_model
from tests.test_moe import make_layer

# -------------------------------------------------------------------------------------------------- losses, collapse


def test_gradients_of_the_losses_on_worked_numbers() -> None:
    """p = (3/4, 1/4), all to expert 0: L = 2 P_0, so dL/dl_0 = 2/T * p_0 p_1 = 3/16 for T = 2, and dL/dl_1 = -3/16.

    z = log(4)^2 for both tokens: dz/dl_e = 2/T * log(4) * p_e.
    """
    logits = torch.tensor([[math.log(3), 0.0]]).repeat(2, 1).requires_grad_()
    (balance,) = torch.autograd.grad(load_balancing_loss(logits, torch.tensor([[0], [0]])), logits)
    torch.testing.assert_close(balance, torch.tensor([[3 / 16, -3 / 16]]).repeat(2, 1))
    (z,) = torch.autograd.grad(router_z_loss(logits), logits)
    torch.testing.assert_close(z, math.log(4) * torch.tensor([[3 / 4, 1 / 4]]).repeat(2, 1))


def test_balancing_loss_of_sigmoids_on_worked_numbers() -> None:
    """Sigmoids 1/2, 2/3, 5/6 over their sum 2: P = 1/4, 1/3, 5/12. All to expert 2: 3 * 5/12."""
    assert load_balancing_loss(LOG, torch.tensor([[2]]), scoring_func="sigmoid").item() == pytest.approx(5 / 4)


def test_balancing_loss_per_sequence_on_worked_numbers() -> None:
    """Two sequences, each all to one expert, another each: balanced over the batch (1), 3/2 within each."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 3.0], [9.0, 1.0]]).log()
    experts = torch.tensor([[0], [0], [1], [1], [0]])
    sequence = torch.tensor([0, 0, 1, 1, 1])
    mask = torch.tensor([True, True, True, True, False])
    assert load_balancing_loss(logits, experts, mask).item() == pytest.approx(1.0)
    assert sequence_balancing_loss(logits, experts, sequence, 2, mask).item() == pytest.approx(1.5)
    assert sequence_balancing_loss(logits, experts, sequence, 3, mask).item() == pytest.approx(1.5), "an empty one"
    one = sequence_balancing_loss(logits[:2], torch.tensor([[0, 1], [1, 0]]), sequence[:2], 1)
    assert one.item() == pytest.approx(1.0), "one at balance, whatever k is"


def test_losses_of_padding_alone_are_zero_not_nan() -> None:
    """A process may get a micro-batch without a token that counts."""
    logits, experts, nothing = torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
    sequence = torch.zeros(4, dtype=torch.int64)
    assert load_balancing_loss(logits, experts, nothing).item() == 0
    assert sequence_balancing_loss(logits, experts, sequence, 1, nothing).item() == 0
    assert router_z_loss(logits, nothing).item() == 0


def test_a_mask_that_covers_the_cache_too_leaves_the_losses_of_the_new_tokens(dense: GPT2LMHeadModel) -> None:
    moe = small_model(dense).eval()
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        cache = moe(ids[:, :5], use_cache=True).past_key_values
        out = moe(ids[:, 5:], past_key_values=cache, attention_mask=mask, output_router_logits=True)
    logits = out.router_logits
    expected = [load_balancing_loss(each, each.topk(2).indices) for each in logits]
    assert all(each.shape == (3, 4) for each in logits)
    torch.testing.assert_close(out.aux_loss, torch.stack(expected).mean())


def test_balance_over_more_than_these_tokens_on_worked_numbers() -> None:
    """Here all go to expert 0 with p = 3/4, elsewhere as many go to expert 1: balanced together, so no pressure."""
    logits = torch.tensor([[math.log(3), 0.0]]).repeat(2, 1)
    experts = torch.tensor([[0], [0]])
    assert load_balancing_loss(logits, experts).item() == pytest.approx(1.5)
    assert load_balancing_loss(logits, experts, counts_E=torch.tensor([2.0, 2.0])).item() == pytest.approx(1.0)
    assert load_balancing_loss(logits, experts, counts_E=torch.tensor([3.0, 1.0])).item() == pytest.approx(1.25)


def test_global_batch_loss_sees_the_forwards_of_the_step(dense: GPT2LMHeadModel) -> None:
    moe = small_model(dense, router_aux_loss_scope="global_batch").train()
    first, second = torch.arange(20)[None], torch.arange(20, 50)[None]
    routers = [moe.transformer.h[i].mlp.router for i in (1, 3)]

    def expected(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """f over all of these rows, P over the first."""
        with torch.no_grad():
            all_logits = [moe.eval()(row, output_router_logits=True).router_logits for row in (ids, *others)]
            moe.train()
            losses = []
            for layer in range(2):
                chosen = [row[layer].topk(2).indices for row in all_logits]
                counts_E = torch.bincount(torch.cat(chosen).reshape(-1), minlength=4)
                losses.append(load_balancing_loss(all_logits[0][layer], chosen[0], counts_E=counts_E))
            return torch.stack(losses).mean()

    torch.testing.assert_close(moe(first, labels=first).aux_loss, expected(first))
    torch.testing.assert_close(moe(second, labels=second).aux_loss, expected(second, first))
    update_router_biases(moe)
    assert not any(router.step_counts_E.any() for router in routers)
    torch.testing.assert_close(moe(second, labels=second).aux_loss, expected(second))


def test_sequence_loss_of_a_packed_sequence_is_that_of_its_names(dense: GPT2LMHeadModel) -> None:
    moe = small_model(dense, router_aux_loss_scope="sequence")
    names = [torch.arange(5)[None], torch.arange(30, 39)[None]]
    alone = torch.stack([moe(ids, output_router_logits=True).aux_loss for ids in names]).mean()
    packed = moe(
        torch.cat(names, 1),
        position_ids=torch.cat([torch.arange(5), torch.arange(9)])[None],
        cu_seq_lens_q=torch.tensor([0, 5, 14], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 5, 14], dtype=torch.int32),
        max_length_q=9,
        max_length_k=9,
        use_cache=False,
        output_router_logits=True,
    )
    torch.testing.assert_close(packed.aux_loss, alone)
    by_positions = moe(
        torch.cat(names, 1),
        position_ids=torch.cat([torch.arange(5), torch.arange(9)])[None],
        use_cache=False,
        output_router_logits=True,
    )
    torch.testing.assert_close(by_positions.aux_loss, alone)
    mask = (torch.arange(9)[None] < torch.tensor([[5], [9]])).long()
    batch = torch.cat([F.pad(names[0], (0, 4)), names[1]])
    torch.testing.assert_close(moe(batch, attention_mask=mask, output_router_logits=True).aux_loss, alone)


def test_routing_collapse_shows_and_the_balancing_loss_repairs_it() -> None:
    """All tokens to one of four experts: variation sqrt(3), largest load 4 times the mean, entropy of the loads 0."""
    torch.manual_seed(0)
    router = make_router(GPT2MoEConfig(n_embd=16, n_head=1, n_layer=2, num_experts=4, num_experts_per_tok=1))
    x_TD = torch.randn(256, 16) + 1.0
    with torch.no_grad():
        router.weight.normal_(std=0.1)
        router.weight[0] += 0.5
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)

    def measured() -> dict[str, float]:
        logits_TE, _, experts_TK = router(x_TD)
        router.record(logits_TE, experts_TK, None)
        return router_metrics(nn.ModuleList([router]))

    before = measured()
    assert before["router/0/load_cv"] == pytest.approx(3**0.5)
    assert before["router/0/max_load"] == pytest.approx(4.0) and before["router/0/load_entropy"] == pytest.approx(0.0)
    for _ in range(60):
        logits_TE, _, experts_TK = router(x_TD)
        optimizer.zero_grad()
        load_balancing_loss(logits_TE, experts_TK).backward()
        optimizer.step()
    after = measured()
    assert after["router/0/max_load"] < 2 and after["router/0/load_entropy"] > 0.7


def test_loss_free_bias_repairs_a_collapsed_sigmoid_router() -> None:
    """Wang et al. 2024 with DeepSeek-V3's scores: the bias moves the choice, and never a gate."""
    torch.manual_seed(0)
    fields = {"scoring_func": "sigmoid", "router_bias_update_rate": 0.02, "num_experts_per_tok": 1}
    router = make_router(GPT2MoEConfig(n_embd=16, n_head=1, n_layer=2, num_experts=4, **fields))
    x_TD = torch.randn(256, 16) + 1.0
    with torch.no_grad():
        router.weight.normal_(std=0.1)
        router.weight[0] += 0.5
    loads = []
    for _ in range(60):
        logits_TE, gates_TK, experts_TK = router(x_TD)
        assert gates_TK.eq(1).all()
        router.record(logits_TE, experts_TK, None)
        loads.append(router_metrics(nn.ModuleList([router]))["router/0/max_load"])
        update_router_biases(nn.ModuleList([router]))
    assert loads[0] == pytest.approx(4.0) and loads[-1] < 2


# ------------------------------------------------------------------------------------------------- several processes

RANKS = """
import sys
import torch
from tests.test_models.test_moe_balancing import train_on_a_rank
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
train_on_a_rank(sys.argv[1])
torch.distributed.destroy_process_group()
"""


class WeightedSum(nn.Module):
    """A loss: the layer's output, summed with weights that differ."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD = self.layer(x_TD)
        weight = torch.linspace(-1, 1, out_TD.shape[1], dtype=out_TD.dtype)
        return (out_TD * weight).sum()


def ranked_layer_and_tokens() -> tuple[MoELayer, torch.Tensor]:
    """Three experts. The first half of the tokens goes to expert 0, the second half to expert 1, none to expert 2."""
    torch.manual_seed(0)
    layer = make_layer(3, 1, router_bias_update_rate=0.1).train()
    layer.experts.config._experts_implementation = "fe_experts"
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0], layer.router.weight[2, 0] = 5.0, -5.0, 0.0
    x_TD = torch.randn(10, 12, dtype=torch.float64)
    x_TD[:5, 0], x_TD[5:, 0] = 1.0, -1.0
    return layer, x_TD


def two_steps(model: nn.Module, layer: MoELayer, x_TD: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    """AdamW, clipping and the balancing bias; ``share`` undoes DDP's mean of gradients."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x_TD) / share).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 10.0)
        with torch.no_grad():
            layer.router.record(*layer.router(x_TD)[::2], None)
        optimizer.step()
        update_router_biases(nn.ModuleList([layer]))
    gradients = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    return {**layer.state_dict(), **gradients}


def train_on_a_rank(folder: str) -> None:
    rank = torch.distributed.get_rank()
    layer, x_TD = ranked_layer_and_tokens()
    model = DistributedDataParallel(WeightedSum(layer))
    weights = two_steps(model, layer, x_TD[rank * 5 : rank * 5 + 5], share=0.5)
    torch.save(weights, f"{folder}/rank{rank}.pt")
    torch.save(global_batch_loss(slice(rank, rank + 1)), f"{folder}/aux{rank}.pt")


def global_batch_loss(rows: slice) -> torch.Tensor:
    """The balancing loss of these rows of two, over the tokens of all processes."""
    torch.manual_seed(0)
    config = GPT2MoEConfig(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=50,
        n_positions=32,
        num_experts=4,
        router_aux_loss_scope="global_batch",
    )
    moe = GPT2MoEForCausalLM(config).train()
    for module in moe.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if "router" in name:
                parameter.normal_()
    ids = torch.arange(40).view(2, 20)[rows]
    return moe(ids, labels=ids).aux_loss.detach()


@pytest.mark.slow
def test_an_expert_with_tokens_on_one_process_only(tmp_path: Path) -> None:
    """Two gloo processes under DDP learn what one process with all tokens learns; expert 2 never gets a token."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)],
            env=environment | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    layer, x_TD = ranked_layer_and_tokens()
    assert layer.router(x_TD)[2][:, 0].tolist() == [0] * 5 + [1] * 5
    before = layer.experts.up_proj[2].detach().clone()
    one = two_steps(WeightedSum(layer), layer, x_TD, share=1.0)
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
    for rank in (0, 1):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert not one["experts.up_proj.grad"][2].any() and one["experts.up_proj.grad"][:2].any(dim=(1, 2)).all()
    decayed = before * (1 - 0.1 * 0.01) ** 2
    torch.testing.assert_close(layer.experts.up_proj[2].detach(), decayed, msg="weight decay alone moves it")
    losses = [torch.load(tmp_path / f"aux{rank}.pt", weights_only=True) for rank in (0, 1)]
    together = global_batch_loss(slice(0, 2))
    torch.testing.assert_close(sum(losses) / 2, together)
    assert abs(losses[0] - losses[1]) > 1e-4, "each has its own probabilities, and the counts of both"
