// What kernels are written in: the only file that knows PTX.
//
// Every primitive has two bodies: inline PTX for a device (no NVIDIA header is needed), and C++ for the
// emulator, which keeps to the documented fragment layouts, so that a wrong index shows.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Sixteen bytes that are loaded and stored at once; at a multiple of sixteen.
struct __attribute__((aligned(16))) Bytes16 {
    u32 x, y, z, w;
};
struct __attribute__((aligned(8))) Bytes8 {
    u32 x, y;
};
struct __attribute__((aligned(16))) Float4 {
    float x, y, z, w;
};
struct __attribute__((aligned(8))) Float2 {
    float x, y;
};

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
// A fixed array of the block's shared memory, and the part whose size the launch says.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
#define EXPORT(name)
#else
#include "emulator/emulator.h"
// Inlined always: the kernels of all files become one library, where helpers of two files may share a name.
#define DEVICE inline __attribute__((always_inline))
#define SHARED(type, name, count)       \
    static const char name##_key_ = 0; \
    type* name = static_cast<type*>(emulator::shared(&name##_key_, sizeof(type) * (count)))
#define DYNAMIC_SHARED(name) u8* name = static_cast<u8*>(emulator::dynamic_shared())
// Makes a kernel known by its name to whoever launches.
#define EXPORT(name) static const bool name##_known = emulator::register_kernel(#name, emulator::entry_of<&name>(&name))
#endif

#ifdef __CUDACC_RTC__
#define INFINITY __int_as_float(0x7f800000)
#endif

constexpr u32 ALL_LANES = ~0u;

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }

// ---- bf16: values, and pairs with the first in the low half.

DEVICE float bf16_to_f32(u16 x) { return __uint_as_float(u32(x) << 16); }

// Rounds to nearest even; NaN stays NaN.
DEVICE u16 f32_to_bf16(float x) {
#ifdef __CUDACC__
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
#else
    u32 u = __float_as_uint(x);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return u16((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

DEVICE u32 pack_bf16(float low, float high) {
#ifdef __CUDACC__
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return f32_to_bf16(low) | u32(f32_to_bf16(high)) << 16;
#endif
}
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// What a plane holds of two values, which keep what it leaves for the planes after it.
DEVICE u32 take_plane(float& low, float& high) {
    u32 pair = pack_bf16(low, high);
    low -= low_bf16(pair);
    high -= high_bf16(pair);
    return pair;
}
DEVICE u16 take_plane(float& value) {
    u16 rounded = f32_to_bf16(value);
    value -= bf16_to_f32(rounded);
    return rounded;
}

// a * b + c of both halves, each rounded once.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
#ifdef __CUDACC__
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    // The product of two bf16 values is exact in f32, and f64 holds the sum: one rounding follows. (From f64 to
    // f32 to bf16 rounds twice only where the sum needs more than 24 bits, which kernels here do not rely on.)
    return pack_bf16(float(double(low_bf16(a)) * low_bf16(b) + low_bf16(c)),
                     float(double(high_bf16(a)) * high_bf16(b) + high_bf16(c)));
#endif
}

// ---- Codes of few bits.

// (a & b) | c, in one instruction.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
#ifdef __CUDACC__
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return (a & b) | c;
#endif
}

// Bytes of (low, high) picked by the nibbles of `pick`, as prmt: 0 to 3 from low, 4 to 7 from high.
DEVICE u32 permute(u32 low, u32 high, u32 pick) {
#ifdef __CUDACC__
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(pick));
    return r;
#else
    u64 both = u64(high) << 32 | low;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= u32(u8(both >> (pick >> (4 * i) & 7) * 8)) << 8 * i;
    return r;
#endif
}

// The high 64 bits of a product.
DEVICE u64 high_product(u64 a, u64 b) {
#ifdef __CUDACC__
    return __umul64hi(a, b);
#else
    return u64(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// ---- f32.

constexpr float LOG2_E = 1.44269504088896340736f;

// a * b rounded to nearest, and never part of a fused operation.
DEVICE float multiply_rn(float a, float b) {
#ifdef __CUDACC__
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return a * b;
#endif
}

// 2^x within 2 ulp; 0 for -inf.
DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return exp2f(x);
#endif
}

// 1 / x within one ulp, for x of 1 and more.
DEVICE float reciprocal_fast(float x) {
#ifdef __CUDACC__
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return 1 / x;
#endif
}

// A whole number that is greater where the value is; of NaN any, and -0 is just below 0.
DEVICE u32 ascending_bits(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// ---- Asynchronous copies from global to shared memory. They land when waited for.

#ifdef __CUDACC__
// Not cvta in assembly: so the compiler sees where the pointer comes from, and counts in 32 bits.
DEVICE u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }
#endif

// 16 bytes, of which the first `bytes` (0 or 16 in practice) are read and the rest is zero.
DEVICE void copy_async_16(void* to, const void* from, u32 bytes = 16) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#else
    emulator::copy_async(to, from, 16, bytes);
#endif
}
DEVICE void copy_async_8(void* to, const void* from, u32 bytes = 8) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#else
    emulator::copy_async(to, from, 8, bytes);
#endif
}
DEVICE void copy_async_4(void* to, const void* from, u32 bytes = 4) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#else
    emulator::copy_async(to, from, 4, bytes);
#endif
}
// Ends a group of the copies so far of this thread.
DEVICE void copy_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::copy_commit();
#endif
}
// Until at most so many groups of this thread are under way. (Other threads' copies need a barrier after it.)
template <int groups>
DEVICE void copy_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
    emulator::copy_wait(groups);
#endif
}

// ---- Named barriers: `count` threads meet at barrier `id` (1 to 15; 0 is __syncthreads').

DEVICE void barrier_wait(u32 id, u32 count) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emulator::barrier_wait(id, count);
#endif
}
DEVICE void barrier_arrive(u32 id, u32 count) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emulator::barrier_arrive(id, count);
#endif
}

// ---- Matrix fragments.

#ifndef __CUDACC__
namespace emulator {

struct RowLoad {
    const void* row;
    u32* out;
};

template <int matrices, bool transposed>
void load_matrices(void** lanes) {
    for (u32 lane = 0; lane < 32; lane++) {
        auto* to = static_cast<RowLoad*>(lanes[lane]);
        if (!to) fault("ldmatrix needs a whole warp");
        for (u32 i = 0; i < matrices; i++) {
            u32 first = lane / 4, second = lane % 4 * 2;
            u16 pair[2];
            for (u32 h = 0; h < 2; h++) {
                u32 row = transposed ? second + h : first, column = transposed ? first : second + h;
                auto* from = static_cast<RowLoad*>(lanes[i * 8 + row]);
                if (reinterpret_cast<uintptr_t>(from->row) % 16) fault("a row of ldmatrix is not aligned");
                memcpy(&pair[h], static_cast<const u16*>(from->row) + column, 2);
            }
            to->out[i] = pair[0] | u32(pair[1]) << 16;
        }
    }
}

struct Product {
    float* d;
    const u32 *a, *b;
};

inline void multiply_16x8x16(void** lanes) {
    float a[16][16], b[16][8], d[16][8] = {};
    for (u32 lane = 0; lane < 32; lane++) {
        auto* one = static_cast<Product*>(lanes[lane]);
        if (!one) fault("mma needs a whole warp");
        for (u32 i = 0; i < 4; i++) {
            u32 row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
            a[row][k] = low_bf16(one->a[i]);
            a[row][k + 1] = high_bf16(one->a[i]);
        }
        for (u32 i = 0; i < 2; i++) {
            u32 k = lane % 4 * 2 + i * 8;
            b[k][lane / 4] = low_bf16(one->b[i]);
            b[k + 1][lane / 4] = high_bf16(one->b[i]);
        }
    }
    for (u32 row = 0; row < 16; row++)
        for (u32 k = 0; k < 16; k++)
            for (u32 column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (u32 lane = 0; lane < 32; lane++) {
        auto* one = static_cast<Product*>(lanes[lane]);
        for (u32 i = 0; i < 4; i++) one->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

}  // namespace emulator
#endif

// Four 8x8 matrices of 16-bit values. Lane 8 i + r names row r of matrix i (16 bytes, aligned); each lane gets
// of matrix i the values (lane / 4, lane % 4 * 2) and the next.
DEVICE void load_matrix_x4(u32 (&out)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::RowLoad mine{row, out};
    emulator::warp_meet(ALL_LANES, &mine, emulator::load_matrices<4, false>);
#endif
}
// Lanes 0 to 15 name the rows.
DEVICE void load_matrix_x2(u32 (&out)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::RowLoad mine{row, out};
    emulator::warp_meet(ALL_LANES, &mine, emulator::load_matrices<2, false>);
#endif
}
// Each lane gets of matrix i the values (lane % 4 * 2, lane / 4) and the one below.
DEVICE void load_matrix_x4_transposed(u32 (&out)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::RowLoad mine{row, out};
    emulator::warp_meet(ALL_LANES, &mine, emulator::load_matrices<4, true>);
#endif
}

// d += a * b with a [16 rows, 16 k] and b [16 k, 8 columns], in bf16 with f32 sums. Of lane (g = lane / 4,
// t = lane % 4): a holds the pairs from column 2 t of rows g and g + 8, then from column 2 t + 8 of both; b the pairs
// from rows 2 t and 2 t + 8 of column g; d (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
DEVICE void multiply_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::Product mine{d, a, b};
    emulator::warp_meet(ALL_LANES, &mine, emulator::multiply_16x8x16);
#endif
}

// ---- Between kernels of a stream, where the device can start the next one early (sm_90 and later).
// A file asks for PTX of its own for sm_90 by `// architectures:`; with the general PTX no kernel starts early.

// Until what the kernels before this one wrote is there. What does not depend on it may be read before.
DEVICE void wait_for_previous() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start as soon as all blocks have said so.
DEVICE void let_next_start() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nanoseconds of a clock that all multiprocessors share.
DEVICE u64 clock_nanoseconds() {
#ifdef __CUDACC__
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
#else
    return 0;
#endif
}

// ---- Sums over a warp, in one fixed order.

template <class T>
DEVICE T warp_sum(T x) {
    for (int bits = 16; bits; bits >>= 1) x += __shfl_xor_sync(ALL_LANES, x, bits);
    return x;
}
DEVICE float warp_max(float x) {
    for (int bits = 16; bits; bits >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bits));
    return x;
}
