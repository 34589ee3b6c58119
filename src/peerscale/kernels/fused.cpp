// The retrieved-row operators on a CPU, as plain C functions that Python calls with the tensors' addresses.
//
// Shapes: T tokens, D vector width, N rows of a table, J retrieved rows a token, P = T J pairs of a token and a row,
// R runs of pairs that share a row; for product keys H heads, n sub-keys a side, K top k. All arrays are contiguous.
// Whatever is summed is summed by one thread in one order, so that results do not depend on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "top_k.h"
#include "top_k_lanes.h"

namespace {

using std::int32_t;
using std::int64_t;

constexpr int64_t kGroup = 4;  // rows handled at once: four independent sums hide the latency of an addition
constexpr int64_t kAhead = 8;  // rows fetched ahead of their use: enough to hide the latency of memory

template <class Real>
inline void prefetch(const Real* row, int64_t D) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < D * static_cast<int64_t>(sizeof(Real)); b += 64) __builtin_prefetch(bytes + b);
}

// ---- Dot products with rows, and sums of rows

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

// ---- Token by token: best where the table fits into the cache, or where few rows are read twice

// out[t, j] = <x[t], table[rows[t, j]]>
template <class Real>
void row_scores(const Real* x, const Real* table, const int64_t* rows, Real* out, int64_t T, int64_t J, int64_t D,
                int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t)
    dot_rows(x + t * D, D, J, (T - t) * J, [=](int64_t i) { return table + rows[t * J + i] * D; },
             [=](int64_t i) -> Real& { return out[t * J + i]; });
}

// out[t] = sum over j of weights[t, j] table[rows[t, j]]
template <class Real>
void row_bags(const Real* table, const int64_t* rows, const Real* weights, Real* out, int64_t T, int64_t J, int64_t D,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t) {
    std::fill_n(out + t * D, D, Real(0));
    add_rows(out + t * D, D, J, (T - t) * J, [=](int64_t i) { return table + rows[t * J + i] * D; },
             [=](int64_t i) { return weights[t * J + i]; });
  }
}

// ---- Row by row: the table passes through the cache once, and it is the tokens' vectors that are read many times

// The pairs p = t J + j sorted by row, and within a row by p: the i-th is order[i], of token tokens[i]. Those of run r
// are the starts[r]-th to the (starts[r + 1] - 1)-th.
struct Runs {
  const int64_t* rows;
  const int32_t *order, *tokens, *starts;
  int64_t R;

  int64_t row(int64_t run) const { return rows[order[starts[run]]]; }
};

// As `row_scores`.
template <class Real>
void row_scores_by_row(const Runs& runs, const Real* x, const Real* table, Real* out, int64_t D, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t run = 0; run < runs.R; ++run) {
    if (run + 2 < runs.R) prefetch(table + runs.row(run + 2) * D, D);
    const int32_t *order = runs.order + runs.starts[run], *tokens = runs.tokens + runs.starts[run];
    const int64_t count = runs.starts[run + 1] - runs.starts[run], known = runs.starts[runs.R] - runs.starts[run];
    dot_rows(table + runs.row(run) * D, D, count, known,
             [=](int64_t i) { return x + tokens[i] * D; }, [=](int64_t i) -> Real& { return out[order[i]]; });
  }
}

// As `row_bags`. A thread adds up the output of its own tokens, for which it looks through all runs.
template <class Real>
void row_bags_by_row(const Runs& runs, const Real* table, const Real* weights, Real* out, int64_t T, int64_t D,
                     int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t begin = T * omp_get_thread_num() / omp_get_num_threads();
    const int64_t end = T * (omp_get_thread_num() + 1) / omp_get_num_threads();
    std::fill(out + begin * D, out + end * D, Real(0));
    for (int64_t run = 0; run < runs.R; ++run) {
      if (run + 2 < runs.R) prefetch(table + runs.row(run + 2) * D, D);
      const Real* row = table + runs.row(run) * D;
      const int32_t *tokens = runs.tokens + runs.starts[run], *last = runs.tokens + runs.starts[run + 1];
      for (tokens = std::lower_bound(tokens, last, begin); tokens < last && *tokens < end; ++tokens)
        add_row(out + *tokens * D, D, weights[runs.order[tokens - runs.tokens]], row);
    }
  }
}

// ---- The gradient of a table: row r gets the sum over its pairs (t, j) of coefficients[t, j] vectors[t]

template <class Real>
inline void add_run(const Runs& runs, int64_t run, const Real* coefficients, const Real* vectors, int64_t D,
                    Real* sum) {
  const int32_t *order = runs.order + runs.starts[run], *tokens = runs.tokens + runs.starts[run];
  const int64_t count = runs.starts[run + 1] - runs.starts[run], known = runs.starts[runs.R] - runs.starts[run];
  add_rows(sum, D, count, known, [=](int64_t i) { return vectors + tokens[i] * D; },
           [=](int64_t i) { return coefficients[order[i]]; });
}

// Rows that have no pair are left as they are.
template <class Real>
void table_gradient(const Runs& runs, const Real* coefficients, const Real* vectors, Real* out, int64_t D,
                    int64_t threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t run = 0; run < runs.R; ++run) {
    Real* row = out + runs.row(run) * D;
    std::fill_n(row, D, Real(0));
    add_run(runs, run, coefficients, vectors, D, row);
  }
}

// AdamW on the rows that have pairs; a row's gradient never leaves the cache. `steps` counts the updates of each row.
template <class Real>
void adamw_rows(const Runs& runs, const Real* coefficients, const Real* vectors, Real* table, Real* mean, Real* square,
                Real* steps, int64_t D, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t threads) {
  const Real b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2, keep = 1 - lr * weight_decay, e = eps;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Real> gradient(D);
    Real* g = gradient.data();
#pragma omp for schedule(dynamic, 64)
    for (int64_t run = 0; run < runs.R; ++run) {
      if (run + 2 < runs.R)
        for (const Real* array : {table, mean, square}) prefetch(array + runs.row(run + 2) * D, D);
      std::fill_n(g, D, Real(0));
      add_run(runs, run, coefficients, vectors, D, g);
      const int64_t row = runs.row(run);
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

// ---- Activations: value and slope

// exp(a) for a <= 0 as 2^k exp(r), |r| <= ln(2) / 2, with a relative error below 1e-7; 0 below -80, before denormal
// numbers.
inline float exp_of_negative(float a) {
  const float bounded = a < -80.f ? -80.f : a;  // NaN stays NaN
  const float k = std::rint(bounded * 1.44269504f);
  const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  float e = 1.38436459e-3f;
  for (const float c : {8.37416344e-3f, 4.16680025e-2f, 0.166664312f, 0.499999942f, 1.f, 1.f}) e = e * r + c;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return a < -80.f ? 0.f : e * power;
}

inline double exp_of_negative(double a) { return std::exp(a); }

// x Phi(x), Phi the standard normal distribution. Phi(-t) = exp(-t^2 / 2) q(t) for t >= 0, where q is smooth: a
// polynomial in 1 / (1 + 0.35 t) that was fitted to it with a relative error of 3e-8.
inline void gelu(float x, float& value, float& slope) {
  const float t = std::fabs(x);
  const float u = 1.f / (1.f + 0.35f * t);
  const float e = exp_of_negative(-0.5f * t * t);
  float q = -2.91455591e-2f;
  for (const float c : {0.143970018f, -0.255711038f, 0.159170764f, -2.31076798e-2f, 0.105507164f, 0.119833063f,
                        0.139861845f, 0.139621406f, 0.f})
    q = q * u + c;
  const float cdf = x < 0 ? e * q : 1 - e * q;
  value = x * cdf;
  slope = cdf + x * e * 0.398942280f;
}

inline void gelu(double x, double& value, double& slope) {
  const double cdf = 0.5 * std::erfc(-x * 0.70710678118654752440);
  value = x * cdf;
  slope = cdf + x * std::exp(-0.5 * x * x) * 0.39894228040143267794;
}

enum Activation : int64_t { kGelu = 0, kRelu = 1 };

template <class Real, class Use>
inline void activate(int64_t activation, const Real* z, int64_t P, int64_t threads, Use use) {
  if (activation == kGelu) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t p = 0; p < P; ++p) {
      Real value, slope;
      gelu(z[p], value, slope);
      use(p, value, slope);
    }
  } else {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t p = 0; p < P; ++p) use(p, z[p] < 0 ? Real(0) : z[p], z[p] > 0 ? Real(1) : Real(0));  // NaN stays NaN
  }
}

// hidden = gates sigma(z)
template <class Real>
void gate(int64_t activation, const Real* z, const Real* gates, Real* hidden, int64_t P, int64_t threads) {
  activate(activation, z, P, threads, [=](int64_t p, Real value, Real) { hidden[p] = gates[p] * value; });
}

// `grad` is that of `hidden`.
template <class Real>
void gate_backward(int64_t activation, const Real* z, const Real* gates, const Real* grad, Real* grad_z,
                   Real* grad_gates, int64_t P, int64_t threads) {
  activate(activation, z, P, threads, [=](int64_t p, Real value, Real slope) {
    grad_z[p] = grad[p] * gates[p] * slope;
    grad_gates[p] = grad[p] * value;
  });
}

// ---- What surrounds the layer under study

// y[t] = x[t] inverse[t] weight, inverse = 1 / sqrt(mean(x[t]^2) + eps)
template <class Real>
void rms_norm(const Real* x, const Real* weight, Real* y, Real* inverse, int64_t T, int64_t D, double eps,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t) {
    const Real* x_t = x + t * D;
    Real* y_t = y + t * D;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += x_t[d] * x_t[d];
    const Real scale = inverse[t] = 1 / std::sqrt(sum / D + static_cast<Real>(eps));
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y_t[d] = x_t[d] * scale * weight[d];
  }
}

// From the gradient of y those of x and of the weight, the latter as partial sums, (T / 256 rounded up, D).
template <class Real>
void rms_norm_backward(const Real* grad, const Real* x, const Real* weight, const Real* inverse, Real* grad_x,
                       Real* grad_weight, int64_t T, int64_t D, int64_t threads) {
  constexpr int64_t kTokens = 256;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t begin = 0; begin < T; begin += kTokens) {
    Real* __restrict sums = grad_weight + begin / kTokens * D;
    std::fill_n(sums, D, Real(0));
    for (int64_t t = begin; t < std::min(begin + kTokens, T); ++t) {
      const Real *x_t = x + t * D, *g_t = grad + t * D;
      Real* __restrict out = grad_x + t * D;
      const Real scale = inverse[t];
      Real dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d) dot += g_t[d] * weight[d] * x_t[d];
      const Real along = dot / D * scale * scale;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        out[d] = scale * (g_t[d] * weight[d] - along * x_t[d]);
        sums[d] += g_t[d] * x_t[d] * scale;
      }
    }
  }
}

// Rotates queries and keys, (B T, 3, H, C) with the values, by the angles of their positions, (T, C / 2), or back.
template <class Real>
void rotary(const Real* in, const Real* cosine, const Real* sine, Real* out, int64_t rows, int64_t T, int64_t H,
            int64_t C, double direction, int64_t threads) {
  const int64_t half = C / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    const Real *cos_t = cosine + r % T * half, *sin_t = sine + r % T * half;
    for (int64_t h = 0; h < 2 * H; ++h) {
      const Real* from = in + (r * 3 * H + h) * C;
      Real* __restrict to = out + (r * 3 * H + h) * C;
#pragma omp simd
      for (int64_t c = 0; c < half; ++c) {
        const Real a = from[c], b = from[c + half], s = static_cast<Real>(direction) * sin_t[c];
        to[c] = a * cos_t[c] - b * s;
        to[c + half] = b * cos_t[c] + a * s;
      }
    }
    std::copy_n(in + (r * 3 + 2) * H * C, H * C, out + (r * 3 + 2) * H * C);
  }
}

// ---- Cross-entropy

// Of each row of logits (T, V) the loss, -log softmax(logits)[target], and in its place `scale` times its gradient.
template <class Real>
void cross_entropy(Real* logits, const int64_t* targets, Real* losses, int64_t T, int64_t V, double scale,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t) {
    Real *__restrict l = logits + t * V, top = l[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < V; ++v) top = l[v] > top ? l[v] : top;
    const Real target = l[targets[t]];
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += l[v] = exp_of_negative(l[v] - top);
    losses[t] = std::log(sum) + top - target;
    const Real factor = scale / sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) l[v] *= factor;
    l[targets[t]] -= scale;
  }
}

// ---- The top k of product keys

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

}  // namespace

// The address of a function for float or double tensors; null if there is none of this name.
extern "C" const void* peerscale_find(const char* name, int64_t is_double) {
#define FIND(function) \
  if (!std::strcmp(name, #function)) return is_double ? (const void*)&function<double> : (const void*)&function<float>
  FIND(row_scores);
  FIND(row_bags);
  FIND(row_scores_by_row);
  FIND(row_bags_by_row);
  FIND(table_gradient);
  FIND(adamw_rows);
  FIND(gate);
  FIND(gate_backward);
  FIND(product_key_top_k);
  FIND(product_key_top_k_lanes);
  FIND(cross_entropy);
  FIND(rms_norm);
  FIND(rms_norm_backward);
  FIND(rotary);
  FIND(product_key_scores_backward);
  FIND(product_key_backward);
  return nullptr;
}

// Fills the arrays of a `Runs`, P, P and P + 1 numbers, by a radix sort, and returns R.
extern "C" int64_t peerscale_sort_pairs(const int64_t* rows, int64_t T, int64_t J, int64_t N, int32_t* order,
                                        int32_t* tokens, int32_t* starts) {
  constexpr int kMostBits = 12;  // places to fill that stay in the nearest cache
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
