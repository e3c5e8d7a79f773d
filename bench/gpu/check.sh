#!/bin/sh
# Checks the CUDA kernels on this machine's device, and how fast they are: see README.md.
#
#   ./check.sh RESULTS [DEVICE]
#
# Every stage has its own time limit, about nine minutes in all, and ends with a line `stage NAME: ok|SKIP|FAILED`. All
# output is in RESULTS/log.txt, rows in RESULTS/*.json and *.csv. Where results are wrong, no times are taken.
# BENCH_OPTIONS in the environment go to every `moebius bench gpu`: --quick, for instance.
set -u

here=$(cd "$(dirname "$0")" && pwd)
results=${1:-results}
device=${2:-0}
mkdir -p "$results"
results=$(cd "$results" && pwd)
log=$results/log.txt
status=0
export BENCH_OPTIONS="${BENCH_OPTIONS:-}"
: >"$log"
export CUDA_VISIBLE_DEVICES="$device" CUDA_DEVICE_ORDER=PCI_BUS_ID

say() {
    echo "$*" | tee -a "$log"
}

# stage NAME SECONDS COMMAND...: runs it, everything into the log.
stage() {
    name=$1 limit=$2
    shift 2
    say "stage $name: begins ($limit s at most)"
    begun=$(date +%s)
    {
        timeout -k 5 "$limit" "$@" 2>&1
        echo $? >"$results/.status"
    } | tee -a "$log"
    code=$(cat "$results/.status")
    rm -f "$results/.status"
    seconds=$(($(date +%s) - begun))
    case $code in
        0) say "stage $name: ok, $seconds s" ;;
        77) say "stage $name: SKIP" && code=0 ;;
        124 | 137) say "stage $name: FAILED, not done after $limit s" ;;
        *) say "stage $name: FAILED with status $code, $seconds s" ;;
    esac
    [ "$code" -eq 0 ] || status=1
    return "$code"
}

skip() {
    say "stage $1: SKIP, $2"
}

# The first of some tools that is there.
find_tool() {
    command -v "$1" 2>/dev/null || ls -d /usr/local/cuda*/bin/"$1" /opt/nvidia/nsight-compute/*/"$1" 2>/dev/null | head -1
}

command -v nvidia-smi >/dev/null && nvidia-smi 2>&1 | tee -a "$log"

# bench STAGE SECONDS: rows to RESULTS/STAGE.json, which is whole up to where the stage ended, and to the CSV.
bench() {
    stage "$1" "$2" sh -c '"$1/moebius" bench gpu $BENCH_OPTIONS --only "$2" --csv "$3/rows.csv" --json >"$3/$2.json"' \
        sh "$here" "$1" "$results"
}

correct=1
bench ceilings 20 || correct=0
if [ $correct = 1 ]; then
    MOEBIUS_CUDA=device
    export MOEBIUS_CUDA
    stage tests 60 "$here/cuda-tests" --test-threads 1 || correct=0
    bench correctness 115 || correct=0
fi
if [ $correct = 0 ]; then
    say "result: FAILED; no times are taken of what is wrong"
    exit 1
fi

sanitizer=$(find_tool compute-sanitizer)
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck; do
        stage "$tool" 30 "$sanitizer" --tool $tool --error-exitcode 9 --launch-timeout 30 \
            "$here/gpu-tests" --exact all_stages_pass_and_rows_are_whole
    done
else
    skip sanitizer "compute-sanitizer is not installed"
fi

bench timings 160

ncu=$(find_tool ncu)
if [ -n "$ncu" ]; then
    metrics=dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_issued.avg.pct_of_peak_sustained_active
    metrics=$metrics,l1tex__data_bank_conflicts_pipe_lsu.sum,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
    metrics=$metrics,gpu__time_duration.sum
    # What takes most of a decode step: the products of experts, and over a long context attention.
    for kernels in 'experts_(up|down)_int4' 'mla_bf16'; do
        file=$results/counters-${kernels%%_*}.csv
        # It ends the program after some launches, which is no failure.
        stage "counters-${kernels%%_*}" 25 sh -c 'file=$1; shift; "$@" >/dev/null; test -s "$file"' sh "$file" \
            "$ncu" --clock-control none --metrics "$metrics" --csv --log-file "$file" \
            --kernel-name "regex:$kernels" --launch-count 4 --kill yes \
            "$here/moebius" bench gpu --only timings --quick --json
    done
else
    skip counters "ncu is not installed"
fi

if python3 -c 'import torch' 2>/dev/null; then
    stage reference 50 sh -c 'python3 "$1" >"$2"' sh "$here/reference.py" "$results/reference.csv"
else
    skip reference "there is no PyTorch"
fi

[ $status = 0 ] && say "result: ok" || say "result: FAILED"
exit $status
