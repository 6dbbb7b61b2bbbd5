// C = A·B of several matrices in single precision, one product after another, each by all threads.
//
// Why not torch's: its library (MKL) has AVX-512 for Intel's processors only, and runs on others at
// half of what they can do. This is the usual scheme (Goto and van de Geijn 2008): slices of A and B
// are packed into panels of 16 rows or columns, so that the innermost loop reads memory in order, and
// that loop keeps a tile of C in registers. A packed slice of B's columns stays in the first cache,
// one of A's rows in the second. The order of summation does not depend on the threads.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "vectors.h"

// One product: A is m×k, B is k×n, C is m×n; strides of A and B are free, C's rows are contiguous.
struct Product {
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row, b_column;
  float* c;
  int64_t c_row, m, n, k;
};

namespace {

typedef Vector<float>::type V;

constexpr int kPanel = 16;   // Rows of A or columns of B that are packed together: a vector.
constexpr int kTile = 8;     // Rows of C in registers, by two vectors.
constexpr int64_t kDepth = 256;  // Of a slice: two of B's panels are 32 KiB.
constexpr int64_t kRows = 256;   // Of A that a thread goes through for each two of B's panels.

int64_t panels(int64_t width) { return (width + kPanel - 1) / kPanel; }

template <int kHalf, size_t... kLane>
inline void swap_halves(V& one, V& other, std::index_sequence<kLane...>) {
  const V first = __builtin_shufflevector(one, other, (kLane & kHalf ? 16 + kLane - kHalf : kLane)...);
  other = __builtin_shufflevector(one, other, (kLane & kHalf ? 16 + kLane : kLane + kHalf)...);
  one = first;
}

template <int kHalf>
inline void transpose(V* rows) {
  for (int i = 0; i < kPanel; i++)
    if (!(i & kHalf))
      swap_halves<kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kPanel>());
  if constexpr (kHalf > 1) transpose<kHalf / 2>(rows);
}

// A panel of up to 16 rows of a matrix, depth by depth, filled up with zeros.
void pack(const float* from, int64_t stride, int64_t depth_stride, int64_t width, int64_t depth,
          float* to) {
  width = std::min<int64_t>(width, kPanel);
  if (depth_stride == 1) {
    for (int64_t k = 0; k < depth; k += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, depth - k);
      V rows[kPanel] = {};
      for (int64_t i = 0; i < width; i++)
        if (count == kPanel)
          rows[i] = load<V>(from + i * stride + k);
        else
          std::memcpy(&rows[i], from + i * stride + k, count * sizeof(float));
      transpose<kPanel / 2>(rows);
      for (int64_t i = 0; i < count; i++) std::memcpy(to + (k + i) * kPanel, &rows[i], sizeof(V));
    }
  } else if (stride == 1 && width == kPanel) {
    for (int64_t k = 0; k < depth; k++)
      std::memcpy(to + k * kPanel, from + k * depth_stride, sizeof(V));
  } else {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t i = 0; i < kPanel; i++)
        to[k * kPanel + i] = i < width ? from[i * stride + k * depth_stride] : 0;
  }
}

inline void store(V value, float* to, int64_t columns, bool add) {
  if (columns >= kPanel) {
    if (add) value += load<V>(to);
    std::memcpy(to, &value, sizeof value);
  } else {
    for (int64_t j = 0; j < columns; j++) to[j] = add ? to[j] + value[j] : value[j];
  }
}

// 8 rows of C by `kVectors` of 16 columns, from half a panel of A and as many panels of B.
template <int kVectors>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t c_row, int64_t rows,
              int64_t columns, bool add) {
  V sums[kTile][kVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    V y[kVectors];
    for (int v = 0; v < kVectors; v++) y[v] = load<V>(b + (v * depth + k) * kPanel);
    for (int u = 0; u < kTile; u++)
      for (int v = 0; v < kVectors; v++) sums[u][v] += a[k * kPanel + u] * y[v];
  }
  for (int u = 0; u < kTile; u++)
    for (int v = 0; v < kVectors; v++)
      if (u < rows && v * kPanel < columns)
        store(sums[u][v], c + u * c_row + v * kPanel, columns - v * kPanel, add);
}

// Rows [row, end) of C at two panels of B's, for one slice of depth.
void multiply_rows(const Product& p, const float* a, const float* b, int64_t row, int64_t end,
                   int64_t pair, int64_t depth, bool add) {
  const int64_t column = pair * 2 * kPanel, columns = p.n - column;
  const float* y = b + column * depth;
  for (int64_t i = row; i < end; i += kTile) {
    const float* x = a + i / kPanel * kPanel * depth + i % kPanel;
    float* c = p.c + i * p.c_row + column;
    if (columns > kPanel)
      multiply<2>(x, y, depth, c, p.c_row, end - i, columns, add);
    else
      multiply<1>(x, y, depth, c, p.c_row, end - i, columns, add);
  }
}

void multiply_all(const Product* products, int64_t count, float* packed) {
  for (const Product* p = products; p < products + count; p++) {
    const int64_t a_panels = panels(p->m), b_panels = panels(p->n);
    const int64_t pairs = (b_panels + 1) / 2, chunks = (p->m + kRows - 1) / kRows;
    for (int64_t k = 0; k < p->k; k += kDepth) {
      const int64_t depth = std::min(kDepth, p->k - k);
      float* const b = packed + a_panels * kPanel * depth;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a_panels + b_panels; i++) {
        const int64_t from_a = i * kPanel, from_b = (i - a_panels) * kPanel;
        if (i < a_panels)
          pack(p->a + from_a * p->a_row + k * p->a_column, p->a_row, p->a_column, p->m - from_a,
               depth, packed + from_a * depth);
        else
          pack(p->b + from_b * p->b_column + k * p->b_row, p->b_column, p->b_row, p->n - from_b,
               depth, b + from_b * depth);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < chunks * pairs; i++) {
        const int64_t row = i / pairs * kRows;
        multiply_rows(*p, packed, b, row, std::min(row + kRows, p->m), i % pairs, depth, k > 0);
      }
    }
  }
}

// Memory that a thread keeps from call to call, so that its pages need not be cleared each time.
float* workspace(int64_t numbers) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < numbers) {
    size = panels(numbers) * kPanel;
    memory.reset(static_cast<float*>(std::aligned_alloc(sizeof(V), size * sizeof(float))));
    if (!memory) std::abort();
  }
  return memory.get();
}

}  // namespace

extern "C" void dpmoe_products_f32(const Product* products, int64_t count, int threads) {
  int64_t most = 0;
  for (const Product* p = products; p < products + count; p++) {
    most = std::max(most, (panels(p->m) + panels(p->n)) * kPanel * std::min(p->k, kDepth));
    if (p->k == 0)
      for (int64_t i = 0; i < p->m; i++) std::fill_n(p->c + i * p->c_row, p->n, 0.0f);
  }
  float* const packed = workspace(most);
#pragma omp parallel num_threads(threads) if (threads > 1)
  multiply_all(products, count, packed);
}
