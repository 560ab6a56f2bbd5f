"""Functions of tensor cores that kernels call, as CUDA C over PTX: squares of 16 x 16 halves or
bytes in shared memory, a warp's share of a square in registers of each thread: eight of halves and
of results, two of bytes (PTX ISA, wmma; bytes since 6.3, sm_72)."""

from __future__ import annotations


def _list(first: int, count: int = 8) -> str:
    return "{" + ", ".join(f"%{i}" for i in range(first, first + count)) + "}"


def _registers(constraint: str, name: str, count: int = 8) -> str:
    return ", ".join(f'"{constraint}"({name}[{i}])' for i in range(count))


def _load(which: str) -> str:
    return f"""
static __device__ __forceinline__ void tensor_load_{which}(unsigned *f, const half *at,
                                                           int pitch) {{
    asm volatile("wmma.load.{which}.sync.aligned.col.m16n16k16.shared.f16 {_list(0)}, [%8], %9;"
                 : {_registers("=r", "f")}
                 : "r"((unsigned)__cvta_generic_to_shared(at)), "r"(pitch) : "memory");
}}
"""


#: Columns of the left operand, columns of the right one and columns of results are contiguous.
SOURCE = f"""{_load("a")}{_load("b")}
static __device__ __forceinline__ void tensor_mma(float *c, const unsigned *a, const unsigned *b) {{
    asm volatile("wmma.mma.sync.aligned.col.col.m16n16k16.f32.f32 "
                 "{_list(0)}, {_list(8)}, {_list(16)}, {_list(0)};"
                 : {_registers("+f", "c")}
                 : {_registers("r", "a")}, {_registers("r", "b")});
}}

static __device__ __forceinline__ void tensor_store(float *at, const float *c, int pitch) {{
    asm volatile("wmma.store.d.sync.aligned.col.m16n16k16.shared.f32 [%8], {_list(0)}, %9;"
                 :: {_registers("f", "c")},
                    "r"((unsigned)__cvta_generic_to_shared(at)), "r"(pitch) : "memory");
}}
"""


def _load_bytes(which: str, order: str) -> str:
    load = f"wmma.load.{which}.sync.aligned.{order}.m16n16k16.shared.s8"
    return f"""
static __device__ __forceinline__ void bytes_load_{which}(unsigned *f, const int *at) {{
    asm volatile("{load} {_list(0, 2)}, [%2], 16;"
                 : {_registers("=r", "f", 2)}
                 : "r"((unsigned)__cvta_generic_to_shared(at)) : "memory");
}}
"""


#: Sixteen bytes of a row of the left operand, of a column of the right one, are contiguous, and so
#: are columns of results.
BYTES = f"""{_load_bytes("a", "row")}{_load_bytes("b", "col")}
static __device__ __forceinline__ void bytes_mma(int *c, const unsigned *a, const unsigned *b) {{
    asm volatile("wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32 "
                 "{_list(0)}, {_list(8, 2)}, {_list(10, 2)}, {_list(0)};"
                 : {_registers("+r", "c")}
                 : {_registers("r", "a", 2)}, {_registers("r", "b", 2)});
}}

static __device__ __forceinline__ void bytes_store(int *at, const int *c, int pitch) {{
    asm volatile("wmma.store.d.sync.aligned.col.m16n16k16.shared.s32 [%8], {_list(0)}, %9;"
                 :: {_registers("r", "c")},
                    "r"((unsigned)__cvta_generic_to_shared(at)), "r"(pitch) : "memory");
}}
"""
