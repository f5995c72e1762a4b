// One update of the compact form of L-BFGS, lane after lane: what attacks/lbfgs.py does after a pair is stored, in one call.
//
// The pairs [place half d] are read twice, which is nearly all there is to do: eight rows at a time, so that what is done
// with a number costs less than fetching it, and the second time from the end, where the first left off, so that much
// of a lane is still in the cache. The small matrices are [places places], of which the first `used` rows and columns count.

#include <vector>

#include "vectors.h"

namespace {

using namespace qleak;

constexpr int ROWS = 8;

// found[row] = (<rows[row], a>, <rows[row], b>).
template <typename T, int N> void dots(const T *rows, const T *a, const T *b, int64_t d, double *with_a, double *with_b) {
    vec<T> left[N] = {}, right[N] = {};
    int64_t i = 0;
    for (; i + WIDE<T> <= d; i += WIDE<T>) {
        vec<T> u = load(a + i), v = load(b + i);
        for (int n = 0; n < N; n++) {
            vec<T> row = load(rows + n * d + i);
            left[n] += row * u;
            right[n] += row * v;
        }
    }
    for (int n = 0; n < N; n++) {
        with_a[n] = sum<T>(left[n]), with_b[n] = sum<T>(right[n]);
        for (int64_t j = i; j < d; j++) {
            with_a[n] += double(rows[n * d + j]) * a[j];
            with_b[n] += double(rows[n * d + j]) * b[j];
        }
    }
}

// out += sum over rows of weights[row] * rows[row].
template <typename T, int N> void add(const T *rows, const double *weights, int64_t d, T *out) {
    T weight[N];
    for (int n = 0; n < N; n++) weight[n] = T(weights[n]);
    int64_t i = 0;
    for (; i + WIDE<T> <= d; i += WIDE<T>) {
        vec<T> total = load(out + i);
        for (int n = 0; n < N; n++) total += weight[n] * load(rows + n * d + i);
        keep<T>(out + i, total);
    }
    for (; i < d; i++)
        for (int n = 0; n < N; n++) out[i] += weight[n] * rows[n * d + i];
}

// `pivots` s.y of a lane's new pair, `places` its place in the ring; the last place of all means that it is not stored.
template <typename T>
void lbfgs(const T *pairs, double *inverse, double *yy, double *diagonal, const int64_t *place, const double *pivots,
           const T *gammas, const T *ys, const T *gs, T *found, int64_t lanes, int64_t places, int64_t used, int64_t d) {
    std::vector<double> buffer(11 * used);
    double *with_y = buffer.data(), *with_g = with_y + 2 * used, *weights = with_g + 2 * used;  // (s, y) by (s, y)
    double *sy = weights + 2 * used, *sg = sy + used, *u = sg + used, *yu = u + used, *top = yu + used;
    for (int64_t lane = 0; lane < lanes; lane++) {
        const T *rows = pairs + lane * 2 * places * d, *y = ys + lane * d, *g = gs + lane * d;
        int64_t row = 0, at = place[lane];
        for (; row + ROWS <= 2 * used; row += ROWS) dots<T, ROWS>(rows + row * d, y, g, d, with_y + row, with_g + row);
        for (; row < 2 * used; row++) dots<T, 1>(rows + row * d, y, g, d, with_y + row, with_g + row);

        if (at < places - 1) {  // one more column of the triangle's inverse, in the oldest one's place
            for (int64_t i = 0; i < used; i++) {
                sy[i] = i == at ? 0 : with_y[2 * i];
                yy[at * places + i] = yy[i * places + at] = with_y[2 * i + 1];
            }
            for (int64_t i = 0; i < used; i++) u[i] = dot(inverse + i * places, sy, used) / -pivots[lane];
            for (int64_t i = 0; i < used; i++) inverse[at * places + i] = 0, inverse[i * places + at] = u[i];
            inverse[at * places + at] = 1 / pivots[lane];
            diagonal[at] = pivots[lane];
        }

        double gamma = gammas[lane];
        for (int64_t i = 0; i < used; i++) sg[i] = with_g[2 * i], yu[i] = top[i] = 0;
        for (int64_t i = 0; i < used; i++) u[i] = dot(inverse + i * places, sg, used);
        for (int64_t j = 0; j < used; j++)
            for (int64_t i = 0; i < used; i++) yu[i] += u[j] * yy[j * places + i];
        for (int64_t i = 0; i < used; i++) {
            double bent = diagonal[i] * u[i] + gamma * (yu[i] - with_g[2 * i + 1]);
            for (int64_t j = 0; j < used; j++) top[j] += bent * inverse[i * places + j];
        }
        for (int64_t i = 0; i < used; i++) weights[2 * i] = -top[i], weights[2 * i + 1] = gamma * u[i];

        T *out = found + lane * d;
        for (int64_t i = 0; i < d; i++) out[i] = -gammas[lane] * g[i];
        for (row = 2 * used; row % ROWS; row--) add<T, 1>(rows + (row - 1) * d, weights + row - 1, d, out);
        for (; row; row -= ROWS) add<T, ROWS>(rows + (row - ROWS) * d, weights + row - ROWS, d, out);
        inverse += places * places, yy += places * places, diagonal += places;
    }
}

}  // namespace

#define QLEAK_EXPORT(T)                                                                                                \
    void lbfgs_##T(const T *pairs, double *inverse, double *yy, double *diagonal, const int64_t *place,                \
                   const double *pivots, const T *gammas, const T *ys, const T *gs, T *found, int64_t lanes,           \
                   int64_t places, int64_t used, int64_t d) {                                                          \
        lbfgs<T>(pairs, inverse, yy, diagonal, place, pivots, gammas, ys, gs, found, lanes, places, used, d);          \
    }

extern "C" {
QLEAK_EXPORT(float)
QLEAK_EXPORT(double)
}
