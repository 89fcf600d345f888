"""`flash-experts benchmark`: output files, detection of wrong results, one line for bad input. No times are tested."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_experts.benchmarks import TOPICS, attention, attention_baselines, generate, moe, train
from flash_experts.benchmarks.attention_baselines import BatchProblem, DecodeProblem, PackedProblem, Trial
from flash_experts.benchmarks.attention_tables import choices
from flash_experts.benchmarks.report import Report, find_recorded, find_worse, machine_facts, main
from flash_experts.benchmarks.timing import Implementation, Timing, peak_memory, relative_error, time_in_rounds
from flash_experts.cli import main as main_of_commands
from flash_experts.commands import benchmark
from flash_experts.kernels.cpu import has_bfloat16
from tests.helpers.command_line import ok

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MODEL = str(ROOT / "models/mtg-base")


def measured(topic: str, *arguments: str) -> Report:
    """Runs a topic with options parsed as by the command."""
    module: Any = {"attention": attention, "moe": moe, "train": train, "generate": generate}[topic]
    return module.run(benchmark.make_parser().parse_args([topic, "--device", "cpu", *arguments]))


@pytest.mark.slow
def test_attention_as_a_user_runs_it(tmp_path: Path) -> None:
    sizes = "--lengths 16 32 --tokens 32 --width 32 --head_dims 16 --decode-lengths 20 --decode-batches 2 --rounds 1"
    files = f"--names-tokens 200 --tokenizer {MODEL} --out a.json --plot a.png --json"
    done = ok("benchmark", "attention", *sizes.split(), *files.split(), cwd=tmp_path)
    result = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert json.loads(done.out) == result
    assert result["topic"] == "attention" and result["machine"]["versions"]["torch"] == version("torch")
    assert result["machine"]["matmul_tflops"] > 0 and result["settings"]["lengths"] == [16, 32]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    rows = {(row["section"], row["backend"], row["length"], row["causal"]): row for row in result["rows"]}
    ran = {key[1] for key, row in rows.items() if row["reason"] is None}
    assert ran == {"sdpa", "reference", "sdpa_flash", "sdpa_math", "eager"}
    assert "GPU" in rows["batch", "triton", 16, True]["reason"]
    for key, row in rows.items():
        if row["reason"] is None:
            assert row["right"] and row["error_forward"] < 1e-5, key
            assert row["peak_mib"] > 0 and row["forward_ms"] > 0
            assert ("backward_ms" in row) == (key[0] != "decode")
    batch = rows["batch", "sdpa", 16, True]
    flops = 3.5 * 4 * 2 * 16**2 * 32 / 2  # two sequences of 16, 32 wide, half of it masked
    assert batch["both_tflops"] * 1e12 * batch["both_ms"] / 1e3 == pytest.approx(flops)


@pytest.mark.slow
def test_moe_as_a_user_runs_it(tmp_path: Path) -> None:
    (tmp_path / "moe.yaml").write_text("width: 16\nnum_experts: 4\nrounds: 1\ntokens: [8]\n", "utf-8")
    sizes = "--config moe.yaml --granularities 1 4 --decode-tokens 1 3 --out m.json --plot m.png"
    done = ok("benchmark", "moe", *sizes.split(), cwd=tmp_path)
    assert "4 experts of 64, 2 per token" in done.out and "16 experts of 16, 8 per token" in done.out
    assert "liger_kernel: needs a GPU" in done.out and (tmp_path / "m.png").exists()
    rows = json.loads((tmp_path / "m.json").read_text("utf-8"))["rows"]
    for row in rows:
        if row["implementation"] in ("fe_experts", "grouped_mm", "batched_mm", "eager"):
            assert row["right"] and row["seconds"] > 0 and max(row["error_output"], row["error_gradients"]) < 1e-5
        assert row["implementation"] != "dense" or row["times_dense"] == 1
    assert {(row["section"], row["tokens"]) for row in rows} == {("training", 8), ("decoding", 1), ("decoding", 3)}


@pytest.mark.slow
def test_train_and_generate() -> None:
    options = f"--data embedded --tokenizer {MODEL} --names-per-step 2 --steps 1 --layers 2 --experts 2"
    report = measured("train", *options.replace("-per-", "_per_").replace("names-", "names_").split())
    assert [row["name"] for row in report.rows][:2] == ["transformers Trainer, padded", "ours, dense"]
    assert "trimmed" in report.rows[2]["name"]
    assert len(report.rows) == 5 and all(row["tokens_per_second"] > 0 for row in report.rows)
    report = measured("generate", "--model", MODEL, "--count", "4", "--batch_size", "4", "--rounds", "1")
    assert report.rows[0]["times_peer"] == 1 and len(report.rows) == 5
    assert "transformers generate" in report.text
    left_out = [row["name"] for row in report.rows if row["reason"]]
    assert left_out == ([] if has_bfloat16() else ["transformers generate, bfloat16", "ours, bfloat16"])
    assert all(row["names_per_second"] > 0 for row in report.rows if not row["reason"])
    assert ("bfloat16 is emulated" in report.text) == bool(left_out)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "topic"),
        ("atention", 2, "did you mean 'attention'"),
        ("moe --top-q 3", 2, "did you mean 'top_k'"),
        ("moe --tokens many", 2, "tokens"),
        ("moe --tokens 0", 1, "--tokens must be more than 0"),
        ("moe --num-experts 2 --top-k 3", 1, "--top-k 3"),
        ("moe --width 10 --granularities 7", 1, "--granularities 7"),
        ("moe --out nowhere/m.json", 1, "no folder nowhere"),
        ("attention --lengths 100", 1, "--lengths 100 must divide"),
        ("attention --head-dims 48", 1, "--head-dims 48 must divide"),
        ("attention --backends tritn", 2, "tritn"),
        ("train --experts 1", 1, "--experts"),
        ("generate --count 10", 1, "multiple of --batch-size"),
    ],
)
def test_bad_input(
    arguments: str, status: int, message: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from flash_experts import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["benchmark", *arguments.split()]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(moe.run, moe.add_options, ["--device", "cuda", "--decode-tokens=1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- its parts


PROBLEMS = [
    BatchProblem(2, 9, 2, 16, True, CPU, torch.float32),
    BatchProblem(2, 9, 2, 16, False, CPU, torch.float32),
    PackedProblem([3, 1, 7, 2] * 20, 2, 16, CPU, torch.float32),
    DecodeProblem(2, 11, 2, 16, CPU, torch.float32),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["causal", "full", "packed", "decode"])
def test_a_wrong_result_is_detected(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention scores that are a fifth too large."""
    truth = problem.truth()

    def row_of(name: str) -> dict[str, Any]:
        row: dict[str, Any] = {}
        assert attention._first_run(name, problem, truth, row) is not None, row
        return row

    def too_large(given: Any) -> Any:
        trial = attention_baselines._sdpa(torch.nn.attention.SDPBackend.MATH, given)
        return Trial(lambda q, k, v: trial.attend(1.2 * q, k, v), trial.inputs, trial.dout, trial.pick)

    monkeypatch.setitem(attention_baselines.IMPLEMENTATIONS, "eager", too_large)
    assert row_of("sdpa_math")["right"] and not row_of("eager")["right"]


def test_a_failing_implementation_reports_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Any) -> Any:
        raise RuntimeError("no kernel\n for this")

    monkeypatch.setitem(attention_baselines.IMPLEMENTATIONS, "eager", fails)
    row: dict[str, Any] = {}
    problem = PROBLEMS[0]
    assert attention._first_run("eager", problem, problem.truth(), row) is None
    assert row == {"reason": "no kernel for this"}


def test_rows_out_of_time_have_a_reason() -> None:
    options = ["--width", "16", "--tokens", "4", "--decode_tokens", "1", "--rounds", "1"]
    report = measured("moe", *options, "--budget", "1e-9")
    assert {row["reason"] for row in report.rows} == {"out of time (--budget)"}
    assert "out of time" in report.text


def test_auto_picks_the_fastest_correct_selectable_backend() -> None:
    def row(backend: str, both: float, right: bool = True, reason: str | None = None) -> dict[str, Any]:
        size = {"section": "batch", "head_dim": 64, "batch": 1, "length": 512, "causal": True, "reason": reason}
        if reason is not None:
            return size | {"backend": backend}
        times = {"forward_ms": both / 4, "backward_ms": both * 3 / 4, "both_ms": both}
        return size | times | {"backend": backend, "right": right}

    rows = [
        row("triton", 2.0),
        row("sdpa", 3.0),
        row("sdpa_cudnn", 1.0),  # fast, but not selectable in a configuration
        row("flash_attention_2", 0.5, right=False),
        row("flash_attention_3", 0, reason="not installed"),
    ]
    (chosen,) = choices(rows)
    assert chosen["pick"] == "triton" and chosen["baseline"] == "sdpa_cudnn" and chosen["forward"] == 0.5
    (chosen,) = choices(rows[1:])
    assert chosen["pick"] == "sdpa" and chosen["ours"] is None and chosen["forward"] is None


def test_a_regression_is_reported_after_a_second_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(implementation: str, times_dense: float, tokens: int = 8) -> dict[str, Any]:
        return {"implementation": implementation, "tokens": tokens, "times_dense": times_dense, "seconds": 1.0}

    here = machine_facts(CPU)
    old, latest = {"date": "2026-01-01"}, {"date": "2026-02-01"}
    elsewhere = {"date": "2026-03-01", "cpu_capability": "another"}
    for name, machine, times in (("b", old, 9.0), ("a", latest, 2.0), ("c", elsewhere, 9.0)):
        run = {"topic": "moe", "machine": here | machine, "rows": [row("steady", times), row("busy", times)]}
        (tmp_path / f"{name}.json").write_text(json.dumps(run), "utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"topic": "train", "machine": here, "rows": []}), "utf-8")
    recorded = find_recorded(tmp_path, "moe", CPU)
    assert recorded == [row("steady", 2.0), row("busy", 2.0)]
    assert not find_worse([row("steady", 2.19), row("new", 9.0), row("steady", 9.0, tokens=16)], recorded)
    faster, slower = {"name": "ours", "times_peer": 3.0}, {"name": "ours", "times_peer": 2.0}
    assert find_worse([slower], [faster]) and not find_worse([faster], [slower])

    runs = iter([[row("steady", 2.5), row("busy", 3.0)], [row("steady", 2.5), row("busy", 2.0)]])
    monkeypatch.setattr(moe, "measure", lambda args, device: Report("moe", here, {}, next(runs), "", lambda _: None))
    measured("moe", "--check", str(tmp_path))
    assert capsys.readouterr().err.splitlines() == [
        "2 ratios look worse than recorded: measuring them again",
        "warning: times_dense is 2.50, recorded 2.00: steady, tokens 8",
    ]
    with pytest.raises(ValueError, match="no results of generate on this machine"):
        find_recorded(tmp_path, "generate", CPU)
    for model, rate in (("models/mtg-base", 5.0), ("models/mtg-names", 3.0)):
        content = {"topic": "generate", "machine": here, "settings": {"model": model, "batch_size": 64, "rounds": 3}}
        rows = [{"name": "ours", "times_peer": rate}]
        (tmp_path / f"generate_{rate}.json").write_text(json.dumps(content | {"rows": rows}), "utf-8")
    for model, rate in (("models/mtg-base", 5.0), ("models/mtg-names", 3.0)):  # each is compared with its own
        options = Namespace(model=model, batch_size=64, rounds=1)
        assert find_recorded(tmp_path, "generate", CPU, options)[0]["times_peer"] == rate
    with pytest.raises(ValueError, match=r"no results of generate .*model models/mtg-base, batch_size 256"):
        find_recorded(tmp_path, "generate", CPU, Namespace(model="models/mtg-base", batch_size=256))
    for name, content in (("rows", {"machine": here}), ("machine", {"machine": 3, "rows": []})):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / f"elsewhere/{name}.json").write_text(json.dumps({"topic": "moe"} | content), "utf-8")
        with pytest.raises(ValueError, match=rf"{name}\.json: not a results file"):
            find_recorded(tmp_path / f"elsewhere/{name}.json", "moe", CPU)
    (tmp_path / "broken.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: not a results file"):
        find_recorded(tmp_path, "moe", CPU)


def test_all_topics_are_recorded_by_machine_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has its usual options; what was not recorded on such a machine is said, and measured all the same."""
    rows = {topic: [{"name": "ours", "times_peer": 3.0, "reason": None}] for topic in TOPICS}

    def measure(topic: str, args: Any, device: torch.device) -> Report:
        assert args.plot is None and len(vars(args)) > 6, "with all options of the topic"
        return Report(topic, machine_facts(device), {}, rows[topic], f"table of {topic}", lambda _: None)

    for module in (attention, moe, train, generate):
        monkeypatch.setattr(module, "measure", partial(measure, module.__name__.rpartition(".")[2]))
    given = ["benchmark", "all", "--device", "cpu"]
    assert main_of_commands([*given, "--record", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split("\n\n") == [f"table of {topic}" for topic in list(TOPICS)[:3]] + [
        "table of generate\n"
    ]
    recorded = sorted(tmp_path.iterdir())
    assert len(recorded) == 4 and all(f"-{torch.get_num_threads()}-threads.json" in file.name for file in recorded)
    assert main_of_commands([*given, "--record", str(tmp_path)]) == 1 and "--overwrite" in capsys.readouterr().err

    recorded[0].unlink()
    rows["moe"] = [{"name": "ours", "times_peer": 2.0, "reason": None}]
    assert main_of_commands([*given, "--check", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "no results of attention on this machine" in said
    assert "warning: times_peer is 2.00, recorded 3.00: ours" in said and said.count("warning") == 1
    assert main_of_commands([*given, "--check", str(tmp_path / "results")]) == 1


def test_ratios_are_paired_by_round() -> None:
    """The machine was ten times slower in the last round, for both."""
    ours, dense = Timing((), 2.0, None, (2.0, 4.0, 30.0)), Timing((), 1.0, None, (1.0, 2.0, 10.0))
    assert ours.times(dense) == 2.0


def test_rounds_and_parts() -> None:
    order: list[str] = []

    def implementation(name: str) -> Implementation:
        def passed(lap: Any) -> None:
            order.append(name)
            lap()
            lap()

        return Implementation(passed)

    timings = time_in_rounds({"a": implementation("a"), "b": implementation("b")}, CPU, rounds=2, seconds=0)
    assert order == ["a", "b"] * 3, "one round to warm up, then two"
    assert len(timings["a"].parts) == 2 and timings["b"].call is None


def test_peak_memory_counts_live_tensors() -> None:
    x = torch.ones(1000)

    def run() -> torch.Tensor:
        a = x + 1
        b = a * 2  # a and b live
        del a
        return b.view(10, 100) + 1  # b and this live; the view costs nothing

    assert peak_memory(run, CPU) == 2 * x.nbytes


def test_relative_error() -> None:
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error([torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])], [truth, truth]) == 0.25
    assert relative_error([torch.tensor([1.0, float("nan")])], [truth]) == float("inf")


def test_lengths_of_real_names() -> None:
    lengths = attention.name_lengths(500, MODEL)
    assert 450 < sum(lengths) <= 500 and all(3 < length < 60 for length in lengths)
    assert lengths == attention.name_lengths(500, MODEL)
    with pytest.raises(ValueError, match="names-tokens"):
        attention.name_lengths(1, MODEL)
