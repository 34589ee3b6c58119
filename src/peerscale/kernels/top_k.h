// The best k of n values, for k up to some dozens and n up to some thousands.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Best first, the earlier of equal ones first. Memory-safe, if meaningless, for NaN.
template <class Real>
class TopK {
 public:
  explicit TopK(std::int64_t n) : value_(n + kLanes), index_(n + kLanes), position_(n + kLanes) {}

  void operator()(const Real* values, std::int64_t n, std::int64_t k, Real* best, std::int32_t* where) {
    std::int64_t m = keep_candidates(values, n, lower_bound(values, n, k));
    if (m > kMany) {  // hardly ever: many equal values
      std::partial_sort(index_.begin(), index_.begin() + k, index_.begin() + m, [=](std::int32_t a, std::int32_t b) {
        return values[a] > values[b] || (!(values[a] < values[b]) && a < b);
      });
      m = k;
      for (std::int64_t i = 0; i < k; ++i) value_[i] = values[index_[i]];
    }
    rank_candidates(m, k, best, where);
  }

 private:
  typedef Real Vector __attribute__((vector_size(__BIGGEST_ALIGNMENT__)));
  static constexpr std::int64_t kLanes = sizeof(Vector) / sizeof(Real);
  static constexpr std::int64_t kMany = 512;
  std::vector<Real> value_;
  std::vector<std::int32_t> index_, position_;

  // The least of the maxima of at least k disjoint groups of values: k values or more are no smaller.
  static Real lower_bound(const Real* values, std::int64_t n, std::int64_t k) {
    const std::int64_t blocks = (k + kLanes - 1) / kLanes, length = n / blocks;
    Real bound = std::numeric_limits<Real>::infinity();
    if (length < 2 * kLanes) return -bound;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const Real* block = values + b * length;
      Vector maxima, v;
      std::memcpy(&maxima, block, sizeof v);
      for (std::int64_t i = kLanes; i + kLanes <= length; i += kLanes) {
        std::memcpy(&v, block + i, sizeof v);
        maxima = v > maxima ? v : maxima;
      }
      for (std::int64_t l = 0; l < std::min(kLanes, k - b * kLanes); ++l) bound = maxima[l] < bound ? maxima[l] : bound;
    }
    return bound;
  }

  // Collects the values that are not below the bound, in their order.
  std::int64_t keep_candidates(const Real* values, std::int64_t n, Real bound) {
    std::int64_t m = 0, i = 0;
#ifdef __AVX512F__
    if constexpr (std::is_same_v<Real, float>) {
      __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (; i + kLanes <= n; i += kLanes, index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes))) {
        const __m512 v = _mm512_loadu_ps(values + i);
        const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
        _mm512_storeu_ps(value_.data() + m, _mm512_maskz_compress_ps(kept, v));
        _mm512_storeu_si512(index_.data() + m, _mm512_maskz_compress_epi32(kept, index));
        m += __builtin_popcount(kept);
      }
    }
#endif
    for (; i < n; ++i) {
      value_[m] = values[i];
      index_[m] = static_cast<std::int32_t>(i);
      m += !(values[i] < bound);
    }
    return m;
  }

  // A candidate's rank is the number of better ones; equal ones, in their order, take the next free ranks.
  void rank_candidates(std::int64_t m, std::int64_t k, Real* best, std::int32_t* where) {
    std::fill_n(value_.begin() + m, kLanes, -std::numeric_limits<Real>::infinity());
    std::fill_n(position_.begin(), m, -1);
    for (std::int64_t i = 0; i < m; i += kLanes) {
      Vector mine;
      std::memcpy(&mine, value_.data() + i, sizeof mine);
      auto better = mine < mine;  // zeros; a comparison that holds is -1
      for (std::int64_t j = 0; j < m; ++j) better += value_[j] > mine;
      for (std::int64_t l = 0; l < std::min(kLanes, m - i); ++l) {
        std::int64_t rank = -better[l];
        while (position_[rank] >= 0) ++rank;
        position_[rank] = static_cast<std::int32_t>(i + l);
      }
    }
    for (std::int64_t r = 0; r < k; ++r) {
      best[r] = value_[position_[r]];
      where[r] = index_[position_[r]];
    }
  }
};
