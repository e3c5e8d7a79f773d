#!/usr/bin/env python3
"""What this machine's PyTorch and Triton do with the same operations: a second opinion on the figures of
`moebius bench gpu`, in rows of the same form (CSV on stdout, everything else on stderr).

Ours, and plain: a copy, a bf16 product, a layer of routed experts of Kimi K2's dims from INT4 (a loop over experts in
PyTorch, and one grouped Triton kernel that makes weights of codes as it goes), and attention over latents.

Without PyTorch, Triton or a device it says so and exits with status 77, as a check that was skipped.
"""

import argparse
import csv
import statistics
import sys

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
RUNS = 20
# Kimi K2.
HIDDEN, INTER, EXPERTS, TOP_K, GROUP = 7168, 2048, 384, 8, 32
HEADS, LATENT, ROPE = 64, 512, 64

out = csv.writer(sys.stdout)
ceilings = {}


def say(text):
    print(text, file=sys.stderr, flush=True)


def timed(work, turns=1):
    """Seconds of a call: of all runs the median, the least and the greatest. `work` gets the number of its turn."""
    for turn in range(3):
        work(turn)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    marks[0].record()
    for run in range(RUNS):
        for turn in range(turns):
            work(run * turns + turn)
        marks[run + 1].record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 / turns for a, b in zip(marks, marks[1:])]
    return statistics.median(seconds), min(seconds), max(seconds)


def row(name, seconds, size, operations, runner="torch", notes=""):
    median, least, greatest = seconds
    ceiling = value = share = ""
    if ceilings:
        times = {"copy_bandwidth": size / ceilings["copy_bandwidth"], "bf16": operations / ceilings["bf16"]}
        ceiling = max(times, key=times.get)
        value, share = f"{ceilings[ceiling]:.5e}", f"{times[ceiling] / median:.5e}"
    times = [f"{value_:.5e}" for value_ in (median, least, greatest)]
    out.writerow([name, *times, RUNS, size, operations, ceiling, value, share, "", "model", runner, 1, "-", notes])
    sys.stdout.flush()
    say(f"{name}: {median * 1e6:.1f} us, {size / median / 1e12:.3f} TB/s, {operations / median / 1e12:.1f} TFLOP/s")


def measure_ceilings(quick):
    count = (1 << 28) if quick else (1 << 30)
    source = torch.empty(count, dtype=torch.int32, device="cuda").fill_(1)
    target = torch.empty_like(source)
    copy = timed(lambda _: target.copy_(source))
    row("reference/ceiling/copy", copy, 8 * count, 0)
    del source, target
    n = 4096 if quick else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = timed(lambda _: a @ b)
    row("reference/ceiling/matmul", product, 6 * n * n, 2 * n**3)
    ceilings["copy_bandwidth"] = 8 * count / copy[0]
    ceilings["bf16"] = 2 * n**3 / product[0]


# ---- Routed experts


class Weight:
    """INT4 weights `[experts, rows, columns]`: eight codes to a word, lowest first, a bf16 scale for 32 columns."""

    def __init__(self, experts, rows, columns):
        self.rows, self.columns = rows, columns
        words = (experts, rows, columns // 8)
        self.codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device="cuda")
        self.scales = torch.rand(experts, rows, columns // GROUP, device="cuda").mul_(columns**-0.5).bfloat16()

    def expert(self, expert):
        """Of one expert as bf16."""
        shifts = torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)
        codes = ((self.codes[expert].unsqueeze(-1) >> shifts) & 15) - 8
        values = codes.reshape(self.rows, -1, GROUP).bfloat16() * self.scales[expert].unsqueeze(-1)
        return values.reshape(self.rows, self.columns)


def silu_glu(gate, up):
    return torch.nn.functional.silu(gate) * up


def experts_in_a_loop(x, ids, weights, layer):
    gate, up, down = layer
    result = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
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
    expert = torch.repeat_interleave(torch.arange(experts, device="cuda"), per)
    within = torch.arange(expert.numel(), device="cuda") - torch.repeat_interleave(per.cumsum(0) - per, per)
    first = ends[expert] - counts[expert] + within * block
    return order, torch.stack([expert, first, ends[expert]], dim=1).int().contiguous()


if triton is not None:

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
            total += tl.dot(values, weight)
        where = result + pairs[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(where, total.to(result.dtype.element_ty), mask=there[:, None])


def grouped(x, weight, order, blocks, divisor, result, m):
    n, k = 64, 64
    grid = (weight.rows // n, blocks.shape[0])
    grouped_product[grid](x, weight.codes, weight.scales, order, blocks, result, weight.rows, weight.columns, divisor,
                          M=m, N=n, K=k, num_warps=4, num_stages=3)
    return result


def experts_grouped(x, ids, weights, layer, m, kept):
    gate, up, down = layer
    order, blocks = by_expert(ids, gate.codes.shape[0], m)
    pairs = ids.numel()
    shape = (pairs, gate.rows)
    inner = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    grouped(x, gate, order, blocks, ids.shape[1], inner[0], m)
    grouped(x, up, order, blocks, ids.shape[1], inner[1], m)
    given = torch.empty(pairs, down.rows, dtype=torch.float32, device="cuda") if kept is None else kept
    grouped(silu_glu(*inner), down, order, blocks, 1, given, m)
    return (given.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def measure_experts(quick):
    free = torch.cuda.mem_get_info()[0]
    one = 3 * HIDDEN * INTER // 2 + 3 * HIDDEN * INTER // GROUP * 2
    # Random words are made in 64 bits at first.
    experts = max(TOP_K, min(64 if quick else EXPERTS, int(free * 0.5) // one))
    if experts < EXPERTS:
        say(f"a layer of {experts} of {EXPERTS} experts")
    layer = [Weight(experts, INTER, HIDDEN), Weight(experts, INTER, HIDDEN), Weight(experts, HIDDEN, INTER)]
    for tokens in [1, 16, 64, 512, 2048]:
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        # Turns with experts of their own: no cache holds them.
        choices = [torch.rand(tokens, experts, device="cuda").topk(TOP_K).indices for _ in range(4)]
        weights = torch.full((tokens, TOP_K), 1 / TOP_K, device="cuda")
        distinct = statistics.mean(ids.unique().numel() for ids in choices)
        size = int(distinct * one + tokens * (4 * HIDDEN + TOP_K * (6 * HIDDEN + 6 * INTER)))
        operations = tokens * TOP_K * 6 * HIDDEN * INTER
        notes = f"experts={distinct:.1f} of={experts}"
        if triton is not None:
            m = 16 if tokens * TOP_K < 32 * experts else 64
            got = experts_grouped(x, choices[0], weights, layer, m, None)
            if tokens == 16:
                want = experts_in_a_loop(x, choices[0], weights, layer)
                error = ((got - want).abs().max() / want.abs().max()).item()
                say(f"experts of Triton and of the loop differ by {error:.1e} of the greatest value")
            seconds = timed(lambda turn: experts_grouped(x, choices[turn % 4], weights, layer, m, None))
            row(f"reference/moe/int4/b{tokens}", seconds, size, operations, "triton", notes)
        if tokens == 16:
            loop = timed(lambda turn: experts_in_a_loop(x, choices[turn % 4], weights, layer))
            row(f"reference/moe_loop/int4/b{tokens}", loop, size, operations, "torch", notes)


# ---- Attention over latents


def measure_attention(quick):
    for context in [4096, 32768] if quick else [4096, 32768, 131072]:
        # One key head for all query heads; values are the latent part of keys.
        size = context * (LATENT + ROPE) * 2
        turns = max(1, min(16, (256 << 20) // size))
        cached = torch.randn(turns, 1, 1, context, LATENT + ROPE, device="cuda").bfloat16()
        query = torch.randn(1, 1, HEADS, LATENT + ROPE, device="cuda").bfloat16()

        def attend(turn):
            keys = cached[turn % turns]
            return torch.nn.functional.scaled_dot_product_attention(query, keys, keys[..., :LATENT])

        try:
            seconds = timed(attend, turns)
        except RuntimeError as error:
            say(f"attention over {context}: {str(error).splitlines()[0]}")
            continue
        operations = 2 * HEADS * (2 * LATENT + ROPE) * context
        row(f"reference/mla/bf16/{context}x1", seconds, size, operations)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    if torch is None:
        say("SKIP: there is no PyTorch")
        return SKIPPED
    if not torch.cuda.is_available():
        say("SKIP: PyTorch finds no CUDA device")
        return SKIPPED
    if triton is None:
        say("there is no Triton: no grouped experts")
    torch.manual_seed(0)
    name, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}"
    if triton is not None:
        versions += f", triton {triton.__version__}"
    out.writerow(COLUMNS)
    print(f"# machine: {name}; {versions}; CUDA {torch.version.cuda}", flush=True)
    say(f"{name}; {versions}")
    with torch.inference_mode():
        measure_ceilings(arguments.quick)
        measure_experts(arguments.quick)
        measure_attention(arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
