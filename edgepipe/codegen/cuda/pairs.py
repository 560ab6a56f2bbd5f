"""Functions of pairs of halves that kernels call, as CUDA C over PTX (4.2 and later, sm_53 and
later): a pair lies in a 32-bit word, its first half in the low bits."""

from __future__ import annotations

#: A fused multiply-add of both halves, each rounded once to a half; both halves added to a float.
SOURCE = """
static __device__ __forceinline__ unsigned pair_fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

static __device__ __forceinline__ float pair_low(unsigned a) {
    float f;
    asm("{.reg .f16 x, y; mov.b32 {x, y}, %1; cvt.f32.f16 %0, x;}" : "=f"(f) : "r"(a));
    return f;
}

static __device__ __forceinline__ float pair_high(unsigned a) {
    float f;
    asm("{.reg .f16 x, y; mov.b32 {x, y}, %1; cvt.f32.f16 %0, y;}" : "=f"(f) : "r"(a));
    return f;
}
"""
