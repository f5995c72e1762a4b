// Calls every kernel on arrays of exactly the size it may touch, for a run under the address sanitizer.

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

using std::int64_t;

extern "C" {
void forward_float(const float *, const float *, const float *, float *, const int64_t *, int64_t, int64_t, int, int);
void transposed_float(const float *, const float *, float *, const int64_t *, int64_t, int64_t, int, int);
void weigh_float(const float *, const float *, const float *, float *, float *, const int64_t *, int64_t, int64_t, double);
void outside_float(const float *, const float *, const float *, const float *, double, float *, float *, float *, int64_t,
                   int64_t, int64_t, int64_t);
void sides_float(const float *, const float *, const float *, float *, float *, int64_t, int64_t, int64_t, int64_t);
void lbfgs_float(const float *, double *, double *, double *, const int64_t *, const double *, const float *, const float *,
                 const float *, float *, int64_t, int64_t, int64_t, int64_t);
}

static std::mt19937 draw(7);
static int64_t whole(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(draw); }
static std::vector<float> numbers(int64_t count) { return std::vector<float>(count, 0.5f); }

int main() {
    int tried = 0;
    for (int turn = 0; turn < 400; turn++) {
        int64_t lanes = whole(1, 3), b = whole(1, 2), n = lanes * b, own = whole(0, 1), add = whole(0, 1);
        int64_t s[] = {whole(1, 19), whole(1, 19), whole(1, 20), whole(1, 40), whole(1, 5), whole(1, 3), whole(0, 5)};
        int64_t rows = s[0] + 2 * s[6] - s[4], columns = s[1] + 2 * s[6] - s[4];
        if (rows < 0 || columns < 0) continue;
        rows = rows / s[5] + 1, columns = columns / s[5] + 1, tried++;
        int64_t image = n * s[0] * s[1] * s[2], made = n * rows * columns * s[3], kernel = s[2] * s[3] * s[4] * s[4];
        auto x = numbers(image), d = numbers(made), k = numbers(kernel * (own ? lanes : 1));
        auto bias = numbers(s[3] * (own ? lanes : 1)), found = numbers(kernel * lanes), total = numbers(s[3] * lanes);
        forward_float(x.data(), k.data(), whole(0, 1) ? bias.data() : nullptr, d.data(), s, lanes, b, own, add);
        transposed_float(d.data(), k.data(), x.data(), s, lanes, b, own, add);
        auto less = numbers(kernel * lanes);
        weigh_float(x.data(), d.data(), whole(0, 1) ? less.data() : nullptr, found.data(), total.data(), s, lanes, b, 0.5);

        int64_t outs = whole(1, 40), ins = whole(1, 70);
        auto lo = numbers(lanes * outs * ins), hi = lo, delta = numbers(n * outs), h = numbers(n * ins), pull = h, push = delta;
        outside_float(lo.data(), hi.data(), delta.data(), h.data(), 2, total.data(), push.data(), pull.data(), lanes, b, outs, ins);
        sides_float(lo.data(), delta.data(), h.data(), push.data(), pull.data(), lanes, b, outs, ins);

        int64_t places = whole(2, 12), used = whole(1, places - 1), size = whole(1, 70);
        auto pairs = numbers(lanes * places * 2 * size), y = numbers(lanes * size), g = y, way = y, gamma = numbers(lanes);
        std::vector<double> inverse(lanes * places * places), yy = inverse, diagonal(lanes * places), pivot(lanes, 1);
        std::vector<int64_t> place(lanes);
        for (auto &p : place) p = whole(0, 1) ? whole(0, used - 1) : places - 1;
        lbfgs_float(pairs.data(), inverse.data(), yy.data(), diagonal.data(), place.data(), pivot.data(), gamma.data(), y.data(),
                    g.data(), way.data(), lanes, places, used, size);
    }
    std::printf("%d geometries\n", tried);
}
