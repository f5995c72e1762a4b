// Vectors of the processor's own width, as GCC and Clang have them, for loops that must stay in registers.

#pragma once

#include <cstdint>
#include <cstring>

namespace qleak {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <typename T> struct Vector { typedef T type __attribute__((vector_size(BYTES), may_alias)); };
template <typename T> using vec = typename Vector<T>::type;
template <typename T> constexpr int WIDE = BYTES / sizeof(T);

template <typename T> vec<T> load(const T *from) {
    vec<T> v;
    std::memcpy(&v, from, BYTES);
    return v;
}

template <typename T> T sum(const vec<T> &v) {
    T total = 0;
    for (int i = 0; i < WIDE<T>; i++) total += v[i];
    return total;
}

template <typename T> void keep(T *to, const vec<T> &v) { std::memcpy(to, &v, BYTES); }

// <a, b>: four sums at once, which hide how long an addition takes.
template <typename T> T dot(const T *a, const T *b, int64_t n) {
    vec<T> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDE<T> <= n; i += 4 * WIDE<T>)
        for (int k = 0; k < 4; k++) sums[k] += load(a + i + k * WIDE<T>) * load(b + i + k * WIDE<T>);
    for (; i + WIDE<T> <= n; i += WIDE<T>) sums[0] += load(a + i) * load(b + i);
    T total = sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

}  // namespace qleak
