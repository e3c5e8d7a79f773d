#!/usr/bin/env python3
"""What this machine's PyTorch and Triton do with the same operations: a second opinion on the figures of
`moebius bench gpu`, in rows of the same form (CSV on stdout, everything else on stderr).

Ours, and plain: a copy, a bf16 product, a layer of routed experts of Kimi K2's dims from INT4 (a loop over experts in
PyTorch, and one grouped Triton kernel that makes weights of codes as it goes), and attention over latents (PyTorch's
own, two products with a softmax between, and a Triton kernel that goes through parts of the context side by side).
Each result is compared with plain sums in f64 first: of what is wrong no time is printed.

Without PyTorch or a device it says so and exits with status 77, as a check that was skipped; with 1 if anything was
wrong or failed. With --device cpu all of it runs at tiny sizes on the processor, Triton's kernels in its interpreter:
that shows that the script works, and its times mean nothing.
"""

import argparse
import csv
import os
import statistics
import sys
import time


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, to test this script")
    parser.add_argument("--seconds", type=float, default=60, help="of --device cuda: then nothing more is begun [60]")
    return parser.parse_args()


BEGUN = time.monotonic()
ARGUMENTS = parse()
DEVICE = ARGUMENTS.device
CPU = DEVICE == "cpu"
if CPU:
    # Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import torch
except ImportError:
    torch = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SKIPPED = 77
COLUMNS = ["name", "seconds_median", "seconds_min", "seconds_max", "runs", "bytes", "operations", "ceiling"]
COLUMNS += ["ceiling_value", "share_of_ceiling", "tokens_per_second", "numerics", "runner", "threads", "model", "notes"]
RUNS = 2 if CPU else 20
# Columns that share a scale.
GROUP = 32
# Kimi K2, or what an interpreter can do.
HIDDEN, INTER, EXPERTS, TOP_K = (128, 128, 4, 2) if CPU else (7168, 2048, 384, 8)
HEADS, LATENT, ROPE = (16, 64, 16) if CPU else (64, 512, 64)
TURNS = 2 if CPU else 4
# Intermediate values are bf16, of which sums are taken: errors by the greatest value.
TOLERANCE = 2e-2

out = csv.writer(sys.stdout, lineterminator="\n")
ceilings = {}
failures = []


def say(text):
    print(text, file=sys.stderr, flush=True)


def failed(text):
    say(f"FAILED {text}")
    failures.append(text)


def quantiles(seconds):
    return statistics.median(seconds), min(seconds), max(seconds)


def timed(work, turns=1, graph=True):
    """Seconds of a turn: of all runs the median, the least and the greatest. `work` gets the number of its turn.

    The turns are one graph, as ours are, for launches from Python take longer than small kernels; without `graph` for
    work that waits for the device."""

    def all_turns():
        for turn in range(turns):
            work(turn)

    if CPU:
        seconds = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            all_turns()
            seconds.append((time.perf_counter() - begun) / turns)
        return quantiles(seconds)
    # Kernels are compiled and libraries started before the capture, on another stream, as torch.cuda.graphs asks.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_turns()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    again = all_turns
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            all_turns()
        again = captured.replay
    # Clocks have risen after these.
    for _ in range(3):
        again()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        again()
        mark.record()
    torch.cuda.synchronize()
    return quantiles([a.elapsed_time(b) / 1e3 / turns for a, b in zip(marks, marks[1:])])


def row(name, seconds, size, operations, runner="torch", notes="", error=None):
    median, least, greatest = seconds
    ceiling = value = share = ""
    if ceilings:
        times = {"copy_bandwidth": size / ceilings["copy_bandwidth"], "bf16": operations / ceilings["bf16"]}
        ceiling = max(times, key=times.get)
        value, share = f"{ceilings[ceiling]:.5e}", f"{times[ceiling] / median:.5e}"
    if error is not None:
        notes = f"{notes} error={error:.1e}".strip()
    times = [f"{value_:.5e}" for value_ in (median, least, greatest)]
    out.writerow([name, *times, RUNS, size, operations, ceiling, value, share, "", "model", runner, 1, "-", notes])
    sys.stdout.flush()
    rates = f"{size / median / 1e12:.3f} TB/s, {operations / median / 1e12:.1f} TFLOP/s"
    say(f"{name} ({runner}): {median * 1e6:.1f} us, {rates}{f', error {error:.1e}' if error is not None else ''}")


def attempt(name, runner, work, got, want, size, operations, turns=TURNS, graph=True, notes=""):
    """Compares what `got` gives with `want`, then times `work` and writes the row. What fails is told, and that is all."""
    if not CPU and time.monotonic() - BEGUN > ARGUMENTS.seconds:
        say(f"{name} ({runner}): left out, out of time")
        return
    try:
        given = got().double()
        error = ((given - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCE:
            failed(f"{name} ({runner}): error {error:.1e} of the greatest value, at most {TOLERANCE:.0e} would be right")
            return
        del given
        row(name, timed(work, turns, graph), size, operations, runner, notes, error)
    # Whatever a library throws (a compiler that is not there, a shape it refuses, no memory): the others go on.
    except Exception as reason:
        failed(f"{name} ({runner}): {type(reason).__name__}: {str(reason).strip().splitlines()[:1]}")


def measure_ceilings():
    count = 1 << (12 if CPU else 28 if ARGUMENTS.quick else 30)
    source = torch.empty(count, dtype=torch.int32, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    copy = timed(lambda _: target.copy_(source))
    row("reference/ceiling/copy", copy, 8 * count, 0)
    if not torch.equal(source, target):
        failed("reference/ceiling/copy: the copy differs")
    del source, target
    n = 64 if CPU else 4096 if ARGUMENTS.quick else 8192
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    product = timed(lambda _: a @ b)
    # Some rows of it in f64.
    want = a[:16].double() @ b.double()
    error = (((a @ b)[:16].double() - want).abs().max() / want.abs().max()).item()
    row("reference/ceiling/matmul", product, 6 * n * n, 2 * n**3, error=error)
    if not error <= TOLERANCE:
        failed(f"reference/ceiling/matmul: error {error:.1e}")
    ceilings["copy_bandwidth"] = 8 * count / copy[0]
    ceilings["bf16"] = 2 * n**3 / product[0]


# ---- Routed experts


class Weight:
    """INT4 weights `[experts, rows, columns]`: eight codes to a word, lowest first, a bf16 scale for 32 columns."""

    def __init__(self, experts, rows, columns):
        self.rows, self.columns = rows, columns
        words = (experts, rows, columns // 8)
        self.codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=DEVICE)
        self.scales = torch.rand(experts, rows, columns // GROUP, device=DEVICE).mul_(columns**-0.5).bfloat16()

    def expert(self, expert, kind=None):
        """Of one expert as bf16, or another type."""
        kind = kind or torch.bfloat16
        shifts = torch.arange(0, 32, 4, device=DEVICE, dtype=torch.int32)
        codes = ((self.codes[expert].unsqueeze(-1) >> shifts) & 15) - 8
        values = codes.reshape(self.rows, -1, GROUP).to(kind) * self.scales[expert].unsqueeze(-1).to(kind)
        return values.reshape(self.rows, self.columns)


def silu_glu(gate, up):
    return torch.nn.functional.silu(gate) * up


def plain_experts(x, ids, weights, layer, tokens):
    """Of some tokens, in f64."""
    gate, up, down = layer
    result = torch.zeros(len(tokens), down.rows, dtype=torch.float64, device=DEVICE)
    for place, token in enumerate(tokens):
        for rank, expert in enumerate(ids[token].tolist()):
            row_ = x[token].double()
            inner = silu_glu(gate.expert(expert, torch.float64) @ row_, up.expert(expert, torch.float64) @ row_)
            result[place] += weights[token, rank].double() * (down.expert(expert, torch.float64) @ inner)
    return result


def experts_in_a_loop(x, ids, weights, layer):
    gate, up, down = layer
    result = torch.zeros(x.shape, dtype=torch.float32, device=DEVICE)
    for expert in ids.unique().tolist():
        token, rank = (ids == expert).nonzero(as_tuple=True)
        rows = x[token]
        inner = silu_glu(rows @ gate.expert(expert).T, rows @ up.expert(expert).T)
        given = (inner @ down.expert(expert).T).float() * weights[token, rank].unsqueeze(-1)
        result.index_add_(0, token, given)
    return result


def by_expert(ids, experts, block):
    """Pairs by expert, and blocks of at most `block` of them: expert, first pair, end of the expert's pairs."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True).int()
    counts = torch.bincount(flat, minlength=experts)
    ends = counts.cumsum(0)
    per = (counts + block - 1) // block
    expert = torch.repeat_interleave(torch.arange(experts, device=DEVICE), per)
    within = torch.arange(expert.numel(), device=DEVICE) - torch.repeat_interleave(per.cumsum(0) - per, per)
    first = ends[expert] - counts[expert] + within * block
    return order, torch.stack([expert, first, ends[expert]], dim=1).int().contiguous()


if triton is not None:
    # Triton's interpreter multiplies the bits of bf16 as if they were numbers: there the same values go in as f32.
    INTERPRETED = tl.constexpr(CPU)

    @triton.jit
    def product(a, b):
        if INTERPRETED:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            total = tl.dot(a, b)
        return total

    @triton.jit
    def grouped_product(
        x, codes, scales, order, blocks, result, rows, columns, divisor,
        M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ):
        """A block of pairs of an expert times N rows of its weight. `divisor` pairs share a row of x."""
        block, part = tl.program_id(1), tl.program_id(0)
        expert = tl.load(blocks + 3 * block).to(tl.int64)
        places = tl.load(blocks + 3 * block + 1) + tl.arange(0, M)
        there = places < tl.load(blocks + 3 * block + 2)
        pairs = tl.load(order + places, mask=there, other=0)
        row = part * N + tl.arange(0, N)
        k = tl.arange(0, K)
        total = tl.zeros((M, N), dtype=tl.float32)
        base = expert * rows
        for start in range(0, columns, K):
            column = start + k
            values = tl.load(x + (pairs // divisor)[:, None].to(tl.int64) * columns + column[None, :],
                             mask=there[:, None], other=0.0)
            word = tl.load(codes + (base + row)[None, :] * (columns // 8) + (column // 8)[:, None])
            scale = tl.load(scales + (base + row)[None, :] * (columns // 32) + (column // 32)[:, None])
            code = (word >> ((column % 8) * 4)[:, None]) & 15
            weight = ((code - 8).to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16)
            total += product(values, weight)
        where = result + pairs[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(where, total.to(result.dtype.element_ty), mask=there[:, None])

    @triton.jit
    def part_of_attention(
        query, cached, sums, greatest, totals, context, length, heads, scale,
        H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    ):
        """H heads over `length` rows of the cache: weighted sums of their latents, the greatest score, the weights' sum."""
        part, head = tl.program_id(0), tl.program_id(1) * H + tl.arange(0, H)
        latent, rope = tl.arange(0, L), L + tl.arange(0, R)
        q = tl.load(query + head[:, None] * (L + R) + latent[None, :])
        q_rope = tl.load(query + head[:, None] * (L + R) + rope[None, :])
        most = tl.full((H,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((H,), dtype=tl.float32)
        sum_ = tl.zeros((H, L), dtype=tl.float32)
        for start in range(part * length, tl.minimum((part + 1) * length, context), N):
            position = start + tl.arange(0, N)
            there = position < tl.minimum((part + 1) * length, context)
            at = cached + position[:, None].to(tl.int64) * (L + R)
            keys = tl.load(at + latent[None, :], mask=there[:, None], other=0.0)
            keys_rope = tl.load(at + rope[None, :], mask=there[:, None], other=0.0)
            scores = (product(q, tl.trans(keys)) + product(q_rope, tl.trans(keys_rope))) * scale
            scores = tl.where(there[None, :], scores, float("-inf"))
            now = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp(scores - now[:, None])
            less = tl.exp(most - now)
            total = total * less + tl.sum(weights, 1)
            sum_ = sum_ * less[:, None] + product(weights.to(tl.bfloat16), keys)
            most = now
        tl.store(greatest + part * heads + head, most)
        tl.store(totals + part * heads + head, total)
        tl.store(sums + (part * heads + head)[:, None] * L + latent[None, :], sum_)


def grouped(x, weight, order, blocks, divisor, result, m):
    n, k = (64, 64) if m < 64 else (128, 64)
    grid = (weight.rows // n, blocks.shape[0])
    grouped_product[grid](x, weight.codes, weight.scales, order, blocks, result, weight.rows, weight.columns, divisor,
                          M=m, N=n, K=k, num_warps=4 if m < 64 else 8, num_stages=3)
    return result


def experts_grouped(x, lists, weights, layer, m):
    """With lists from `by_expert`: routing and grouping are not in it."""
    gate, up, down = layer
    order, blocks = lists
    (tokens, top_k), pairs = weights.shape, weights.numel()
    inner = [torch.empty(pairs, gate.rows, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    grouped(x, gate, order, blocks, top_k, inner[0], m)
    grouped(x, up, order, blocks, top_k, inner[1], m)
    given = torch.empty(pairs, down.rows, dtype=torch.float32, device=DEVICE)
    grouped(silu_glu(*inner), down, order, blocks, 1, given, m)
    return torch.bmm(weights.unsqueeze(1), given.view(tokens, top_k, -1)).squeeze(1)


def measure_experts():
    one = 3 * HIDDEN * INTER // 2 + 3 * HIDDEN * INTER // GROUP * 2
    experts = EXPERTS
    if not CPU:
        # At most half of what is free: rows of many tokens come beside it.
        experts = max(TOP_K, min(64 if ARGUMENTS.quick else EXPERTS, int(torch.cuda.mem_get_info()[0] * 0.5) // one))
    if experts < EXPERTS:
        say(f"a layer of {experts} of {EXPERTS} experts")
    layer = [Weight(experts, INTER, HIDDEN), Weight(experts, INTER, HIDDEN), Weight(experts, HIDDEN, INTER)]
    for tokens in [1, 5, 70] if CPU else [1, 16, 512] if ARGUMENTS.quick else [1, 16, 64, 512, 2048, 8192]:
        x = torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16()
        # Turns with experts of their own: no cache holds them.
        choices = [torch.rand(tokens, experts, device=DEVICE).topk(TOP_K).indices for _ in range(TURNS)]
        weights = torch.rand(tokens, TOP_K, device=DEVICE) / TOP_K
        distinct = statistics.mean(ids.unique().numel() for ids in choices)
        size = int(distinct * one + tokens * (4 * HIDDEN + TOP_K * (6 * HIDDEN + 6 * INTER)))
        operations = tokens * TOP_K * 6 * HIDDEN * INTER
        notes = f"experts={distinct:.1f} of={experts}"
        some = sorted({0, tokens // 2, tokens - 1})
        want = plain_experts(x, choices[0], weights, layer, some)
        if triton is not None:
            each = tokens * TOP_K / experts
            m = 16 if each < 32 else 64 if each < 128 else 128
            lists = [by_expert(ids, experts, m) for ids in choices]

            def by_triton(turn):
                return experts_grouped(x, lists[turn], weights, layer, m)

            attempt(f"reference/moe/int4/b{tokens}", "triton", by_triton, lambda: by_triton(0)[some], want, size,
                    operations, notes=f"{notes} without=routing")
        # Hundreds of launches each: to compare with, and not a rival.
        if tokens in [5, 16, 512]:

            def in_a_loop(turn):
                return experts_in_a_loop(x, choices[turn], weights, layer)

            attempt(f"reference/moe_loop/int4/b{tokens}", "torch", in_a_loop, lambda: in_a_loop(0)[some], want, size,
                    operations, turns=1, graph=False, notes=notes)


# ---- Attention over latents


def attention_of_parts(query, cached, scale):
    """Query `[heads, width]` and cache `[context, width]` by Triton: parts of the context, then their sum."""
    context, n = cached.shape[0], 32
    # As many programs as fill a large device, of whole blocks.
    length = triton.cdiv(triton.cdiv(context, 2 if CPU else 64), n) * n
    parts = triton.cdiv(context, length)
    sums = torch.empty(parts, HEADS, LATENT, dtype=torch.float32, device=DEVICE)
    greatest, totals = (torch.empty(parts, HEADS, dtype=torch.float32, device=DEVICE) for _ in range(2))
    part_of_attention[(parts, HEADS // 16)](query, cached, sums, greatest, totals, context, length, HEADS, scale,
                                            H=16, L=LATENT, R=ROPE, N=n, num_warps=4, num_stages=2)
    share = torch.exp(greatest - greatest.amax(0))
    return (sums * share.unsqueeze(-1)).sum(0) / (totals * share).sum(0).unsqueeze(-1)


def measure_attention():
    scale = (LATENT + ROPE) ** -0.5
    for context in [100, 256] if CPU else [4096, 131072] if ARGUMENTS.quick else [4096, 32768, 131072, 262144]:
        # One key head for all query heads; values are the latent part of keys.
        size = context * (LATENT + ROPE) * 2
        # No cache holds all turns.
        turns = 2 if CPU else min(64, -(-(512 << 20) // size))
        cached = torch.randn(turns, context, LATENT + ROPE, device=DEVICE).bfloat16()
        query = torch.randn(HEADS, LATENT + ROPE, device=DEVICE).bfloat16()

        def by_torch(turn):
            keys = cached[turn][None, None]
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(query[None, None], keys, keys[..., :LATENT], scale=scale)[0, 0]

        def by_products(turn):
            keys = cached[turn]
            return torch.softmax((query @ keys.T).float() * scale, -1).bfloat16() @ keys[:, :LATENT]

        def by_triton(turn):
            return attention_of_parts(query, cached[turn], scale)

        keys = cached[0].double()
        want = torch.softmax(query.double() @ keys.T * scale, -1) @ keys[:, :LATENT]
        del keys
        operations = 2 * HEADS * (2 * LATENT + ROPE) * context
        ways = [("mla", "triton", by_triton)] if triton is not None else []
        for name, runner, way in [*ways, ("mla_products", "torch", by_products), ("mla_sdpa", "torch", by_torch)]:
            attempt(f"reference/{name}/bf16/{context}x1", runner, way, lambda: way(0), want, size, operations, turns)


def main():
    if torch is None:
        say("SKIP: there is no PyTorch")
        return SKIPPED
    if not CPU and not torch.cuda.is_available():
        say("SKIP: PyTorch finds no CUDA device")
        return SKIPPED
    if triton is None:
        say("there is no Triton: PyTorch alone")
    torch.manual_seed(0)
    if CPU:
        torch.set_num_threads(1)
    name, versions = "cpu (times mean nothing)" if CPU else torch.cuda.get_device_name(), f"torch {torch.__version__}"
    if triton is not None:
        versions += f", triton {triton.__version__}"
    out.writerow(COLUMNS)
    print(f"# machine: {name}; {versions}; CUDA {torch.version.cuda}", flush=True)
    say(f"{name}; {versions}")
    with torch.inference_mode():
        for part in [measure_ceilings, measure_experts, measure_attention]:
            try:
                part()
            except Exception as reason:
                failed(f"{part.__name__}: {type(reason).__name__}: {reason}")
            if not CPU:
                torch.cuda.empty_cache()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
