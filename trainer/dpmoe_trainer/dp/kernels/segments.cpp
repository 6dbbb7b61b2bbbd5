// ‖Σ_s g_s·a_sᵀ‖² of many segments of rows, from the rows' inner products:
//
//   Σ_{s,s'} (a_s·a_s')·(g_s·g_s')
//
// Both factors are symmetric, so only tiles on and above the diagonal are computed, 4 rows by 4.
// Nothing is gathered and nothing is kept: a segment's rows lie next to each other, and a tile's 16
// products of pairs go into the sum at once. Inner products have the rows' precision, with 64 bytes
// of partial sums each; sums of pairs are in double.

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

constexpr int kTile = 4;
constexpr int kPairs = kTile * kTile;


typedef Vector<float>::type Floats;
typedef Vector<double>::type Doubles;

// The sums of each of 16 vectors of 16, as one vector: halves are added until one number is left.
inline void sum_lanes(const Floats* v, float* sums) {
  Floats a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19,
                                   20, 21, 22, 23) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25,
                                   26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18,
                                   19, 24, 25, 26, 27) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22,
                                   23, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20,
                                   21, 24, 25, 28, 29) +
           __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22,
                                   23, 26, 27, 30, 31);
  const Floats d = __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22,
                                           24, 26, 28, 30) +
                   __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23,
                                           25, 27, 29, 31);
  std::memcpy(sums, &d, sizeof d);
}

inline void sum_lanes(const Doubles* v, double* sums) {
  for (int i = 0; i < kPairs; i++) {
    double sum = 0;
    for (int lane = 0; lane < 8; lane++) sum += v[i][lane];
    sums[i] = sum;
  }
}

// Inner products of rows i…i+3 with rows j…j+3; rows past the last one repeat it.
template <typename T>
inline void inner_products(const T* rows, int64_t n, int64_t width, int64_t i, int64_t j, T* out) {
  typedef typename Vector<T>::type V;
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  const T *left[kTile], *right[kTile];
  for (int u = 0; u < kTile; u++) {
    left[u] = rows + std::min(i + u, n - 1) * width;
    right[u] = rows + std::min(j + u, n - 1) * width;
  }
  V sums[kPairs] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    V x[kTile], y[kTile];
    for (int u = 0; u < kTile; u++) x[u] = load<V>(left[u] + k);
    for (int u = 0; u < kTile; u++) y[u] = load<V>(right[u] + k);
    if (i == 0)  // The first tiles find their rows in no cache.
      for (int u = 0; u < kTile; u++) __builtin_prefetch(right[u] + kTile * width + k);
    for (int u = 0; u < kTile; u++)
      for (int v = 0; v < kTile; v++) sums[u * kTile + v] += x[u] * y[v];
  }
  sum_lanes(sums, out);
  for (; k < width; k++)
    for (int u = 0; u < kTile; u++)
      for (int v = 0; v < kTile; v++) out[u * kTile + v] += left[u][k] * right[v][k];
}

template <typename T>
double squared_norm(const T* a, const T* g, int64_t n, int64_t inputs, int64_t outputs,
                    double rounding) {
  T x[kPairs], y[kPairs];
  double total = 0, terms = 0;
  for (int64_t i = 0; i < n; i += kTile) {
    for (int64_t j = i; j < n; j += kTile) {
      inner_products(a, n, inputs, i, j, x);
      inner_products(g, n, outputs, i, j, y);
      double tile = 0;
      for (int u = 0; u < std::min<int64_t>(kTile, n - i); u++)
        for (int v = 0; v < std::min<int64_t>(kTile, n - j); v++)
          tile += (double)x[u * kTile + v] * y[u * kTile + v];
      total += i == j ? tile : 2 * tile;
      if (i == j)
        for (int u = 0; u < std::min<int64_t>(kTile, n - i); u++)
          terms += std::sqrt((double)x[u * kTile + u] * y[u * kTile + u]);
    }
  }
  // Not std::max, which would lose a total that is not a number.
  const double floor = rounding * terms * terms;
  return total < floor ? floor : total;
}

template <typename T>
void squared_norms(const T* a, const T* g, int64_t inputs, int64_t outputs, const int64_t* start,
                   const int64_t* length, int64_t segments, double rounding, double* out,
                   int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
  for (int64_t m = 0; m < segments; m++)
    out[m] = squared_norm(a + start[m] * inputs, g + start[m] * outputs, length[m], inputs,
                          outputs, rounding);
}

}  // namespace

extern "C" void dpmoe_squared_norms_f32(const float* a, const float* g, int64_t inputs,
                                        int64_t outputs, const int64_t* start,
                                        const int64_t* length, int64_t segments, double rounding,
                                        double* out, int threads) {
  squared_norms(a, g, inputs, outputs, start, length, segments, rounding, out, threads);
}

extern "C" void dpmoe_squared_norms_f64(const double* a, const double* g, int64_t inputs,
                                        int64_t outputs, const int64_t* start,
                                        const int64_t* length, int64_t segments, double rounding,
                                        double* out, int threads) {
  squared_norms(a, g, inputs, outputs, start, length, segments, rounding, out, threads);
}
