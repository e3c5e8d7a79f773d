#!/usr/bin/env python3
"""Moebius and a peer in turns (A B A B) on one machine, as ratios of medians.

  compare.py --what prefill-512 --moebius target/release/moebius --model SLICE --gguf SLICE.gguf --csv FILE

First every setting of the peer is tried on every --gguf, and the fastest is kept; then the two take
turns, each turn a process of its own: a warm-up, then timed runs. With --minus and --minus-gguf a turn
also times a second, smaller model and subtracts it: one K2 MoE layer is `kimi-k2-moe` less
`kimi-k2-dense`. The peer then computes logits for all tokens, because llama.cpp gives its last layer's
FFN only tokens whose logits are wanted. Without --moebius only the peer's settings are timed.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAIR_SHARE = 0.95
COLUMNS = (
    "date machine threads what model options round moebius_seconds peer peer_version peer_model peer_setting"
    " peer_seconds peer_cpu_share ratio"
).split()


def rows_of(command):
    """The JSON rows that a command prints."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def moebius_command(args, model):
    kind, _, count = args.what.partition("-")
    command = [args.moebius.resolve(), "bench", kind, model, "--json", "--threads", args.threads]
    if kind == "prefill":
        command += ["--tokens", count]
    elif count:
        command += ["--batch", count]
    return command + args.options.split()


def moebius_seconds(args, model):
    """Of the whole step; the rows of its parts are not for comparison."""
    for row in rows_of(moebius_command(args, model)):
        if row["name"] == args.what:
            return row["seconds_median"]
    sys.exit(f"moebius bench printed no row named {args.what}")


def is_mla(gguf):
    with open(gguf, "rb") as file:  # The architecture is the first of the header's values.
        return b"deepseek2" in file.read(4096)


def settings(args):
    """All that the peer can be told that may help."""
    prefill = args.what.startswith("prefill")
    if args.peer == "ik_llama.cpp":
        options = [["--repack", "off", "--mmap", "on"], ["--repack", "on", "--mmap", "off"]]
        more = [["--mla", mla] for mla in ("3", "1")] if is_mla(args.gguf[0]) else [[]]
    else:
        loads = itertools.product(("on", "off"), ("on", "off"))
        options = [["--repack", repack, "--mmap", mmap] for repack, mmap in loads]
        more = [["--flash", "on"], ["--flash", "off"]] if prefill else [[]]
    # A micro-batch of 2048 is the same as one of 512 for 512 tokens.
    tokens = int(args.what.partition("-")[2] or 1)
    sizes = [["--ubatch", "512"]] + ([["--ubatch", "2048"]] if prefill and tokens > 512 else [])
    return [sum(parts, []) for parts in itertools.product(options, more, sizes)]


def peer_row(args, gguf, setting, runs):
    script = HERE / ("ik_llama.py" if args.peer == "ik_llama.cpp" else "llama_cpp.py")
    place = ["--ik", args.ik] if args.peer == "ik_llama.cpp" else ["--venv", args.venv] if args.venv else []
    all_logits = ["--all-logits"] if args.minus_gguf else []
    command = [sys.executable, script, "measure", gguf, "--what", args.what, "--threads", args.threads]
    command += ["--runs", runs, "--patience", args.patience, *place, *setting, *all_logits]
    row = rows_of(command)[-1]
    if not row.get("logits_finite", True):
        sys.exit(f"{gguf}: logits are not finite; such a run proves nothing")
    return row


def peer_seconds(args, gguf, setting, runs, field="seconds_median"):
    row = peer_row(args, gguf, setting, runs)
    if not args.minus_gguf:
        return row[field], row
    less = peer_row(args, args.minus_gguf, setting, runs)
    row["cpu_share"] = min(row["cpu_share"], less["cpu_share"])
    return row[field] - less[field], row


def show(args, seconds, row):
    rss, share = row["peak_rss_bytes"] / 2**30, row["cpu_share"]
    disturbed = "" if share >= FAIR_SHARE else f"  DISTURBED: had {share:.0%} of the cores"
    print(f"{args.what}  {seconds}  {row['model']}  {row['setting']}  peak {rss:.1f} GiB{disturbed}", flush=True)


def machine():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", default="decode", help="decode, decode-16, prefill-512, prefill-2048")
    add("--moebius", type=Path, help="its binary")
    add("--model", help="Moebius's checkpoint folder")
    add("--minus", help="the checkpoint to subtract")
    add("--options", default="", help="more options for Moebius, e.g. '--activations int8'")
    add("--gguf", action="append", required=True, help="may be given more than once (Q4_0, Q4_K): the best counts")
    add("--minus-gguf", help="the GGUF to subtract")
    add("--peer", choices=["llama.cpp", "ik_llama.cpp"], default="llama.cpp")
    add("--venv", help="of llama_cpp.py install")
    add("--ik", help="a built checkout of ik_llama.cpp")
    add("--threads", type=int, default=os.cpu_count())
    add("--rounds", type=int, default=3)
    add("--runs", type=int, default=5, help="timed runs of the peer in a turn; Moebius has its own number")
    add("--tune-runs", type=int, default=3, help="timed runs of each setting while the best is sought")
    add("--patience", type=int, default=0, help="seconds for which a peer's disturbed runs are made again")
    add("--csv", type=Path)
    args = parser.parse_args()
    if args.moebius and bool(args.minus) != bool(args.minus_gguf):
        parser.error("--minus and --minus-gguf go together")

    tried = []
    for gguf, setting in itertools.product(args.gguf, settings(args)):
        # The minimum, which a passing disturbance does not change.
        seconds, row = peer_seconds(args, gguf, setting, args.tune_runs, "seconds_min")
        # Rows that others disturbed go last; a difference of such may even be negative.
        tried.append((row["cpu_share"] < FAIR_SHARE, seconds, gguf, setting))
        show(args, f"least {seconds:.4f} s", row)
    _, _, gguf, setting = min(tried)
    if not args.moebius:
        return

    ratios, lines = [], []
    for number in range(args.rounds):
        ours = moebius_seconds(args, args.model)
        ours -= moebius_seconds(args, args.minus) if args.minus else 0.0
        theirs, row = peer_seconds(args, gguf, setting, args.runs)
        ratios.append(theirs / ours)
        show(args, f"{theirs:.4f} s", row)
        print(f"round {number + 1}: Moebius {ours:.4f} s, ratio {ratios[-1]:.3f}", flush=True)
        values = [
            time.strftime("%Y-%m-%dT%H:%M:%S"), machine(), args.threads, args.what, Path(args.model).name,
            args.options, number + 1, f"{ours:.6f}", args.peer, row["peer_version"], row["model"], row["setting"],
            f"{theirs:.6f}", f"{row['cpu_share']:.3f}", f"{ratios[-1]:.4f}",
        ]
        lines.append(dict(zip(COLUMNS, values)))
    print(f"{args.what}: {args.peer} / Moebius {statistics.median(ratios):.3f} (median of {len(ratios)} rounds)")
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
