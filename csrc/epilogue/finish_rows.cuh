// The sm_90 engine's way from the sums of mma.sync to a finished slice of Y. The ring goes on filling
// meanwhile, so rows are laid out in memory of their own:
//
//   registers --lay out--> rows, one copy per part of the depth
//   --add the copies, four columns a thread--> --hand over, or scale and add the bias--> Y
#pragma once

#include "epilogue/rows.cuh"
#include "epilogue/team.cuh"
#include "ptx/cluster.cuh"

namespace marlin {

template <Sm90Shape kShape>
using SliceRows = RowTile<kShape.rows, kShape.columns>;

template <Sm90Shape kShape>
__device__ SliceRows<kShape>* rows_of_slice(Sm90Shared<kShape>& shared) {
  return reinterpret_cast<SliceRows<kShape>*>(shared.finished);
}

// Handover (epilogue/handover.cuh) within a pair of CTAs that share every slice: the second writes its
// sums into the first one's shared memory, where a barrier counts the bytes.
template <Sm90Shape kShape>
class PairHandover {
 public:
  __device__ PairHandover(Sm90Shared<kShape>& shared, const GemmParams& params,
                          const SliceOrigin& origin, bool owner)
      : theirs_(rows_of_slice(shared)[Sm90Shared<kShape>::kCopies]),
        barrier_(&shared.partner_sums[0]),
        owner_(owner) {
    if (!owner || threadIdx.x != 0) return;
    const int64_t rows = params.m - origin.row, columns = params.n - origin.column;
    ptx::mbarrier_arrive_expect(
        barrier_, static_cast<int>(rows < kShape.rows ? rows : kShape.rows) *
                      static_cast<int>(columns < kShape.columns ? columns : kShape.columns) *
                      static_cast<int>(sizeof(float)));
  }

  __device__ bool owner() const { return owner_; }
  __device__ int others() const { return 1; }
  __device__ void await_others() const { ptx::mbarrier_wait_remote(barrier_, 0); }
  __device__ void count_myself() const {}
  __device__ float4 take(int, int row, int column) const { return theirs_.at(row, column); }
  __device__ void give(int row, int column, float4 sums) const {
    ptx::store_remote(&theirs_.sums[row][column], barrier_, ptx::cluster_rank() ^ 1, sums);
  }

 private:
  SliceRows<kShape>& theirs_;
  ptx::Mbarrier* barrier_;
  bool owner_;
};

template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, typename Handover>
__device__ void finish_rows(const Sums<kBatches>& sums, const SumsPlace& place,
                            Sm90Shared<kShape>& shared, const GemmParams& params,
                            const SliceOrigin& origin, const Handover& handover) {
  using Rows = SliceRows<kShape>;
  constexpr int kCopies = Sm90Shared<kShape>::kCopies;
  Rows* tiles = rows_of_slice(shared);
  tiles[place.copy].lay_out(sums, 0, place.column, place.pair);
  if (place.thread == 0 && handover.owner()) handover.await_others();
  team_barrier<kShape>(0);
  const Rows* copies[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) copies[i] = &tiles[i];
  const RowFinisher<Half, kPerColumn, Rows, kCopies, kShape.team_threads()> finisher(params, origin,
                                                                                     place.thread);
  finisher.finish(copies, 0, handover);
  team_barrier<kShape>(0);  // the rows may be overwritten; what was given is all there
  if (place.thread == 0 && !handover.owner()) handover.count_myself();
}

}  // namespace marlin
