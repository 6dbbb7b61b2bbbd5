// Adds normal numbers from a ChaCha20 stream (RFC 8439, with a 64-bit block counter and no nonce).
//
// Sixteen blocks are computed at once, one in each lane, and make a group of 128 numbers. With w(i)
// the i-th 64 bits of a lane's block, Box and Muller's pairs are (w(0), w(4)) … (w(3), w(7)): radius
// and angle. A group's numbers are first the 4·16 cosines, by pair and lane, then the sines. The
// same is written in torch in dpmoe_trainer/dp/stream.py, and a test compares the two.

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

constexpr int kLanes = 16;
constexpr int kPairs = 4;
constexpr int64_t kGroup = 2 * kPairs * kLanes;

typedef double Doubles __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef int64_t Masks __attribute__((vector_size(64)));

template <int kBits>
inline Words rotated(Words x) {
  return (x << kBits) | (x >> (32 - kBits));
}

inline void quarter_round(Words& a, Words& b, Words& c, Words& d) {
  a += b, d = rotated<16>(d ^ a);
  c += d, b = rotated<12>(b ^ c);
  a += b, d = rotated<8>(d ^ a);
  c += d, b = rotated<7>(b ^ c);
}

// Blocks 16·group … 16·group + 15, word by word.
inline void chacha20(const uint32_t* key, uint64_t group, Words* block) {
  const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  Words start[16] = {};
  for (int i = 0; i < 4; i++) start[i] += constants[i];
  for (int i = 0; i < 8; i++) start[4 + i] += key[i];
  for (int lane = 0; lane < kLanes; lane++) {
    const uint64_t counter = group * kLanes + lane;
    start[12][lane] = (uint32_t)counter;
    start[13][lane] = (uint32_t)(counter >> 32);
  }
  Words x[16];
  for (int i = 0; i < 16; i++) x[i] = start[i];
  for (int round = 0; round < 10; round++) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 16; i++) block[i] = x[i] + start[i];
}

// Lanes 8·half … 8·half + 7 of two words, joined to 64 bits; their upper 53 as a number in [0, 1).
inline Doubles uniform(Words low, Words high, int half) {
  typedef uint32_t HalfWords __attribute__((vector_size(32)));
  HalfWords low8, high8;
  std::memcpy(&low8, (const char*)&low + half * sizeof low8, sizeof low8);
  std::memcpy(&high8, (const char*)&high + half * sizeof high8, sizeof high8);
  const Longs bits = __builtin_convertvector(low8, Longs) |
                     (__builtin_convertvector(high8, Longs) << 32);
  return __builtin_convertvector((Masks)(bits >> 11), Doubles) * 0x1p-53;
}

inline Doubles select(Masks where, Doubles one, Doubles other) {
  return (Doubles)((where & (Masks)one) | (~where & (Masks)other));
}

// ln(u) of normal positive numbers: u = 2^e·m with m around 1, and with s = (m-1)/(m+1),
// ln(m) = 2·artanh(s) (the polynomial is FreeBSD's e_log.c).
inline Doubles logarithm(Doubles u) {
  const Longs bits = (Longs)u;
  // The exponent is cut so that m is in [√½, √2).
  const Longs shifted = bits - 0x3fe6a09e667f3bcdULL;
  const Masks exponent = (Masks)shifted >> 52;
  const Doubles e = __builtin_convertvector(exponent, Doubles);
  const Doubles m = (Doubles)(bits - ((Longs)exponent << 52));
  const Doubles f = m - 1.0, s = f / (m + 1.0), z = s * s;
  Doubles r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  r = r * z;
  const Doubles h = 0.5 * f * f;
  return e * 6.93147180369123816490e-01 -
         ((h - (s * (h + r) + e * 1.90821492927058770002e-10)) - f);
}

// cos(2πt) and sin(2πt): by quarter turns to within an eighth of one (FreeBSD's k_cos.c, k_sin.c).
inline void cosine_and_sine(Doubles t, Doubles& cosine, Doubles& sine) {
  const Masks quarter = __builtin_convertvector(4.0 * t + 0.5, Masks);
  const Doubles x =
      (t - 0.25 * __builtin_convertvector(quarter, Doubles)) * 6.283185307179586477;
  const Doubles z = x * x;
  Doubles c = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  c = 1.0 - (0.5 * z - z * z * c);
  Doubles s = z * 1.58969099521155010221e-10 - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = x + x * z * s;
  const Masks odd = (quarter & 1) != 0;
  const Doubles over = select(odd, s, c), up = select(odd, c, s);
  cosine = select(((quarter + 1) & 2) != 0, -over, over);
  sine = select((quarter & 2) != 0, -up, up);
}

inline Doubles square_root(Doubles x) {
  Doubles root;
  for (int i = 0; i < 8; i++) root[i] = std::sqrt(x[i]);
  return root;
}

inline void normal_group(const uint32_t* key, uint64_t group, double scale, double* out) {
  Words block[16];
  chacha20(key, group, block);
  for (int pair = 0; pair < kPairs; pair++) {
    const Words* radius = block + 2 * pair;
    const Words* angle = radius + 2 * kPairs;
    for (int half = 0; half < 2; half++) {
      // Half a grid step up: the logarithm of zero is none of the normal's values.
      const Doubles u = uniform(radius[0], radius[1], half) + 0x1p-54;
      const Doubles r = scale * square_root(-2.0 * logarithm(u));
      Doubles cosine, sine;
      cosine_and_sine(uniform(angle[0], angle[1], half), cosine, sine);
      const Doubles x = r * cosine, y = r * sine;
      double* at = out + pair * kLanes + half * 8;
      std::memcpy(at, &x, sizeof x);
      std::memcpy(at + kPairs * kLanes, &y, sizeof y);
    }
  }
}

// The stream's numbers first … first + count - 1, which may begin and end within a group.
template <typename T>
void add_normal(T* to, int64_t first, int64_t count, const uint32_t* key, double scale,
                int threads) {
  const int64_t end = first + count, groups = (end + kGroup - 1) / kGroup;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t group = first / kGroup; group < groups; group++) {
    double normal[kGroup];
    normal_group(key, group, scale, normal);
    const int64_t begin = group * kGroup;
    const int64_t from = std::max(first, begin), until = std::min(end, begin + kGroup);
    for (int64_t i = from; i < until; i++) {
      T& at = to[i - first];
      at = (T)((double)at + normal[i - begin]);
    }
  }
}

}  // namespace

extern "C" void dpmoe_add_normal_f32(float* to, int64_t first, int64_t count, const uint32_t* key,
                                     double scale, int threads) {
  add_normal(to, first, count, key, scale, threads);
}

extern "C" void dpmoe_add_normal_f64(double* to, int64_t first, int64_t count, const uint32_t* key,
                                     double scale, int threads) {
  add_normal(to, first, count, key, scale, threads);
}
