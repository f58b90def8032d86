# Imported targets torch::core and torch::python, found by asking Python where torch is.
#
# find_package(Torch) is not used: with a CUDA torch it demands a full toolkit, forces a CUDA
# language standard that CMake 3.25 does not know, and does not provide torch_python.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import torch, os; print(torch.__version__, torch.version.cuda or '', int(torch._C._GLIBCXX_USE_CXX11_ABI), os.path.dirname(torch.__file__), sep=';')"
  OUTPUT_VARIABLE LATENTDEM_TORCH_FACTS
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE LATENTDEM_TORCH_RESULT)
if(NOT LATENTDEM_TORCH_RESULT EQUAL 0)
  message(FATAL_ERROR "torch cannot be imported by ${Python_EXECUTABLE}: install it first")
endif()
list(GET LATENTDEM_TORCH_FACTS 0 LATENTDEM_TORCH_VERSION)
list(GET LATENTDEM_TORCH_FACTS 1 LATENTDEM_TORCH_CUDA)
list(GET LATENTDEM_TORCH_FACTS 2 LATENTDEM_TORCH_ABI)
list(GET LATENTDEM_TORCH_FACTS 3 LATENTDEM_TORCH_ROOT)

set(_includes "${LATENTDEM_TORCH_ROOT}/include"
              "${LATENTDEM_TORCH_ROOT}/include/torch/csrc/api/include")

add_library(torch::core INTERFACE IMPORTED)
target_include_directories(torch::core SYSTEM INTERFACE ${_includes})
target_compile_definitions(torch::core INTERFACE _GLIBCXX_USE_CXX11_ABI=${LATENTDEM_TORCH_ABI})
target_link_libraries(torch::core INTERFACE
  "${LATENTDEM_TORCH_ROOT}/lib/libtorch_cpu.so" "${LATENTDEM_TORCH_ROOT}/lib/libc10.so"
  "${LATENTDEM_TORCH_ROOT}/lib/libtorch.so")

add_library(torch::python INTERFACE IMPORTED)
target_link_libraries(torch::python INTERFACE
  torch::core "${LATENTDEM_TORCH_ROOT}/lib/libtorch_python.so")

if(LATENTDEM_TORCH_CUDA)
  add_library(torch::cuda INTERFACE IMPORTED)
  target_link_libraries(torch::cuda INTERFACE
    torch::core "${LATENTDEM_TORCH_ROOT}/lib/libtorch_cuda.so"
    "${LATENTDEM_TORCH_ROOT}/lib/libc10_cuda.so")
endif()
