#!/bin/sh
# Checks the CUDA kernels on this machine's device, and how fast they are: see README.md.
#
#   ./check.sh [RESULTS [DEVICE [STAGE...]]]
#
# Every stage has its own time limit, and all together have BUDGET seconds (570 where the environment does not say
# otherwise). A stage ends with a line `stage NAME: ok|SKIP|FAILED`, and the next one runs whatever it was. All output is
# in RESULTS/log.txt, rows in RESULTS/*.json and *.csv: a call overwrites those of the call before. Where STAGEs are
# named only they run, after the ceilings. BENCH_OPTIONS in the environment go to every `moebius bench gpu` (--quick, for
# instance), REFERENCE_OPTIONS to reference.py, which PYTHON runs.
#
# Exit status: 0, 1 if a stage failed, 2 for wrong arguments, 77 if there is no device to check.
set -u

# What is worth most comes first: the budget may end, and a machine with a device be taken away.
all='ceilings correctness tests timings reference counters memcheck racecheck synccheck'
here=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in
    -*)
        echo "usage: $0 [RESULTS [DEVICE [STAGE...]]], stages: $all" >&2
        exit 2
        ;;
esac
results=${1:-results}
device=${2:-0}
wanted=$all
if [ $# -gt 2 ]; then
    shift 2
    wanted=$*
fi
for name in $wanted; do
    case " $all " in
        *" $name "*) ;;
        *) echo "$0: $name is none of: $all" >&2 && exit 2 ;;
    esac
done
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
log=$results/log.txt
: >"$log" || exit 2
rm -f "$results"/*.json "$results/rows.csv" "$results/reference.csv" "$results/counters.csv"
export BENCH_OPTIONS="${BENCH_OPTIONS:-}" REFERENCE_OPTIONS="${REFERENCE_OPTIONS:-}" PYTHON="${PYTHON:-python3}"
export CUDA_VISIBLE_DEVICES="$device" CUDA_DEVICE_ORDER=PCI_BUS_ID
# The tests take the machine's device and not the mock.
export MOEBIUS_CUDA=device
begun=$(date +%s)
budget=${BUDGET:-570}
failed='' skipped=''

say() {
    echo "$*" | tee -a "$log"
}

skip() {
    say "stage $1: SKIP, $2"
    skipped="$skipped $1"
}

# stage NAME SECONDS COMMAND...: runs it, everything into the log. (Not through a pipe: its reader would wait for what
# cannot be ended, such as a process that hangs in the driver.)
stage() {
    name=$1 limit=$2
    shift 2
    from=$(date +%s)
    left=$((begun + budget - from))
    if [ "$left" -lt 5 ]; then
        skip "$name" "no time is left of $budget s"
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    say "stage $name: begins ($limit s at most)"
    before=$(wc -l <"$log")
    # As Ctrl-C: `moebius bench` ends its measurement and writes the CSV.
    timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null
    code=$?
    seconds=$(($(date +%s) - from))
    case $code in
        0) say "stage $name: ok, $seconds s" && return 0 ;;
        77) skip "$name" "$(tail -n 1 "$log" | sed 's/^SKIP: //')" && return 0 ;;
    esac
    # Why, for those who have no more than this output.
    tail -n +$((before + 1)) "$log" | tail -n 12
    case $code in
        124 | 137) say "stage $name: FAILED, not done after $limit s" ;;
        *) say "stage $name: FAILED with status $code, $seconds s" ;;
    esac
    failed="$failed $name"
    return "$code"
}

asked() {
    case " $wanted " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

# The first of some tools that is there.
find_tool() {
    command -v "$1" 2>/dev/null || ls -d /usr/local/cuda*/bin/"$1" /opt/nvidia/nsight-compute/*/"$1" 2>/dev/null | head -1
}

# bench STAGE SECONDS [NAME]: rows to RESULTS/STAGE.json, which is whole up to where the stage ended, and to the CSV when
# it ended by itself or at its limit. (The trap makes this shell wait for it: what outlives a stage disturbs the next.)
bench() {
    stage "${3:-$1}" "$2" sh -c \
        'trap : INT; "$1/moebius" bench gpu $BENCH_OPTIONS --only "$2" --csv "$3/rows.csv" --json >>"$3/$2.json"' \
        sh "$here" "$1" "$results"
}

# part STAGE SECONDS PART OTHERS: one part of a stage in a process of its own, for after some errors a process cannot use
# its device any more. Where experts end in such an error, or hang, they are tried without the kernels that are Hopper's.
part() {
    stage_of=$1 limit_of=$2 part_of=$3 others=$4
    export MOEBIUS_BENCH_GPU_WITHOUT="$others"
    if ! bench "$stage_of" "$limit_of" "$stage_of-$part_of" && [ "$part_of" = experts ]; then
        if [ "$code" = 124 ] || [ "$code" = 137 ] || tail -n +$((before + 1)) "$log" | grep -q 'a part FAILED'; then
            MOEBIUS_BENCH_GPU_WITHOUT="$others wgmma"
            bench "$stage_of" "$limit_of" "$stage_of-experts-without-wgmma"
        fi
    fi
    unset MOEBIUS_BENCH_GPU_WITHOUT
}

# counters NAME KERNELS: of the first launches of some kernels.
counters() {
    # It ends the program after some launches, which is no failure; what it could not read is. Where a device has no
    # such kernel there is nothing to read.
    stage "counters-$1" 30 sh -c 'file=$1; shift; "$@" >/dev/null; cat "$file"; grep -q dram__throughput "$file" ||
        { ! grep "No kernels were profiled" "$file" || exit 77; exit 1; }' \
        sh "$results/counters-$1.csv" \
        "$ncu" --clock-control none --metrics "$metrics" --csv --log-file "$results/counters-$1.csv" \
        --kernel-name "regex:$2" --launch-count 4 --kill yes \
        "$here/moebius" bench gpu --quick $BENCH_OPTIONS --only timings --json
    if [ -e "$results/counters-$1.csv" ]; then
        cat "$results/counters-$1.csv" >>"$results/counters.csv"
        rm "$results/counters-$1.csv"
    fi
}

sanitize() {
    tool=$1
    shift
    sanitizer=$(find_tool compute-sanitizer)
    if [ -n "$sanitizer" ]; then
        stage "$tool" 40 "$sanitizer" --tool "$tool" "$@" --error-exitcode 9 --launch-timeout 30 \
            "$here/gpu-tests" --exact all_stages_pass_and_rows_are_whole --nocapture
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
}

if command -v nvidia-smi >/dev/null; then
    timeout -k 5 20 nvidia-smi >>"$log" 2>&1 </dev/null || say "nvidia-smi: status $?"
fi

if ! bench ceilings 30 && grep -q 'nothing to check here' "$log"; then
    say "result: SKIP, there is no device"
    exit 77
fi

# Correctness goes first: it has the shapes of a model.
if asked correctness; then
    part correctness 90 experts 'attention dense'
    part correctness 60 attention 'experts dense'
    part correctness 60 dense 'experts attention'
fi
if asked tests; then
    # What models need most comes first.
    modules='experts attention dense route group finalize'
    all_modules=$(timeout 20 "$here/cuda-tests" --list 2>>"$log" </dev/null | sed -n 's/::.*: test$//p' | sort -u)
    for module in $all_modules; do
        case " $modules " in *" $module "*) ;; *) modules="$modules $module" ;; esac
    done
    for module in $modules; do
        # A process of its own for each, as above.
        stage "tests-$module" 40 "$here/cuda-tests" "$module::" --test-threads 1
    done
fi
case " $failed " in
    *" tests"* | *" correctness"*)
        say "NOTE: not all that was checked is right; what follows may be times of wrong results"
        echo "# tests or correctness failed on this device: see log.txt" >>"$results/rows.csv"
        ;;
esac

if asked timings; then
    part timings 120 experts 'attention dense layer'
    part timings 60 attention 'experts dense layer'
    part timings 60 layer 'experts attention dense'
    part timings 60 dense 'experts attention layer'
fi

if asked reference; then
    if command -v "$PYTHON" >/dev/null; then
        stage reference 80 sh -c '"$PYTHON" "$1" $REFERENCE_OPTIONS >"$2"' sh "$here/reference.py" "$results/reference.csv"
    else
        skip reference "there is no $PYTHON"
    fi
fi

if asked counters; then
    ncu=$(find_tool ncu)
    if [ -n "$ncu" ]; then
        metrics=dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_issued.avg.pct_of_peak_sustained_active
        metrics=$metrics,l1tex__data_bank_conflicts_pipe_lsu.sum,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
        metrics=$metrics,gpu__time_duration.sum
        # What takes most of a decode step, over a long context attention; then what takes most of a prefill.
        counters few 'experts_(up|down)_int4_few'
        MOEBIUS_BENCH_GPU_WITHOUT='experts dense layer'
        export MOEBIUS_BENCH_GPU_WITHOUT
        counters mla '^mla_bf16'
        unset MOEBIUS_BENCH_GPU_WITHOUT
        counters wgmma 'experts_(up|down)_int4_wgmma'
        counters wide 'experts_(up|down)_int4_wide'
    else
        skip counters "ncu is not installed"
    fi
fi

# Errors that the program handles, such as a driver's answer that it does not know something, are none of the kernels'.
! asked memcheck || sanitize memcheck --report-api-errors no
! asked racecheck || sanitize racecheck
! asked synccheck || sanitize synccheck

[ -z "$skipped" ] || say "skipped:$skipped"
if [ -n "$failed" ]; then
    grep -h '^WRONG: \|a part FAILED' "$log" | head -n 20
    say "result: FAILED:$failed"
    exit 1
fi
say "result: ok${skipped:+, except what was skipped}"
