"""What a run leaves behind: metrics.jsonl always, and a tracker of accelerate where asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from flash_experts.extras import EXTRAS, install_command
from flash_experts.models import GPT2MoEForCausalLM
from flash_experts.training import Callback, Trainer, TrainingConfig
from flash_experts.training.trackers import make_tracker, wandb_mode
from flash_experts.training.tracking import Reporter, read_metrics
from flash_experts.training.training_config import ModelConfig, TrackerName
from tests.helpers.trackers import FakeRun, Kept, made
from tests.test_training import TRAIN, VALIDATION, make_model

TRAIN_FIELDS = {
    *("step", "epoch", "tokens", "seconds", "loss", "aux_loss", "z_loss", "lr", "lr/router", "grad_norm"),
    *("tokens_per_second", "peak_memory_gib", "router/1/load_cv", "router/3/load_entropy", "router/1/top1"),
}
VALIDATION_FIELDS = {"validation/loss", "validation/bits_per_char", "validation/bits_per_char_given_attributes"}
# What a tracker has: the router's statistics over the blocks, and the loads of the experts block by block.
PANELS = {
    *("train/loss", "train/epoch", "train/lr", "train/lr/router", "train/aux_loss", "train/peak_memory_gib"),
    *("eval/loss", "eval/bits_per_char", "eval/bits_per_char_given_attributes", "eval/bits_per_char_mean"),
    *("router/load_cv", "router/max_load", "router/load_entropy", "router/entropy", "router/top1"),
}
LOADS = {"router/load_block_1", "router/load_block_3"}


class Names(Callback):
    """Two names, one of them memorized."""

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Sequence[str]:
        return [TRAIN[0].name, f"Wholly New {step}"]


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="run",
        max_steps=4,
        max_epochs=None,
        tokens_per_batch=75,
        log_every=1,
        eval_every=2,
        sample_every=2,
        checkpoint_every=2,
        device="cpu",
    )


@pytest.fixture
def train(dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast) -> Any:
    def train(config: TrainingConfig, resume: str | None = None, overwrite: bool = False) -> None:
        model = GPT2MoEForCausalLM.from_dense(make_model(dense_config), num_experts=2)
        scale = replace(config.lr_scale, router=2.0)
        data_info = {"source": "embedded"}
        settings = replace(config, lr_scale=scale)
        Trainer(model, tokenizer, TRAIN, VALIDATION, settings, [Names()], data_info).train(resume, overwrite)

    return train


def no_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody has used wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that wandb.init was asked for. There is neither a key nor a network, and a question fails the test."""
    wandb = pytest.importorskip("wandb")
    runs: list[FakeRun] = []

    def fake_init(**started: Any) -> FakeRun:
        runs.append(FakeRun(**started))
        return runs[-1]

    no_wandb_settings(monkeypatch)
    monkeypatch.setattr(wandb, "init", fake_init)
    return runs


def check_run_info(info: dict[str, Any]) -> None:
    """Configuration, commit, versions and hashes of the data."""
    assert info["config"]["tokens_per_batch"] == 75 and info["config"]["lr_scale"]["router"] == 2.0
    assert info["data"]["meta"] == {"source": "embedded"} and len(info["data"]["train_sha256"]) == 64
    assert len(info["data"]["validation_sha256"]) == 64
    assert info["versions"].keys() >= {"python", "torch", "transformers"} and "git_commit" in info


def test_metrics_jsonl_and_run_json_have_everything(train: Any, config: TrainingConfig) -> None:
    train(config)
    path = config.run_dir / "metrics.jsonl"
    lines = read_metrics(path, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() >= TRAIN_FIELDS for line in lines)
    assert all(line["lr/router"] == pytest.approx(2 * line["lr"]) for line in lines)
    assert all(0.05 < line["peak_memory_gib"] < 1000 for line in lines)
    validations = read_metrics(path, "validation")
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert all(line.keys() >= VALIDATION_FIELDS | {"tokens", "seconds"} for line in validations)
    samples = read_metrics(path, "samples")
    assert [line["names"]["new"] for line in samples] == [["Wholly New 2"], ["Wholly New 4"]]
    check_run_info(json.loads((config.run_dir / "run.json").read_text()))
    page = (Path(__file__).parents[2] / "docs/monitoring.md").read_text("utf-8")
    explained = set(re.findall(r"`([\w/]+)`", page))
    for name in {name for line in (*lines, *validations) for name in line} - {"event", "step", "epoch", "tokens"}:
        general = re.sub(
            r"^lr/\w+", "lr", re.sub(r"^router/\d+/(load/)?", "router/B/", name).replace("B/0", "B/load/E")
        )
        assert general in explained or general.rpartition("/")[2] in explained or "/load/" in name, name


def test_a_name_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are, and a model of bytes can write them."""

    class Odd(Callback):
        def on_sample(self, *_: Any) -> Sequence[str]:
            return ["Odd\u2028Name", "Odder\u0085Name"]

    nothing: Any = None
    report = Reporter(tmp_path, [Odd()], [], [], is_main=True)
    report.sample(3, nothing, nothing)
    report.start(3, {}, None)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["names"]["new"] == ["Odd\u2028Name", "Odder\u0085Name"]


def test_run_json_and_wandb_have_the_whole_resolved_configuration(
    workplace: Path,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    wandb_runs: list[FakeRun],
) -> None:
    """Of the command line, and of a `Trainer` made in Python."""
    written = json.loads((workplace / "models/base/run.json").read_text("utf-8"))
    assert set(written["config"]) == {field.name for field in fields(TrainingConfig)}
    assert set(written["origin"]["model"]) == {field.name for field in fields(ModelConfig)}
    assert written["config"]["run_name"] == "base" and written["origin"]["model"]["num_experts"] == 0
    assert written["origin"]["base"] is None and written["origin"]["data"] == "data/mtg"
    assert {len(written["data"][f"{split}_sha256"]) for split in ("train", "validation")} == {64}
    assert written["identity"]["model_config"]["n_embd"] == 32
    settings = TrainingConfig(output_dir=str(tmp_path), max_steps=1, max_epochs=None, device="cpu", tracker="wandb")
    origin = {"base": "models/base", "model": asdict(ModelConfig(granularity=2))}
    trainer = Trainer(dense, tokenizer, TRAIN, [], settings, origin=origin)
    trainer.train()
    (run,) = wandb_runs
    assert run.started["config"] == json.loads((trainer.run_dir / "run.json").read_text("utf-8"))
    assert run.started["config"]["origin"] == origin


def test_wandb_has_all_of_it_offline_and_asks_nothing(
    train: Any, config: TrainingConfig, wandb_runs: list[FakeRun], capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, tracker="wandb"))
    (run,) = wandb_runs
    lines = capsys.readouterr().err.splitlines()
    assert "wandb: recording offline in 'wandb/offline run'" in lines
    assert lines[-1].endswith("wandb sync 'wandb/offline run'")
    assert run.started["mode"] == "offline" and run.is_finished
    check_run_info(run.started["config"])
    assert run.summary == {"reason": "steps", "step": 4}
    by_step: dict[int, dict[str, Any]] = {}
    for step, values in run.logged:
        by_step.setdefault(step, {}).update(values)
    assert sorted(by_step) == [0, 1, 2, 3, 4] and by_step[4].keys() >= PANELS | LOADS
    assert {name.partition("/")[0] for values in by_step.values() for name in values} == {"train", "eval", "router"}
    assert len([name for name in by_step[3] if name.startswith("router/")]) < 10, "few panels, however many experts"
    lines = {line["step"]: line for line in read_metrics(config.run_dir / "metrics.jsonl", "train")}
    loads = by_step[4]["router/load_block_3"]
    assert loads.histogram == [lines[4]["router/3/load/0"], lines[4]["router/3/load/1"]] and loads.bins == [0, 1, 2]
    cv = [lines[4][f"router/{block}/load_cv"] for block in (1, 3)]
    assert by_step[4]["router/load_cv"] == pytest.approx(sum(cv) / 2)
    layers = by_step[4]["router/layers"]
    assert [row[0] for row in layers.data] == [1, 3] and layers.data[1][layers.columns.index("load_cv")] == cv[1]
    table = by_step[2]["eval/samples"]
    assert table.columns == ["group", "name"]
    assert sorted(table.data) == [["in train", TRAIN[0].name], ["new", "Wholly New 2"]]


def test_a_resumed_run_is_the_same_run_of_wandb(
    train: Any, config: TrainingConfig, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    train(replace(config, tracker="wandb", max_steps=2))
    train(replace(config, tracker="wandb"), "auto")
    first, second = (run.started for run in wandb_runs)
    assert first["id"] == second["id"] and first["mode"] == second["mode"] == "online"
    assert first["resume"] == second["resume"] == "allow"
    assert min(step for step, _ in wandb_runs[1].logged) == 3
    train(replace(config, tracker="wandb", run_name="other"))
    assert wandb_runs[2].started["id"] != first["id"]
    train(replace(config, tracker="wandb"), "auto", overwrite=True)
    assert wandb_runs[3].started["id"] != first["id"], "wandb would ignore the steps that the run before has"


def test_without_a_connection_wandb_goes_on_offline(
    config: TrainingConfig, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    fake_init = wandb.init

    def offline_only(mode: str, **started: Any) -> FakeRun:
        if mode == "online":
            raise wandb.errors.CommError("connection\nrefused")
        return fake_init(mode=mode, **started)

    torn_down: list[bool] = []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", offline_only)
    monkeypatch.setattr(wandb, "teardown", lambda: torn_down.append(True))
    shown: list[str] = []
    config.run_dir.mkdir(parents=True)
    tracker = make_tracker("wandb", config.run_dir, 0, shown.append)
    assert tracker is not None
    tracker.on_start("run", {})
    assert shown[0] == "wandb cannot go online (connection refused): recording offline" and torn_down
    assert wandb_runs[0].started["mode"] == "offline"


@pytest.mark.parametrize(
    ("variables", "netrc_hosts", "mode"),
    [
        ({}, (), "offline"),
        ({"WANDB_API_KEY": "0" * 40}, (), "online"),
        ({}, ("api.wandb.ai",), "online"),
        ({}, ("other.example",), "offline"),
        ({"WANDB_BASE_URL": "http://other.example:8080"}, ("other.example",), "online"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "0" * 40}, (), "offline"),
        ({"WANDB_MODE": "disabled"}, (), "disabled"),
        ({"WANDB_MODE": "online"}, (), "offline"),
    ],
)
def test_wandb_is_online_with_a_key_alone(
    variables: dict[str, str],
    netrc_hosts: tuple[str, ...],
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_wandb_settings(monkeypatch)
    (tmp_path / "netrc").write_text("".join(f"machine {host} login user password {'0' * 40}\n" for host in netrc_hosts))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shown: list[str] = []
    assert wandb_mode(shown.append) == mode
    assert bool(shown) == (variables == {"WANDB_MODE": "online"}), (
        "asked for online without a key: a warning, no prompt"
    )


def test_an_unknown_mode_of_wandb_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of line")
    with pytest.raises(ValueError, match="WANDB_MODE is 'of line': set it to online, offline or disabled"):
        wandb_mode(print)


@pytest.mark.slow
def test_a_resumed_offline_run_has_two_parts_that_one_command_uploads_in_order(
    train: Any, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the real wandb writes and finds; the upload itself needs its server."""
    wandb = pytest.importorskip("wandb")
    no_wandb_settings(monkeypatch)
    place = Path(config.output_dir)
    monkeypatch.setenv("WANDB_DIR", str(place))
    settings = replace(config, tracker="wandb", sample_every=None)
    train(replace(settings, max_steps=2))
    first = capsys.readouterr().err.splitlines()[-1]
    ended = int(time.time())
    while int(time.time()) == ended:  # wandb names a part's folder by the second
        time.sleep(0.05)
    train(settings, "auto")
    wandb.teardown()
    run_id = (config.run_dir / "wandb_id.txt").read_text("utf-8").strip()
    parts = sorted(place.glob(f"wandb/offline-run-*-{run_id}"), key=lambda path: path.stat().st_ctime_ns)
    assert len(parts) == 2
    assert first.endswith(f"wandb sync {parts[0]}")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"wandb sync {parts[0]} {parts[1]}")
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0 and "Would sync 2 run(s)" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_real_wandb_writes_a_file_offline(
    train: Any,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    wandb = pytest.importorskip("wandb")
    no_wandb_settings(monkeypatch)
    place = tmp_path / "not there yet"
    monkeypatch.setenv("WANDB_DIR", str(place))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("wandb asked for something"))
    train(replace(config, tracker="wandb"))
    wandb.teardown()  # its own process writes the file, and may do so a moment after the run has ended
    (file,) = place.glob("wandb/offline-run-*/*.wandb")
    assert f"wandb sync '{file.parent}'" in capsys.readouterr().err
    content = file.read_bytes()
    for part in (b"train_sha256", b"eval/bits_per_char", b"router/load_cv", b"router/load_block_1", b"peak_memory_gib"):
        assert part in content
    (table,) = place.glob("wandb/offline-run-*/files/media/table/eval/samples_4_*.json")
    assert "Wholly New 4" in table.read_text("utf-8")


def test_tensorboard_has_all_of_it_and_forgets_what_a_kill_undid(train: Any, config: TrainingConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(config, tracker="tensorboard")
    train(replace(settings, max_steps=3, checkpoint_every=2))
    # As a kill after step 3 would leave it: the checkpoint of step 2 is the last.
    for path in (config.run_dir / "checkpoints/step-000003").iterdir():
        path.unlink()
    (config.run_dir / "checkpoints/step-000003").rmdir()
    train(settings, "auto")
    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= PANELS and set(events.Tags()["histograms"]) == LOADS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4], "no step twice"
    lines = read_metrics(config.run_dir / "metrics.jsonl", "train")
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    last = events.Histograms("router/load_block_1")[-1].histogram_value
    assert last.bucket == pytest.approx([lines[-1][f"router/1/load/{expert}"] for expert in range(2)])
    assert last.bucket_limit == [1, 2] and last.num == pytest.approx(2)
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    info = texts["run/text_summary"][-1].tensor_proto.string_val[0].decode()
    check_run_info(json.loads(info.removeprefix("```json\n").removesuffix("\n```")))
    table = texts["eval/samples/text_summary"][-1].tensor_proto.string_val[0].decode()
    assert "| new | Wholly New 4 |" in table and f"| in train | {TRAIN[0].name} |" in table
    layers = texts["router/layers/text_summary"][-1].tensor_proto.string_val[0].decode().splitlines()
    assert layers[0].startswith("| block | ") and [line[:5] for line in layers[2:]] == ["| 1 |", "| 3 |"]


def test_every_tracker_of_accelerate_has_its_name() -> None:
    assert set(get_args(TrackerName)) == {"none", *LOGGER_TYPE_TO_CLASS}


def test_another_tracker_has_scalars_and_its_failure_does_not_end_the_run(
    train: Any, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made.clear()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", Kept)
    monkeypatch.setattr("flash_experts.training.trackers.is_installed", lambda name: True)
    train(replace(config, tracker="swanlab"))
    (tracker,) = made
    assert tracker.given == ("flash-experts", {"experiment_name": "run"})
    assert tracker.configuration["config.lr_scale.router"] == 2.0
    assert (
        len(tracker.configuration["data.train_sha256"]) == 64 and tracker.configuration["config.betas"] == "[0.9, 0.95]"
    )
    assert max(step for step, _ in tracker.logged) == 2
    values = {name: value for _, logged in tracker.logged for name, value in logged.items()}
    assert values.keys() >= PANELS | {"router/block_1/load_cv", "router/block_3/top1"}
    assert all(isinstance(value, int | float) for value in values.values())
    assert len(read_metrics(config.run_dir / "metrics.jsonl", "train")) == 4
    said = capsys.readouterr()
    assert said.err.count("swanlab has failed (server gone): training continues without it") == 1
    assert "a banner" in said.err and not said.out, "what --json prints stays JSON"


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_warning(
    name: Any,
    train: Any,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    train(replace(config, tracker=name, max_steps=2))
    assert len(read_metrics(config.run_dir / "metrics.jsonl", "train")) == 2
    said = capsys.readouterr().err
    command = install_command(EXTRAS[name]) if name in EXTRAS else f"pip install {name}"
    assert said.count(f"{name} is not installed, which training.tracker needs: {command}") == 1
