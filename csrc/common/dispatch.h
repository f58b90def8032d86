// Calls a generic lambda with a zero of the compute type, float or double.
#pragma once

#include <c10/core/ScalarType.h>

namespace latentdem {

template <class Function>
auto dispatch_real(c10::ScalarType type, const Function& function) {
  return type == c10::ScalarType::Double ? function(0.0) : function(0.0F);
}

}  // namespace latentdem
