/* CUDA C on a CPU, for checks: the threads of a block are contexts that change at each barrier.
 * Blocks run one after another, threads in an order that `emulated_seed` shuffles. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3_ { int x, y, z; };
static dim3_ blockIdx, threadIdx;
typedef float float4_ __attribute__((ext_vector_type(4)));
#define VECTOR(T, N) struct alignas(16) N { T x, y, z, w; }; \
    static inline N make_##N(T x, T y, T z, T w) { return N{x, y, z, w}; }
VECTOR(float, float4)
VECTOR(int, int4)
VECTOR(unsigned, uint4)
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
typedef unsigned char uchar;
#define CUDART_INF_F INFINITY
#define CUDART_INF ((double)INFINITY)
#define CUDART_NAN_F NAN
#define CUDART_NAN ((double)NAN)
typedef _Float16 half;
struct alignas(8) half4 { half x, y, z, w; };
static inline half4 make_half4(half x, half y, half z, half w) { return half4{x, y, z, w}; }
static inline half __float2half_rn(float x) { return (half)x; }
static inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
static inline int __float2int_rn(float x) {
    return x >= 2147483648.f ? INT32_MAX : x <= -2147483648.f ? INT32_MIN : (int)rintf(x);
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
using std::max;
using std::min;

static ucontext_t scheduler_context, *current;
static inline void __syncthreads() { swapcontext(current, &scheduler_context); }

static void (*emulated_body)(void **);
static void **emulated_arguments;
static std::vector<char> emulated_done;
static void enter(int thread) {
    emulated_body(emulated_arguments);
    emulated_done[thread] = 1;
}

static void emulated_block(int threads, unsigned seed) {
    static std::vector<std::vector<char>> stacks;
    if ((int)stacks.size() < threads) stacks.resize(threads, std::vector<char>(65536));
    std::vector<ucontext_t> contexts(threads);
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    emulated_done.assign(threads, 0);
    for (int t = 0; t < threads; t++) {
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks[t].data();
        contexts[t].uc_stack.ss_size = stacks[t].size();
        contexts[t].uc_link = &scheduler_context;
        makecontext(&contexts[t], (void (*)())enter, 1, t);
    }
    for (int left = threads; left > 0;) {
        for (int i = threads - 1; i > 0; i--) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(order[i], order[(seed >> 8) % (i + 1)]);
        }
        for (int t : order) {
            if (emulated_done[t]) continue;
            threadIdx = {t, 0, 0};
            current = &contexts[t];
            swapcontext(&scheduler_context, current);
            left -= emulated_done[t];
        }
    }
}

/* Tensor cores: a fragment remembers where its square lies, a thread owns eight of its results. */
struct square { const half *at; int pitch; };
static inline void tensor_load_a(unsigned *f, const half *at, int pitch) {
    *(square *)f = square{at, pitch};
}
static inline void tensor_load_b(unsigned *f, const half *at, int pitch) {
    *(square *)f = square{at, pitch};
}
static inline void tensor_mma(float *c, const unsigned *a, const unsigned *b) {
    square l = *(const square *)a, r = *(const square *)b;
    for (int i = 0; i < 8; i++) {
        int e = threadIdx.x % 32 * 8 + i;
        for (int k = 0; k < 16; k++)
            c[i] += (float)l.at[k * l.pitch + e % 16] * (float)r.at[e / 16 * r.pitch + k];
    }
}
static inline void tensor_store(float *at, const float *c, int pitch) {
    for (int i = 0; i < 8; i++) {
        int e = threadIdx.x % 32 * 8 + i;
        at[e / 16 * pitch + e % 16] = c[i];
    }
}

/* Pairs of halves: one rounding per multiply-add, which float64 has room for. */
struct pair { half x, y; };
static inline unsigned pair_fma(unsigned a, unsigned b, unsigned c) {
    pair p = *(pair *)&a, q = *(pair *)&b, r = *(pair *)&c;
    pair d = {(half)((double)p.x * (double)q.x + (double)r.x),
              (half)((double)p.y * (double)q.y + (double)r.y)};
    return *(unsigned *)&d;
}
static inline float pair_low(unsigned a) { return (float)((pair *)&a)->x; }
static inline float pair_high(unsigned a) { return (float)((pair *)&a)->y; }

/* Of bytes: a fragment is where its square lies, sixteen rows of sixteen bytes. */
static inline void bytes_load_a(unsigned *f, const int *at) { memcpy(f, &at, sizeof at); }
static inline void bytes_load_b(unsigned *f, const int *at) { memcpy(f, &at, sizeof at); }
static inline void bytes_mma(int *c, const unsigned *a, const unsigned *b) {
    const signed char *l, *r;
    memcpy(&l, a, sizeof l), memcpy(&r, b, sizeof r);
    for (int i = 0; i < 8; i++) {
        int e = threadIdx.x % 32 * 8 + i;
        for (int k = 0; k < 16; k++) c[i] += l[e % 16 * 16 + k] * r[e / 16 * 16 + k];
    }
}
static inline void bytes_store(int *at, const int *c, int pitch) {
    for (int i = 0; i < 8; i++) {
        int e = threadIdx.x % 32 * 8 + i;
        at[e / 16 * pitch + e % 16] = c[i];
    }
}
