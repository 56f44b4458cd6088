#include "bindings.h"

NB_MODULE(_core, m) {
  using namespace tokenyard::python;
  m.doc() = "The C++ library, thinly: tokenyard's own modules are the interface.";
  bind_errors(m);
  bind_arrays(m);
  bind_world(m);
  bind_placement(m);
  bind_routing(m);
  bind_quantise(m);
  bind_options(m);
  bind_received(m);
  bind_exchange(m);
  bind_collective(m);
  bind_device_collective(m);
  bind_topo(m);
  bind_parallel(m);
  bind_safetensors(m);
  bind_weights(m);
  bind_experts(m);
  bind_device_experts(m);
  bind_layer(m);
  bind_norm(m);
}
