// Torch glue of Richardson-Lucy: checks, layout and dtype.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/min.h>

#include "bindings/api.h"
#include "common/dispatch.h"
#include "deconv/deconv_spectral.h"
#include "deconv/richardson_lucy_glue.h"

namespace latentdem {
namespace {

void check_non_negative(const at::Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  const double least = t.min().item<double>();
  TORCH_CHECK_VALUE(least >= 0, name, " must be non-negative, found ", least);
}

}  // namespace

at::Tensor richardson_lucy(const at::Tensor& observation, const at::Tensor& kernel,
                           const at::Tensor& initial, const std::optional<at::Tensor>& mask,
                           std::string_view boundary, int64_t iterations, double total_variation,
                           double eps) {
  const auto s =
      check_lucy(observation, kernel, initial, mask, boundary, iterations, total_variation, eps);
  check_non_negative(observation, "observation");
  check_non_negative(kernel, "kernel");
  check_non_negative(initial, "initial");
  if (mask.has_value()) check_non_negative(*mask, "mask");
  if (s.planes() == 0 || iterations == 0) return initial.clone(at::MemoryFormat::Contiguous);
  const auto type = compute_type(initial, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto y = observation.to(type), u = initial.to(type), k = prepare(kernel, type);
    const auto m = mask ? mask->to(type) : at::Tensor();
    auto out = at::empty(initial.sizes(), initial.options().dtype(type));
    LucyParams<T> p{};
    p.s = s;
    p.g = make_grid(s);
    p.wraps = wraps_in_place(s);
    p.kernel = k.template const_data_ptr<T>();
    p.observation = view<T>(y);
    if (m.defined()) p.mask = view<T>(m);
    p.initial = view<T>(u);
    p.iterations = iterations;
    p.total_variation = static_cast<T>(total_variation);
    p.floor = static_cast<T>(eps);
    p.least = static_cast<T>(kUnobserved);
    p.output = out.template mutable_data_ptr<T>();
    richardson_lucy_cpu(p);
    return out.to(initial.scalar_type());
  });
}

}  // namespace latentdem
