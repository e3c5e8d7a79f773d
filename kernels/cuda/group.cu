// Pairs of a token and one of its experts, sorted by expert: so that an expert's weights are read once for all of
// its tokens.
//
// Pair t * top_k + r is token t's expert of rank r. Pairs of an expert keep their order, which nothing but their
// numbers decides: warps take consecutive parts, count them, and then know where each of their pairs goes. Atomic
// additions only count. Up to 8192 pairs are one block's work; more are cut into chunks, a block for each, with a
// scan in between.
//
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "lanes.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 MOST_EXPERTS = THREADS;
// Pairs of one block where there are several.
constexpr u32 CHUNK = 2048;
constexpr u32 NOBODY = ~0u;

// ---- The ring of what was grouped, for whoever profiles.

// In the host's memory. A reader that finds the number it expects at both ends, `ended` before and `begun` after
// it read the rest, has a whole entry.
struct RingEntry {
    u64 begun, time_nanoseconds;
    u32 layer, tokens, experts, reserved;
    // Pairs of each expert; 65535 means that or more.
    u16 counts[MOST_EXPERTS];
    u64 ended;
};

// In the device's memory, since reading the host's takes microseconds. Where the capacity is 0, nothing is
// recorded.
struct Ring {
    u64 written, capacity;
};

// Thread e has the count of expert e. All threads of the block come here.
DEVICE void record(Ring* ring, RingEntry* entries, u32 layer, u32 tokens, u32 experts, u32 count) {
    if (!ring || !ring->capacity) return;
    u64 number = ring->written + 1;
    volatile RingEntry* entry = entries + number % ring->capacity;
    if (threadIdx.x == 0) entry->begun = number;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x < experts) entry->counts[threadIdx.x] = u16(min(count, 0xffffu));
    if (threadIdx.x == 0) {
        entry->time_nanoseconds = clock_nanoseconds();
        entry->layer = layer;
        entry->tokens = tokens;
        entry->experts = experts;
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        entry->ended = number;
        ring->written = number;
    }
}

// ---- Counting and placing.

// The pairs of this call: those of tokens that are padding are left out.
DEVICE u32 pair_count(const u32* tokens, u32 rows, u32 top_k) {
    return (tokens ? min(*tokens, rows) : rows) * top_k;
}

// What a block or a warp takes of the pairs.
struct Part {
    u32 first, last;
};

DEVICE Part part_of_warp(Part block) {
    u32 each = (block.last - block.first + THREADS - 1) / THREADS * 32;
    u32 first = min(block.first + warp_id() * each, block.last);
    return {first, min(first + each, block.last)};
}

DEVICE Part part_of_block(u32 pairs) {
    u32 first = min(blockIdx.x * CHUNK, pairs);
    return {first, min(first + CHUNK, pairs)};
}

// No expert past the part's end, and where the router named none (below zero).
DEVICE u32 expert_of(const int* ids, u32 pair, u32 last, u32 experts) {
    u32 expert = pair < last ? u32(ids[pair]) : NOBODY;
    return expert < experts ? expert : NOBODY;
}

// Warps that have any: few pairs do not fill a block.
DEVICE u32 warps_with_pairs(Part block) { return min((block.last - block.first + 31) / 32, WARPS); }

// A row of counts for each of the warps; thread e clears expert e's and later adds them up.
DEVICE void clear_counts(u32* counts, u32 warps) {
    for (u32 warp = 0; warp < warps; warp++) counts[warp * MOST_EXPERTS + threadIdx.x] = 0;
}

DEVICE void count_pairs(const int* ids, Part part, u32 experts, u32* counts) {
    for (u32 pair = part.first + lane_id(); pair < part.last; pair += 32) {
        u32 expert = expert_of(ids, pair, part.last, experts);
        if (expert != NOBODY) atomicAdd(&counts[expert], 1u);
    }
}

// Thread e turns the counts of expert e into where each warp starts, from `start` on, and gives back the end.
DEVICE u32 add_up(u32* counts, u32 warps, u32 start) {
    for (u32 warp = 0; warp < warps; warp++) {
        u32 count = counts[warp * MOST_EXPERTS + threadIdx.x];
        counts[warp * MOST_EXPERTS + threadIdx.x] = start;
        start += count;
    }
    return start;
}

// `starts` is this warp's: where its next pair of each expert goes. Lanes with the same expert follow each other.
DEVICE void place_pairs(const int* ids, Part part, u32 experts, u32* starts, int* order) {
    for (u32 from = part.first; from < part.last; from += 32) {
        u32 pair = from + lane_id();
        u32 expert = expert_of(ids, pair, part.last, experts);
        u32 same = lanes_with_same(expert), rank = __popc(same & lanes_before());
        u32 start = expert != NOBODY ? starts[expert] : 0;
        __syncwarp();
        if (expert != NOBODY) {
            order[start + rank] = int(pair);
            if (rank == 0) starts[expert] = start + __popc(same);
        }
        __syncwarp();
    }
}

// ---- Sums over experts, thread e having expert e.

// How many pairs an expert has, and units of each of the two sizes.
struct Counts {
    u32 pairs, units[2];
};

// What all threads before this one have. `warps` is room for the sums of warps.
DEVICE Counts sum_before(Counts mine, Counts* warps) {
    Counts sum = mine;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 pairs = __shfl_up_sync(ALL_LANES, sum.pairs, step);
        u32 first = __shfl_up_sync(ALL_LANES, sum.units[0], step);
        u32 second = __shfl_up_sync(ALL_LANES, sum.units[1], step);
        if (lane_id() < step) continue;
        sum.pairs += pairs, sum.units[0] += first, sum.units[1] += second;
    }
    if (lane_id() == 31) warps[warp_id()] = sum;
    __syncthreads();
    Counts before{sum.pairs - mine.pairs, {sum.units[0] - mine.units[0], sum.units[1] - mine.units[1]}};
    for (u32 warp = 0; warp < warp_id(); warp++) {
        before.pairs += warps[warp].pairs;
        before.units[0] += warps[warp].units[0], before.units[1] += warps[warp].units[1];
    }
    return before;
}

// Lists of units: an expert's pairs in parts of at most `size`, {expert, first place in the order, pairs, 0}.
struct Units {
    u32 size;
    Bytes16* list;
};

DEVICE u32 units_of(u32 pairs, const Units& units) {
    return units.size ? (pairs + units.size - 1) / units.size : 0;
}

// Unit u belongs to the last expert whose units start at or before u; those without any start where the next does.
// Threads take units, not experts: one expert may have nearly all.
DEVICE void write_units(const Units& units, u32 which, const Counts* starts, u32 experts, u32* unit_counts) {
    if (!units.size) return;
    u32 total = starts[experts].units[which];
    for (u32 unit = blockIdx.x * THREADS + threadIdx.x; unit < total; unit += gridDim.x * THREADS) {
        u32 expert = 0, end = experts;
        while (end - expert > 1) {
            u32 middle = (expert + end) / 2;
            if (starts[middle].units[which] <= unit) expert = middle;
            else end = middle;
        }
        u32 first = starts[expert].pairs + (unit - starts[expert].units[which]) * units.size;
        units.list[unit] = {expert, first, min(units.size, starts[expert + 1].pairs - first), 0};
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) unit_counts[which] = total;
}

// Thread e writes where expert e starts, the last thread also the end of all. Threads past the last
// expert have no pairs.
DEVICE void write_starts(const Counts& before, Counts mine, Counts* starts) {
    starts[threadIdx.x] = before;
    Counts after{before.pairs + mine.pairs, {before.units[0] + mine.units[0], before.units[1] + mine.units[1]}};
    if (threadIdx.x == THREADS - 1) starts[THREADS] = after;
}

// ---- All pairs in one block.

// ids [rows, top_k] of which the first *tokens rows count (all if null); order [rows * top_k], whose places past
// the last pair are left as they are; offsets [experts + 1]; for each size of units that is not 0 a list, and how
// many in unit_counts[2].
extern "C" __global__ void __launch_bounds__(THREADS)
    group(const int* ids, const u32* tokens, u32 rows, u32 top_k, u32 experts, int* order, int* offsets, u32 size,
          Bytes16* list, u32 other_size, Bytes16* other_list, u32* unit_counts, Ring* ring,
          RingEntry* entries, u32 layer) {
    SHARED(u32, counts, WARPS * MOST_EXPERTS);
    SHARED(Counts, starts, MOST_EXPERTS + 1);
    SHARED(Counts, warps, WARPS);
    wait_for_previous();
    let_next_start();
    Units units{size, list}, other_units{other_size, other_list};
    u32 pairs = pair_count(tokens, rows, top_k), *mine = counts + warp_id() * MOST_EXPERTS;
    Part block{0, pairs}, part = part_of_warp(block);
    u32 busy = warps_with_pairs(block);
    clear_counts(counts, busy);
    __syncthreads();
    count_pairs(ids, part, experts, mine);
#ifndef FAULT_NO_BARRIER
    __syncthreads();
#endif
    u32 count = add_up(counts, busy, 0);
    Counts all{count, {units_of(count, units), units_of(count, other_units)}};
    Counts before = sum_before(all, warps);
    write_starts(before, all, starts);
    for (u32 warp = 0; warp < busy; warp++) counts[warp * MOST_EXPERTS + threadIdx.x] += before.pairs;
    __syncthreads();
    place_pairs(ids, part, experts, mine, order);
#ifdef FAULT_OUT_OF_BOUNDS
    for (u32 expert = threadIdx.x; expert <= experts + 1; expert += THREADS)
#else
    for (u32 expert = threadIdx.x; expert <= experts; expert += THREADS)
#endif
        offsets[expert] = int(starts[min(expert, experts)].pairs);
    write_units(units, 0, starts, experts, unit_counts);
    write_units(other_units, 1, starts, experts, unit_counts);
    record(ring, entries, layer, pairs / top_k, experts, count);
}
EXPORT(group);

// ---- Many pairs: a block for every chunk, twice, and one between.

// chunk_counts [chunks, experts].
extern "C" __global__ void __launch_bounds__(THREADS)
    group_count(const int* ids, const u32* tokens, u32 rows, u32 top_k, u32 experts, u32* chunk_counts) {
    SHARED(u32, counts, MOST_EXPERTS);
    wait_for_previous();
    let_next_start();
    counts[threadIdx.x] = 0;
    __syncthreads();
    count_pairs(ids, part_of_warp(part_of_block(pair_count(tokens, rows, top_k))), experts, counts);
    __syncthreads();
    if (threadIdx.x < experts) chunk_counts[u64(blockIdx.x) * experts + threadIdx.x] = counts[threadIdx.x];
}
EXPORT(group_count);

// One block. Turns the counts into where each chunk's pairs of an expert go.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_scan(const u32* tokens, u32 rows, u32 top_k, u32 experts, u32* chunk_counts, u32 chunks, int* offsets,
               Ring* ring, RingEntry* entries, u32 layer) {
    SHARED(Counts, warps, WARPS);
    wait_for_previous();
    let_next_start();
    u32 expert = threadIdx.x, count = 0;
    bool exists = expert < experts;
    // Eight at a time, so that as many loads are under way.
    u32 here[8];
    auto load = [&](u32 chunk) {
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            here[i] = exists && chunk + i < chunks ? chunk_counts[u64(chunk + i) * experts + expert] : 0;
    };
    for (u32 chunk = 0; chunk < chunks; chunk += 8) {
        load(chunk);
#pragma unroll
        for (u32 i = 0; i < 8; i++) count += here[i];
    }
    u32 start = sum_before({count, {0, 0}}, warps).pairs, next = start;
    for (u32 chunk = 0; chunk < chunks; chunk += 8) {
        load(chunk);
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (exists && chunk + i < chunks) chunk_counts[u64(chunk + i) * experts + expert] = next;
            next += here[i];
        }
    }
    if (exists) offsets[expert] = int(start);
    if (expert == experts - 1) offsets[experts] = int(next);
    record(ring, entries, layer, pair_count(tokens, rows, top_k) / top_k, experts, count);
}
EXPORT(group_scan);

extern "C" __global__ void __launch_bounds__(THREADS)
    group_place(const int* ids, const u32* tokens, u32 rows, u32 top_k, u32 experts, const u32* chunk_starts,
                const int* offsets, int* order, u32 size, Bytes16* list, u32 other_size, Bytes16* other_list,
                u32* unit_counts) {
    SHARED(u32, counts, WARPS * MOST_EXPERTS);
    SHARED(Counts, starts, MOST_EXPERTS + 1);
    SHARED(Counts, warps, WARPS);
    wait_for_previous();
    let_next_start();
    Units units{size, list}, other_units{other_size, other_list};
    u32* mine = counts + warp_id() * MOST_EXPERTS;
    Part block = part_of_block(pair_count(tokens, rows, top_k)), part = part_of_warp(block);
    u32 busy = warps_with_pairs(block);
    bool exists = threadIdx.x < experts;
    u32 start = exists ? chunk_starts[u64(blockIdx.x) * experts + threadIdx.x] : 0;
    u32 count = exists ? u32(offsets[threadIdx.x + 1] - offsets[threadIdx.x]) : 0;
    clear_counts(counts, busy);
    __syncthreads();
    count_pairs(ids, part, experts, mine);
    __syncthreads();
    add_up(counts, busy, start);
    Counts all{count, {units_of(count, units), units_of(count, other_units)}};
    write_starts(sum_before(all, warps), all, starts);
    __syncthreads();
    place_pairs(ids, part, experts, mine, order);
    write_units(units, 0, starts, experts, unit_counts);
    write_units(other_units, 1, starts, experts, unit_counts);
}
EXPORT(group_place);
