# cmake --install: headers, library, CMake package, pkg-config file and the command line.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(TARGETS tokenyard EXPORT tokenyardTargets)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
if(TARGET tokenyard_cli)
  install(TARGETS tokenyard_cli)
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tokenyard)
install(EXPORT tokenyardTargets NAMESPACE tokenyard:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tokenyardConfig.cmake.in ${PROJECT_BINARY_DIR}/tokenyardConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tokenyardConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/tokenyardConfig.cmake ${PROJECT_BINARY_DIR}/tokenyardConfigVersion.cmake DESTINATION ${package_dir})

# A static library's users link what it uses, also without pkg-config --static. MPI's libraries are those CMake found:
# its pkg-config file has no common name.
set(TY_PC_REQUIRES "")
set(TY_PC_LIBS "-L\${libdir} -ltokenyard")
if(NOT BUILD_SHARED_LIBS)
  set(TY_PC_REQUIRES "fmt spdlog libhwy")
  string(APPEND TY_PC_LIBS " -lpthread")
  if(TY_ONEDNN)
    string(APPEND TY_PC_LIBS " ${TY_ONEDNN_LIBRARY}")
  endif()
  if(TY_CUDA)
    string(APPEND TY_PC_LIBS " ${CUDA_cudart_static_LIBRARY} -ldl -lrt")  # CUDA has no pkg-config file of this name everywhere
  endif()
  if(TY_MPI)
    find_package(MPI REQUIRED COMPONENTS CXX)  # src/ has found it too, for its own folder
    list(JOIN MPI_CXX_LIBRARIES " " mpi_libraries)
    string(APPEND TY_PC_LIBS " ${mpi_libraries}")
  endif()
endif()
file(RELATIVE_PATH TY_PC_TO_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(${PROJECT_SOURCE_DIR}/cmake/tokenyard.pc.in ${PROJECT_BINARY_DIR}/tokenyard.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/tokenyard.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
