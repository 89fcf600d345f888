"""Training in processes of its own: several at once, stopped by a signal, killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.data.prepare import prepare
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.training import TrainingConfig, distributed
from tests.test_training import make_model, run


@pytest.fixture
def start(dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder for scripts, with the model's configuration and tokenizer in ``start``."""
    dense_config.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path


def python(script: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts a script that may import this module."""
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_processes(script: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Starts a script twice, in the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    return [python(script, folder, RANK=rank, LOCAL_RANK=rank, **rendezvous) for rank in ("0", "1")]


def until_step_3(process: subprocess.Popen[str]) -> None:
    """Reads a process's lines until it has trained a little."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "step 3 " in line:
            return
    raise AssertionError("".join(seen))


ENDLESS = """
import os
import sys
import torch
from tests.test_training import TRAIN, VALIDATION, make_model
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.training import Trainer, TrainingConfig
from transformers import GPT2Config
folder = sys.argv[1]
open(f"{folder}/pid-{os.environ.get('RANK', 0)}", "w").write(str(os.getpid()))
torch.set_num_threads(1)
config = TrainingConfig(
    output_dir=folder, run_name="run", max_steps=10**6, max_epochs=None, tokens_per_batch=75, log_every=1,
    eval_every=None, checkpoint_every=None, device="cpu",
)
model = make_model(GPT2Config.from_pretrained(folder + "/start"))
result = Trainer(model, load_tokenizer(folder + "/start"), TRAIN, VALIDATION, config).train()
print(result.reason, result.step)
"""


@pytest.mark.slow
def test_sigterm_saves_and_shows_how_to_resume(start: Path) -> None:
    with python(ENDLESS, start) as process:
        until_step_3(process)
        with pytest.raises(ValueError, match="another process is training into"):
            config = TrainingConfig(output_dir=str(start), run_name="run", device="cpu")
            run(make_model(GPT2Config.from_pretrained(start / "start")), load_tokenizer(start / "start"), config)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    reason, step = out.split()
    assert reason == "SIGTERM" and f"stopped after step {step}" in err and 'resume="auto"' in err
    assert (start / "run" / "checkpoints" / f"step-{int(step):06d}" / "MANIFEST.json").is_file()


@pytest.mark.slow
def test_a_dead_process_ends_the_others_soon(start: Path) -> None:
    """Started by torchrun, which sends the others SIGTERM: they must not take it for a wish to save."""
    script = start / "endless.py"
    script.write_text(ENDLESS)
    launch = f"from torch.distributed.run import main\nmain(['--nproc-per-node=2', {str(script)!r}, {str(start)!r}])"
    with python(launch, start) as launcher:
        until_step_3(launcher)
        ranks = [int((start / f"pid-{rank}").read_text()) for rank in range(2)]
        os.kill(ranks[1], signal.SIGKILL)
        _, err = launcher.communicate(timeout=300)  # seconds, on an idle machine; the exchange's own time-out is longer
    assert launcher.returncode == 1
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
    assert "LostProcessError: another process of this run is gone, at step" in err, err[-3000:]
    assert not list((start / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(start: Path) -> None:
    ranks = two_processes(ENDLESS, start)
    until_step_3(ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    results = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert results[0][0] == results[1][0] and results[0][0].startswith("SIGTERM")


TRAIN_COMMAND = """
import sys
import torch
from flash_experts.cli import main
torch.set_num_threads(1)
words = "--model.num-experts 0 --model.n-layer 1 --model.n-embd 16 --model.vocab-size 300 --training.device cpu --json"
limits = "--training.max-steps 2 --training.max-epochs null --training.eval-every null --training.sample-every null"
folders = ["--data", f"{sys.argv[1]}/data", "--training.output-dir", sys.argv[1], "--training.run-name", "run"]
sys.exit(main(["train", *words.split(), *limits.split(), *folders]))
"""


@pytest.mark.slow
def test_two_processes_print_one_json_document(tmp_path: Path) -> None:
    draw = random.Random(0)
    names = ["".join(draw.choices("aeioubdglnrst", k=9)).title() for _ in range(200)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    prepare(tmp_path / "names.txt", tmp_path / "data")
    results = [process.communicate(timeout=300) for process in two_processes(TRAIN_COMMAND, tmp_path)]
    assert json.loads(results[0][0])["step"] == 2, results
    assert results[1][0] == ""


@pytest.mark.slow
def test_a_silent_process_ends_the_others(start: Path) -> None:
    """Stopped, not killed: its connections stay open, as those of a machine that hangs."""
    assert distributed.HEARTBEAT_TIMEOUT_SECONDS < 60
    short_timeout = "from flash_experts.training import distributed\ndistributed.HEARTBEAT_TIMEOUT_SECONDS = 10.0\n"
    ranks = two_processes(short_timeout + ENDLESS, start)
    until_step_3(ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        _, err = ranks[0].communicate(timeout=300)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 1 and "process 1 of this run has been silent for 10 seconds" in err, err[-3000:]
