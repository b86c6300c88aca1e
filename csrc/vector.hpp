// Vectors of the widest kind that the instruction set of this translation unit has, and storage types narrower than
// the arithmetic on them.
//
// The types are the compiler's own vector extensions: expressions on them compile to vector instructions on every
// architecture, and a local of such a type stays in a register, which arrays in plain loops do not always do.
//
// Every kernel file is compiled once for each instruction set with UTNETV2_ISA naming the namespace. What is defined
// here has internal linkage, and kernel files use nothing of the standard library that has code of its own: the linker
// would merge the copies of such code and could run the widest one on a processor that lacks its instructions.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define UTNETV2_VECTOR_BYTES 64
#elif defined(__AVX__)
#define UTNETV2_VECTOR_BYTES 32
#else
#define UTNETV2_VECTOR_BYTES 16
#endif

namespace utnetv2 {
namespace {

// Storage of 16 bits; arithmetic on it is float.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class T>
struct ArithmeticOf {
    using type = float;
};
template <>
struct ArithmeticOf<double> {
    using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <class A>
struct VectorOf {
    typedef A type __attribute__((vector_size(UTNETV2_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

template <class A>
constexpr int64_t LANES = UTNETV2_VECTOR_BYTES / sizeof(A);

// Integers of the width of A: what comparisons of Vec<A> give, and its bits.
template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
    using type = int32_t;
};
template <>
struct BitsOf<double> {
    using type = int64_t;
};
template <class A>
using Mask = Vec<typename BitsOf<A>::type>;

using Bits = Vec<uint32_t>;
typedef uint16_t HalfBits __attribute__((vector_size(UTNETV2_VECTOR_BYTES / 2)));

template <class A>
inline Vec<A> broadcast(A value) {
    return value - Vec<A>{};
}

// The compiler may otherwise load a vector again for every use.
template <class A>
inline void keep_in_register([[maybe_unused]] Vec<A>& vector) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(vector));
#elif defined(__SSE2__)
    __asm__("" : "+x"(vector));
#endif
}
// It may otherwise derive one of several pointers from the others, which takes more registers than it spares.
template <class T>
inline void keep_in_register(const T*& pointer) {
    __asm__("" : "+r"(pointer));
}

template <class A>
inline Vec<A> select(Mask<A> condition, Vec<A> yes, Vec<A> no) {
    return condition ? yes : no;
}

template <class V>
inline V load_bits(const void* from) {
    V vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

// GCC takes three times as many instructions as there are for these two.
inline Bits widen(HalfBits half) {
#if defined(__AVX512BW__)
    return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#else
    return __builtin_convertvector(half, Bits);
#endif
}
inline HalfBits narrow(Bits bits) {
#if defined(__AVX512BW__)
    return (HalfBits)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#else
    return __builtin_convertvector(bits, HalfBits);
#endif
}

// ---- Vectors from and to storage; pointers need no alignment beyond that of T. ----

inline Vec<float> load(const float* from) { return load_bits<Vec<float>>(from); }
inline Vec<double> load(const double* from) { return load_bits<Vec<double>>(from); }

inline Vec<float> load(const BFloat16* from) {
    return (Vec<float>)(widen(load_bits<HalfBits>(from)) << 16);
}

inline Vec<float> load(const Float16* from) {
    const Bits half = widen(load_bits<HalfBits>(from));
    const Bits magnitude = (half & 0x7fff) << 13;
    // The exponent's bias differs by 112; the product also normalises subnormals. Infinity and NaN stay full.
    const Bits scaled = (Bits)((Vec<float>)magnitude * 0x1p112f);
    const Bits special = magnitude | 0x7f800000;
    return (Vec<float>)(((half & 0x7c00) == 0x7c00 ? special : scaled) | (half & 0x8000) << 16);
}

inline void store(float* to, Vec<float> value) { __builtin_memcpy(to, &value, sizeof value); }
inline void store(double* to, Vec<double> value) { __builtin_memcpy(to, &value, sizeof value); }

inline void store(BFloat16* to, Vec<float> value) {
    const Bits bits = (Bits)value;
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    const Bits quiet = bits >> 16 | 0x40;
    const HalfBits half = narrow((value == value) ? rounded : quiet);
    __builtin_memcpy(to, &half, sizeof half);
}

inline void store(Float16* to, Vec<float> value) {
    const Bits sign = (Bits)value >> 16 & 0x8000;
    const Bits magnitude = (Bits)value & 0x7fffffff;
    // Normal results: rebias the exponent, round to nearest, ties to even; a carry into the exponent is right.
    const Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Subnormal ones: adding 0.5 aligns the mantissa so that the addition itself rounds.
    const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
    Bits half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;  // 65520 and more is infinity
    half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;
    const HalfBits stored = narrow(half | sign);
    __builtin_memcpy(to, &stored, sizeof stored);
}

// ---- Past the caches: memory that is not in them need not be read before it is overwritten. ----

// Results from this size on are streamed: few processors have caches that would keep them for their readers, and a copy
// that streams takes two thirds of the time.
#if defined(__SSE2__)
constexpr int64_t STREAMED_BYTES = 32 << 20;
#else
constexpr int64_t STREAMED_BYTES = INT64_MAX;
#endif

// A vector to an address that is a multiple of its size. Other threads see it after `finish_streams`.
inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
    __builtin_memcpy(to, from, UTNETV2_VECTOR_BYTES);
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// `count` elements, whatever their address, the same way.
template <class T>
inline void stream_run(T* to, const T* from, int64_t count) {
    constexpr int64_t STEP = UTNETV2_VECTOR_BYTES / int64_t(sizeof(T));
    for (; count > 0 && uintptr_t(to) % UTNETV2_VECTOR_BYTES != 0; --count) *to++ = *from++;
    for (; count >= STEP; count -= STEP, to += STEP, from += STEP) stream(to, from);
    for (; count > 0; --count) *to++ = *from++;
}

// ---- Parts of vectors: `count` elements, fewer than LANES; what is missing reads as zero and is not written. ----

template <class T>
inline Vec<Arithmetic<T>> load_part(const T* from, int64_t count) {
    T buffer[LANES<Arithmetic<T>>] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
    return load(buffer);
}

template <class T>
inline void store_part(T* to, Vec<Arithmetic<T>> value, int64_t count) {
    T buffer[LANES<Arithmetic<T>>];
    store(buffer, value);
    for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// ---- Single elements. ----

inline float to_arithmetic(float value) { return value; }
inline double to_arithmetic(double value) { return value; }
inline float to_arithmetic(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
}
inline float to_arithmetic(Float16 value) { return load_part(&value, 1)[0]; }

template <class T>
inline T from_arithmetic(Arithmetic<T> value) {
    T result;
    store_part(&result, broadcast(value), 1);
    return result;
}
template <>
inline float from_arithmetic<float>(float value) {
    return value;
}
template <>
inline double from_arithmetic<double>(double value) {
    return value;
}

// ---- Across the lanes, always in the same order. ----

template <class A>
inline A sum(Vec<A> value) {
    A buffer[LANES<A>];
    store(buffer, value);
    for (int64_t half = LANES<A> / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) buffer[i] += buffer[i + half];
    return buffer[0];
}

template <class A>
inline Vec<A> maximum(Vec<A> a, Vec<A> b) {
    return select<A>(a > b || a != a, a, b);  // NaN stays
}

template <class A>
inline Vec<A> minimum(Vec<A> a, Vec<A> b) {
    return select<A>(a < b || a != a, a, b);
}

template <class A>
inline A maximum(Vec<A> value) {
    A largest = value[0];
    for (int64_t i = 1; i < LANES<A>; ++i) largest = value[i] > largest || value[i] != value[i] ? value[i] : largest;
    return largest;
}

template <class A>
inline A minimum(Vec<A> value) {
    return -maximum<A>(-value);
}

// ---- e to the power of each lane: exact to a rounding or two; below -87 it is zero. ----

inline Vec<float> exponential(Vec<float> x) {
    constexpr float to_integer = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits of the mantissa
    const Vec<float> shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
    const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // |r| <= ln(2) / 2; ln(2) in two parts
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Vec<float> result = (Vec<float>)((Bits)p + ((Bits)shifted << 23));
    return select<float>(x < -87.0f, Vec<float>{}, result);
}

inline Vec<double> exponential(Vec<double> x) {
    for (int64_t i = 0; i < LANES<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

// ---- LANES x LANES matrices, a vector for each row, transposed by exchanging ever larger blocks. ----

template <int SIZE, class V, int... I>
inline void exchange_blocks(V& a, V& b, std::integer_sequence<int, I...>) {
    constexpr int N = sizeof...(I);
    const V first = __builtin_shufflevector(a, b, ((I & SIZE) == 0 ? I : N + (I ^ SIZE))...);
    b = __builtin_shufflevector(a, b, ((I & SIZE) == 0 ? I ^ SIZE : N + I)...);
    a = first;
}

template <int SIZE, class A>
inline void transpose_blocks(Vec<A>* rows) {
    constexpr int N = int(LANES<A>);
    if constexpr (SIZE < N) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
            if ((i & SIZE) == 0) exchange_blocks<SIZE>(rows[i], rows[i + SIZE], std::make_integer_sequence<int, N>{});
        transpose_blocks<SIZE * 2, A>(rows);
    }
}

template <class A>
inline void transpose(Vec<A>* rows) {
    transpose_blocks<1, A>(rows);
}

}  // namespace
}  // namespace utnetv2
