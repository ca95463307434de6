#!/usr/bin/env bash
# All that needs a GPU, in at most ten minutes, as one Markdown table for docs/benchmarks.md:
#   bash benchmarks/gpu.sh > gpu.md             four networks
#   bash benchmarks/gpu.sh NAME... > gpu.md     these networks; all for every one that there is
#   bash benchmarks/gpu.sh --dry-run            whether it runs, on any machine: few images of 32 px
# What it is doing stands on stderr. A part that fails, or takes too long, costs its rows and not the table.
# PYTHON names another Python than .venv's, GPU_SECONDS another time than ten minutes.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-.venv/bin/python}
end=${GPU_SECONDS:-590}
dry=()
if [ "${1:-}" = --dry-run ]; then dry=(--dry_run) && shift; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

blank=" – | – | – | – | – | – | – | – | – |" # cells between what and result

row() { # what, result
    echo "| $1 |$blank ${2//|//} |"
}

part() { # most seconds, what, command: its rows, and one more if it fails
    local most=$1 what=$2 left=$((end - SECONDS)) code reason
    shift 2
    if [ "$most" -gt "$left" ]; then most=$left; fi
    if [ "$most" -lt 3 ]; then
        row "$what" "not run: the time is over"
        return
    fi
    echo "$SECONDS s: $what, at most $most s" >&2
    timeout -k 2 "$most" "$@" 2> "$folder/errors"
    code=$?
    if [ $code = 124 ] || [ $code = 137 ]; then
        row "$what" "stopped after $most s"
    elif [ $code != 0 ]; then
        reason=$(tail -n 1 "$folder/errors" | cut -c 1-200)
        row "$what" "failed${reason:+: $reason}"
    fi
}

cards=$("$python" -c 'import torch; print(torch.cuda.device_count())') || cards=0
if [ "$cards" = 0 ] && [ ${#dry[@]} = 0 ]; then
    echo "no CUDA device: a dry run" >&2
    dry=(--dry_run)
fi
if [ $# = 0 ]; then set -- fcn_resnet50 fcn_resnet50_s4 deeplabv3_resnet50 unet:resnet34; fi
networks=("$@")
if [ "$1" = all ]; then
    list='from pneumo_experiments.learning.network import NETWORKS; print(*NETWORKS)'
    read -r -a networks <<< "$("$python" -c "$list")"
fi
train=("$python" benchmarks/train.py --folder "$folder" ${dry[@]+"${dry[@]}"})

# The most important first: what is late may find no time left.
part 60 head "${train[@]}" --head
part 60 "usual script" "${train[@]}" --rows "usual script"
for name in "${networks[@]}"; do part 70 "$name" "${train[@]}" --rows "$name"; done
part 110 checks "${train[@]}" --check |
    sed -nE "/^\|/{p;d}; s,\|,/,g; s/^([^:|]+): ((ok|FAILED|not checked).*)/| check \\1 |$blank \\2 |/p"
device_tests="ends_in_a_model or waits_for_nothing_in_a_step"
if [ "$cards" -gt 0 ]; then export PNEUMO_REAL_CUDA=1 PNEUMO_KILLS=10; fi # soak: the large networks, too
part 60 "tests on the device" "$python" -m pytest -n 0 -p no:cacheprovider tests/on_simulated_cuda.py \
    -k "$device_tests" |
    sed -nE "/^\|/{p;d}; s,\|,/,g; s/^(FAILED .*|ERROR .*|[0-9]+ (passed|failed).*)/| tests on the device |$blank \\1 |/p"
if [ "$cards" -ge 2 ] || [ ${#dry[@]} != 0 ]; then
    part 60 "two processes" "${train[@]}" --rows "${networks[0]}" --processes 2
else
    row "two processes" "not run: one card"
fi
if [ ${#dry[@]} != 0 ]; then
    row compile "not run: a dry run, and the checks have it"
else
    for name in "${networks[@]}"; do part 100 "$name, compile" "${train[@]}" --rows "$name" --compile; done
fi
echo "$SECONDS s in all" >&2
