// Pointwise arithmetic of the deconvolutions, shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>

#include "common/complex.h"
#include "common/macros.h"

namespace latentdem {

// What wiener_filter multiplies a spectrum by, with D = |K|^2 + ratio.
enum class WienerFilter : int {
  kGain = 0,            // conj(K) / D: misfit -> change of the image
  kGainTransposed = 1,  // K / D
  kEcho = 2,            // |K|^2 / D: misfit -> change of the prediction
};

template <class T>
LATENTDEM_HD Complex<T> scale(Complex<T> a, T factor) {
  return {a.re * factor, a.im * factor};
}

template <class T>
LATENTDEM_HD Complex<T> add(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class T>
LATENTDEM_HD Complex<T> subtract(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}

// x + conj(k) (y - k x) / D: the minimiser of |k x' - y|^2 + ratio |x' - x|^2.
template <class T>
LATENTDEM_HD Complex<T> wiener_solve(Complex<T> k, Complex<T> x, Complex<T> y, T ratio) {
  const Complex<T> step = multiply_conj(k, subtract(y, multiply(k, x)));
  return add(x, scale(step, T(1) / (squared_norm(k) + ratio)));
}

template <class T>
LATENTDEM_HD Complex<T> wiener_filter(WienerFilter filter, Complex<T> k, Complex<T> value,
                                      T ratio) {
  const T power = squared_norm(k), inverse = T(1) / (power + ratio);
  switch (filter) {
    case WienerFilter::kGain:
      return scale(multiply_conj(k, value), inverse);
    case WienerFilter::kGainTransposed:
      return scale(multiply(k, value), inverse);
    default:
      return scale(value, power * inverse);
  }
}

// Gradient of the gain and of the echo in K and in the ratio. `gain` is the gradient in
// conj(K) / D (as a complex number), `echo` that in |K|^2 / D.
template <class T>
struct WienerGradient {
  Complex<T> kernel;
  T ratio;
};
template <class T>
LATENTDEM_HD WienerGradient<T> wiener_gradient(Complex<T> k, Complex<T> gain, T echo, T ratio) {
  const T power = squared_norm(k), inverse = T(1) / (power + ratio);
  const T inverse2 = inverse * inverse, ramp = ratio * inverse2;
  const Complex<T> gain_k = multiply(gain, k);
  // d gain = ramp dconj(K) - (conj(K) / D)^2 dK;  d echo = 2 ramp Re(conj(K) dK)
  Complex<T> out = scale(multiply(gain_k, k), -inverse2);
  out = add(out, scale(Complex<T>{gain.re, -gain.im}, ramp));
  out = add(out, scale(k, 2 * echo * ramp));
  return {out, -(gain_k.re + echo * power) * inverse2};
}

// Divergence of the normalised gradient at the centre of
//        north  northeast
//   west here   east
//   southwest south
// by forward differences; a missing neighbour repeats the pixel it would adjoin.
template <class T>
LATENTDEM_HD T curvature(T here, T east, T south, T west, T southwest, T north, T northeast,
                         T floor) {
  const T e = east - here, s = south - here;
  const T we = here - west, ws = southwest - west;
  const T ne = northeast - north, ns = here - north;
  const T norm = std::sqrt(e * e + s * s + floor);
  return (e + s) / norm - we / std::sqrt(we * we + ws * ws + floor) -
         ns / std::sqrt(ne * ne + ns * ns + floor);
}

}  // namespace latentdem
