// The CUDA implementations, emulated: operators latentdem_emulated::* on CPU tensors, with the
// schemas of latentdem::*, whose module must be loaded first.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "bindings/api_cuda.h"
#include "runtime/emulation.h"

TORCH_LIBRARY(latentdem_emulated, m) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.getNamespace() == "latentdem") {
      const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), "");
      m.def(op.schema().cloneWithName("latentdem_emulated" + name.name.substr(9), ""));
    }
}

TORCH_LIBRARY_IMPL(latentdem_emulated, CPU, m) { latentdem::cuda::implement(m); }

extern "C" __attribute__((visibility("default"))) void latentdem_emulation_seed(uint64_t seed) {
  latentdem::emulation::set_seed(seed);
}
extern "C" __attribute__((visibility("default"))) void latentdem_emulation_plan(bool on) {
  latentdem::emulation::plan(on);
}
extern "C" __attribute__((visibility("default"))) const char* latentdem_emulation_planned() {
  return latentdem::emulation::planned();
}
