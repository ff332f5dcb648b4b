// What every kernel file starts from: integer types, 16-bit elements, shared memory, address arithmetic.
//
// The same sources are compiled twice: by NVRTC to PTX, and with HALFBYTE_EMULATOR defined by a C++ compiler for the tests
// on a processor. Then kernels/emulator/ provides the CUDA names that are used (threadIdx, __syncthreads, shuffles, ...).
#pragma once

#ifdef HALFBYTE_EMULATOR
#include "emulator/runtime.h"
#else

// One array of shared memory of a size known at compile time: SHARED_ARRAY(float, table, [16]).
#define SHARED_ARRAY(type, name, dimensions) __shared__ type name dimensions

// The dynamic shared memory of the launch, as a pointer to its first byte. At most once in a kernel.
#define DYNAMIC_SHARED(name)                                      \
    extern __shared__ __align__(128) unsigned char name##_base[]; \
    unsigned char *const name = name##_base

// The same, at a multiple of 1024: where the copy engine and the matrix units have their patterns begin.
#define DYNAMIC_SHARED_1024(name) extern __shared__ __align__(1024) unsigned char name[]

// An array that every kernel may read: in constant memory where all lanes read the same element, else in global.
#define CONSTANT_TABLE __constant__ const
#define GLOBAL_TABLE __device__ const

#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(i64) == 8, "as on every CUDA platform");

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// 16-bit floats as their bits: no arithmetic is done in them outside the matrix units.
struct Bf16 {
    u16 bits;
};
struct F16 {
    u16 bits;
};

// Words that travel together in one access of their size.
struct alignas(8) Words2 {
    u32 word[2];
};
struct alignas(8) Floats2 {
    float value[2];
};
struct alignas(16) Floats4 {
    float value[4];
};
struct alignas(16) Words4 {
    u32 word[4];
};

#include "common/ptx.cuh"

__device__ inline float to_f32(float value) { return value; }
__device__ inline float to_f32(Bf16 value) { return __uint_as_float(u32(value.bits) << 16); }
__device__ inline float to_f32(F16 value) { return half_to_float(value.bits); }

// The nearest value of T, ties to even; too large becomes infinite.
template <typename T>
__device__ inline T from_f32(float value);
template <>
__device__ inline float from_f32<float>(float value) {
    return value;
}
template <>
__device__ inline Bf16 from_f32<Bf16>(float value) {
    return {float_to_bfloat(value)};
}
template <>
__device__ inline F16 from_f32<F16>(float value) {
    return {float_to_half(value)};
}

// Two 16-bit elements in a word, the first in the low half.
template <typename T>
__device__ inline u32 pack2(float first, float second);
template <>
__device__ inline u32 pack2<Bf16>(float first, float second) {
    return pack_bfloat2(first, second);
}
template <>
__device__ inline u32 pack2<F16>(float first, float second) {
    return pack_half2(first, second);
}

// The elements of such a word.
template <typename T>
__device__ inline float first_of(u32 word) {
    return to_f32(T{u16(word & 0xffff)});
}
template <typename T>
__device__ inline float second_of(u32 word) {
    return to_f32(T{u16(word >> 16)});
}
template <>
__device__ inline float second_of<Bf16>(u32 word) {
    return __uint_as_float(word & 0xffff0000u);
}

// Whether `pointer` is a multiple of `bytes`, a power of two.
__device__ inline bool is_aligned(const void *pointer, u32 bytes) { return (u64(pointer) & (bytes - 1)) == 0; }

// The element `offset` bytes behind `base`: spares the multiplication where bit fields make good offsets.
template <typename T>
__device__ inline T at_byte(const T *base, u32 offset) {
    return *reinterpret_cast<const T *>(reinterpret_cast<const u8 *>(base) + offset);
}
