// What surrounds the layer under study: norms, rotary positions, cross-entropy.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "activations.h"

namespace peerscale {

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

}  // namespace peerscale
