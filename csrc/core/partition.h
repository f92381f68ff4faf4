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

// The part of a slice that one run covers.
struct Segment {
  int64_t slice;
  int first;         // tiles [first, last) of the slice
  int last;
  int contributors;  // runs that touch the slice
  int order;         // this run's place among them; 0 owns the slice

  constexpr bool owner() const { return order == 0; }
  constexpr bool shared() const { return contributors > 1; }
  constexpr bool operator==(const Segment&) const = default;
};

struct Partition {
  int64_t slices;
  int depth;  // tiles per slice
  int runs;

  constexpr int64_t tiles() const { return slices * depth; }
  constexpr int64_t run_begin(int run) const { return tiles() * run / runs; }

  // The run that holds a tile of the line: the last one that begins at or before it.
  constexpr int run_of(int64_t tile) const {
    return static_cast<int>(((tile + 1) * runs - 1) / tiles());
  }

  // The segment of `run` that starts at `tile`, which must lie in the run.
  constexpr Segment segment_at(int run, int64_t tile) const {
    const int64_t slice = tile / depth, begin = slice * depth;
    const int64_t end = run_begin(run + 1) - begin;
    const int head = run_of(begin);
    return {slice, static_cast<int>(tile - begin), static_cast<int>(end < depth ? end : depth),
            run_of(begin + depth - 1) - head + 1, run - head};
  }

  constexpr bool operator==(const Partition&) const = default;
};

// Walks over the segments of a run:  for (SegmentWalk walk(p, run); walk; walk.next()) *walk ...
class SegmentWalk {
 public:
  constexpr SegmentWalk(const Partition& partition, int run)
      : partition_(partition),
        run_(run),
        tile_(partition.run_begin(run)),
        end_(partition.run_begin(run + 1)) {
    seek();
  }

  constexpr explicit operator bool() const { return tile_ < end_; }
  constexpr const Segment& operator*() const { return segment_; }
  constexpr const Segment* operator->() const { return &segment_; }

  constexpr void next() {
    tile_ += segment_.last - segment_.first;
    seek();
  }

 private:
  constexpr void seek() {
    if (tile_ < end_) segment_ = partition_.segment_at(run_, tile_);
  }

  Partition partition_;
  int run_;
  int64_t tile_;
  int64_t end_;
  Segment segment_{};
};

// Walks over the tiles of a run that belong to one of `groups` groups of warps, which take the
// tiles of every segment in turn.
class TileWalk {
 public:
  constexpr TileWalk(const Partition& partition, int run, int group, int groups)
      : segments_(partition, run), group_(group), groups_(groups) {
    if (segments_) tile_ = segments_->first + group_;
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
      if (segments_) tile_ = segments_->first + group_;
    }
  }

  SegmentWalk segments_;
  int group_;
  int groups_;
  int tile_ = 0;
};

}  // namespace marlin
