// The retrieved-row operators on a CPU, as plain C functions that Python calls with the tensors' addresses.
//
// Shapes: T tokens, D vector width, N rows of a table, J retrieved rows per token, P = T J pairs of a token and a row,
// R runs of pairs that share a row; for product keys H heads, n sub-keys per side, K top k. All arrays are contiguous.
// One thread computes each sum, in a fixed order, so that results do not depend on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "activations.h"
#include "backbone.h"
#include "product_key_search.h"
#include "rows.h"

namespace peerscale {

// ---- Token by token: faster if the table fits into the cache, or if few rows are read more than once

// out[t, j] = <x[t], table[rows[t, j]]>
template <class Real>
void row_dot_products(const Real* x, const Real* table, const int64_t* rows, Real* out, int64_t T, int64_t J,
                      int64_t D, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t)
    dot_rows(x + t * D, D, J, (T - t) * J, [=](int64_t i) { return table + rows[t * J + i] * D; },
             [=](int64_t i) -> Real& { return out[t * J + i]; });
}

// out[t] = sum over j of weights[t, j] table[rows[t, j]]
template <class Real>
void weighted_row_sum(const Real* table, const int64_t* rows, const Real* weights, Real* out, int64_t T, int64_t J,
                      int64_t D, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t) {
    std::fill_n(out + t * D, D, Real(0));
    add_rows(out + t * D, D, J, (T - t) * J, [=](int64_t i) { return table + rows[t * J + i] * D; },
             [=](int64_t i) { return weights[t * J + i]; });
  }
}

// ---- Row by row: the table passes through the cache once, and the vectors of the tokens are read many times

// The pairs p = t J + j sorted by row, and within a row by p: the i-th is order[i], of token tokens[i]. Run r has the
// pairs from order[starts[r]] to order[starts[r + 1] - 1].
struct SortedPairs {
  const int64_t* rows;
  const int32_t *order, *tokens, *starts;
  int64_t R;

  int64_t row(int64_t run) const { return rows[order[starts[run]]]; }
};

// Like `row_dot_products`.
template <class Real>
void row_dot_products_by_row(const SortedPairs& pairs, const Real* x, const Real* table, Real* out, int64_t D,
                             int64_t threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t run = 0; run < pairs.R; ++run) {
    if (run + 2 < pairs.R) prefetch(table + pairs.row(run + 2) * D, D);
    const int32_t *order = pairs.order + pairs.starts[run], *tokens = pairs.tokens + pairs.starts[run];
    const int64_t count = pairs.starts[run + 1] - pairs.starts[run], known = pairs.starts[pairs.R] - pairs.starts[run];
    dot_rows(table + pairs.row(run) * D, D, count, known,
             [=](int64_t i) { return x + tokens[i] * D; }, [=](int64_t i) -> Real& { return out[order[i]]; });
  }
}

// Like `weighted_row_sum`. Each thread computes the output of its own tokens and reads all pairs for that.
template <class Real>
void weighted_row_sum_by_row(const SortedPairs& pairs, const Real* table, const Real* weights, Real* out, int64_t T,
                             int64_t D, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t begin = T * omp_get_thread_num() / omp_get_num_threads();
    const int64_t end = T * (omp_get_thread_num() + 1) / omp_get_num_threads();
    std::fill(out + begin * D, out + end * D, Real(0));
    for (int64_t run = 0; run < pairs.R; ++run) {
      if (run + 2 < pairs.R) prefetch(table + pairs.row(run + 2) * D, D);
      const Real* row = table + pairs.row(run) * D;
      const int32_t *tokens = pairs.tokens + pairs.starts[run], *last = pairs.tokens + pairs.starts[run + 1];
      for (tokens = std::lower_bound(tokens, last, begin); tokens < last && *tokens < end; ++tokens)
        add_row(out + *tokens * D, D, weights[pairs.order[tokens - pairs.tokens]], row);
    }
  }
}

// ---- The gradient of a table: in row r the sum of coefficients[t, j] vectors[t] over its pairs (t, j)

template <class Real>
inline void add_run(const SortedPairs& pairs, int64_t run, const Real* coefficients, const Real* vectors, int64_t D,
                    Real* sum) {
  const int32_t *order = pairs.order + pairs.starts[run], *tokens = pairs.tokens + pairs.starts[run];
  const int64_t count = pairs.starts[run + 1] - pairs.starts[run], known = pairs.starts[pairs.R] - pairs.starts[run];
  add_rows(sum, D, count, known, [=](int64_t i) { return vectors + tokens[i] * D; },
           [=](int64_t i) { return coefficients[order[i]]; });
}

// Rows without pairs do not change.
template <class Real>
void table_gradient(const SortedPairs& pairs, const Real* coefficients, const Real* vectors, Real* out, int64_t D,
                    int64_t threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t run = 0; run < pairs.R; ++run) {
    Real* row = out + pairs.row(run) * D;
    std::fill_n(row, D, Real(0));
    add_run(pairs, run, coefficients, vectors, D, row);
  }
}

// AdamW on the rows that have pairs; a row's gradient never leaves the cache. `steps` counts the updates of each row.
template <class Real>
void adamw_rows(const SortedPairs& pairs, const Real* coefficients, const Real* vectors, Real* table, Real* mean,
                Real* square, Real* steps, int64_t D, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t threads) {
  const Real b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2, keep = 1 - lr * weight_decay, e = eps;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Real> gradient(D);
    Real* g = gradient.data();
#pragma omp for schedule(dynamic, 64)
    for (int64_t run = 0; run < pairs.R; ++run) {
      if (run + 2 < pairs.R)
        for (const Real* array : {table, mean, square}) prefetch(array + pairs.row(run + 2) * D, D);
      std::fill_n(g, D, Real(0));
      add_run(pairs, run, coefficients, vectors, D, g);
      const int64_t row = pairs.row(run);
      const double step = steps[row] += 1;
      const Real size = lr / (1 - std::pow(beta1, step)), scale = 1 / std::sqrt(1 - std::pow(beta2, step));
      Real *__restrict p = table + row * D, *__restrict m = mean + row * D, *__restrict v = square + row * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        m[d] = b1 * m[d] + c1 * g[d];
        v[d] = b2 * v[d] + c2 * g[d] * g[d];
        p[d] = keep * p[d] - size * m[d] / (std::sqrt(v[d]) * scale + e);
      }
    }
  }
}

}  // namespace peerscale

using namespace peerscale;

// The address of the function of this name for float or double tensors; null if there is none.
extern "C" const void* peerscale_find(const char* name, int64_t is_double) {
#define FIND(function) \
  if (!std::strcmp(name, #function)) return is_double ? (const void*)&function<double> : (const void*)&function<float>
  FIND(row_dot_products);
  FIND(weighted_row_sum);
  FIND(row_dot_products_by_row);
  FIND(weighted_row_sum_by_row);
  FIND(table_gradient);
  FIND(adamw_rows);
  FIND(gate);
  FIND(gate_backward);
  FIND(product_key_top_k);
  FIND(cross_entropy);
  FIND(rms_norm);
  FIND(rms_norm_backward);
  FIND(rotary);
  FIND(product_key_backward_narrow);
  FIND(product_key_backward);
  return nullptr;
}

// Fills the arrays of a `SortedPairs`, P, P and P + 1 numbers, by a radix sort, and returns R.
extern "C" int64_t peerscale_sort_pairs(const int64_t* rows, int64_t T, int64_t J, int64_t N, int32_t* order,
                                        int32_t* tokens, int32_t* starts) {
  constexpr int kMostBits = 12;  // so few target positions that they stay in the nearest cache
  const int64_t P = T * J;
  int bits = 1;
  while ((N - 1) >> bits) ++bits;
  const int passes = (bits + kMostBits - 1) / kMostBits;
  bits = (bits + passes - 1) / passes;
  const int64_t mask = (1 << bits) - 1;
  std::vector<int32_t> place(mask + 1);
  int32_t *from = passes % 2 ? tokens : order, *to = passes % 2 ? order : tokens;
  for (int64_t p = 0; p < P; ++p) from[p] = static_cast<int32_t>(p);
  for (int shift = 0; shift < passes * bits; shift += bits, std::swap(from, to)) {
    std::fill(place.begin(), place.end(), 0);
    for (int64_t p = 0; p < P; ++p) ++place[rows[p] >> shift & mask];
    int32_t total = 0;
    for (int32_t& count : place) total += std::exchange(count, total);
    for (int64_t i = 0; i < P; ++i) to[place[rows[from[i]] >> shift & mask]++] = from[i];
  }
  int64_t R = 0;
  for (int64_t i = 0; i < P; ++i) {
    tokens[i] = order[i] / static_cast<int32_t>(J);
    if (i == 0 || rows[order[i]] != rows[order[i - 1]]) starts[R++] = static_cast<int32_t>(i);
  }
  starts[R] = static_cast<int32_t>(P);
  return R;
}
