// The one CUDA type in launchers' signatures, so that headers need no toolkit.
#pragma once

struct CUstream_st;
typedef CUstream_st* cudaStream_t;
