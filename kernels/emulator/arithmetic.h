// CUDA's arithmetic that matters to the bit: no contraction (-ffp-contract=off), round to nearest even, denormals kept.
// Where CUDA gives a NaN it has the bits 0x7fffffff; here too, as processors have other ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine.h"

namespace emulator {

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float one_nan(float value) { return value == value ? value : bits_as<float>(0x7fffffffu); }
inline double one_nan(double value) { return value == value ? value : bits_as<double>(uint64_t(0x7fffffffffffffff)); }

// Out of range: the nearest integer there is; NaN: 0.
template <typename Integer>
inline Integer saturated(double value, double lowest, double highest) {
    return value != value ? Integer(0) : Integer(value < lowest ? lowest : value > highest ? highest : value);
}

}  // namespace emulator

inline float __uint_as_float(unsigned bits) { return emulator::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return emulator::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return emulator::bits_as<int>(value); }
inline double __longlong_as_double(long long bits) { return emulator::bits_as<double>(bits); }
inline long long __double_as_longlong(double value) { return emulator::bits_as<long long>(value); }

inline float __fadd_rn(float a, float b) { return emulator::one_nan(a + b); }
inline float __fsub_rn(float a, float b) { return emulator::one_nan(a - b); }
inline float __fmul_rn(float a, float b) { return emulator::one_nan(a * b); }
inline float __fdiv_rn(float a, float b) { return emulator::one_nan(a / b); }
inline float __frcp_rn(float a) { return emulator::one_nan(1.0f / a); }
inline float __fsqrt_rn(float a) { return emulator::one_nan(std::sqrt(a)); }
inline float __fmaf_rn(float a, float b, float c) { return emulator::one_nan(std::fmaf(a, b, c)); }

inline double __dadd_rn(double a, double b) { return emulator::one_nan(a + b); }
inline double __dsub_rn(double a, double b) { return emulator::one_nan(a - b); }
inline double __dmul_rn(double a, double b) { return emulator::one_nan(a * b); }
inline double __ddiv_rn(double a, double b) { return emulator::one_nan(a / b); }
inline double __fma_rn(double a, double b, double c) { return emulator::one_nan(std::fma(a, b, c)); }
inline float __double2float_rn(double a) { return emulator::one_nan(float(a)); }

inline int __float2int_rn(float a) { return emulator::saturated<int>(std::nearbyint(double(a)), -2147483648.0, 2147483647.0); }
inline int __float2int_rz(float a) { return emulator::saturated<int>(std::trunc(double(a)), -2147483648.0, 2147483647.0); }
inline unsigned __float2uint_rn(float a) { return emulator::saturated<unsigned>(std::nearbyint(double(a)), 0.0, 4294967295.0); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }

// With one NaN the other operand, and +0 for larger than -0. Those of <cmath> make an exception of signalling NaNs, which
// CUDA does not know.
namespace emulator {
inline float larger(float a, float b) {
    return a != a ? one_nan(b) : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline float smaller(float a, float b) {
    return a != a ? one_nan(b) : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
}  // namespace emulator
#define fmaxf emulator::larger
#define fminf emulator::smaller

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}

// PRMT copies the sign of a byte where bit 3 of its selector is set; nothing here is meant to.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector, emulator::Site site = emulator::Site::here()) {
    if ((selector & 0x8888) != 0) {
        emulator::fail(site, "the selector %#x asks for the sign of a byte", selector & 0xffff);
    }
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}
