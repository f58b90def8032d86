// A plain complex number, layout-compatible with std::complex and c10::complex.
//
// std::complex multiplication checks for NaN unless the whole file is compiled with
// -fcx-limited-range; these four functions are all that the kernels need.
#pragma once

#include "common/macros.h"

namespace latentdem {

template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re;
  T im;
};

template <class T>
LATENTDEM_HD Complex<T> multiply(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// conj(a) * b
template <class T>
LATENTDEM_HD Complex<T> multiply_conj(Complex<T> a, Complex<T> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

template <class T>
LATENTDEM_HD T squared_norm(Complex<T> a) {
  return a.re * a.re + a.im * a.im;
}

}  // namespace latentdem
