// The engine for Hopper: one warpgroup feeds a ring of stages, the others multiply.
//
//   global --feed (copy engine)--> Sm90Shared's ring --mma.sync or wgmma--> Sums (registers)
//   Sums --finish_in_turns--> rows in shared memory --Handover--> the slice's owner --> Y
#pragma once

#include "core/config.h"
#include "core/partition.h"
#include "epilogue/finish_turns.cuh"
#include "epilogue/store_halves.cuh"
#include "pipeline/feed.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/sums.cuh"
#include "pipeline/weight_blocks.cuh"
#include "ptx/cluster.cuh"
#include "ptx/register.cuh"
#include "ptx/wgmma.cuh"

namespace marlin {

// The thread's warp, as a number that the compiler knows to be the same for the whole warp.
__device__ inline int uniform_warp() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
}

// A consumer thread's place.
template <Sm90Shape kShape>
struct Consumer {
  int lane = threadIdx.x % 32;
  int warpgroup;
  int warp;  // of its warpgroup
  int set = kShape.sets == 1 ? 0 : warpgroup / kShape.set_warpgroups();
  // Its first block of 16 columns of the CTA, and which 128 rows of a stage are its own.
  int first_block = kShape.wgmma ? (warpgroup % kShape.set_warpgroups() * 4 + warp) * kShape.blocks
                                 : warp % Sm90Shared<kShape>::kStrips * kShape.blocks;
  int part = kShape.wgmma ? 0 : warp / Sm90Shared<kShape>::kStrips;
  int fragment_column = lane / 4;

  // `cta_warp`: uniform.
  __device__ explicit Consumer(int cta_warp) : warpgroup(cta_warp / 4), warp(cta_warp % 4) {}

  __device__ SumsPlace sums_place() const {
    constexpr int kTeamThreads = 128 * kShape.consumers() / kShape.teams();
    const int team = static_cast<int>(threadIdx.x) / kTeamThreads;
    return {team, static_cast<int>(threadIdx.x) % kTeamThreads, set * kShape.parts() + part,
            16 * first_block + fragment_column - team * Sm90Shared<kShape>::kTeamColumns, lane % 4};
  }
};

// ------------------------------------------------------------------ up to 16 rows: mma.sync

// A warp's 128 rows of a stage by its 64 columns. The product of a group of rows is scaled, then
// added; without groups sums stay in units of the scale.
template <typename Half, int kGroups, Sm90Shape kShape, int kBatches>
__device__ void multiply_part(const Sm90Shared<kShape>& shared, int slot,
                              const Consumer<kShape>& me, Dtype scale_dtype, Sums<kBatches>& sums) {
  constexpr int kTiles = 128 / kTileRows;
  const int strip = me.first_block / kBlocks;
  auto multiply = [&](int first, int last, Sums<kBatches>& target) {
#pragma unroll
    for (int i = first; i < last; ++i) {
      const int tile = me.part * kTiles + i;
      target.template multiply<Half>(shared.words[slot][tile][strip][me.lane], [&](int batch) {
        ActivationFragments x;
        x.load<kBatches == 1>(shared.activations[slot], me.lane, 0, tile, batch);
        return x;
      });
    }
  };
  if constexpr (kGroups == 0) {
    multiply(0, kTiles, sums);
  } else {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      constexpr int kLength = kTiles / kGroups;
      Sums<kBatches> product;
      multiply(group * kLength, (group + 1) * kLength, product);
      const ScaleFragment scale(
          shared.scales[slot][me.part * kGroups + group][strip][me.fragment_column], scale_dtype);
      sums.add_scaled(product, scale);
    }
  }
}

template <typename Half, int kGroups, Sm90Shape kShape>
class MmaConsumer {
  static constexpr int kBatches = kShape.rows / 8;

 public:
  Sums<kBatches> sums;

  __device__ MmaConsumer(const Consumer<kShape>& me, Dtype scale_dtype)
      : me_(me), scale_dtype_(scale_dtype) {}

  __device__ void multiply_stage(Sm90Shared<kShape>& shared, int slot) {
    multiply_part<Half, kGroups>(shared, slot, me_, scale_dtype_, sums);
    __syncwarp();
    if (me_.lane == 0) ptx::mbarrier_arrive(&shared.empty[slot]);
  }

  __device__ void finish(Sm90Shared<kShape>&) {}

 private:
  const Consumer<kShape>& me_;
  Dtype scale_dtype_;
};

// ------------------------------------------------------------------------ more rows: wgmma

// The warpgroup multiplies a block of all its warps at a time, and each block's product runs while the
// next ones are dequantized. A stage is given back when only products of the next one are under way.
template <typename Half, int kGroups, Sm90Shape kShape>
class WgmmaConsumer {
  static constexpr int kBatches = kShape.rows / 8;
  static constexpr int kCount = kShape.blocks;
  static constexpr int kTiles = Sm90Shared<kShape>::kTiles;
  static constexpr bool kScaleSums = kGroups > 0 && kShape.scales_sums();
  static constexpr bool kScaleWeights = kGroups > 0 && !kShape.scales_sums();
  // Rows of tiles that share a scale, at most a stage.
  static constexpr int kGroupTiles = kTiles * kGroups > 8 ? 8 / (kGroups > 0 ? kGroups : 1)
                                                          : kTiles;
  // Products under way; after how many rows of tiles none of them is of the stage before.
  static constexpr int kPending = kShape.rows > 64 ? 2 * kCount : 4 * kCount / (kCount > 2 ? 2 : 1);
  static constexpr int kReleaseTile = kPending / kCount - 1;
  static_assert(kPending % kCount == 0 && kReleaseTile < kTiles);

 public:
  Sums<kBatches, kCount> sums;

  __device__ WgmmaConsumer(const Consumer<kShape>& me, Dtype scale_dtype)
      : me_(me), scale_dtype_(scale_dtype) {
    const int strip = me.first_block / kBlocks, block = me.first_block % kBlocks;
    words_at_ = ptx::in_a_register((strip * 32 + me.lane) * sizeof(Chunk) + block * 4);
    scales_at_ = ptx::in_a_register((strip * 8 + me.fragment_column) * sizeof(Chunk) + block * 4);
  }

  __device__ void multiply_stage(Sm90Shared<kShape>& shared, int slot) {
    const uint64_t x = ptx::wgmma_descriptor(shared.activations[slot]);
    Words<kCount> words = words_of(shared, slot, 0);
    const int passes = kScaleWeights ? shared.passes[slot] : 1;
    int pass = 0;
    do {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Words<kCount> next = words_of(shared, slot, (tile + 1) % kTiles);
        multiply_tile(shared, slot, tile, words, x);
        words = next;
        if (tile == kReleaseTile && pass == 0) release(shared);
      }
    } while (++pass < passes);
    held_ = slot;
  }

  // Everything is in `sums`, and no stage is held.
  __device__ void finish(Sm90Shared<kShape>& shared) {
    ptx::wgmma_wait<0>();
    release(shared);
    held_ = -1;
    if constexpr (kScaleSums) add_product();
  }

 private:
  __device__ Words<kCount> words_of(const Sm90Shared<kShape>& shared, int slot, int tile) const {
    const auto* bytes = reinterpret_cast<const char*>(shared.words[slot][tile]);
    return *reinterpret_cast<const Words<kCount>*>(bytes + words_at_);
  }

  __device__ Words<kCount> scales_of(const Sm90Shared<kShape>& shared, int slot, int group) const {
    const auto* bytes = reinterpret_cast<const char*>(shared.scales[slot][group]);
    return *reinterpret_cast<const Words<kCount>*>(bytes + scales_at_);
  }

  __device__ void multiply_tile(const Sm90Shared<kShape>& shared, int slot, int tile,
                                const Words<kCount>& words, uint64_t x) {
    constexpr int kPanelTiles = kPanelColumns / kTileRows;
    constexpr uint64_t kPanelBytes = kShape.rows * kSwizzleChunks * sizeof(Chunk);
    const uint64_t columns = x + tile / kPanelTiles * (kPanelBytes / 16) + tile % kPanelTiles * 2;
    const bool first = kGroups > 0 && tile % kGroupTiles == 0;
    if (first) {
      const Words<kCount> scales = scales_of(shared, slot, tile / kGroupTiles);
      if constexpr (kScaleWeights) pair_scales_ = PairScales<Half, kCount>(scales);
      if constexpr (kScaleSums) {
        add_product();
        set_scales(scales);
      }
    }
#pragma unroll
    for (int block = 0; block < kCount; ++block) {
      ptx::wgmma_wait<kPending - 1>();
      ptx::FragmentA w = dequantize<Half>(words.words[block]);
      if constexpr (kScaleWeights) scale_weights(w, pair_scales_, block);
      ptx::wgmma_fence();
      if constexpr (kScaleSums) {
        if (first) ptx::wgmma<Half, true>(w, columns, product_.values[block]);
        else ptx::wgmma<Half, false>(w, columns, product_.values[block]);
      } else {
        ptx::wgmma<Half, false>(w, columns, sums.values[block]);
      }
      ptx::wgmma_commit();
    }
  }

  // sums += product · scale of the group before. The compiler allows no look at any accumulator while
  // a product is under way; the other sets go on meanwhile.
  __device__ void add_product() {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < kCount; ++block)
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums.values[block][batch].values[i];
          sum = fmaf(product_.values[block][batch].values[i], sum_scales_[2 * block + i / 2], sum);
        }
  }

  __device__ void set_scales(const Words<kCount>& halves) {
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i)
      sum_scales_[i] =
          scale_value(static_cast<uint16_t>(halves.words[i / 2] >> (16 * (i % 2))), scale_dtype_);
  }

  __device__ void release(Sm90Shared<kShape>& shared) {
    __syncwarp();  // every lane has read what it needs
    if (held_ >= 0 && me_.lane == 0) ptx::mbarrier_arrive(&shared.empty[held_]);
  }

  struct Nothing {};
  const Consumer<kShape>& me_;
  Dtype scale_dtype_;
  uint32_t words_at_;   // of this thread, in bytes, in a row of tiles
  uint32_t scales_at_;  // and in a group
  int held_ = -1;       // the stage before, which products under way still read
  Sums<kScaleSums ? kBatches : 1, kScaleSums ? kCount : 1> product_;  // of the current group
  float sum_scales_[2 * kCount] = {};                                 // its scales
  PairScales<Half, kCount> pair_scales_;
};

// ------------------------------------------------------------------------------ the kernel

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void consume(Sm90Shared<kShape>& shared, const LaunchParams& params, int warp, int run) {
  using Multiplier = std::conditional_t<kShape.wgmma, WgmmaConsumer<Half, kGroups, kShape>,
                                        MmaConsumer<Half, kGroups, kShape>>;
  const Consumer<kShape> me(warp);
  RingPlace<kShape.stages, kShape.sets> place(me.set);
  int until_mine = me.set;  // tiles of the run before this set's next one
#pragma unroll 1
  for (SegmentWalk segment(params.partition, run); segment; segment.next()) {
    Multiplier multiplier(me, params.gemm.scale_dtype);
    const int tiles = segment->last - segment->first;
#pragma unroll 1
    for (; until_mine < tiles; until_mine += kShape.sets, place.advance()) {
      ptx::mbarrier_wait(&shared.full[place.slot], place.parity);
      multiplier.multiply_stage(shared, place.slot);
    }
    until_mine -= tiles;
    multiplier.finish(shared);

    const Slice slice(segment->slice, params.row_tiles, kShape.rows, Sm90Shared<kShape>::kStrips);
    const SumsPlace target = me.sums_place();
    const SliceOrigin origin{slice.first_row, slice.strip * kTileColumns +
                                                  target.team * Sm90Shared<kShape>::kTeamColumns};
    const Sharing sharing = params.partition.sharing(run, segment->slice);
    constexpr bool kPerColumn = kGroups == 0;
    const Sm90Handover<kShape> handover(params.workspace, sharing, run, target.team);
    if constexpr (kShape.wgmma && kShape.sets == 1) {
      const int64_t rows_left = params.gemm.m - slice.first_row;
      const bool mine =
          params.pairs
              ? add_partner<kShape>(multiplier.sums, target, rows_left, shared, sharing.owner())
              : add_others<kShape>(multiplier.sums, target, rows_left, handover);
      if (mine)
        store_halves<Half, kPerColumn, kShape>(
            multiplier.sums, reinterpret_cast<HalfRows<kShape>*>(shared.finished)[target.team],
            params.gemm, origin, target.thread, target.column,
            [&] { team_barrier<kShape>(target.team); });
    } else if (params.pairs) {
      finish_in_pairs<Half, kPerColumn, kShape>(multiplier.sums, target, shared, params.gemm,
                                                origin, sharing.owner());
    } else {
      finish_in_turns<Half, kPerColumn, kShape>(multiplier.sums, target, shared, params.gemm,
                                                origin, handover);
    }
  }
}

// Registers of a thread: as launched, then of the feeding and of the consuming warpgroups.
template <Sm90Shape kShape>
struct Registers {
  static constexpr int kLaunched = 65536 / kShape.ctas / kShape.threads() / 8 * 8;
  static constexpr int kFeed = kShape.ctas == 1 ? 56 : 48;
  static constexpr int kSpare = (kLaunched - kFeed) / kShape.consumers() / 8 * 8;
  static constexpr int kConsume = kLaunched + kSpare < 240 ? kLaunched + kSpare : 240;
};

// Templated on the index of its shape: nvcc 13.0 cannot name a kernel by a class-type argument.
template <size_t kIndex, typename Half, int kGroups>
__global__ void __launch_bounds__(kSm90Shapes[kIndex].shape.threads(),
                                  kSm90Shapes[kIndex].shape.ctas)
    sm90_kernel(const __grid_constant__ LaunchParams params,
                const __grid_constant__ CUtensorMap x_map) {
  constexpr Sm90Shape kShape = kSm90Shapes[kIndex].shape;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Sm90Shared<kShape>*>(memory);
  const int run = run_of_block(params.partition);

  const int warp = uniform_warp();
  if (threadIdx.x == 0) init_ring(shared, kProducers<kShape, kGroups>);
  __syncthreads();
  if (params.pairs) ptx::cluster_arrive();  // the partner may reach for the barriers from here on

  if (warp / 4 == kShape.consumers()) {
    ptx::give_registers<Registers<kShape>::kFeed>();
    feed<Half, kGroups>(shared, params, x_map, warp % 4, run);
    if (params.pairs) ptx::cluster_wait();
  } else {
    ptx::take_registers<Registers<kShape>::kConsume>();
    prefetch_words<kShape>(params, warp, run);
    if (params.pairs) ptx::cluster_wait();
    consume<Half, kGroups>(shared, params, warp, run);
  }
}

}  // namespace marlin
