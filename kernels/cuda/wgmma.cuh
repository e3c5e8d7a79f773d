// Products of a warp group: four warps multiply together, and go on before it is done (wgmma, sm_90a).
//
// The second operand lies in shared memory as [columns][64 k] of bf16, rows of 128 bytes swizzled as the device
// does (Swizzled<128>), at a multiple of 1024 bytes. In the emulator a product is computed when it is waited for,
// from what shared memory holds then.
#pragma once

#include "primitives.cuh"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#endif

#ifndef __CUDACC__
namespace emulator {

// One product of a warp group that nobody has waited for.
struct OpenProduct {
    float* d[128];
    u32 a[128][4];
    const u8* b;
    bool add;
    u64 group;

    void compute() const {
        for (u32 warp = 0; warp < 4; warp++) {
            float left[16][16];
            for (u32 lane = 0; lane < 32; lane++)
                for (u32 i = 0; i < 4; i++) {
                    u32 row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8, pair = a[warp * 32 + lane][i];
                    left[row][k] = low_bf16(pair);
                    left[row][k + 1] = high_bf16(pair);
                }
            for (u32 column = 0; column < 64; column++) {
                float right[16];
                for (u32 k = 0; k < 16; k++) {
                    u64 at = reinterpret_cast<u64>(b) + column * 128 + k * 2;
                    u16 value;
                    memcpy(&value, reinterpret_cast<const void*>(at ^ (at >> 7 & 7) << 4), 2);
                    right[k] = bf16_to_f32(value);
                }
                for (u32 row = 0; row < 16; row++) {
                    float sum = 0;
                    for (u32 k = 0; k < 16; k++) sum += left[row][k] * right[k];
                    u32 lane = row % 8 * 4 + column % 8 / 2;
                    float& to = d[warp * 32 + lane][column / 8 * 4 + row / 8 * 2 + column % 2];
                    to = (add ? to : 0) + sum;
                }
            }
        }
    }
};

// Of one warp group of the block that this thread runs.
struct OpenProducts {
    dim3 block;
    u64 group = 0;
    std::vector<OpenProduct> products;
};

inline OpenProducts& open_products() {
    static thread_local OpenProducts all[8];
    const Place& at = place();
    OpenProducts& mine = all[at.rank / 128];
    // What a block left open ends with it.
    bool same = mine.block.x == at.block.x && mine.block.y == at.block.y && mine.block.z == at.block.z;
    if (!same) mine.products.clear();
    mine.block = at.block;
    return mine;
}

struct WarpgroupProduct {
    float* d;
    const u32* a;
    const u8* b;
    bool add;
};

inline void open_product(void** lanes) {
    OpenProducts& mine = open_products();
    OpenProduct product;
    auto* first = static_cast<WarpgroupProduct*>(lanes[0]);
    product.b = first->b;
    product.add = first->add;
    product.group = mine.group;
    if (reinterpret_cast<u64>(first->b) % 32 || reinterpret_cast<u64>(first->b) % 1024 > 96)
        fault("an operand of wgmma does not begin at a swizzled row");
    for (u32 lane = 0; lane < 128; lane++) {
        auto* one = static_cast<WarpgroupProduct*>(lanes[lane]);
        if (one->b != first->b || one->add != first->add)
            fault("threads of a warp group multiply different things");
        product.d[lane] = one->d;
        memcpy(product.a[lane], one->a, sizeof(product.a[lane]));
    }
    mine.products.push_back(product);
}

template <int groups>
void finish_products(void**) {
    OpenProducts& mine = open_products();
    while (!mine.products.empty() && mine.products.front().group + groups < mine.group) {
        mine.products.front().compute();
        mine.products.erase(mine.products.begin());
    }
}

}  // namespace emulator
#endif

// The first multiple of 1024 bytes from `shared` on.
DEVICE u8* aligned_for_swizzle(u8* shared) {
#ifdef __CUDACC__
    return shared + (0u - shared_address(shared)) % 1024;
#else
    return shared + (0u - reinterpret_cast<u64>(shared)) % 1024;
#endif
}

// What this thread wrote to shared memory, or had copied, is seen by products that start after a barrier.
DEVICE void fence_for_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#ifdef HAS_WGMMA
// Before the first product, and after registers of one were written by others.
DEVICE void wgmma_fence() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Ends a group of the products so far.
DEVICE void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    int none = 0;
    emulator::warpgroup_meet(&none, [](void**) { emulator::open_products().group++; });
#endif
}
// Until at most so many groups are under way.
template <int groups>
DEVICE void wgmma_wait() {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
#else
    int none = 0;
    emulator::warpgroup_meet(&none, emulator::finish_products<groups>);
#endif
}
// The sums are read only after a wait that stands before this.
DEVICE void wgmma_settle(float (&d)[8][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (u32 i = 0; i < 32; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
#endif
}

// d = a * b, or with `add` d += a * b, where a is [64 rows, 16 k] and b [16 k, 64 columns]. Warp w has rows 16 w
// and on: a and each eight columns of d as multiply_bf16. `b` points to the first of the 16 k in the first column.
DEVICE void wgmma_bf16_n64(float (&d)[8][4], const u32 (&a)[4], const u8* b, bool add) {
#ifdef __CUDACC__
    // Swizzle of 128 bytes; 1024 bytes from eight columns to the next.
    u64 descriptor = u64(1) << 62 | u64(1024 >> 4) << 32 | u64(1) << 16 | (shared_address(b) & 0x3ffff) >> 4;
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
          "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
          "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
          "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(u32(add)));
#else
    emulator::WarpgroupProduct mine{&d[0][0], a, b, add};
    emulator::warpgroup_meet(&mine, emulator::open_product);
#endif
}
#endif
