// Gradients of linear layers that are made, met and forgotten row by row (attacks/ghost.py): a row stays in the first cache.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

using namespace qleak;

// A row v of a matrix V, met from both sides: push[o] = <h, v>, pull += delta[o] * v, for each image of a lane.
template <typename T>
void meet(const T *v, const T *delta, const T *h, int64_t images, int64_t outs, int64_t ins, T *push, T *pull) {
    for (int64_t b = 0; b < images; b++) {
        push[b * outs] = dot(h + b * ins, v, ins);
        T weight = delta[b * outs], *to = pull + b * ins;
        for (int64_t i = 0; i < ins; i++) to[i] += weight * v[i];
    }
}

// V = U - proj U, U = scale * delta^T h and lo <= proj U <= hi: |V|^2 [lane], h V^T [lane b out] and delta V [lane b in].
template <typename T>
void outside(const T *lo, const T *hi, const T *delta, const T *h, T scale, T *value, T *push, T *pull, int64_t lanes,
             int64_t images, int64_t outs, int64_t ins) {
    std::vector<T> row(ins);
    T *v = row.data();
    for (int64_t lane = 0; lane < lanes; lane++) {
        std::fill_n(pull, images * ins, T(0));
        double total = 0;
        for (int64_t o = 0; o < outs; o++, lo += ins, hi += ins) {
            T first = scale * delta[o];
            for (int64_t i = 0; i < ins; i++) v[i] = first * h[i];
            for (int64_t b = 1; b < images; b++) {
                T weight = scale * delta[b * outs + o];
                for (int64_t i = 0; i < ins; i++) v[i] += weight * h[b * ins + i];
            }
            for (int64_t i = 0; i < ins; i++) {
                T inside = v[i] < lo[i] ? lo[i] : v[i];  // not a number stays what it is
                inside = inside > hi[i] ? hi[i] : inside;
                v[i] -= inside;
            }
            total += dot(v, v, ins);
            meet(v, delta + o, h, images, outs, ins, push + o, pull);
        }
        *value++ = T(total);
        delta += images * outs, h += images * ins, push += images * outs, pull += images * ins;
    }
}

// h R^T [lane b out] and delta R [lane b in] of matrices [lane out in], each read once.
template <typename T>
void sides(const T *rest, const T *delta, const T *h, T *push, T *pull, int64_t lanes, int64_t images, int64_t outs,
           int64_t ins) {
    for (int64_t lane = 0; lane < lanes; lane++) {
        std::fill_n(pull, images * ins, T(0));
        for (int64_t o = 0; o < outs; o++, rest += ins) meet(rest, delta + o, h, images, outs, ins, push + o, pull);
        delta += images * outs, h += images * ins, push += images * outs, pull += images * ins;
    }
}

}  // namespace

#define QLEAK_EXPORT(T)                                                                                                \
    void outside_##T(const T *lo, const T *hi, const T *delta, const T *h, double scale, T *value, T *push, T *pull,   \
                     int64_t lanes, int64_t images, int64_t outs, int64_t ins) {                                       \
        outside<T>(lo, hi, delta, h, T(scale), value, push, pull, lanes, images, outs, ins);                           \
    }                                                                                                                  \
    void sides_##T(const T *rest, const T *delta, const T *h, T *push, T *pull, int64_t lanes, int64_t images,         \
                   int64_t outs, int64_t ins) {                                                                        \
        sides<T>(rest, delta, h, push, pull, lanes, images, outs, ins);                                                \
    }

extern "C" {
QLEAK_EXPORT(float)
QLEAK_EXPORT(double)
}
