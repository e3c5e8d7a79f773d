#!/usr/bin/env python3
"""llama.cpp as a peer: installs its Python package, writes GGUF slices, times it in one process.

  llama_cpp.py install                      a virtual environment; compiles llama.cpp for this machine
  llama_cpp.py write NAME FILE              a GGUF of a slice's shapes (kimi-k2-slice, qwen3-30b-slice, ...)
  llama_cpp.py info                         version and instruction sets
  llama_cpp.py measure FILE --what decode   one row of JSON, in the form of `moebius bench --json`

`compare.py` alternates it with Moebius. Nothing of llama.cpp is kept here: the package comes from the
usual index, and is called through its ctypes bindings, so that no Python runs inside a timed step.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAIR_SHARE = 0.95
VENV = Path(tempfile.gettempdir()) / "moebius-peers" / "venv"


def python_of(venv):
    return Path(venv) / "bin" / "python"


def install(args):
    subprocess.run([sys.executable, "-m", "venv", args.venv], check=True)
    pip = [python_of(args.venv), "-m", "pip", "install", "--quiet"]
    # GGML_NATIVE: all instruction sets of this machine; a wheel built elsewhere would flatter Moebius.
    # The compiler is kept out of the way of whatever else runs.
    build = {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(args.jobs),
    }
    subprocess.run(pip + ["numpy", "gguf"], check=True)
    no_wheel = ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
    subprocess.run(["nice", "-n", "19", *pip, *no_wheel, "llama-cpp-python"], check=True, env=os.environ | build)
    info(args)


def inside(args):
    """Goes on in the virtual environment. `-I`, because this folder holds a `llama_cpp` too: itself."""
    python = python_of(args.venv)
    if not python.exists():
        sys.exit(f"{python} is missing: `{Path(__file__).name} install --venv {args.venv}` makes it")
    if Path(sys.prefix).resolve() != Path(args.venv).resolve() or not sys.flags.isolated:
        sys.stdout.flush()
        os.execv(python, [str(python), "-I", "-B", str(HERE / "llama_cpp.py"), *sys.argv[1:]])
    sys.path.append(str(HERE))  # At the end: the package goes first.


def info(args):
    code = "import llama_cpp as l; print(l.__version__); print(l.llama_print_system_info().decode())"
    subprocess.run([python_of(args.venv), "-I", "-c", code], check=True)


def write(args):
    inside(args)
    import slices

    routed, rest = slices.write(args.name, args.file, args.experts, args.layers, args.vocab, args.seed)
    print(f"{args.file}: routed experts {routed} bytes, all else {rest}, together {routed + rest}")
    if args.beside:
        routed, rest = slices.checkpoint_bytes(args.beside)
        print(f"{args.beside}: routed experts {routed} bytes, all else {rest}, together {routed + rest}")


def load(lib, args, tokens, sequences, context):
    """A model and a context for steps of so many tokens."""
    model = lib.llama_model_default_params()
    model.n_gpu_layers = 0
    # Repacking makes a second, interleaved layout of Q4_0 and Q4_K weights at load.
    model.use_extra_bufts = args.repack == "on"
    if hasattr(model, "load_mode"):
        model.load_mode = lib.LLAMA_LOAD_MODE_MMAP if args.mmap == "on" else lib.LLAMA_LOAD_MODE_NONE
    else:  # Releases before the middle of 2026.
        model.use_mmap = args.mmap == "on"
    loaded = lib.llama_model_load_from_file(os.fsencode(args.file), model)
    if not loaded:
        sys.exit(f"{args.file}: llama.cpp does not load it (--verbose shows why)")
    params = lib.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = max(tokens, 32)
    params.n_ubatch = args.ubatch
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = args.threads
    params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[args.flash]
    if hasattr(params, "n_outputs_max_per_seq"):  # 1 unless told; 0 lifts the limit.
        params.n_outputs_max_per_seq = 0
    ctx = lib.llama_init_from_model(loaded, params)
    if not ctx:
        sys.exit(f"{args.file}: no context (--verbose shows why)")
    return loaded, ctx


def fill(batch, tokens):
    """Puts (id, position, sequence, wants logits) into a batch."""
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, logits) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence


def measure(args):
    inside(args)
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    if not args.verbose:
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    what, _, count = args.what.partition("-")
    count = int(count or 1)
    prefill = what == "prefill"
    # A decoding sequence has a short past: the step is about weights, not about the cache.
    past = 8
    sequences = 1 if prefill else count
    # A sequence's part of the cache is a multiple of 256.
    context = count if prefill else sequences * 256
    model, ctx = load(lib, args, max(count, sequences * past), sequences, context)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rng = random.Random(args.seed)
    # Distinct where the vocabulary allows: repeated tokens go to the same experts, which flatters.
    draw = lambda n: rng.sample(range(vocab), n) if n <= vocab else rng.choices(range(vocab), k=n)
    batch = lib.llama_batch_init(max(count, sequences * past), 0, 1)

    def step(tokens):
        fill(batch, tokens)
        start = time.perf_counter()
        status = lib.llama_decode(ctx, batch)
        lib.llama_synchronize(ctx)
        taken = time.perf_counter() - start
        if status:
            sys.exit(f"llama_decode: status {status}")
        return taken

    memory = lib.llama_get_memory(ctx)
    if not prefill:
        ids = draw(sequences * past)
        step([(ids[s * past + p], p, s, p == past - 1) for s in range(sequences) for p in range(past)])

    def run():
        """Seconds and share of the cores' time."""
        ids = draw(count)
        # The same past before every run.
        lib.llama_memory_seq_rm(memory, -1, 0 if prefill else past, -1)
        if prefill:
            tokens = [(id, p, 0, args.all_logits or p == count - 1) for p, id in enumerate(ids)]
        else:
            tokens = [(id, past, s, True) for s, id in enumerate(ids)]
        busy, seconds = time.process_time(), step(tokens)
        return seconds, (time.process_time() - busy) / seconds / args.threads

    for _ in range(args.warmup):
        run()
    runs, until = [run() for _ in range(args.runs)], time.monotonic() + args.patience
    # Its threads wait for each other by spinning: one core taken by another program for a moment costs
    # a multiple. What decides is the share of time, never the speed.
    while sum(share >= FAIR_SHARE for _, share in runs) < args.runs and time.monotonic() < until:
        runs.append(run())
    seconds, shares = zip(*sorted(runs, key=lambda run: run[1])[-args.runs :])
    logits = lib.llama_get_logits_ith(ctx, -1)
    finite = all(abs(logits[i]) < 1e4 for i in range(vocab))
    median = statistics.median(seconds)
    setting = [f"repack={args.repack}", f"mmap={args.mmap}", f"flash={args.flash}"]
    setting += [f"ubatch={args.ubatch}"] if prefill else []
    row = {
        "name": args.what,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": len(seconds),
        "tokens_per_second": count / median,
        "threads": args.threads,
        "model": Path(args.file).stem,
        "peer": "llama.cpp",
        "peer_version": lib.__version__,
        "setting": " ".join(setting + (["all-logits"] if args.all_logits else [])),
        # Below 0.95 where other programs took the cores: such a row is to be thrown away.
        "cpu_share": min(shares),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "logits_finite": finite,
    }
    print(json.dumps(row), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, **options):
        sub = commands.add_parser(run.__name__, **options)
        sub.add_argument("--venv", default=VENV, type=Path, help="default: %(default)s")
        sub.set_defaults(run=run)
        return sub

    command(install).add_argument("--jobs", type=int, default=2)
    command(info)
    sub = command(write)
    sub.add_argument("name", help="kimi-k2-slice, qwen3-30b-slice, kimi-k2-moe or kimi-k2-dense")
    sub.add_argument("file")
    sub.add_argument("--experts", choices=["q4_0", "q4_k"], default="q4_0")
    sub.add_argument("--layers", type=int, help="layers with experts")
    sub.add_argument("--vocab", type=int)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--beside", metavar="CHECKPOINT", help="print the bytes of this checkpoint folder too")
    sub = command(measure)
    sub.add_argument("file")
    sub.add_argument("--what", default="decode", help="decode, decode-N (sequences) or prefill-N (tokens)")
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    sub.add_argument("--runs", type=int, default=5)
    sub.add_argument("--warmup", type=int, default=1)
    sub.add_argument("--patience", type=float, default=0, help="seconds to go on for while other programs disturb")
    sub.add_argument("--repack", choices=["on", "off"], default="on")
    sub.add_argument("--mmap", choices=["on", "off"], default="on")
    sub.add_argument("--flash", choices=["auto", "on", "off"], default="auto")
    sub.add_argument("--ubatch", type=int, default=512)
    sub.add_argument("--all-logits", action="store_true", help="else the last layer's FFN sees one token")
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--verbose", action="store_true", help="llama.cpp's own log")
    return parser.parse_args()


if __name__ == "__main__":
    if platform.system() == "Windows":
        sys.exit("POSIX only")
    args = arguments()
    args.run(args)
