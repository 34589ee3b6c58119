// Dot products with rows that lie anywhere in a table, and sums of them.
#pragma once
#include <algorithm>
#include <cstdint>

namespace peerscale {

using std::int32_t;
using std::int64_t;

constexpr int64_t kGroup = 4;  // rows handled at once: four independent sums hide the latency of an addition
constexpr int64_t kAhead = 8;  // rows fetched ahead of their use: enough to hide the latency of memory

template <class Real>
inline void prefetch(const Real* row, int64_t D) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < D * static_cast<int64_t>(sizeof(Real)); b += 64) __builtin_prefetch(bytes + b);
}

// out(i) = <x, row(i)> for i < count; row(i) may be asked for, but is not read, up to i < known. (Vectors of 8: adding
// up the lanes of wider ones costs more than they save where D is small.)
template <class Real, class Row, class Out>
inline void dot_rows(const Real* x, int64_t D, int64_t count, int64_t known, Row row, Out out) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    for (int64_t a = i + kAhead; a < std::min(i + kAhead + kGroup, known); ++a) prefetch(row(a), D);
    const Real *r0 = row(i), *r1 = row(i + 1), *r2 = row(i + 2), *r3 = row(i + 3);
    Real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd simdlen(8) reduction(+ : s0, s1, s2, s3)
    for (int64_t d = 0; d < D; ++d) s0 += x[d] * r0[d], s1 += x[d] * r1[d], s2 += x[d] * r2[d], s3 += x[d] * r3[d];
    out(i) = s0, out(i + 1) = s1, out(i + 2) = s2, out(i + 3) = s3;
  }
  for (; i < count; ++i) {
    if (i + kAhead < known) prefetch(row(i + kAhead), D);
    const Real* r = row(i);
    Real s = 0;
#pragma omp simd simdlen(8) reduction(+ : s)
    for (int64_t d = 0; d < D; ++d) s += x[d] * r[d];
    out(i) = s;
  }
}

template <class Real>
inline void add_row(Real* __restrict y, int64_t D, Real weight, const Real* row) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) y[d] += weight * row[d];
}

// y += sum of weight(i) row(i) over i < count; `known` as above.
template <class Real, class Row, class Weight>
inline void add_rows(Real* __restrict y, int64_t D, int64_t count, int64_t known, Row row, Weight weight) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    for (int64_t a = i + kAhead; a < std::min(i + kAhead + kGroup, known); ++a) prefetch(row(a), D);
    const Real *r0 = row(i), *r1 = row(i + 1), *r2 = row(i + 2), *r3 = row(i + 3);
    const Real w0 = weight(i), w1 = weight(i + 1), w2 = weight(i + 2), w3 = weight(i + 3);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[d] += w0 * r0[d] + w1 * r1[d] + w2 * r2[d] + w3 * r3[d];
  }
  for (; i < count; ++i) {
    if (i + kAhead < known) prefetch(row(i + kAhead), D);
    add_row(y, D, weight(i), row(i));
  }
}

}  // namespace peerscale
