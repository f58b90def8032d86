# CUDA without CMake's own CUDA language, which wants a full toolkit and its own idea of standards:
# nvcc is called on each kernel file, and the objects are linked like any others.
#
# LATENTDEM_CUDA=auto|on|off   whether the module gets CUDA kernels; auto: if torch was built with
#                              CUDA and an nvcc of the same major version is there
# LATENTDEM_CHECK_CUDA=ON      adds the target check_cuda: nvcc compiles every kernel, whatever
#                              torch is installed
# LATENTDEM_CUDA_ARCHS         "80;90+PTX", else TORCH_CUDA_ARCH_LIST, else 80, 90 and PTX
set(LATENTDEM_CUDA "auto" CACHE STRING "auto, on or off")
set_property(CACHE LATENTDEM_CUDA PROPERTY STRINGS auto on off)
option(LATENTDEM_CHECK_CUDA "Compile the CUDA kernels beside any torch (target check_cuda)" OFF)
string(TOLOWER "${LATENTDEM_CUDA}" LATENTDEM_CUDA)
if(NOT LATENTDEM_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "LATENTDEM_CUDA must be auto, on or off, found '${LATENTDEM_CUDA}'")
endif()

find_program(LATENTDEM_NVCC nvcc
  HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda)
set(LATENTDEM_NVCC_VERSION "")
if(LATENTDEM_NVCC)
  execute_process(COMMAND "${LATENTDEM_NVCC}" --version OUTPUT_VARIABLE _text)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _match "${_text}")
  set(LATENTDEM_NVCC_VERSION "${CMAKE_MATCH_1}")
  # nvcc says where its headers are; a link or a wrapper script may stand in for it.
  execute_process(COMMAND "${LATENTDEM_NVCC}" --dryrun -x cu -E /dev/null ERROR_VARIABLE _text
                  OUTPUT_QUIET)
  string(REGEX MATCH "#\\$ TOP=([^\n]*)" _match "${_text}")
  get_filename_component(LATENTDEM_CUDA_ROOT "${CMAKE_MATCH_1}" REALPATH)
endif()

# Why the module gets no CUDA kernels; empty if it gets them.
set(_obstacle "")
string(REGEX MATCH "^[0-9]+" _torch_major "${LATENTDEM_TORCH_CUDA}")
string(REGEX MATCH "^[0-9]+" _nvcc_major "${LATENTDEM_NVCC_VERSION}")
if(NOT LATENTDEM_TORCH_CUDA)
  set(_obstacle "torch ${LATENTDEM_TORCH_VERSION} was built without CUDA")
elseif(NOT LATENTDEM_NVCC)
  set(_obstacle "no nvcc on PATH nor under CUDA_HOME")
elseif(NOT _torch_major STREQUAL _nvcc_major)
  set(_obstacle "torch was built with CUDA ${LATENTDEM_TORCH_CUDA}, but nvcc is ${LATENTDEM_NVCC_VERSION}")
endif()
set(LATENTDEM_WITH_CUDA OFF)
if(LATENTDEM_CUDA STREQUAL "on" AND _obstacle)
  message(FATAL_ERROR "LATENTDEM_CUDA=on: ${_obstacle}")
elseif(NOT LATENTDEM_CUDA STREQUAL "off" AND NOT _obstacle)
  set(LATENTDEM_WITH_CUDA ON)
endif()
if(LATENTDEM_WITH_CUDA)
  message(STATUS "CUDA kernels: nvcc ${LATENTDEM_NVCC_VERSION} (${LATENTDEM_NVCC})")
else()
  message(STATUS "CUDA kernels: none (LATENTDEM_CUDA=${LATENTDEM_CUDA}; ${_obstacle})")
endif()

# "80", "8.0", "90+PTX" -> code for sm_80, and for sm_90 also as PTX for devices to come.
set(_archs "${LATENTDEM_CUDA_ARCHS}")
foreach(_name LATENTDEM_CUDA_ARCHS TORCH_CUDA_ARCH_LIST)
  if(NOT _archs)
    set(_archs "$ENV{${_name}}")
  endif()
endforeach()
if(NOT _archs)
  set(_archs "80;90+PTX")
endif()
string(REGEX REPLACE "[ ,]+" ";" _archs "${_archs}")
set(LATENTDEM_CUDA_CODES)
set(_gencode)
foreach(_arch IN LISTS _archs)
  if(NOT _arch MATCHES "^([0-9]+)\\.?([0-9]+[af]?)(\\+PTX)?$")
    message(FATAL_ERROR "CUDA architectures must look like 80, 9.0 or 90+PTX, found '${_arch}'")
  endif()
  set(_number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  list(APPEND _gencode "-gencode=arch=compute_${_number},code=sm_${_number}")
  list(APPEND LATENTDEM_CUDA_CODES "sm_${_number}")
  if(_arch MATCHES "PTX")
    list(APPEND _gencode "-gencode=arch=compute_${_number},code=compute_${_number}")
    list(APPEND LATENTDEM_CUDA_CODES "compute_${_number}")
  endif()
endforeach()

# Names of the kernels in the given files, for build_info().
function(latentdem_kernel_names out)
  set(names)
  foreach(source IN LISTS ARGN)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
    file(READ "${source}" text)
    string(REGEX MATCHALL "__global__ void (__launch_bounds__\\([^)]*\\)[ \n]*)?[a-z0-9_]+" heads "${text}")
    foreach(head IN LISTS heads)
      string(REGEX MATCH "[a-z0-9_]+$" name "${head}")
      list(APPEND names "${name}")
    endforeach()
  endforeach()
  list(SORT names)
  set(${out} ${names} PARENT_SCOPE)
endfunction()

# The check refuses warnings and kernels that spill registers; a build for use must not depend on
# what a newer compiler warns of.
set(_strict)
if(LATENTDEM_CHECK_CUDA)
  set(_strict -Werror all-warnings -Xptxas=-warn-spills,-Werror)
endif()

# Compiles kernel files with nvcc; the objects are put in the list named by `out`.
function(latentdem_cuda_objects out)
  set(objects)
  foreach(source IN LISTS ARGN)
    get_filename_component(name "${source}" NAME_WE)
    set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${CMAKE_COMMAND}" -E make_directory "${CMAKE_CURRENT_BINARY_DIR}/cuda"
      COMMAND "${LATENTDEM_NVCC}" -std=c++17 -O3 ${_gencode} -ccbin "${CMAKE_CXX_COMPILER}"
              -Xcompiler=-fPIC,-fvisibility=hidden,-Wall ${_strict} -lineinfo
              -I "${CMAKE_SOURCE_DIR}/csrc" -MD -MF "${object}.d" -MT "${object}"
              -c "${CMAKE_SOURCE_DIR}/${source}" -o "${object}"
      DEPENDS "${CMAKE_SOURCE_DIR}/${source}"
      DEPFILE "${object}.d"
      COMMENT "nvcc ${source}"
      VERBATIM)
    list(APPEND objects "${object}")
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set(${out} ${objects} PARENT_SCOPE)
endfunction()

# The runtime that torch itself loads, from pip's wheels, else the toolkit's.
if(LATENTDEM_WITH_CUDA)
  file(GLOB _cudart "${LATENTDEM_TORCH_ROOT}/../nvidia/*/lib/libcudart.so.${_nvcc_major}*")
  if(NOT _cudart)
    file(GLOB _cudart "${LATENTDEM_CUDA_ROOT}/lib64/libcudart.so" "${LATENTDEM_CUDA_ROOT}/lib/libcudart.so")
  endif()
  if(NOT _cudart)
    message(FATAL_ERROR "no libcudart, neither beside torch nor under ${LATENTDEM_CUDA_ROOT}")
  endif()
  list(GET _cudart 0 _cudart)
  target_include_directories(torch::cuda SYSTEM INTERFACE "${LATENTDEM_CUDA_ROOT}/include")
  target_link_libraries(torch::cuda INTERFACE "${_cudart}")
endif()
