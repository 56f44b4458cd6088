#pragma once
// Where and with what a figure was measured.

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace tokenyard::cli {

// {"cpu", "cores", "memory_bytes", "kernel"}
nlohmann::json machine();
// {"tokenyard", "git_revision", "build_type", "compiler"}, and {"mpi"} when mpirun is given.
nlohmann::json versions(const std::string& mpirun);

}  // namespace tokenyard::cli
