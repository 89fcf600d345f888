"""Many processes learn what one learns: data parallel (DDP), sharded (FSDP2) and expert parallel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.training import TrainingConfig
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.distributed import parallelize_model
from flash_experts.training.run_state import checkpoint_path
from flash_experts.training.tracking import read_metrics
from scripts.scaling_plan import all_to_all_bytes_per_token, memory_per_gpu
from tests.helpers.parallel_runs import CONFIG, MODEL

if not hasattr(os, "fork"):
    pytest.skip("the runs are forked", allow_module_level=True)

STRATEGIES = [(parallel, world) for world in (2, 4) for parallel in ("ddp", "fsdp", "expert")]
MEASURED = {"seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.parallel_runs", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoint_path(run, checkpoint_steps(run)[-1])
    tensors = load_file(last / "model.safetensors")
    # The optimizer's state and the averages are compared too.
    return tensors | {f"state {name}": value for name, value in load_file(last / "trainer_state.safetensors").items()}


def assert_same_log(mine: Path, theirs: Path, rel: float, events: set[str]) -> None:
    """The same metrics, to rounding."""
    logs = [[line for line in read_metrics(run / "metrics.jsonl") if line["event"] in events] for run in (mine, theirs)]
    assert logs[0]
    for line, other in zip(*logs, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - MEASURED:
            is_number = isinstance(other[key], float)
            expected = pytest.approx(other[key], rel=rel, abs=1e-6) if is_number else other[key]
            assert line[key] == expected, (key, line["step"])


def assert_same_checkpoint(mine: Path, theirs: Path) -> None:
    weights, others = weights_of(mine), weights_of(theirs)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        if "interval/" not in name:  # has one entry for each process
            torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "world"), STRATEGIES)
def test_many_processes_are_one(runs: Path, parallel: str, world: int) -> None:
    for variant in ("plain", "muon and average"):
        mine, theirs = runs / f"{variant} {parallel} {world}", runs / f"{variant} ddp 1"
        assert_same_log(mine, theirs, 1e-4, {"train", "validation", "samples"})
        assert_same_checkpoint(mine, theirs)
    log = read_metrics(runs / f"plain {parallel} {world}" / "metrics.jsonl", "train")
    assert all(line["grad_norm"] > 2 * CONFIG.clip_norm for line in log)  # type: ignore[operator]
    assert json.loads((runs / f"plain {parallel} {world}" / "run.json").read_text())["processes"] == world


@pytest.mark.slow
def test_a_run_resumes_with_other_processes_and_another_strategy(runs: Path) -> None:
    """Two steps of fsdp on two processes, then two of expert on four."""
    assert_same_log(runs / "moved", runs / "plain ddp 1", 1e-4, {"train"})
    assert_same_checkpoint(runs / "moved", runs / "plain ddp 1")
    log = (runs / "4.0.log").read_text()  # of the main process
    assert "not as in the checkpoint: processes 4, formerly 2" in log and "not equal to the bit" in log
    assert "not as in the checkpoint: parallel expert, formerly fsdp" in log
    model = GPT2MoEForCausalLM.from_pretrained(runs / "moved")
    assert type(model.transformer.h[1].mlp.experts).__name__ == "Experts" and model.num_parameters() > 0


@pytest.mark.slow
def test_bfloat16_and_global_load_balancing(runs: Path) -> None:
    """Rounded hidden states add up in another order; without prompts, labels are in proportion to tokens."""
    for parallel in ("fsdp", "expert"):
        assert_same_log(runs / f"bfloat16 {parallel} 2", runs / "bfloat16 ddp 1", 1e-2, {"train"})
    one, two = (read_metrics(runs / f"global batch {run}" / "metrics.jsonl", "train") for run in ("ddp 1", "expert 2"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-6)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "world"), STRATEGIES)
def test_memory_and_traffic_are_those_of_the_plan(runs: Path, parallel: Any, world: int) -> None:
    found = json.loads((runs / f"measured {parallel} {world}.json").read_text())
    config = GPT2MoEConfig(vocab_size=300, **MODEL)
    plan = memory_per_gpu(config, parallel, world)
    for part in ("parameters", "gradients", "optimizer"):
        assert found[part] == pytest.approx([getattr(plan, part)] * world, rel=0.01), part
    # The router of so young a model does not balance.
    planned = all_to_all_bytes_per_token(config, world, bytes_per_number=4) if parallel == "expert" else 0
    assert sum(found["all_to_all"]) == pytest.approx(planned * found["tokens"], rel=0.25)


def test_a_wrong_parallel_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="parallel is 'tensor', but it is one of ddp, fsdp, expert"):
        TrainingConfig(parallel="tensor").validate()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile works with parallel: ddp, not with fsdp"):
        TrainingConfig(parallel="fsdp", compile=True).validate()
    tiny = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 8}
    five: Any = SimpleNamespace(num_processes=5)
    with pytest.raises(ValueError, match="distributes experts, but the model has none"):
        parallelize_model(GPT2LMHeadModel(GPT2Config(**tiny)), five, TrainingConfig(parallel="expert"))
    with pytest.raises(ValueError, match="5 processes cannot share 8 experts"):
        model = GPT2MoEForCausalLM(GPT2MoEConfig(**tiny, moe_layer_freq=1))
        parallelize_model(model, five, TrainingConfig(parallel="expert"))
