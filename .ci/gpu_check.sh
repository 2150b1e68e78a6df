#!/usr/bin/env bash
# What only a GPU can tell about this package, in two commands of at most ten and five minutes. In a clone, without a GPU:
#   .ci/gpu_check.sh dry [PARTS]        the same parts on this CPU, tiny, in minutes
#   .ci/gpu_check.sh wheels [MORE]      into .whl: what a machine lacks that has torch, transformers and accelerate and no network (`wheels bitsandbytes`: four bits too)
# On the machine with the GPU, OUT naming a folder for the results (COMMIT, where git is not there):
#   .ci/gpu_check.sh first              520 s: ceilings, exactness, memory and time of every stage, decoding, adapters, launches, all stages of a run
#   .ci/gpu_check.sh second             250 s: four bits, fp16, a notebook's calls, TRL, determinism
#   .ci/gpu_check.sh third              200 s: float32, the first cells of the tutorial for a T4
# In $OUT: results.jsonl (a line per finding, written at once; `cat $OUT/results.jsonl >> results/gpu.jsonl` keeps them), log.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
device=cuda size=gpt2 slack=1 what=${1:-}
parts=("${@:2}")
case "$what" in
wheels)
    # the machine's Python and platform, which need not be those of this one
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do on+=(--platform "${tag}_x86_64"); done
    exec python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" --implementation cp "${on[@]}" -d .whl -c .ci/constraints.txt \
        fastcore pydantic pydantic-core annotated-types typing-inspection typing-extensions httpx datasets dill multiprocess peft trl "${parts[@]}" ;;
dry) device=cpu size=tiny budget=1800 slack=4 OUT=${OUT:-$(mktemp -d)} ;;
first) budget=520 parts=(env exact stages_bf16 decode adapters plain_peft tokens demo) ;;
second) budget=250 parts=(four_bits stages_fp16 demo_fp16 library trl determinism) ;;
third) budget=200 parts=(stages_fp32 t4) ;;
*) sed -n '2,9p' "$0"; exit 2 ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
elif compgen -G '.whl/*.whl' >/dev/null; then
    site=${TMPDIR:-/tmp}/rlhf_nb_wheels
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl
    PYTHONPATH+=:$site
fi
card=cpu
[ "$device" = cpu ] || card=$(python3 -c 'import fastcore, pydantic, transformers, accelerate, torch; print(torch.cuda.get_device_name())')
commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=${COMMIT:-}
echo "$card, commit $commit; results in ${OUT:?name a folder for the results}"
exec python3 .ci/gpu_check.py --out "$OUT" --device $device --size $size --budget $budget --slack $slack --card "$card" --commit "$commit" ${parts:+--parts "${parts[@]}"}
