#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, within ten minutes, with only PyTorch, Triton and transformers installed:
#
#     benchmarks/gpu.sh RESULTS [tests attention moe generate train flex]
#
# Logs, JSON and plots go into the folder RESULTS. A step that fails or times out does not stop the next. Given steps run
# alone; a single step has all ten minutes, since autotuning of a kernel takes minutes.
set -u
cd "$(dirname "$0")/.."
results=${1:?usage: benchmarks/gpu.sh RESULTS [STEP ...]}
shift
steps=${*:-tests attention moe generate train flex}
mkdir -p "$results"
results=$(cd "$results" && pwd)
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python=${PYTHON:-python3}
failed=
alone=
[ "$(wc -w <<<"$steps")" = 1 ] && alone=yes

# step NAME SECONDS COMMAND...: runs a selected step; its output goes to the screen and to NAME.log.
step() {
    local name=$1 seconds=${alone:+590}
    seconds=${seconds:-$2}
    shift 2
    case " $steps " in *" $name "*) ;; *) return ;; esac
    echo "=== $name ($(date +%T))"
    if ! timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$results/$name.log"; then
        echo "=== $name failed, or ran longer than $seconds s"
        failed="$failed $name"
    fi
}

# budget SECONDS: time after which a benchmark starts no further size, to leave time for its tables.
budget() {
    if [ -n "$alone" ]; then echo 540; else echo "$1"; fi
}

# benchmark NAME SECONDS TOPIC [OPTIONS]: writes NAME.json.
benchmark() {
    local name=$1 seconds=$2 topic=$3
    shift 3
    step "$name" "$seconds" "$python" -m "flash_experts.benchmarks.$topic" --device cuda --out "$results/$name.json" \
        ${plot:+--plot "$results/$name.png"} "$@"
}

plot=
"$python" -c 'import matplotlib' 2>/dev/null && plot=yes
set -o pipefail
step tests 140 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_kernels
# FlexAttention compiles for seconds per size, so it runs last, as a step of its own.
backends="triton sdpa sdpa_flash sdpa_efficient sdpa_cudnn sdpa_math sdpa_nested varlen_attn eager"
packages="flash_attention_2 flash_attention_3 flash_attention_4"
benchmark attention 180 attention --budget $(budget 150) --backends $backends $packages
benchmark moe 80 moe --budget $(budget 50)
benchmark generate 45 generate --count 2048 --batch-size 512
benchmark train 55 train --data embedded --tokenizer models/mtg-base --names-per-step 1024 --steps 10
benchmark flex 90 attention --budget $(budget 45) --backends triton sdpa_flash sdpa_cudnn flex --sections packed batch \
    --masks causal --lengths 1024 4096 16384
echo "=== done ($(date +%T)); results in $results${failed:+; failed:$failed}"
[ -z "$failed" ]
