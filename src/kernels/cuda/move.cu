// Which of the two ways rows are moved.

#include "kernels/cuda/move_job.h"

namespace tokenyard::cuda {

bool moves_in_bulk(const SourceArgs& source) {
  MoveArgs args;
  args.source = source;
  return can_move_bulk(move_job(args));
}

void launch_move(const MoveArgs& args, Stream stream) {
  const MoveJob job = move_job(args);
  if (can_move_bulk(job)) {
    launch_move_bulk(job, stream);
  } else {
    launch_move_vector(job, stream);
  }
}

}  // namespace tokenyard::cuda
