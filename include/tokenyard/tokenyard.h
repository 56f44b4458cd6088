#pragma once
// Everything.

#include "tokenyard/collective.h"
#include "tokenyard/dtype.h"
#include "tokenyard/error.h"
#include "tokenyard/exchange.h"
#include "tokenyard/launch.h"
#include "tokenyard/options.h"
#include "tokenyard/parallel.h"
#include "tokenyard/placement.h"
#include "tokenyard/quantise.h"
#include "tokenyard/routing.h"
#include "tokenyard/safetensors.h"
#include "tokenyard/tensor_view.h"
#include "tokenyard/topo.h"
#include "tokenyard/weights.h"
#include "tokenyard/world.h"
