#!/usr/bin/env bash
# Measures the figures of this folder again, a part at a time:
#
#   measure.sh cpu DIR      two quiet cores: the default run, balance, combine formats, plans, sweeps
#   measure.sh train DIR    one GPU: train step, decoding, drafting, micro-batches and remat compared
#   measure.sh kernels DIR  one GPU: kernels beside the vendor's, LogFMT, accumulation
#   measure.sh loss DIR     one GPU, long: FP8 and rounded branches trained beside BF16
#   measure.sh mesh DIR     all GPUs of the host: meshes and dispatch beside NCCL
#
# Every command writes a JSON file into DIR, nearly all with commit and date, and its words beside it.
# One that fails does not stop the others. Two parts run side by side on two GPUs with
# CUDA_VISIBLE_DEVICES.
set -uo pipefail

part="${1:?which part: cpu, train, kernels, loss or mesh}"
out="${2:?a folder for what is measured}"
mkdir -p "$out"
failed=()

# measure NAME WORDS...: one command; what it prints goes to NAME.log and the end of it to the screen.
measure() {
    local name="$1"
    shift
    echo "+ python -m experiments $*"
    if ! python -m experiments "$@" > "$out/$name.log" 2>&1; then failed+=("$name"); fi
    tail -n 4 "$out/$name.log"
}

# A larger corpus than the library's: the Python sources of all installed packages.
corpus() {
    python - "$out/corpus" <<'PYTHON'
import pathlib, shutil, sys, sysconfig

root, made = pathlib.Path(sysconfig.get_paths()["purelib"]), pathlib.Path(sys.argv[1])
for source in sorted(root.rglob("*.py")):
    target = made / source.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
PYTHON
}

case "$part" in
cpu)
    measure tiny launch --run "$out/tiny" --json "$out/tiny.json"
    measure draft_tiny bench draft "$out/tiny" --json "$out/bench_draft_tiny.json"
    measure balance bench balance --json "$out/balance.json"
    measure combine bench combine tiny --steps 200 --json "$out/combine.json"
    for mesh in fsdp=32,expert=64 data=8,fsdp=16,expert=16 fsdp=16,expert=32,tensor=4 fsdp=8,expert=256
    do
        shape="${mesh//=/}"
        name="plan_v3_fp8_h200x2048_${shape//,/_}"
        measure "$name" plan deepseek_v3 --cluster h200x2048 --precision fp8 --mesh "$mesh" \
            --json "$out/$name.json"
        name="plan_v3_bf16_v5px2048_${shape//,/_}"
        measure "$name" plan deepseek_v3 --cluster v5px2048 --remat full --mesh "$mesh" \
            --json "$out/$name.json"
    done
    measure sweep_v3 sweep deepseek_v3 --cluster h200x2048 --out "$out/sweep_v3" \
        --json "$out/sweep_v3_h200x2048.json"
    measure sweep_tiny sweep tiny --cluster cpux8 --measure --best 20 --out "$out/sweep_tiny" \
        --json "$out/sweep_tiny_cpux8.json"
    measure claims claims --json "$out/claims.json"
    ;;
train)
    for precision in bf16 fp8; do
        measure "train_$precision" bench train peer --precision "$precision" \
            --json "$out/bench_train_$precision.json"
    done
    measure decode bench decode peer --batch 1 128 --precision bf16 \
        --json "$out/bench_decode.json"
    corpus
    measure hundred_million launch hundred_million --run "$out/hundred_million" \
        --data "$out/corpus"
    measure draft bench draft "$out/hundred_million" --prompts 40 --json "$out/bench_draft.json" \
        --out "$out/bench_draft.svg"
    measure sweep_bf16 sweep peer --cluster h200x1 --batch 8 --measure --best 16 \
        --out "$out/sweep_bf16" --json "$out/sweep_peer_bf16.json"
    measure sweep_fp8 sweep peer --cluster h200x1 --precision fp8 --measure --best 16 \
        --out "$out/sweep_fp8" --json "$out/sweep_peer_fp8.json"
    ;;
kernels)
    measure kernels bench kernels --out "$out" --json "$out/bench_kernels.json"
    measure logfmt bench logfmt --out "$out" --json "$out/bench_logfmt.json"
    measure accumulation bench accumulation --json "$out/bench_accumulation.json"
    ;;
loss)
    corpus
    measure tokens bench fp8_loss --data "$out/corpus" --write-tokens "$out/tokens"
    measure residual bench residual --data "$out/tokens" --out "$out/residual" \
        --json "$out/bench_residual.json"
    measure fp8_loss bench fp8_loss --data "$out/tokens" --out "$out/fp8_loss" \
        --json "$out/bench_fp8_loss.json"
    ;;
mesh)
    measure mesh bench mesh peer --json "$out/bench_mesh.json" --picture "$out/bench_mesh.svg"
    measure dispatch bench dispatch --json "$out/bench_dispatch.json" \
        --picture "$out/bench_dispatch.svg"
    measure processes bench mesh peer --processes 2 --micro-batch 4 --no-plan --no-small \
        --json "$out/bench_mesh_processes.json"
    ;;
*)
    echo "error: unknown part '$part': use cpu, train, kernels, loss or mesh" >&2
    exit 2
    ;;
esac
rm -rf "$out/corpus"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "error: these failed, see their logs in $out: ${failed[*]}" >&2
    exit 1
fi
