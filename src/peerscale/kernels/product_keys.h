// The top k of product keys, and its gradients.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"
#include "top_k.h"
#include "top_k_lanes.h"

namespace peerscale {

// For every token and head the best K sums of a first-side and a second-side score. Of the pairs of ranks among the K
// best of either side only those (first[c], second[c]) can be in the result. The scores of (token, head, side) lie
// `stride_*` apart. Results, best first: sums and rows (T, H, K), the row of sub-keys i and j being i n + j; sub_keys
// (T, H, 2, K), the numbers of i and j among the sub-keys (G, 2, n) of all G = 1 or H key sets.
template <class Real>
void product_key_top_k(const Real* scores, int64_t T, int64_t H, int64_t G, int64_t n, int64_t K, int64_t stride_token,
                       int64_t stride_head, int64_t stride_side, const int64_t* first, const int64_t* second,
                       int64_t n_candidates, Real* sums, int64_t* rows, int32_t* sub_keys, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    TopK<Real> top_k(std::max(n, n_candidates));
    std::vector<Real> best(2 * K), candidates(n_candidates);
    std::vector<int32_t> key(2 * K), chosen(K);
#pragma omp for schedule(static)
    for (int64_t th = 0; th < T * H; ++th) {
      const Real* mine = scores + th / H * stride_token + th % H * stride_head;
      for (int64_t s = 0; s < 2; ++s) top_k(mine + s * stride_side, n, K, best.data() + s * K, key.data() + s * K);
      for (int64_t c = 0; c < n_candidates; ++c) candidates[c] = best[first[c]] + best[K + second[c]];
      top_k(candidates.data(), n_candidates, K, sums + th * K, chosen.data());
      const int64_t offset = G == 1 ? 0 : 2 * n * (th % H);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t i = key[first[chosen[k]]], j = key[K + second[chosen[k]]];
        rows[th * K + k] = i * n + j;
        sub_keys[2 * th * K + k] = static_cast<int32_t>(offset + i);
        sub_keys[(2 * th + 1) * K + k] = static_cast<int32_t>(offset + n + j);
      }
    }
  }
}

// As `product_key_top_k`, faster for some hundred sub-keys or fewer; the scores are laid out (G, 2, n, Q), Q the tokens
// and, if they share a key set, heads.
template <class Real>
void product_key_top_k_lanes(const Real* scores, int64_t Q, int64_t H, int64_t G, int64_t n, int64_t K,
                             const int64_t* first, const int64_t* second, int64_t n_candidates, Real* sums,
                             int64_t* rows, int32_t* sub_keys, int64_t threads) {
  using Top = TopKLanes<Real>;
  using Item = typename Top::Item;
  constexpr int kSideBits = 4 * sizeof(typename Top::Int);  // an index holds those of both sides, half its bits each
  const int64_t blocks = (Q + Top::kLanes - 1) / Top::kLanes;
#pragma omp parallel num_threads(threads)
  {
    Top top_k(K);
    std::vector<Item> best(2 * K);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < G * blocks; ++block) {
      const int64_t g = block / blocks, q = block % blocks * Top::kLanes, count = std::min(Top::kLanes, Q - q);
      for (int64_t s = 0; s < 2; ++s) {
        const Real* mine = scores + (2 * g + s) * n * Q + q;
        const Item* side = top_k(n, 0, [=](int64_t i) {
          Item item{{}, typename Top::Indices{} + static_cast<typename Top::Int>(i)};
          std::memcpy(&item.value, mine + i * Q, count * sizeof(Real));
          return item;
        });
        std::copy_n(side, K, best.data() + s * K);
      }
      // The pairs with the best of the first side come first, and are in order.
      const Item* sum = top_k(n_candidates, K, [&](int64_t c) {
        const Item &a = best[first[c]], &b = best[K + second[c]];
        return Item{a.value + b.value, (a.index << kSideBits) + b.index};
      });
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t th = G == 1 ? q + lane : (q + lane) * H + g, offset = 2 * n * g;
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

// The gradient of the sub-key scores, laid out (G, 2, Q, n), zeros at first, Q as in `product_key_top_k_lanes`.
template <class Real>
void product_key_scores_backward(const Real* grad, const int32_t* sub_keys, Real* grad_scores, int64_t T, int64_t H,
                                 int64_t G, int64_t n, int64_t K, int64_t threads) {
  const int64_t Q = T * H / G;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t th = 0; th < T * H; ++th) {
    const int64_t g = G == 1 ? 0 : th % H, q = G == 1 ? th : th / H;
    for (int64_t s = 0; s < 2; ++s) {
      Real* mine = grad_scores + ((2 * g + s) * (Q - 1) + q) * n;  // sub-keys are numbered on from those of 2 g + s
      for (int64_t k = 0; k < K; ++k) mine[sub_keys[(2 * th + s) * K + k]] += grad[th * K + k];
    }
  }
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
