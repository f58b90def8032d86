# Refuses a compiler that links its own copy of libstdc++ into a shared library. torch brings the
# dynamic one, so that a process would have two: a message written to a stream of one copy with the
# tables of the other crashes, and every error that the operators report is such a message.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(_source "${CMAKE_CURRENT_BINARY_DIR}/cxx_runtime.cpp")
  set(_library "${CMAKE_CURRENT_BINARY_DIR}/libcxx_runtime.so")
  file(WRITE "${_source}" "#include <sstream>
int length(long n) { std::ostringstream s; s << n; return static_cast<int>(s.str().size()); }
")
  separate_arguments(_flags UNIX_COMMAND "${CMAKE_CXX_FLAGS} ${CMAKE_SHARED_LINKER_FLAGS}")
  execute_process(
    COMMAND "${CMAKE_CXX_COMPILER}" ${_flags} -shared -fPIC "${_source}" -o "${_library}"
    RESULT_VARIABLE _failed ERROR_VARIABLE _text)
  if(_failed)
    message(FATAL_ERROR "${CMAKE_CXX_COMPILER} cannot build a shared library:\n${_text}")
  endif()
  # The name of a library that is needed at run time stands in the file as it is.
  file(STRINGS "${_library}" _needed REGEX "libstdc\\+\\+\\.so" LIMIT_COUNT 1)
  if(NOT _needed)
    message(FATAL_ERROR "${CMAKE_CXX_COMPILER} links libstdc++ statically into shared libraries; beside "
      "torch's dynamic one, every error message of the module would crash. Choose another compiler, "
      "for example CC=/usr/bin/gcc CXX=/usr/bin/g++ CUDAHOSTCXX=/usr/bin/g++, or take "
      "-static-libstdc++ out of CXXFLAGS and LDFLAGS.")
  endif()
endif()
