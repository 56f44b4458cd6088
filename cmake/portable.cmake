# TY_PORTABLE_DEPS: libraries from a folder that './dev deps --portable' filled, for hosts without a package registry. They are
# compiled in or header-only, so that a program built with them runs on other hosts, too.
include_guard()
if(NOT TY_PORTABLE_DEPS)
  return()
endif()
if(NOT EXISTS ${TY_PORTABLE_DEPS}/include/fmt/core.h)
  message(FATAL_ERROR "TY_PORTABLE_DEPS=${TY_PORTABLE_DEPS}: no libraries there. Run './dev deps --portable' on a machine that has them, and bring the folder along.")
endif()
if(TY_TESTS AND NOT TY_TESTS STREQUAL "device")
  message(FATAL_ERROR "TY_PORTABLE_DEPS has what the tests on GPUs need, and not what all tests need: configure with --preset gpu, -DTY_TESTS=device or -DTY_TESTS=OFF.")
endif()

# find_package(<package>) is content: its targets are defined here.
function(ty_portable_package package)
  string(TOLOWER ${package} lower)
  file(WRITE ${CMAKE_FIND_PACKAGE_REDIRECTS_DIR}/${lower}-config.cmake "")
  file(WRITE ${CMAKE_FIND_PACKAGE_REDIRECTS_DIR}/${lower}-config-version.cmake "set(PACKAGE_VERSION_COMPATIBLE TRUE)\n")
endfunction()

function(ty_portable_headers package target)
  add_library(${target} INTERFACE IMPORTED)
  target_include_directories(${target} INTERFACE ${TY_PORTABLE_DEPS}/include)
  target_compile_definitions(${target} INTERFACE ${ARGN})
  ty_portable_package(${package})
endfunction()

function(ty_portable_library package target library)
  add_library(${library} STATIC EXCLUDE_FROM_ALL ${ARGN})
  add_library(${target} ALIAS ${library})
  target_include_directories(${library} SYSTEM PUBLIC ${TY_PORTABLE_DEPS}/include)
  ty_portable_package(${package})
endfunction()

ty_portable_headers(fmt fmt::fmt FMT_HEADER_ONLY=1)
ty_portable_headers(spdlog spdlog::spdlog SPDLOG_FMT_EXTERNAL FMT_HEADER_ONLY=1)
ty_portable_headers(tl-expected tl::expected)
ty_portable_headers(nlohmann_json nlohmann_json::nlohmann_json)
ty_portable_headers(CLI11 CLI11::CLI11)

file(GLOB hwy_sources ${TY_PORTABLE_DEPS}/src/hwy/*.cc)
ty_portable_library(HWY hwy::hwy portable_hwy ${hwy_sources})
target_include_directories(portable_hwy PRIVATE ${TY_PORTABLE_DEPS}/src)  # its files include themselves, once per instruction set
if(TY_TESTS)
  find_package(Threads REQUIRED)
  ty_portable_library(GTest GTest::gtest_main portable_gtest ${TY_PORTABLE_DEPS}/src/gtest/src/gtest-all.cc ${TY_PORTABLE_DEPS}/src/gtest/src/gtest_main.cc)
  target_include_directories(portable_gtest PRIVATE ${TY_PORTABLE_DEPS}/src/gtest)
  target_link_libraries(portable_gtest PUBLIC Threads::Threads)
endif()
