// The engine for Hopper: one warpgroup feeds a ring of stages, the others multiply.
//
//   global --feed (copy engine)--> Sm90Shared's ring --mma.sync or wgmma--> Sums (registers)
//   Sums (mma.sync) --finish_rows--> rows in shared memory --Handover--> the slice's owner --> Y
//   Sums (wgmma) --add_sums--> those of the slice's owner, or half of them --store_halves--> Y
#pragma once

#include "core/config.h"
#include "core/partition.h"
#include "epilogue/add_sums.cuh"
#include "epilogue/finish_rows.cuh"
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
    const int team = kShape.wgmma ? warpgroup % kShape.teams() : 0;
    return {team,
            static_cast<int>(threadIdx.x) % kShape.team_threads(),
            set,
            set * kShape.parts() + part,
            16 * first_block + fragment_column - team * Sm90Shared<kShape>::kTeamColumns,
            lane % 4};
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
      target.template multiply<Half>(
          shared.words[slot][tile][strip][me.lane],
          [](uint32_t word, int) { return dequantize<Half>(word); },
          [&](int batch) {
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
    give_back(shared, slot, me_.lane);
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
  static constexpr bool kCanFuse = kGroups > 0 && std::is_same_v<Half, __half>;
  // Rows of tiles that share a scale, at most a stage.
  static constexpr int kGroupTiles = kTiles * kGroups > 8 ? 8 / (kGroups > 0 ? kGroups : 1)
                                                          : kTiles;
  // Products under way, and after which row of tiles none of them is of the stage before. (More are no
  // faster; two up to 64 rows, or above, are up to 2 % slower: bench/LOG.md, 863478e.)
  static constexpr int kPending = kShape.rows > 64 ? 3 : 4;
  static constexpr int kReleaseTile = (kPending + kCount - 1) / kCount - 1;
  static_assert(kReleaseTile < kTiles);

 public:
  Sums<kBatches, kCount> sums;

  __device__ explicit WgmmaConsumer(const Consumer<kShape>& me, Dtype) : me_(me) {
    const int strip = me.first_block / kBlocks, block = me.first_block % kBlocks;
    words_at_ = ptx::in_a_register((strip * 32 + me.lane) * sizeof(Chunk) + block * 4);
    scales_at_ = ptx::in_a_register((strip * 8 + me.fragment_column) * sizeof(Chunk) + block * 4);
  }

  __device__ void multiply_stage(Sm90Shared<kShape>& shared, int slot) {
    int passes = 1;
    if constexpr (kGroups > 0) {
      const ScaleForm form = shared.scale_forms[slot];
      if (form.unit != unit_) change_unit(form.unit);
      passes = form.passes;
    }
    if (kCanFuse && passes == 0) {
      multiply_tiles<FusedScales<kCount>>(shared, slot, true);
    } else {
      multiply_tiles<PairScales<Half, kCount>>(shared, slot, true);
      for (int pass = 1; pass < passes; ++pass)
        multiply_tiles<PairScales<Half, kCount>>(shared, slot, false);
    }
    held_ = slot;
  }

  // Everything is in `sums`, and no stage is held.
  __device__ void finish(Sm90Shared<kShape>& shared) {
    ptx::wgmma_wait<0>();
    give_back(shared, held_, me_.lane);
    held_ = -1;
    if constexpr (kGroups > 0) change_unit(0);
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

  template <typename Scales>
  __device__ void multiply_tiles(Sm90Shared<kShape>& shared, int slot, bool first_pass) {
    const uint64_t x = ptx::wgmma_descriptor(shared.activations[slot]);
    Words<kCount> words = words_of(shared, slot, 0);
    Scales scales;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Words<kCount> next = words_of(shared, slot, (tile + 1) % kTiles);
      if (kGroups > 0 && tile % kGroupTiles == 0)
        scales = Scales(scales_of(shared, slot, tile / kGroupTiles).words);
      multiply_tile(words, scales, columns_of(x, tile));
      words = next;
      if (tile == kReleaseTile && first_pass) give_back(shared, held_, me_.lane);
    }
  }

  // The 16 columns of X that a row of tiles meets.
  static __device__ uint64_t columns_of(uint64_t x, int tile) {
    constexpr int kPanelTiles = kPanelColumns / kTileRows;
    constexpr uint64_t kPanelBytes = kShape.rows * kSwizzleChunks * sizeof(Chunk);
    return x + tile / kPanelTiles * (kPanelBytes / 16) + tile % kPanelTiles * 2;
  }

  template <typename Scales>
  __device__ void multiply_tile(const Words<kCount>& words, const Scales& scales,
                                uint64_t columns) {
#pragma unroll
    for (int block = 0; block < kCount; ++block) {
      ptx::wgmma_wait<kPending - 1>();
      ptx::FragmentA w;
      if constexpr (kGroups == 0) w = dequantize<Half>(words.words[block]);
      else w = dequantize_scaled(words.words[block], scales, block);
      ptx::wgmma_fence();
      ptx::wgmma<Half>(w, columns, sums.values[block]);
      ptx::wgmma_commit();
    }
  }

  __device__ void change_unit(int unit) {
    const float factor = power_of_two(unit - unit_);
    unit_ = unit;
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < kCount; ++block)
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.values[block][batch].values[i] *= factor;
  }

  const Consumer<kShape>& me_;
  uint32_t words_at_;   // of this thread, in bytes, in a row of tiles
  uint32_t scales_at_;  // and in a group
  int held_ = -1;       // the stage before, which products under way still read
  int unit_ = 0;        // log2 of what one is in the sums
};

// ------------------------------------------------------------------------------ the kernel

// From a thread's sums to Y, or to the CTA that owns the slice.
template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, int kCount>
__device__ void finish_slice(Sums<kBatches, kCount>& sums, const SumsPlace& place,
                             Sm90Shared<kShape>& shared, const LaunchParams& params,
                             const SliceOrigin& origin, int run, const Sharing& sharing) {
  const GemmParams& gemm = params.gemm;
  const Sm90Handover<kShape> handover(params.workspace, sharing, run,
                                      twin_rank<kShape>() * kShape.teams() + place.team);
  if constexpr (kShape.wgmma) {
    const int64_t rows_left = gemm.m - origin.row;
    if (!add_sets<kShape>(sums, place, rows_left, shared)) return;
    const auto store = [&](const auto& rows, int first_row) {
      store_halves<Half, kPerColumn, kShape>(
          rows, reinterpret_cast<HalfRows<kShape>*>(shared.finished)[place.team], gemm,
          {origin.row + first_row, origin.column}, place.thread, place.column,
          [&] { team_barrier<kShape>(place.team); });
    };
    if constexpr (kShape.can_pair()) {
      if (params.pairs) {
        const bool owner = sharing.owner();
        return store(add_partner<kShape>(sums, place, rows_left, shared, owner),
                     owner ? 0 : kShape.rows / 2);
      }
    }
    if (add_others<kShape>(sums, place, rows_left, handover)) store(sums, 0);
  } else if (params.pairs) {
    const PairHandover<kShape> pair(shared, gemm, origin, sharing.owner());
    finish_rows<Half, kPerColumn, kShape>(sums, place, shared, gemm, origin, pair);
  } else {
    finish_rows<Half, kPerColumn, kShape>(sums, place, shared, gemm, origin, handover);
  }
}

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void consume(Sm90Shared<kShape>& shared, const LaunchParams& params, int warp, int run) {
  using Multiplier = std::conditional_t<kShape.wgmma, WgmmaConsumer<Half, kGroups, kShape>,
                                        MmaConsumer<Half, kGroups, kShape>>;
  const Consumer<kShape> me(warp);
  const SumsPlace target = me.sums_place();
  RingPlace<kShape.stages, kShape.sets> place(me.set);
  int until_mine = me.set;  // tiles of the run before this set's next one
#pragma unroll 1
  for (SegmentWalk segment(params.partition, run); segment; segment.next()) {
    // Before the first stage is there, so that it costs no time.
    const Slice slice = slice_of_cta<kShape>(params, segment->slice);
    const SliceOrigin origin{slice.first_row, slice.strip * kTileColumns +
                                                  target.team * Sm90Shared<kShape>::kTeamColumns};
    const Sharing sharing = params.partition.sharing(run, segment->slice);

    Multiplier multiplier(me, params.gemm.scale_dtype);
    const int tiles = segment->last - segment->first;
#pragma unroll 1
    for (; until_mine < tiles; until_mine += kShape.sets, place.advance()) {
      ptx::mbarrier_wait(&shared.full[place.slot], place.parity);
      multiplier.multiply_stage(shared, place.slot);
    }
    until_mine -= tiles;
    multiplier.finish(shared);
    finish_slice<Half, kGroups == 0, kShape>(multiplier.sums, target, shared, params, origin, run,
                                             sharing);
  }
}

// Registers of a thread: as launched, then of the feeding and of the consuming warpgroups.
template <Sm90Shape kShape>
struct Registers {
  static constexpr int kLaunched = 65536 / kShape.threads() / 8 * 8;
  static constexpr int kFeed = 56;
  static constexpr int kSpare = (kLaunched - kFeed) / kShape.consumers() / 8 * 8;
  static constexpr int kConsume = kLaunched + kSpare < 240 ? kLaunched + kSpare : 240;
};

// Templated on the index of its shape: nvcc 13.0 cannot name a kernel by a class-type argument.
template <size_t kIndex, typename Half, int kGroups>
__global__ void __launch_bounds__(kSm90Shapes[kIndex].shape.threads(), 1)
    sm90_kernel(const __grid_constant__ LaunchParams params,
                const __grid_constant__ TensorMaps maps) {
  constexpr Sm90Shape kShape = kSm90Shapes[kIndex].shape;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Sm90Shared<kShape>*>(memory);
  const int run = run_of_block(params.partition, kShape.twins);
  constexpr bool kTwins = kShape.twins > 1;

  const int warp = uniform_warp();
  if (threadIdx.x == 0) init_ring(shared, kProducers<kShape, kGroups>);
  __syncthreads();
  // The partner may reach for the barriers from here on.
  if (kTwins || params.pairs) ptx::cluster_arrive();

  if (warp / 4 == kShape.consumers()) {
    ptx::give_registers<Registers<kShape>::kFeed>();
    if (kTwins) ptx::cluster_wait();
    feed<Half, kGroups>(shared, params, maps, warp % 4, run);
    __syncwarp();
    if (params.pairs) ptx::cluster_wait();
  } else {
    ptx::take_registers<Registers<kShape>::kConsume>();
    if (kTwins || params.pairs) ptx::cluster_wait();
    consume<Half, kGroups>(shared, params, warp, run);
  }
}

}  // namespace marlin
