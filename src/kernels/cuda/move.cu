// Which of the two ways rows are moved.

#include "kernels/cuda/launch.h"
#include "kernels/cuda/move_job.h"

namespace tokenyard::cuda {

void launch_move(const MoveArgs& args, Stream stream) {
  const MoveJob job = move_job(args);
  const bool aligned = args.source.quantise || job.row_width == 16;
  if (aligned && has_bulk_copies() && launch_move_bulk(job, stream)) return;
  launch_move_vector(job, stream);
}

}  // namespace tokenyard::cuda
