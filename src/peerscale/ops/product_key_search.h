// The top k of product keys, and its gradients.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"
#include "top_k.h"

namespace peerscale {

// Scores of the sub-keys `key` (count, C) with the queries in `query`, a vector of lanes for each of the C numbers.
template <class Real, class Item, class Values, class Int>
inline void score_lanes(const Real* key, int64_t C, const Values* query, Int index, int64_t count, Item* out) {
  constexpr int kKeys = 8;  // at once, for which a query is loaded but once
  int64_t i = 0;
  for (; i + kKeys <= count; i += kKeys, key += kKeys * C) {
    Values score[kKeys] = {};
    for (int64_t c = 0; c < C; ++c)
      for (int k = 0; k < kKeys; ++k) score[k] += query[c] * key[k * C + c];
    for (int k = 0; k < kKeys; ++k) out[i + k] = {score[k], decltype(out->index){} + static_cast<Int>(index + i + k)};
  }
  for (; i < count; ++i, key += C) {
    Values score = {};
    for (int64_t c = 0; c < C; ++c) score += query[c] * key[c];
    out[i] = {score, decltype(out->index){} + static_cast<Int>(index + i)};
  }
}

// For every token and head the best K sums of a first-side and a second-side score of the queries (T, H, 2, C) with the
// sub-keys (G, 2, n, C) of all G = 1 or H key sets, for K up to kSize. Of the pairs of ranks among the K best of either
// side only those (first[c], second[c]) can be in the result. Results, best first: sums and rows (T, H, K), the row of
// sub-keys i and j being i n + j; sub_keys (T, H, 2, K), the numbers of i and j among all sub-keys.
template <class Real, int kSize>
void product_key_top_k_up_to(const Real* query, const Real* keys, int64_t T, int64_t H, int64_t G, int64_t n, int64_t C,
                    int64_t K, const int64_t* first, const int64_t* second, int64_t n_candidates, Real* sums,
                    int64_t* rows, int32_t* sub_keys, int64_t threads) {
  using Top = TopK<Real, kSize>;
  using Item = typename Top::Item;
  using Int = typename Top::Int;
  constexpr int kSideBits = 4 * sizeof(Int);  // an index holds those of both sides, half its bits each
  // Queries that share a set of sub-keys: those of all tokens, and of all heads or of one.
  const int64_t Q = T * H / G, blocks = (Q + Top::kLanes - 1) / Top::kLanes;
#pragma omp parallel num_threads(threads)
  {
    Top top_k;
    Item best[2 * kSize];
    std::vector<typename Top::Values> lanes(C);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < G * blocks; ++block) {
      const int64_t g = block / blocks, q = block % blocks * Top::kLanes, count = std::min(Top::kLanes, Q - q);
      const auto query_of = [=](int64_t lane) { return G == 1 ? q + lane : (q + lane) * H + g; };
      for (int64_t s = 0; s < 2; ++s) {
        for (int64_t lane = 0; lane < count; ++lane)
          for (int64_t c = 0; c < C; ++c) lanes[c][lane] = query[(2 * query_of(lane) + s) * C + c];
        const Real* key = keys + (2 * g + s) * n * C;
        const Item* side = top_k(n, 0, [&](int64_t start, int64_t some, Item* to) {
          score_lanes(key + start * C, C, lanes.data(), static_cast<Int>(start), some, to);
        });
        std::copy_n(side, K, best + s * kSize);
      }
      // The pairs with the best of the first side come first, and are in order.
      const Item* sum = top_k(n_candidates, K, [&](int64_t start, int64_t some, Item* to) {
        for (int64_t c = start; c < start + some; ++c, ++to) {
          const Item &a = best[first[c]], &b = best[kSize + second[c]];
          *to = {a.value + b.value, (a.index << kSideBits) + b.index};
        }
      });
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t th = query_of(lane), offset = 2 * n * g;
        for (int64_t k = 0; k < K; ++k) {
          const int64_t pair = sum[k].index[lane], i = pair >> kSideBits, j = pair - (i << kSideBits);
          sums[th * K + k] = sum[k].value[lane];
          rows[th * K + k] = i * n + j;
          sub_keys[2 * th * K + k] = static_cast<int32_t>(offset + i);
          sub_keys[(2 * th + 1) * K + k] = static_cast<int32_t>(offset + n + j);
        }
      }
    }
  }
}

// For K up to 64.
template <class Real>
void product_key_top_k(const Real* query, const Real* keys, int64_t T, int64_t H, int64_t G, int64_t n,
                       int64_t C, int64_t K, const int64_t* first, const int64_t* second, int64_t n_candidates,
                       Real* sums, int64_t* rows, int32_t* sub_keys, int64_t threads) {
  const auto of_size = K <= 8    ? product_key_top_k_up_to<Real, 8>
                       : K <= 16 ? product_key_top_k_up_to<Real, 16>
                       : K <= 32 ? product_key_top_k_up_to<Real, 32>
                                 : product_key_top_k_up_to<Real, 64>;
  of_size(query, keys, T, H, G, n, C, K, first, second, n_candidates, sums, rows, sub_keys, threads);
}

// Up to kWidth numbers, and zeros.
template <class Real, int kWidth>
struct PaddedRow {
  static constexpr int kBytes = std::min<int>(kWidth * sizeof(Real), 64), kPieces = kWidth * sizeof(Real) / kBytes;
  typedef Real Piece __attribute__((vector_size(kBytes), aligned(sizeof(Real))));
  Piece piece[kPieces] = {};

  void add(Real factor, const PaddedRow& row) {
    for (int i = 0; i < kPieces; ++i) piece[i] += factor * row.piece[i];
  }
  void load(const Real* from, int64_t C) { std::memcpy(piece, from, C * sizeof(Real)); }
  void store(Real* to, int64_t C) const { std::memcpy(to, piece, C * sizeof(Real)); }
};

// As `product_key_backward`, for C up to kWidth, without sorting out which sub-keys a query has twice. Those of
// `a_part` tokens and heads add up their gradients of the sub-keys in a part of their own, (parts, M, C).
template <class Real, int kWidth>
void narrow_backward(const Real* grad, const int32_t* sub_keys, const Real* query, const Real* keys, Real* grad_query,
                     Real* parts, int64_t TH, int64_t a_part, int64_t K, int64_t C, int64_t M, int64_t threads) {
  using Row = PaddedRow<Real, kWidth>;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Row> key(M), sum(M);
    for (int64_t m = 0; m < M; ++m) key[m].load(keys + m * C, C);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < (TH + a_part - 1) / a_part; ++part) {
      std::fill(sum.begin(), sum.end(), Row());
      for (int64_t th = part * a_part; th < std::min(TH, (part + 1) * a_part); ++th) {
        const int32_t *first = sub_keys + 2 * th * K, *second = first + K;
        Row query_0, query_1, grad_0, grad_1;
        query_0.load(query + 2 * th * C, C), query_1.load(query + (2 * th + 1) * C, C);
        for (int64_t k = 0; k < K; ++k) {
          const Real g = grad[th * K + k];
          grad_0.add(g, key[first[k]]), grad_1.add(g, key[second[k]]);
          sum[first[k]].add(g, query_0), sum[second[k]].add(g, query_1);
        }
        grad_0.store(grad_query + 2 * th * C, C), grad_1.store(grad_query + (2 * th + 1) * C, C);
      }
      for (int64_t m = 0; m < M; ++m) sum[m].store(parts + (part * M + m) * C, C);
    }
  }
}

template <class Real>
void product_key_backward_narrow(const Real* grad, const int32_t* sub_keys, const Real* query, const Real* keys,
                                 Real* grad_query, Real* parts, int64_t TH, int64_t a_part, int64_t K, int64_t C,
                                 int64_t M, int64_t threads) {
  const auto of_width = C <= 8    ? narrow_backward<Real, 8>
                        : C <= 16 ? narrow_backward<Real, 16>
                                  : narrow_backward<Real, 32>;
  of_width(grad, sub_keys, query, keys, grad_query, parts, TH, a_part, K, C, M, threads);
}

// From the gradient (Q / 2, K) of the sums those of the queries, (Q, C), Q = T H 2, and of all sub-keys, (M, C),
// M = G 2 n.
template <class Real>
void product_key_backward(const Real* grad, const int32_t* sub_keys, const Real* query, const Real* keys,
                          Real* grad_query, Real* grad_keys, int64_t Q, int64_t K, int64_t C, int64_t M,
                          int64_t threads) {
  std::vector<int32_t> key(Q * K), count(Q);  // the distinct sub-keys of a half query, some half of the K
  std::vector<Real> weight(Q * K);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> place(M, -1);
#pragma omp for schedule(static)
    for (int64_t q = 0; q < Q; ++q) {
      int32_t* key_q = key.data() + q * K;
      Real* weight_q = weight.data() + q * K;
      int32_t m = 0;
      for (int64_t k = 0; k < K; ++k) {
        int32_t& at = place[sub_keys[q * K + k]];
        if (at < 0) key_q[at = m++] = sub_keys[q * K + k], weight_q[at] = 0;
        weight_q[at] += grad[q / 2 * K + k];
      }
      for (int32_t i = 0; i < m; ++i) place[key_q[i]] = -1;
      count[q] = m;
      std::fill_n(grad_query + q * C, C, Real(0));
      add_rows(grad_query + q * C, C, m, 0, [=](int64_t i) { return keys + key_q[i] * C; },
               [=](int64_t i) { return weight_q[i]; });
    }
    // A thread adds up the gradients of its own sub-keys.
    const int64_t begin = M * omp_get_thread_num() / omp_get_num_threads();
    const int64_t end = M * (omp_get_thread_num() + 1) / omp_get_num_threads();
    std::fill(grad_keys + begin * C, grad_keys + end * C, Real(0));
    for (int64_t q = 0; q < Q; ++q)
      for (int64_t i = q * K; i < q * K + count[q]; ++i)
        if (begin <= key[i] && key[i] < end) add_row(grad_keys + key[i] * C, C, weight[i], query + q * C);
  }
}

}  // namespace peerscale
