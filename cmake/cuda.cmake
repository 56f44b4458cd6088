# TY_CUDA=ON: the compiler for device code, and how device code is compiled. Linked statically to the runtime, not at all to
# the driver: a program with it starts on a machine without one, and says what it misses.
include_guard()

# 8.0, 9.0, and PTX for later chips; fewer compile faster.
set(TY_CUDA_ARCHITECTURES "80-real;90-real;90-virtual" CACHE STRING "Architectures of device code, as CMAKE_CUDA_ARCHITECTURES")
# Bulk copies and mbarriers are not there before 9.0.
set(TY_CUDA_BULK_ARCHITECTURES ${TY_CUDA_ARCHITECTURES})
list(FILTER TY_CUDA_BULK_ARCHITECTURES EXCLUDE REGEX "^8")

set(CMAKE_CUDA_ARCHITECTURES ${TY_CUDA_ARCHITECTURES})
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "TY_CUDA=ON needs nvcc, which is not in PATH. Install the CUDA toolkit (12.4 or newer), or configure with -DTY_CUDA=OFF.")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "TY_CUDA=ON needs CUDA 12.4 or newer; ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}.")
endif()
find_package(CUDAToolkit REQUIRED)

if(TY_CUTLASS)
  find_path(TY_CUTLASS_INCLUDE cutlass/cutlass.h
    HINTS ${TY_PORTABLE_DEPS}/cutlass/include ${PROJECT_SOURCE_DIR}/build/cutlass/include DOC "Folder of CUTLASS's headers")
  if(NOT TY_CUTLASS_INCLUDE)
    message(FATAL_ERROR "TY_CUTLASS=ON: CUTLASS's headers are not here. Run './dev deps --cutlass', which fetches them with pip, name their "
      "folder with -DTY_CUTLASS_INCLUDE, or configure with -DTY_CUTLASS=OFF: matrix products are slower then.")
  endif()
endif()

# What the target device_compile_only builds: all device code, on machines without a GPU.
set_property(GLOBAL PROPERTY TY_DEVICE_CODE "")

# ty_add_device_code(<target> SOURCES <files> [ARCHITECTURES <list>]): an object library of .cu files.
# -fmad=false is -ffp-contract=off; --expt-relaxed-constexpr lets device code call constexpr functions of the standard library.
function(ty_add_device_code target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;ARCHITECTURES")
  # CMake 3.25 applies these three to CUDA too and does not know nvcc's C++20 flag, so it is given by hand.
  unset(CMAKE_CXX_STANDARD)
  unset(CMAKE_CXX_STANDARD_REQUIRED)
  unset(CMAKE_CXX_EXTENSIONS)
  add_library(${target} OBJECT ${arg_SOURCES})
  if(arg_ARCHITECTURES)
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${arg_ARCHITECTURES}")
  endif()
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(${target} PRIVATE -std=c++20 -fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall,-ffp-contract=off --Werror=all-warnings)
  set_property(GLOBAL APPEND PROPERTY TY_DEVICE_CODE ${target})
endfunction()
