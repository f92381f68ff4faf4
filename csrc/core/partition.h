// Who computes what: an equal share of the tiles for every CTA, whatever the shape.
//
// The output is cut into slices (a strip of columns by a tile of rows); each slice is `depth` tiles
// long along k. The tiles of all slices form one line, slice after slice, which is cut into `runs`
// equal pieces. A CTA takes one run: it walks down a slice and on into the next.
//
//   slice        0            1            2
//   tiles   [ . . . . . ][ . . . . . ][ . . . . . ]
//   runs    [  0   ][  1    ][  2   ][   3        ]
//
// A slice that several runs touch needs their sums added: the run that holds the slice's head owns
// it and adds the others' partial sums in the order of the runs. Every run has at most one segment
// that it does not own (its first), and at most one slice that it owns and shares (its last): one
// buffer and one counter per run suffice. With runs = slices * s this is an even split by s.
#pragma once

#include <cstdint>

namespace marlin {

// The part of a slice that one run covers: tiles [first, last) of the slice.
struct Segment {
  int64_t slice = 0;
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

struct Partition {
  int64_t slices;
  int depth;  // tiles per slice
  int runs;
  int64_t run_tiles;  // of every run, before what is left is shared out
  int left;

  constexpr Partition(int64_t slices, int depth, int runs)
      : slices(slices),
        depth(depth),
        runs(runs),
        run_tiles(slices * depth / runs),
        left(static_cast<int>(slices * depth % runs)) {}

  constexpr int64_t tiles() const { return slices * depth; }

  // tiles() · run / runs, rounded down.
  constexpr int64_t run_begin(int run) const {
    return run * run_tiles + quotient(int64_t{run} * left, runs);
  }

  // The run that holds a tile of the line: the last one that begins at or before it.
  constexpr int run_of(int64_t tile) const {
    return static_cast<int>(quotient((tile + 1) * runs - 1, tiles()));
  }

  constexpr Sharing sharing(int run, int64_t slice) const {
    const int head = run_of(slice * depth);
    return {run_of(slice * depth + depth - 1) - head + 1, run - head};
  }

  constexpr bool operator==(const Partition&) const = default;

  // GPUs divide 64-bit numbers slowly, and hardly any line is that long.
  static constexpr int64_t quotient(int64_t a, int64_t b) {
    const bool fit = (static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 == 0;
    return fit ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }
};

// Walks over the segments of a run:  for (SegmentWalk walk(p, run); walk; walk.next()) *walk ...
class SegmentWalk {
 public:
  constexpr SegmentWalk(const Partition& partition, int run) : depth_(partition.depth), left_(0) {
    const int64_t begin = partition.run_begin(run);
    left_ = static_cast<int>(partition.run_begin(run + 1) - begin);
    segment_.slice = Partition::quotient(begin, depth_);
    segment_.first = static_cast<int>(begin - segment_.slice * depth_);
    segment_.last = end_of(segment_.first);
  }

  constexpr explicit operator bool() const { return left_ > 0; }
  constexpr const Segment& operator*() const { return segment_; }
  constexpr const Segment* operator->() const { return &segment_; }

  constexpr void next() {
    left_ -= segment_.last - segment_.first;
    segment_ = {segment_.slice + 1, 0, end_of(0)};
  }

 private:
  constexpr int end_of(int first) const { return left_ < depth_ - first ? first + left_ : depth_; }

  int depth_;
  int left_;  // tiles of the run from this segment on
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
