// Who computes what: an equal share of the tiles for every CTA, whatever the shape.
//
// The output is cut into slices (a strip of columns by a tile of rows); each slice is `depth` tiles
// long along k. A CTA, or two twins (core/config.h), take one run. While there are slices enough
// for all runs, they are dealt out whole, in turn: at any time all CTAs are in neighbouring slices,
// at about the same k, so that what they read is in L2. The tiles of the slices left form one line,
// which is cut into equal pieces, one for each run, or for as many as may share so few slices: a run
// walks down a slice and perhaps on into the next.
//
//   slice left   0            1            2
//   tiles   [ . . . . . ][ . . . . . ][ . . . . . ]
//   runs    [  0   ][  1    ][  2   ][   3        ]
//
// A slice that several runs touch needs their sums added: the run that holds the slice's head owns
// it and adds the others' partial sums in the order of the runs. Every run has at most one segment
// that it does not own (its first of the line), and at most one slice that it owns and shares (its
// last): one buffer and one counter per run suffice. With runs = slices * s this is an even split by s.
#pragma once

#include <cstdint>

namespace marlin {

// The part of a slice that one run covers: tiles [first, last) of the slice. (32 bits number the slices
// of any Y that a GPU could hold.)
struct Segment {
  int slice = 0;
  int first = 0;
  int last = 0;

  constexpr bool operator==(const Segment&) const = default;
};

// Who else works on the slice of a segment.
struct Sharing {
  int contributors;  // runs that touch the slice
  int order;         // the run's place among them; 0 owns the slice

  constexpr bool owner() const { return order == 0; }
  constexpr bool shared() const { return contributors > 1; }
  constexpr bool operator==(const Sharing&) const = default;
};

// That share the line: so few that 32 bits hold its tiles, and all but a rare product of them. GPUs
// divide 64-bit numbers slowly, and have few registers left where a walk goes on.
inline constexpr int kMostRuns = 4096;

// That share a slice which is left after whole ones: its owner adds what the others have one after the
// other, 128 KB each. (What was measured on an H200, and won, shares with up to nine.)
inline constexpr int kMostSharers = 9;

struct Partition {
  int64_t slices;
  int depth;  // tiles per slice
  int runs;
  int dealt;      // slices that go whole to the runs in turn
  int line_runs;  // the first so many runs share the line
  int run_tiles;  // of each of them, before what is left is shared out
  int left;

  constexpr Partition(int64_t slices, int depth, int runs)
      : slices(slices),
        depth(depth),
        runs(runs),
        dealt(static_cast<int>(slices / runs * runs)),
        line_runs(most_line_runs()),
        run_tiles(line_runs == 0 ? 0 : line_tiles() / line_runs),
        left(line_runs == 0 ? 0 : line_tiles() % line_runs) {}

  constexpr int64_t tiles() const { return slices * depth; }
  constexpr int line_tiles() const { return static_cast<int>(slices - dealt) * depth; }

  constexpr int most_line_runs() const {
    const int left_slices = static_cast<int>(slices - dealt);
    const int sharers = dealt == 0 ? runs : left_slices * kMostSharers;
    const int most = sharers < runs ? sharers : runs;
    return line_tiles() < most ? line_tiles() : most;
  }

  // line_tiles() · run / line_runs, rounded down.
  constexpr int line_begin(int run) const {
    return run < line_runs ? run * run_tiles + run * left / line_runs : line_tiles();
  }

  // All tiles of a run.
  constexpr int64_t tiles_of(int run) const {
    return int64_t{dealt / runs} * depth + line_begin(run + 1) - line_begin(run);
  }

  // The run that holds a tile of the line: the last one that begins at or before it.
  constexpr int run_of(int tile) const {
    return static_cast<int>(quotient((int64_t{tile} + 1) * line_runs - 1, line_tiles()));
  }

  constexpr Sharing sharing(int run, int slice) const {
    if (slice < dealt) return {1, 0};
    const int head_tile = (slice - dealt) * depth;
    const int head = run_of(head_tile);
    return {run_of(head_tile + depth - 1) - head + 1, run - head};
  }

  constexpr bool operator==(const Partition&) const = default;

  static constexpr int64_t quotient(int64_t a, int64_t b) {
    const bool fit = (static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 == 0;
    return fit ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }
};

// What the run with most to do has to do: tiles, segments, and how many runs share its last slice.
struct BusiestRun {
  int64_t tiles;
  int64_t segments;
  int sharers;

  constexpr bool operator==(const BusiestRun&) const = default;
};

constexpr BusiestRun busiest_run(const Partition& partition) {
  const int64_t whole = partition.dealt / partition.runs;
  const int left = static_cast<int>(partition.slices - partition.dealt);
  const int64_t tiles = whole * partition.depth;
  if (left == 0) return {tiles, whole, 1};
  const bool even = partition.line_runs % left == 0;
  return {tiles + partition.run_tiles + (partition.left > 0 ? 1 : 0), whole + (even ? 1 : 2),
          (partition.line_runs + left - 1) / left};
}

// Walks over the segments of a run:  for (SegmentWalk walk(p, run); walk; walk.next()) *walk ...
class SegmentWalk {
 public:
  // `partition` must outlive the walk. It begins one step before the first slice, with nothing.
  constexpr SegmentWalk(const Partition& partition, int run)
      : partition_(partition), segment_{run - partition.runs, 0, 0} {
    next();
  }

  constexpr explicit operator bool() const { return segment_.last > 0; }
  constexpr const Segment& operator*() const { return segment_; }
  constexpr const Segment* operator->() const { return &segment_; }

  // Written so that kernels whose registers are all in use need none for it beyond the members.
  constexpr void next() {
    const int slice = segment_.slice;
    if (slice + partition_.runs < partition_.dealt) {
      segment_ = {slice + partition_.runs, 0, partition_.depth};
      return;
    }
    int first = 0;
    segment_.slice = slice + 1;
    if (slice < partition_.dealt) {  // on to the line
      const int run = slice + partition_.runs - partition_.dealt;
      const int begin = partition_.line_begin(run);
      left_ = partition_.line_begin(run + 1) - begin;
      segment_.slice = partition_.dealt + begin / partition_.depth;
      first = begin % partition_.depth;
    }
    const int in_slice = partition_.depth - first;
    const int tiles = left_ < in_slice ? left_ : in_slice;
    segment_.first = first;
    segment_.last = tiles == 0 ? 0 : first + tiles;  // 0: there is none
    left_ -= tiles;
  }

 private:
  const Partition& partition_;
  int left_ = 0;  // tiles of the line after this segment
  Segment segment_;
};

// Walks over the tiles of a run that belong to one of `groups` groups of warps, which take the
// tiles of every segment in turn.
class TileWalk {
 public:
  constexpr TileWalk(const Partition& partition, int run, int group, int groups)
      : segments_(partition, run), group_(group), groups_(groups) {
    tile_ = segments_->first + group_;
    skip_finished_segments();
  }

  constexpr explicit operator bool() const { return static_cast<bool>(segments_); }
  constexpr int64_t slice() const { return segments_->slice; }
  constexpr int tile() const { return tile_; }  // along k

  // Returns whether the next tile is in the same slice, `groups` further along k.
  constexpr bool next() {
    tile_ += groups_;
    if (tile_ < segments_->last) return true;
    skip_finished_segments();
    return false;
  }

 private:
  constexpr void skip_finished_segments() {
    while (segments_ && tile_ >= segments_->last) {
      segments_.next();
      tile_ = segments_->first + group_;
    }
  }

  SegmentWalk segments_;
  int group_;
  int groups_;
  int tile_ = 0;
};

}  // namespace marlin
