// Vectors of 64 bytes, in the compiler's own extension: one register with AVX-512, two with AVX2,
// four with NEON or SSE. Shared by the kernels.

#pragma once

#include <cstdint>
#include <cstring>

template <typename T>
struct Vector;

template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
};

template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
};

typedef uint32_t Words __attribute__((vector_size(64)));

template <typename V, typename T>
static inline V load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
