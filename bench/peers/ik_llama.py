#!/usr/bin/env python3
"""ik_llama.cpp as a peer, on the GGUF files of llama_cpp.py: one row of JSON, as `moebius bench --json`.

  ik_llama.py measure FILE --ik CHECKOUT --what decode

CHECKOUT is a clone that the user has built with shared libraries (its default), for example with
`cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama`. None of its code is kept here.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(checkout):
    """The timing program; compiled again when its source or the library is newer."""
    checkout, source = Path(checkout).resolve(), HERE / "ik_step.c"
    libraries = [next((checkout / "build").rglob(name), None) for name in ("libllama.so", "libggml.so")]
    if None in libraries:
        sys.exit(f"{checkout}/build holds no libllama.so and libggml.so: build ik_llama.cpp first")
    program = Path(tempfile.gettempdir()) / "moebius-peers" / "ik_step"
    newest = max(path.stat().st_mtime for path in [source, *libraries])
    if not program.exists() or program.stat().st_mtime < newest:
        program.parent.mkdir(exist_ok=True)
        include = [f"-I{checkout / 'include'}", f"-I{checkout / 'ggml' / 'include'}"]
        link = [f"-Wl,-rpath,{path.parent}" for path in libraries]
        command = [os.environ.get("CC", "cc"), "-O2", source, *include, *libraries, *link, "-o", program]
        subprocess.run(command, check=True)
    return program


def version(checkout):
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def measure(args):
    what, _, count = args.what.partition("-")
    count = int(count or 1)
    flags = [int(args.mmap == "on"), int(args.repack == "on"), args.mla, int(args.all_logits), int(args.verbose)]
    numbers = [count, args.threads, args.warmup, args.runs, args.patience, args.ubatch, *flags]
    command = [build(args.ik), args.file, what, *map(str, numbers)]
    stderr = None if args.verbose else subprocess.PIPE
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode:
        sys.exit(f"{args.file}: {(done.stderr or '').strip()[-500:]}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Its library prints now and then to stdout as well.
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    runs = [(float(line[1]), float(line[2])) for line in lines]
    # As llama_cpp.py: what counts is the runs that other programs disturbed least.
    seconds, shares = zip(*sorted(runs, key=lambda run: run[1])[-args.runs :])
    median = statistics.median(seconds)
    setting = [f"repack={args.repack}", f"mmap={args.mmap}", f"mla={args.mla}"]
    setting += [f"ubatch={args.ubatch}"] if what == "prefill" else []
    row = {
        "name": args.what,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": len(seconds),
        "tokens_per_second": count / median,
        "threads": args.threads,
        "model": Path(args.file).stem,
        "peer": "ik_llama.cpp",
        "peer_version": version(args.ik),
        "setting": " ".join(setting + (["all-logits"] if args.all_logits else [])),
        "cpu_share": min(shares),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    print(json.dumps(row), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_subparsers(required=True).add_parser("measure").add_argument
    add("file")
    add("--ik", required=True, metavar="CHECKOUT")
    add("--what", default="decode", help="decode, decode-N (sequences) or prefill-N (tokens)")
    add("--threads", type=int, default=os.cpu_count())
    add("--runs", type=int, default=5)
    add("--warmup", type=int, default=1)
    add("--patience", type=int, default=0, help="seconds to go on for while other programs disturb")
    add("--repack", choices=["on", "off"], default="off", help="interleave rows at load")
    add("--mmap", choices=["on", "off"], default="on", help="off: a copy in huge pages")
    add("--mla", type=int, default=3, help="how attention over the latent is done")
    add("--ubatch", type=int, default=512)
    add("--all-logits", action="store_true", help="else the last layer's FFN sees one token")
    add("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    measure(arguments())
