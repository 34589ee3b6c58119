// Exponential, GELU and ReLU, in a form that compilers vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace peerscale {

using std::int32_t;
using std::int64_t;

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

}  // namespace peerscale
