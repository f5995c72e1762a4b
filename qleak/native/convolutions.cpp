// Convolutions of small images in many lanes, each with its own kernels or all with the same.
//
// Images are [lane image h w c], kernels [(lane) out in k k]. One loop does the work: a few places of the output times one
// vector of channels stay in registers while the taps of a kernel go by. Nothing is laid out but a border of zeros
// around an image and the kernels, filled up to whole vectors; both fit the first cache. Every sum runs in one fixed
// order, whoever else is in the batch.

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

using namespace qleak;

#if defined(__AVX512F__)
constexpr int PLACES = 14, TAPS = 12;  // sums that the registers hold, in `taps` and in `outer`
#else
constexpr int PLACES = 8, TAPS = 12;
#endif

struct Shape {
    int64_t h, w, in, out, kernel, stride, padding;
    int64_t rows() const { return (h + 2 * padding - kernel) / stride + 1; }
    int64_t columns() const { return (w + 2 * padding - kernel) / stride + 1; }
    int64_t taps() const { return in * kernel * kernel; }
};

// Room for `numbers` numbers that the thread keeps for its next call.
template <typename T> T *room(int which, int64_t numbers) {
    static thread_local std::array<std::vector<T>, 4> kept;
    if (int64_t(kept[which].size()) < numbers) kept[which].resize(numbers);
    return kept[which].data();
}

// An image [h w c] inside [high wide c] of zeros, its corner at (top, top), which may lie outside.
template <typename T>
void bordered(const T *x, T *into, int64_t h, int64_t w, int64_t c, int64_t top, int64_t high, int64_t wide) {
    std::memset(into, 0, sizeof(T) * high * wide * c);
    int64_t least = std::max<int64_t>(0, -top), last = std::min(w, wide - top);
    if (last <= least) return;
    for (int64_t y = least; y < std::min(h, high - top); y++)
        std::memcpy(into + ((y + top) * wide + least + top) * c, x + (y * w + least) * c, sizeof(T) * (last - least) * c);
}

// sums[i] += sum over rows y and taps r of x[y * row + r + i * step] * k[y, r], k [rows run WIDE].
template <typename T, int N>
void taps(const T *x, int64_t row, int64_t step, const T *k, int64_t rows, int64_t run, vec<T> *sums) {
    vec<T> a[N];
    for (int i = 0; i < N; i++) a[i] = sums[i];
    for (int64_t y = 0; y < rows; y++) {
        const T *at = x + y * row;
        for (int64_t r = 0; r < run; r++, k += WIDE<T>) {
            vec<T> tap = load(k);
            for (int i = 0; i < N; i++) a[i] += at[i * step + r] * tap;
        }
    }
    for (int i = 0; i < N; i++) sums[i] = a[i];
}

// sums[r] += sum over places (y, p) of x[y * row + p * step + r] * d[y, p], d [rows places WIDE], for N taps r of a row.
template <typename T, int N>
void outer(const T *x, int64_t row, int64_t step, const T *d, int64_t rows, int64_t places, T *sums) {
    vec<T> a[N];
    std::memcpy(a, sums, sizeof(a));
    for (int64_t y = 0; y < rows; y++) {
        const T *at = x + y * row;
        for (int64_t p = 0; p < places; p++, d += WIDE<T>, at += step) {
            vec<T> error = load(d);
            for (int i = 0; i < N; i++) a[i] += at[i] * error;
        }
    }
    std::memcpy(sums, a, sizeof(a));
}

// The loops for every number of sums, 1 to so many, by that number.
template <typename T> using Taps = void (*)(const T *, int64_t, int64_t, const T *, int64_t, int64_t, vec<T> *);
template <typename T, int... N> constexpr std::array<Taps<T>, PLACES> every_taps(std::integer_sequence<int, N...>) {
    return {taps<T, N + 1>...};
}
template <typename T> constexpr auto TAPS_OF = every_taps<T>(std::make_integer_sequence<int, PLACES>{});

template <typename T> using Outer = void (*)(const T *, int64_t, int64_t, const T *, int64_t, int64_t, T *);
template <typename T, int... N> constexpr std::array<Outer<T>, TAPS> every_outer(std::integer_sequence<int, N...>) {
    return {outer<T, N + 1>...};
}
template <typename T> constexpr auto OUTER_OF = every_outer<T>(std::make_integer_sequence<int, TAPS>{});

int64_t equal(int64_t all, int64_t most) {  // parts as equal as may be, none larger than `most`
    int64_t parts = (all + most - 1) / most;
    return (all + parts - 1) / parts;
}

// Kernels k [block kernel run WIDE] over all places of an image [. wide c], whose sums begin at `start`: `store(y, x, block, sums)`.
template <typename T, typename Store>
void slide(const T *image, int64_t wide, int64_t c, int64_t stride, const T *k, int64_t kernel, int64_t blocks, int64_t rows,
           int64_t columns, const T *start, Store store) {
    int64_t run = kernel * c, row = wide * c, step = stride * c, part = equal(columns, PLACES);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t y = 0; y < rows; y++)
            for (int64_t x = 0; x < columns; x += part) {
                vec<T> sums[PLACES], from = load(start + b * WIDE<T>);
                for (auto &v : sums) v = from;
                const T *at = image + (y * wide + x) * stride * c, *own = k + b * kernel * run * WIDE<T>;
                int64_t count = std::min(part, columns - x);
                TAPS_OF<T>[count - 1](at, row, step, own, kernel, run, sums);
                for (int64_t i = 0; i < count; i++) store(y, x + i, b, reinterpret_cast<const T *>(sums + i));
            }
}

template <typename T> int64_t blocks_of(int64_t channels) { return (channels + WIDE<T> - 1) / WIDE<T>; }

// out (+)= K * x + bias: [lane image h w in] -> [lane image rows columns out]. `own`: each lane has its kernels and bias.
template <typename T>
void forward(const T *x, const T *kernels, const T *bias, T *out, const Shape &s, int64_t lanes, int64_t images, bool own,
             bool add) {
    int64_t high = s.h + 2 * s.padding, wide = s.w + 2 * s.padding, blocks = blocks_of<T>(s.out), k = s.kernel;
    T *image = room<T>(0, high * wide * s.in), *start = room<T>(2, blocks * WIDE<T>);
    int64_t size = s.taps() * WIDE<T>, rows = s.rows(), columns = s.columns();
    T *packed = room<T>(1, size * blocks);
    std::fill_n(packed, size * blocks, T(0));
    std::fill_n(start, blocks * WIDE<T>, T(0));
    for (int64_t lane = 0; lane < lanes; lane++) {
        if (own || lane == 0) {
            const T *from = kernels + lane * s.out * s.taps() * own;
            for (int64_t b = 0; b < blocks; b++, from += WIDE<T> * s.taps())
                for (int64_t yx = 0; yx < k * k; yx++)
                    for (int64_t i = 0; i < s.in; i++)
                        for (int64_t o = 0; o < std::min<int64_t>(WIDE<T>, s.out - b * WIDE<T>); o++)
                            packed[b * size + (yx * s.in + i) * WIDE<T> + o] = from[o * s.taps() + i * k * k + yx];
            if (bias) std::copy_n(bias + lane * s.out * own, s.out, start);
        }
        for (int64_t n = 0; n < images; n++, x += s.h * s.w * s.in, out += rows * columns * s.out) {
            bordered(x, image, s.h, s.w, s.in, s.padding, high, wide);
            slide(image, wide, s.in, s.stride, packed, k, blocks, rows, columns, start,
                  [&](int64_t y, int64_t p, int64_t b, const T *sums) {
                      T *to = out + (y * columns + p) * s.out + b * WIDE<T>;
                      int64_t many = std::min<int64_t>(WIDE<T>, s.out - b * WIDE<T>);
                      if (add)
                          for (int64_t o = 0; o < many; o++) to[o] += sums[o];
                      else
                          for (int64_t o = 0; o < many; o++) to[o] = sums[o];
                  });
        }
    }
}

// Channels of one phase within one vector: where they go.
struct Piece {
    int64_t y, z, channel, from, many;
};

// The transposed map, (d(K * x)/dx)^T d: [lane image rows columns out] -> (+)= [lane image h w in].
//
// With y + padding = stride * m + r and a tap's row = stride * j + r, x(y) gathers d(m - j) K(stride * j + r): a
// convolution of d with kernels sorted by phase r, whose outputs are the phases of all inputs.
template <typename T>
void transposed(const T *d, const T *kernels, T *out, const Shape &s, int64_t lanes, int64_t images, bool own, bool add) {
    int64_t st = s.stride, reach = (s.kernel + st - 1) / st, first = s.padding / st, oh = s.rows(), ow = s.columns();
    int64_t rows = (s.padding + s.h - 1) / st - first + 1, columns = (s.padding + s.w - 1) / st - first + 1;
    int64_t high = rows + reach - 1, wide = columns + reach - 1, phases = st * st * s.in, blocks = blocks_of<T>(phases);
    int64_t size = reach * reach * s.out * WIDE<T>;
    T *image = room<T>(0, high * wide * s.out), *packed = room<T>(1, size * blocks), *start = room<T>(2, blocks * WIDE<T>);
    std::fill_n(packed, size * blocks, T(0));
    std::fill_n(start, blocks * WIDE<T>, T(0));
    std::vector<Piece> pieces;
    std::vector<int64_t> begin;
    for (int64_t c = 0, many; c < phases; c += many) {
        int64_t phase = c / s.in, from = c % WIDE<T>;
        many = std::min(WIDE<T> - from, s.in - c % s.in);
        if (!from) begin.push_back(pieces.size());
        pieces.push_back({phase / st - s.padding, phase % st - s.padding, c % s.in, from, many});
    }
    begin.push_back(pieces.size());
    for (int64_t lane = 0; lane < lanes; lane++) {
        if (own || lane == 0) {
            const T *from = kernels + lane * s.out * s.taps() * own;
            for (int64_t y = 0; y < s.kernel; y++)
                for (int64_t z = 0; z < s.kernel; z++, from++)
                    for (int64_t i = 0; i < s.in; i++) {
                        int64_t c = (y % st * st + z % st) * s.in + i;
                        int64_t tap = ((reach - 1 - y / st) * reach + reach - 1 - z / st) * s.out;
                        T *to = packed + c / WIDE<T> * size + tap * WIDE<T> + c % WIDE<T>;
                        for (int64_t o = 0; o < s.out; o++) to[o * WIDE<T>] = from[o * s.taps() + i * s.kernel * s.kernel];
                    }
        }
        for (int64_t n = 0; n < images; n++, d += oh * ow * s.out, out += s.h * s.w * s.in) {
            bordered(d, image, oh, ow, s.out, reach - 1 - first, high, wide);
            slide(image, wide, s.out, 1, packed, reach, blocks, rows, columns, start,
                  [&](int64_t m, int64_t q, int64_t b, const T *sums) {
                      for (int64_t c = begin[b]; c < begin[b + 1]; c++) {
                          const Piece &piece = pieces[c];
                          int64_t y = st * (m + first) + piece.y, z = st * (q + first) + piece.z;
                          if (y < 0 || y >= s.h || z < 0 || z >= s.w) continue;
                          T *to = out + (y * s.w + z) * s.in + piece.channel;
                          if (add)
                              for (int64_t v = 0; v < piece.many; v++) to[v] += sums[piece.from + v];
                          else
                              for (int64_t v = 0; v < piece.many; v++) to[v] = sums[piece.from + v];
                      }
                  });
        }
    }
}

// scale * d/dK - less [lane out in k k] and scale * d/dbias [lane out], summed over a lane's images.
template <typename T>
void weigh(const T *x, const T *d, const T *less, T *found, T *total, const Shape &s, int64_t lanes, int64_t images,
           T scale) {
    int64_t high = s.h + 2 * s.padding, wide = s.w + 2 * s.padding, blocks = blocks_of<T>(s.out), k = s.kernel;
    int64_t rows = s.rows(), columns = s.columns(), places = rows * columns, size = s.taps() * WIDE<T>, run = k * s.in;
    int64_t part = equal(run, TAPS);
    T *image = room<T>(0, high * wide * s.in), *errors = room<T>(1, blocks * places * WIDE<T>);
    T *sums = room<T>(2, blocks * size), *all = room<T>(3, s.out);
    std::fill_n(errors, blocks * places * WIDE<T>, T(0));
    for (int64_t lane = 0; lane < lanes; lane++) {
        std::fill_n(sums, blocks * size, T(0));
        std::fill_n(all, s.out, T(0));
        for (int64_t n = 0; n < images; n++, x += s.h * s.w * s.in, d += places * s.out) {
            bordered(x, image, s.h, s.w, s.in, s.padding, high, wide);
            for (int64_t p = 0; p < places; p++)
                for (int64_t o = 0; o < s.out; o++) {
                    all[o] += d[p * s.out + o];
                    errors[(o / WIDE<T> * places + p) * WIDE<T> + o % WIDE<T>] = d[p * s.out + o];
                }
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t y = 0; y < k; y++)
                    for (int64_t r = 0; r < run;) {
                        int64_t count = std::min(part, run - r);
                        OUTER_OF<T>[count - 1](image + y * wide * s.in + r, s.stride * wide * s.in, s.stride * s.in,
                                            errors + b * places * WIDE<T>, rows, columns,
                                            sums + b * size + (y * run + r) * WIDE<T>);
                        r += count;
                    }
        }
        for (int64_t o = 0; o < s.out; o++) {
            *total++ = scale * all[o];
            for (int64_t i = 0; i < s.in; i++)
                for (int64_t yx = 0; yx < k * k; yx++) {
                    T sum = scale * sums[o / WIDE<T> * size + (yx * s.in + i) * WIDE<T> + o % WIDE<T>];
                    *found++ = less ? sum - *less++ : sum;
                }
        }
    }
}

Shape shape(const int64_t *s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}; }

}  // namespace

// `s`: h w in out kernel stride padding. Null for no bias, nothing to take off.
#define QLEAK_EXPORT(T)                                                                                                \
    void forward_##T(const T *x, const T *kernels, const T *bias, T *out, const int64_t *s, int64_t lanes,             \
                     int64_t images, int own, int add) {                                                               \
        forward<T>(x, kernels, bias, out, shape(s), lanes, images, own, add);                                          \
    }                                                                                                                  \
    void transposed_##T(const T *d, const T *kernels, T *out, const int64_t *s, int64_t lanes, int64_t images,         \
                        int own, int add) {                                                                            \
        transposed<T>(d, kernels, out, shape(s), lanes, images, own, add);                                             \
    }                                                                                                                  \
    void weigh_##T(const T *x, const T *d, const T *less, T *found, T *total, const int64_t *s, int64_t lanes,         \
                   int64_t images, double scale) {                                                                     \
        weigh<T>(x, d, less, found, total, shape(s), lanes, images, T(scale));                                         \
    }

extern "C" {
QLEAK_EXPORT(float)
QLEAK_EXPORT(double)
}
